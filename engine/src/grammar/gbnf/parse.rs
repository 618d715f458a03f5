//! Reading GBNF.
//!
//! The notation is that of llama.cpp's `grammars/README.md`: rules `name ::= …`, literals, character classes, `.`, groups, `|`,
//! `* + ? {m} {m,} {m,n}`, and comments. A rule ends with its line, except inside parentheses and beside `|`.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use super::{Gbnf, Id, Node, Problem, Rule};

/// Longest text, in bytes.
const MAX_TEXT: usize = 256 << 10;
/// Most nodes.
const MAX_NODES: usize = 100_000;
/// Most rules: the constraint engine follows them one inside the other.
const MAX_RULES: usize = 4096;
/// Deepest nesting of parentheses.
const MAX_DEPTH: usize = 100;
/// Most repetitions that a pair of braces can ask for, llama.cpp's own limit.
const MAX_REPEAT: u32 = 2000;

const HINT: &str = "a grammar is written as for llama.cpp: root ::= (\"yes\" | \"no\") \"\\n\"?";
const HINT_LIMIT: &str = "a smaller grammar is faster as well";

/// Reads a grammar and checks that it makes sense.
pub(super) fn parse(text: &str) -> Result<Gbnf, Problem> {
    let mut p = Parser {
        text,
        at: 0,
        depth: 0,
        g: Gbnf::default(),
        names: HashMap::new(),
    };
    if text.len() > MAX_TEXT {
        return Err(Problem {
            what: format!(
                "{} bytes of grammar, expected at most {MAX_TEXT}",
                text.len()
            ),
            hint: HINT_LIMIT,
        });
    }
    p.space(true);
    while p.peek().is_some() {
        p.rule()?;
    }
    p.finish()
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    depth: usize,
    g: Gbnf,
    names: HashMap<&'t str, usize>,
}

impl<'t> Parser<'t> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn bump(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, what: &str) -> bool {
        let found = self.text[self.at..].starts_with(what);
        if found {
            self.at += what.len();
        }
        found
    }

    /// Skips blanks and comments, line ends too if `lines`.
    fn space(&mut self, lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' => {}
                '\r' | '\n' if lines => {}
                '#' => {
                    let rest = &self.text[self.at..];
                    self.at += rest.find(['\r', '\n']).unwrap_or(rest.len());
                    continue;
                }
                _ => return,
            }
            self.at += 1;
        }
    }

    fn problem(&self, at: usize, found: &str, expected: &str) -> Problem {
        self.problem_hint(at, found, expected, HINT)
    }

    fn problem_hint(&self, at: usize, found: &str, expected: &str, hint: &'static str) -> Problem {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        Problem {
            what: format!("line {line}, column {column}: {found}, expected {expected}"),
            hint,
        }
    }

    /// What stands at the present place, for an error.
    fn here(&self) -> String {
        match self.peek() {
            None => "the end of the grammar".to_owned(),
            Some('\n' | '\r') => "the end of the line".to_owned(),
            Some(c) => format!("{c:?}"),
        }
    }

    fn expected(&self, what: &str) -> Problem {
        self.problem(self.at, &self.here(), what)
    }

    fn node(&mut self, node: Node) -> Result<Id, Problem> {
        if self.g.nodes.len() == MAX_NODES {
            let expected = format!("at most {MAX_NODES} of them");
            return Err(self.problem_hint(self.at, "too many parts", &expected, HINT_LIMIT));
        }
        self.g.nodes.push(node);
        Ok(self.g.nodes.len() - 1)
    }

    fn name(&mut self) -> Result<&'t str, Problem> {
        let rest = &self.text[self.at..];
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'))
            .unwrap_or(rest.len());
        if end == 0 {
            return Err(self.expected("the name of a rule"));
        }
        self.at += end;
        Ok(&rest[..end])
    }

    /// Index of a rule by its name.
    fn rule_id(&mut self, name: &'t str, at: usize) -> Result<usize, Problem> {
        if let Some(&id) = self.names.get(name) {
            return Ok(id);
        }
        if self.g.rules.len() == MAX_RULES {
            let expected = format!("at most {MAX_RULES} of them");
            return Err(self.problem_hint(at, "too many rules", &expected, HINT_LIMIT));
        }
        self.g.rules.push(Rule {
            name: name.to_owned(),
            body: None,
            at,
        });
        self.names.insert(name, self.g.rules.len() - 1);
        Ok(self.g.rules.len() - 1)
    }

    fn rule(&mut self) -> Result<(), Problem> {
        let start = self.at;
        let name = self.name()?;
        self.space(false);
        if !self.eat("::=") {
            return Err(self.expected("::= after the name of a rule"));
        }
        self.space(true);
        let body = self.alternatives(false)?;
        if !matches!(self.peek(), None | Some('\n' | '\r')) {
            return Err(self.expected("the end of the rule"));
        }
        self.space(true);
        let id = self.rule_id(name, start)?;
        if self.g.rules[id].body.is_some() {
            let found = format!("a second rule named {name}");
            return Err(self.problem(start, &found, "another name"));
        }
        self.g.rules[id].body = Some(body);
        self.g.rules[id].at = start;
        Ok(())
    }

    fn alternatives(&mut self, nested: bool) -> Result<Id, Problem> {
        let mut list = vec![self.sequence(nested)?];
        loop {
            // An alternative may stand on the next line.
            let before = self.at;
            self.space(true);
            if !self.eat("|") {
                self.at = before;
                break;
            }
            self.space(true);
            list.push(self.sequence(nested)?);
        }
        match list[..] {
            [one] => Ok(one),
            _ => self.node(Node::Alt(list)),
        }
    }

    fn sequence(&mut self, nested: bool) -> Result<Id, Problem> {
        let mut list = Vec::new();
        loop {
            let start = self.at;
            let Some(c) = self.peek() else { break };
            let item = match c {
                '"' => self.literal()?,
                '[' => self.class()?,
                '(' => self.group()?,
                '.' => {
                    self.at += 1;
                    self.node(Node::Chars(vec!['\0'..=char::MAX]))?
                }
                '<' | '!' => {
                    return Err(self.problem_hint(
                        start,
                        &format!("{c:?}, which begins a token"),
                        "characters",
                        "tokens (<name>, <[id]>) are not supported; write what they stand for as a literal",
                    ));
                }
                c if c.is_ascii_alphanumeric() || c == '_' || c == '-' => {
                    let name = self.name()?;
                    let rule = self.rule_id(name, start)?;
                    self.node(Node::Ref(rule))?
                }
                '*' | '+' | '?' | '{' => {
                    return Err(self.expected("something to repeat before it"));
                }
                _ => break,
            };
            self.space(nested);
            list.push(self.repeats(item, nested)?);
        }
        match list[..] {
            [one] => Ok(one),
            _ => self.node(Node::Seq(list)),
        }
    }

    fn repeats(&mut self, mut item: Id, nested: bool) -> Result<Id, Problem> {
        loop {
            let start = self.at;
            let (min, max) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => self.braces()?,
                _ => return Ok(item),
            };
            self.at += 1;
            if max.is_some_and(|max| max < min) {
                return Err(self.problem(
                    start,
                    "a maximum below the minimum",
                    "{m,n} with m <= n",
                ));
            }
            item = self.node(Node::Repeat(item, min, max))?;
            self.space(nested);
        }
    }

    /// `{m}`, `{m,}`, `{,n}` or `{m,n}`, up to the closing brace.
    fn braces(&mut self) -> Result<(u32, Option<u32>), Problem> {
        self.at += 1;
        self.space(false);
        let min = self.count()?;
        self.space(false);
        let bounds = if self.eat(",") {
            self.space(false);
            let max = self.count()?;
            self.space(false);
            (min.unwrap_or(0), max)
        } else {
            let n = min.ok_or_else(|| self.expected("a number of repetitions"))?;
            (n, Some(n))
        };
        match self.peek() {
            Some('}') => Ok(bounds),
            _ => Err(self.expected("}")),
        }
    }

    fn count(&mut self) -> Result<Option<u32>, Problem> {
        let rest = &self.text[self.at..];
        let end = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        if end == 0 {
            return Ok(None);
        }
        let n = rest[..end].parse().ok().filter(|&n| n <= MAX_REPEAT);
        if n.is_none() {
            let expected = format!("at most {MAX_REPEAT}");
            return Err(self.problem(self.at, "too many repetitions", &expected));
        }
        self.at += end;
        Ok(n)
    }

    fn group(&mut self) -> Result<Id, Problem> {
        let start = self.at;
        if self.depth == MAX_DEPTH {
            let expected = format!("at most {MAX_DEPTH} parentheses one inside the other");
            return Err(self.problem_hint(start, "a parenthesis", &expected, HINT_LIMIT));
        }
        self.depth += 1;
        self.at += 1;
        self.space(true);
        let inner = self.alternatives(true)?;
        self.depth -= 1;
        if !self.eat(")") {
            return Err(self.expected(") of the parenthesis"));
        }
        Ok(inner)
    }

    fn literal(&mut self) -> Result<Id, Problem> {
        let start = self.at;
        self.at += 1;
        let mut list = Vec::new();
        loop {
            match self.peek() {
                Some('"') => break,
                None | Some('\n' | '\r') => {
                    return Err(self.problem(start, "a literal without an end", "\""));
                }
                Some(_) => {
                    let c = self.character()?;
                    list.push(self.node(Node::Chars(vec![c..=c]))?);
                }
            }
        }
        self.at += 1;
        match list[..] {
            [one] => Ok(one),
            _ => self.node(Node::Seq(list)),
        }
    }

    fn class(&mut self) -> Result<Id, Problem> {
        let start = self.at;
        self.at += 1;
        let negated = self.eat("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                Some(']') => break,
                None | Some('\n' | '\r') => {
                    return Err(self.problem(start, "a character class without an end", "]"));
                }
                Some(_) => {}
            }
            let at = self.at;
            let low = self.character()?;
            // A dash before the bracket is a dash.
            let rest = &self.text[self.at..];
            let high = if rest.starts_with('-') && !rest.starts_with("-]") {
                self.at += 1;
                if matches!(self.peek(), None | Some('\n' | '\r')) {
                    return Err(self.problem(start, "a character class without an end", "]"));
                }
                self.character()?
            } else {
                low
            };
            if low > high {
                let found = format!("the range {low:?} to {high:?}");
                return Err(self.problem(at, &found, "the lower end first"));
            }
            ranges.push(low..=high);
        }
        self.at += 1;
        let ranges = if negated {
            complement(merged(ranges))
        } else {
            merged(ranges)
        };
        if ranges.is_empty() {
            return Err(self.problem(
                start,
                "a character class of nothing",
                "at least one character",
            ));
        }
        self.node(Node::Chars(ranges))
    }

    /// One character, escaped or not.
    fn character(&mut self) -> Result<char, Problem> {
        let start = self.at;
        let c = self.bump().ok_or_else(|| self.expected("a character"))?;
        if c != '\\' {
            return Ok(c);
        }
        let digits = match self.bump() {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some('t') => return Ok('\t'),
            Some('r') => return Ok('\r'),
            Some('n') => return Ok('\n'),
            Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^' | '/')) => return Ok(c),
            _ => {
                return Err(self.problem(
                    start,
                    "an unknown escape",
                    r#"one of \n \r \t \\ \" \[ \] \x41 \u0041 \U00000041"#,
                ));
            }
        };
        let hex = self
            .text
            .get(self.at..self.at + digits)
            .filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|h| u32::from_str_radix(h, 16).ok());
        let Some(code) = hex else {
            let expected = format!("{digits} hexadecimal digits");
            return Err(self.problem(start, "an incomplete escape", &expected));
        };
        self.at += digits;
        char::from_u32(code)
            .ok_or_else(|| self.problem(start, &format!("\\U{code:08x}"), "a Unicode character"))
    }

    /// Checks the rules as a whole.
    fn finish(mut self) -> Result<Gbnf, Problem> {
        if let Some(rule) = self.g.rules.iter().find(|r| r.body.is_none()) {
            let found = format!("{}, which has no rule", rule.name);
            let expected = format!("a rule {} ::= …", rule.name);
            return Err(self.problem(rule.at, &found, &expected));
        }
        let Some(&root) = self.names.get("root") else {
            return Err(Problem {
                what: "no rule named root, expected one: it is what the whole answer is".to_owned(),
                hint: HINT,
            });
        };
        self.g.root = root;
        if let Some(rule) = endless(&self.g) {
            let rule = &self.g.rules[rule];
            return Err(self.problem_hint(
                rule.at,
                &format!("{}, which can never end", rule.name),
                "an alternative that does not lead back to it",
                "a recursive rule needs a way out: list ::= item | item \",\" list",
            ));
        }
        Ok(self.g)
    }
}

/// A rule that has no finite text, if there is one.
fn endless(g: &Gbnf) -> Option<usize> {
    let mut ends = vec![false; g.nodes.len()];
    let mut who_waits: Vec<Vec<Id>> = vec![Vec::new(); g.nodes.len()];
    for id in 0..g.nodes.len() {
        for child in g.children(id) {
            who_waits[child].push(id);
        }
    }
    let can_end = |ends: &[bool], id: Id| match &g.nodes[id] {
        Node::Chars(_) => true,
        Node::Ref(rule) => ends[g.body(*rule)],
        Node::Seq(list) => list.iter().all(|&c| ends[c]),
        Node::Alt(list) => list.iter().any(|&c| ends[c]),
        Node::Repeat(child, min, _) => *min == 0 || ends[*child],
    };
    let mut todo: Vec<Id> = (0..g.nodes.len()).collect();
    while let Some(id) = todo.pop() {
        if !ends[id] && can_end(&ends, id) {
            ends[id] = true;
            todo.extend(&who_waits[id]);
        }
    }
    (0..g.rules.len()).find(|&r| !ends[g.body(r)])
}

/// Sorted, and those that touch made one.
fn merged(mut ranges: Vec<RangeInclusive<char>>) -> Vec<RangeInclusive<char>> {
    ranges.sort_by_key(|r| (*r.start(), *r.end()));
    let mut out: Vec<RangeInclusive<char>> = Vec::new();
    for r in ranges {
        match out.last_mut() {
            Some(last) if *r.start() <= *last.end() || next(*last.end()) == Some(*r.start()) => {
                *last = *last.start()..=(*last.end()).max(*r.end());
            }
            _ => out.push(r),
        }
    }
    out
}

/// All characters but these.
fn complement(ranges: Vec<RangeInclusive<char>>) -> Vec<RangeInclusive<char>> {
    let mut out = Vec::new();
    let mut low = Some('\0');
    for r in ranges {
        if let (Some(low), Some(high)) = (low, previous(*r.start()))
            && low <= high
        {
            out.push(low..=high);
        }
        low = next(*r.end());
    }
    out.extend(low.map(|low| low..=char::MAX));
    out
}

fn next(c: char) -> Option<char> {
    (c..=char::MAX).nth(1)
}

fn previous(c: char) -> Option<char> {
    ('\0'..c).next_back()
}
