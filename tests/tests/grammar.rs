//! Answers under grammars and schemas. Models of random weights obey nothing but the mask, which makes them the strictest test.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use lemma_engine::conversation::{Conversation, PromptOptions};
use lemma_engine::error::Error;
use lemma_engine::generate::{Finish, GenOptions, Outcome, Prompt, generate};
use lemma_engine::grammar::{Grammar, GrammarSource};
use lemma_engine::model::Model;
use lemma_engine::options::LoadOptions;
use lemma_engine::sampling::{Sampler, SamplerParams};
use lemma_engine::session::Session;
use serde_json::Value;

fn load(file: &str) -> Arc<Model> {
    let o = LoadOptions {
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    Arc::new(Model::load(&path, &o).unwrap())
}

/// One with byte tokens and SentencePiece, one with byte-level BPE.
fn random_models() -> [Arc<Model>; 2] {
    ["data/arch/llama-mha.gguf", "data/arch/qwen3-tied.gguf"].map(load)
}

fn gbnf(text: &str) -> GrammarSource {
    GrammarSource::Gbnf(text.to_owned())
}

fn json_schema(text: &str) -> GrammarSource {
    GrammarSource::JsonSchema(text.to_owned())
}

fn sampler(model: &Model, seed: u64, temp: f32) -> Sampler {
    let params = SamplerParams {
        temp,
        seed: Some(seed),
        min_p: 0.0,
        top_p: 1.0,
        ..SamplerParams::default()
    };
    Sampler::new(params, model.hparams().n_vocab, |_| Vec::new()).unwrap()
}

/// Continues a text under a grammar.
fn answer(model: &Arc<Model>, grammar: &Grammar, seed: u64, n: usize) -> Result<Outcome, Error> {
    let o = LoadOptions {
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    let mut session = Session::new(model.clone(), &o)?;
    let g = GenOptions {
        n_predict: Some(n),
        grammar: Some(grammar.clone()),
        ..GenOptions::default()
    };
    let prompt = Prompt::raw(model.tokenizer(), "x", false);
    // Some seeds at a temperature that makes nearly all tokens alike, some greedy.
    let temp = [20.0, 0.0, 0.8][seed as usize % 3];
    let go_on = &mut |_: lemma_engine::generate::Event<'_>| ControlFlow::Continue(());
    generate(
        &mut session,
        &prompt,
        0,
        &mut sampler(model, seed, temp),
        None,
        &g,
        go_on,
    )
}

#[test]
fn yes_or_no_is_one_of_both() {
    let mut seen = std::collections::BTreeSet::new();
    for model in random_models() {
        let grammar = Grammar::compile(&model, &gbnf(r#"root ::= ("yes" | "no")"#)).unwrap();
        for seed in 0..12 {
            let o = answer(&model, &grammar, seed, 50).unwrap();
            assert_eq!(o.finish, Finish::Eos, "{}", o.text);
            seen.insert(o.text);
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["no", "yes"]);
}

#[test]
fn json_under_a_schema_parses_and_fits_it() {
    let schema = r##"{
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b", null]}, "minItems": 1, "maxItems": 3},
            "inner": {"$ref": "#/$defs/inner"}
        },
        "required": ["name", "age", "tags", "inner"],
        "$defs": {"inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}}
    }"##;
    for model in random_models() {
        let grammar = Grammar::compile(&model, &json_schema(schema)).unwrap();
        for seed in 0..9 {
            let o = answer(&model, &grammar, seed, 600).unwrap();
            assert_eq!(o.finish, Finish::Eos, "{}", o.text);
            let v: Value =
                serde_json::from_str(&o.text).unwrap_or_else(|e| panic!("{e}: {}", o.text));
            let keys: Vec<&str> = v.as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(keys, ["name", "age", "tags", "inner"], "{}", o.text);
            let name = v["name"].as_str().unwrap().chars().count();
            assert!((1..=8).contains(&name), "{}", o.text);
            assert!(v["age"].as_u64().unwrap() <= 120, "{}", o.text);
            let tags = v["tags"].as_array().unwrap();
            assert!((1..=3).contains(&tags.len()), "{}", o.text);
            assert!(
                tags.iter().all(|t| t.is_null() || t == "a" || t == "b"),
                "{}",
                o.text
            );
            assert!(v["inner"]["ok"].is_boolean(), "{}", o.text);
        }
    }
}

/// What the grammar of a recursive language, read as lexemes and character by character, lets through.
#[test]
fn recursive_grammars_are_kept() {
    let sum = "root ::= sum \";\"\nsum ::= term ([-+*] term)*\nterm ::= [1-9] [0-9]{0,2} | \"(\" sum \")\"";
    // Greedy lexemes would lose "ab" + "c" here.
    let pairs = "root ::= pair{3} \"!\"\npair ::= \"abc\" | [a-c] [a-c] | \"[\" pair \"]\"";
    for model in random_models() {
        let compile = |text| Grammar::compile(&model, &gbnf(text)).unwrap();
        let (sum, pairs) = (compile(sum), compile(pairs));
        for seed in 0..9 {
            let o = answer(&model, &sum, seed, 400).unwrap();
            if o.finish == Finish::Eos {
                let text = o.text.strip_suffix(';').expect(&o.text);
                let open = text.matches('(').count();
                assert_eq!(open, text.matches(')').count(), "{text}");
                assert!(!text.is_empty() && !text.contains("()"), "{text}");
            }
            let o = answer(&model, &pairs, seed, 400).unwrap();
            assert!(
                o.finish != Finish::Eos || o.text.ends_with('!'),
                "{}",
                o.text
            );
        }
        for text in ["abcabab!", "aabbcc!", "ab[[abc]]ca!"] {
            let mut c = pairs.start();
            c.accept_text(text)
                .unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(c.is_done(), "{text}");
        }
        for text in ["abca!", "ab[abcab!", "abababab"] {
            assert!(pairs.start().accept_text(text).is_err(), "{text}");
        }
    }
}

#[test]
fn what_is_invalid_is_an_error_of_grammar() {
    let [model, _] = random_models();
    let deep_refs: String = {
        let defs: Vec<String> = (0..3000)
            .map(|i| {
                format!(
                    "\"d{i}\":{{\"type\":\"array\",\"items\":{{\"$ref\":\"#/$defs/d{}\"}}}}",
                    i + 1
                )
            })
            .collect();
        format!(
            "{{\"$ref\":\"#/$defs/d0\",\"$defs\":{{{},\"d3000\":{{}}}}}}",
            defs.join(",")
        )
    };
    let rules: String = (0..4000)
        .map(|i| format!("r{i} ::= \"(\" r{} \")\" | \"x\" root\n", i + 1))
        .collect();
    let deep_rules = format!("root ::= r0\n{rules}r4000 ::= \"y\"");
    for source in [
        gbnf("root ::= [a"),
        gbnf("root ::= a"),
        json_schema("{"),
        json_schema(r#"{"type":"objec"}"#),
        json_schema(r#"{"type":"string","pattern":"("}"#),
        json_schema(r##"{"$ref":"#/$defs/missing"}"##),
        json_schema(r#"{"type":"integer","minimum":3,"maximum":2}"#),
        json_schema(r#"{"dependentRequired":{}}"#),
    ] {
        let e = Grammar::compile(&model, &source).unwrap_err();
        assert_eq!((e.exit_code(), e.kind()), (8, "grammar"), "{source:?}: {e}");
        assert!(!e.to_string().contains('\n'));
    }
    // Whatever becomes of these, it is neither a crash nor a hang.
    for source in [
        json_schema(&deep_refs),
        gbnf(&deep_rules),
        gbnf("root ::= (((\"a\"?){2000}){2000}){2000}"),
        gbnf("root ::= ([a-z]* \"x\" [a-z]{1000}){1000} | \"(\" root \")\""),
        gbnf("root ::= root root | \"a\" | \"\""),
    ] {
        if let Ok(g) = Grammar::compile(&model, &source) {
            let _ = answer(&model, &g, 0, 20);
        }
    }
}

#[test]
fn a_walk_ends_where_the_grammar_does() {
    let [model, _] = random_models();
    let g = Grammar::compile(&model, &gbnf("root ::= \"a\" \"b\"?")).unwrap();
    let mut c = g.start();
    let id = |text: &str| model.tokenizer().encode(text, false, false)[0];
    let eog = model.tokenizer().eog()[0];
    let (a, b) = (
        model.tokenizer().token_id("a").unwrap(),
        model.tokenizer().token_id("b").unwrap(),
    );
    assert!(c.mask().unwrap().allows(a) && !c.mask().unwrap().allows(eog));
    assert!(!c.mask().unwrap().allows(b) && !c.mask().unwrap().allows(id("x")));
    c.accept(a).unwrap();
    assert!(c.mask().unwrap().allows(b) && c.mask().unwrap().allows(eog) && !c.is_done());
    let mut row = vec![1.0; model.hparams().n_vocab];
    c.mask().unwrap().apply(&mut row, Some(a));
    for (i, x) in row.iter().enumerate() {
        // The vocabulary has the letter twice, the second time as a byte.
        let allowed = i as u32 == a
            || model.tokenizer().is_eog(i as u32)
            || model.tokenizer().token_bytes(i as u32, false) == b"b";
        assert_eq!(*x, if allowed { 1.0 } else { f32::NEG_INFINITY }, "{i}");
    }
    c.accept(b).unwrap();
    assert!(c.is_done());
    assert!(g.start().accept(b).is_err());
}

#[test]
fn thinking_is_free_and_the_answer_is_not() {
    let model = load("../models/reasoner/reasoner.gguf");
    let o = LoadOptions::default();
    let mut c = Conversation::new(Session::new(model.clone(), &o).unwrap());
    let grammar =
        Grammar::compile(&model, &gbnf(r#"root ::= "The answer is " [0-9]+ ".""#)).unwrap();
    let g = |n_predict| GenOptions {
        n_predict,
        grammar: Some(grammar.clone()),
        ..GenOptions::default()
    };
    let reply = |c: &mut Conversation, n| {
        let mut s = sampler(&model, 1, 0.0);
        let go_on = &mut |_: lemma_engine::generate::Event<'_>| ControlFlow::Continue(());
        c.reply(&mut s, &PromptOptions::default(), &g(n), go_on)
            .unwrap()
    };
    c.push_user("What is 12+30?");
    let whole = reply(&mut c, None);
    assert_eq!(whole.text, "The answer is 42.");
    assert!(whole.thinking.contains("12+30"), "{}", whole.thinking);
    // Cut inside the answer and resumed: the grammar goes on where it was.
    c.undo();
    c.push_user("What is 12+30?");
    let cut = reply(&mut c, Some(whole.n_think + 2));
    assert!(!cut.text.is_empty() && whole.text.starts_with(&cut.text) && cut.text != whole.text);
    let mut s = sampler(&model, 1, 0.0);
    let go_on = &mut |_: lemma_engine::generate::Event<'_>| ControlFlow::Continue(());
    let rest = c.resume(&mut s, &g(None), go_on).unwrap().unwrap();
    assert_eq!(cut.text + &rest.text, whole.text);
    // The conversation goes on after a reply that the grammar ended.
    c.push_user("What is 12+7+5?");
    assert_eq!(reply(&mut c, None).text, "The answer is 24.");
}
