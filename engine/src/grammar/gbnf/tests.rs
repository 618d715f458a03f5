//! What is read, what is refused, and what becomes a lexeme.

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::ApproximateTokEnv;
use llguidance::{Matcher, ParserFactory};

use super::{Gbnf, Node, lark, lexemes, parse, to_lark};

/// llama.cpp's grammar for JSON, in our words: recursive, with strings and numbers that must be lexemes.
const JSON: &str = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn grammars_that_people_write_are_read() {
    for text in [
        JSON,
        r#"root ::= "yes" | "no""#,
        r#"root ::= ("yes" | "no") "\n"?"#,
        "root ::= \"a\"\n",
        "\n# nothing\nroot ::= #comment\n \"a\" # more\n\n",
        "root ::= \"a\" |\n  \"b\"",
        "root ::= \"a\"\n  | \"b\"\r\nother ::= [a-z]",
        "root ::= (\n\"a\"\n\"b\"\n)",
        "root ::= [a-zA-Z_] [a-zA-Z0-9_]* \"=\" [^\\n]+",
        r#"root ::= [\u4E00-\u9FFF\U0001F600-\U0001F64F] "\x41\u0042""#,
        "root ::= [-+a] [a-] [\\]\\[^]",
        "root ::= .*",
        "root ::= a-b_C1\na-b_C1 ::= \"x\"{2} \"y\"{1,} \"z\"{0,3} \"w\"{,2} \"v\"{0}",
        "root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | \"(\" expr \")\"",
        "root ::= root \"a\" | \"b\"",
        "root ::= \"a\"*+?",
        "root ::= \"\"",
        "root ::=",
    ] {
        if let Err(p) = to_lark(text) {
            panic!("{text}: {}", p.what);
        }
    }
}

#[test]
fn mistakes_are_told_with_their_place() {
    for (text, what) in [
        (
            "",
            "no rule named root, expected one: it is what the whole answer is",
        ),
        ("a ::= \"x\"", "no rule named root"),
        (
            "root ::= \"a",
            "line 1, column 10: a literal without an end, expected \"",
        ),
        (
            "root ::= [a-z",
            "line 1, column 10: a character class without an end",
        ),
        (
            "root ::= []",
            "line 1, column 10: a character class of nothing",
        ),
        (
            "root ::= [z-a]",
            "line 1, column 11: the range 'z' to 'a', expected the lower end first",
        ),
        (
            "root ::= (\"a\"",
            "the end of the grammar, expected ) of the parenthesis",
        ),
        (
            "root ::= \"a\")",
            "line 1, column 13: ')', expected the end of the rule",
        ),
        (
            "root ::= *",
            "line 1, column 10: '*', expected something to repeat before it",
        ),
        ("root ::= \"a\"{3,1}", "a maximum below the minimum"),
        ("root ::= \"a\"{}", "'}', expected a number of repetitions"),
        ("root ::= \"a\"{1", "the end of the grammar, expected }"),
        (
            "root ::= \"a\"{99999}",
            "too many repetitions, expected at most 2000",
        ),
        (
            "root ::= \"a\"{99999999999999999999}",
            "too many repetitions",
        ),
        ("root ::= \"\\q\"", "line 1, column 11: an unknown escape"),
        (
            "root ::= \"\\u12\"",
            "an incomplete escape, expected 4 hexadecimal digits",
        ),
        ("root ::= \"\\uD800\"", "expected a Unicode character"),
        (
            "root ::= a\n\nb ::= \"x\"",
            "line 1, column 10: a, which has no rule",
        ),
        ("root = \"a\"", "line 1, column 6: '=', expected ::="),
        (
            "root ::= \"a\"\nroot ::= \"b\"",
            "line 2, column 1: a second rule named root",
        ),
        ("root ::= <think>", "'<', which begins a token"),
        ("root ::= !<[7]>", "'!', which begins a token"),
        (
            "root ::= \"a\" root",
            "line 1, column 1: root, which can never end",
        ),
        (
            "root ::= \"a\" | b\nb ::= c\nc ::= b",
            "which can never end",
        ),
        (
            "root ::= \"ä\" §",
            "line 1, column 14: '§', expected the end of the rule",
        ),
    ] {
        let p = to_lark(text).expect_err(text);
        assert!(p.what.contains(what), "{text}: {}", p.what);
        assert!(!p.what.contains('\n') && !p.hint.is_empty());
    }
}

#[test]
fn hostile_grammars_are_refused_at_once() {
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(5000), ")".repeat(5000));
    assert!(to_lark(&deep).unwrap_err().what.contains("at most 100"));
    let long = format!("root ::= \"{}\"", "a".repeat(300 << 10));
    assert!(
        to_lark(&long)
            .unwrap_err()
            .what
            .contains("bytes of grammar")
    );
    let many: String = (0..5000).map(|i| format!("r{i} ::= \"a\"\n")).collect();
    assert!(to_lark(&many).unwrap_err().what.contains("too many rules"));
    let nodes = format!("root ::= {}", "[a]".repeat(85_000));
    assert!(to_lark(&nodes).is_ok());
    let nodes = format!("root ::= {}", "a ".repeat(120_000));
    assert!(to_lark(&nodes).unwrap_err().what.contains("too many parts"));
}

/// How many lexemes of more than one character a grammar has, and whether its root is one.
fn lexemes_of(text: &str) -> (usize, bool) {
    let g = parse::parse(text).unwrap();
    let lexeme = lexemes::find(&g);
    let mut root = g.body(g.root);
    while let Node::Ref(rule) = g.nodes[root] {
        root = g.body(rule);
    }
    let long = (0..lexeme.len()).filter(|&i| lexeme[i] && !matches!(g.nodes[i], Node::Chars(_)));
    (long.count(), lexeme[root])
}

#[test]
fn what_has_no_recursion_is_one_lexeme() {
    assert_eq!(
        lexemes_of(
            r#"root ::= ("yes" | "no") ws
ws ::= [ \n]*"#
        ),
        (1, true)
    );
    assert_eq!(lexemes_of(r#"root ::= [0-9]+ [0-9]"#), (1, true));
}

#[test]
fn strings_and_numbers_of_json_are_lexemes() {
    let g = parse::parse(JSON).unwrap();
    let lexeme = lexemes::find(&g);
    for name in ["string", "number", "ws"] {
        let rule = g.rules.iter().find(|r| r.name == name).unwrap();
        assert!(lexeme[rule.body.unwrap()], "{name}");
    }
}

#[test]
fn what_greed_would_break_is_taken_apart() {
    // After "fo" a greedy lexer would wait for "foo" for ever.
    let text = "root ::= (\"foo\" | [a-z] [a-z]) \"x\" root | \"!\"";
    assert_eq!(lexemes_of(text).0, 0);
    // The digits would take the last one too.
    assert_eq!(lexemes_of("root ::= [0-9]+ [0-9] root | \"!\"").0, 0);
    // Bytes, not characters, decide: both letters begin alike.
    assert_eq!(lexemes_of("root ::= \"é\"+ \"è\" root | \"!\"").0, 0);
    assert_eq!(lexemes_of("root ::= [0-9]+ \",\" root | \"!\"").0, 1);
}

/// A parser over single bytes for a grammar of which these nodes are lexemes.
fn parser(g: &Gbnf, lexeme: &[bool]) -> Matcher {
    let env = ApproximateTokEnv::single_byte_env();
    let mut factory = ParserFactory::new_simple(&env).unwrap();
    factory.quiet();
    let grammar = TopLevelGrammar::from_lark(lark::write(g, lexeme));
    Matcher::new(factory.create_parser(grammar))
}

/// All texts over `letters` up to a length that are in the language.
fn language(start: &Matcher, letters: &[u8], longest: usize) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut todo = vec![Vec::new()];
    while let Some(text) = todo.pop() {
        let mut m = start.deep_clone();
        let ids: Vec<u32> = text.iter().map(|&b| u32::from(b)).collect();
        if m.try_consume_tokens(&ids).ok() != Some(ids.len()) {
            continue;
        }
        if m.is_accepting().unwrap_or(false) {
            found.push(text.clone());
        }
        if text.len() < longest {
            todo.extend(letters.iter().map(|&b| [&text[..], &[b]].concat()));
        }
    }
    found.sort();
    found
}

/// A random expression over a, b and é, and rules that may lead to each other.
fn expression(random: &mut impl FnMut(usize) -> usize, depth: usize) -> String {
    const LEAVES: &[&str] = &[
        "\"a\"", "\"b\"", "\"ab\"", "[ab]", "\"é\"", "[éè]", "[^b]", "x", "y", "z", "\"\"",
        "\"aab\"",
    ];
    let leaf = |random: &mut dyn FnMut(usize) -> usize| LEAVES[random(LEAVES.len())].to_owned();
    if depth == 0 {
        return leaf(random);
    }
    match random(6) {
        0 => leaf(random),
        1 | 2 => format!(
            "{} {}",
            expression(random, depth - 1),
            expression(random, depth - 1)
        ),
        3 | 4 => format!(
            "({} | {})",
            expression(random, depth - 1),
            expression(random, depth - 1)
        ),
        _ => {
            let op = ["*", "+", "?", "{2}", "{1,2}"][random(5)];
            format!("({}){op}", expression(random, depth - 1))
        }
    }
}

#[test]
fn lexemes_do_not_change_the_language() {
    let mut state = 7_u64;
    let mut random = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % n
    };
    let (mut compared, mut with_lexemes) = (0, 0);
    while compared < 150 {
        let text = format!(
            "root ::= {}\nx ::= {}\ny ::= \"a\" | \"b\" x \"é\"\nz ::= {}\n",
            expression(&mut random, 3),
            expression(&mut random, 2),
            expression(&mut random, 1),
        );
        let Ok(g) = parse::parse(&text) else { continue };
        let single: Vec<bool> = g
            .nodes
            .iter()
            .map(|n| matches!(n, Node::Chars(_)))
            .collect();
        let lexeme = lexemes::find(&g);
        with_lexemes += usize::from(lexeme != single);
        let letters = [b'a', b'b', 0xc3, 0xa9, 0xa8];
        let [fast, exact] = [&lexeme, &single].map(|l| language(&parser(&g, l), &letters, 5));
        assert_eq!(fast, exact, "{text}");
        compared += 1;
    }
    assert!(with_lexemes > 50, "{with_lexemes}");
}
