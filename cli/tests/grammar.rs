//! Answers under grammars and schemas, as a person and a script meet them.

#![cfg(bundled_model)]

mod common;

use common::{ends, err, json, out, pipe, run, temp};

const SCHEMA: &str =
    r#"{"type":"object","properties":{"answer":{"type":"integer"}},"required":["answer"]}"#;

fn ask(more: &[&str]) -> std::process::Output {
    let mut args = vec![
        "-p",
        "What is 12+30?",
        "--temp",
        "0",
        "-t",
        "2",
        "-n",
        "900",
    ];
    args.extend(more);
    run(&args)
}

#[test]
fn the_answer_keeps_to_a_schema() {
    let file = temp("schema.json");
    std::fs::write(&file, SCHEMA).unwrap();
    let file = file.to_str().unwrap();
    let mut answers = Vec::new();
    for flags in [
        &["-j", SCHEMA][..],
        &["--json-schema", SCHEMA],
        &["-jf", file],
        &["--json-schema-file", file],
    ] {
        let o = ask(flags);
        ends(&o, 0);
        let v = json(&out(&o));
        assert!(
            v["answer"].is_i64() && v.as_object().unwrap().len() == 1,
            "{v}"
        );
        answers.push(out(&o));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
}

#[test]
fn the_answer_keeps_to_a_grammar_and_thinking_does_not() {
    let grammar = r#"root ::= "It is " [0-9]+ ".""#;
    let file = temp("grammar.gbnf");
    std::fs::write(&file, format!("# a sentence\n{grammar}\n")).unwrap();
    for flags in [
        ["--grammar", grammar],
        ["--grammar-file", file.to_str().unwrap()],
    ] {
        let mut flags = flags.to_vec();
        flags.push("--json");
        let o = ask(&flags);
        ends(&o, 0);
        let v = json(&out(&o));
        assert_eq!(
            (&v["text"], &v["finish"]),
            (&"It is 42.".into(), &"eos".into())
        );
        assert!(v["thinking"].as_str().unwrap().contains("12+30"), "{v}");
    }
}

#[test]
fn what_is_invalid_ends_with_eight() {
    let missing = temp("missing.gbnf");
    let bad = temp("bad.gbnf");
    std::fs::write(&bad, "root ::= yes\n").unwrap();
    for (flags, what) in [
        (
            ["--grammar", "root ::= (\"a\""],
            "error: --grammar: line 1, column 14: ",
        ),
        (
            ["--grammar-file", bad.to_str().unwrap()],
            "line 1, column 10: yes, which has no rule",
        ),
        (["-j", "{\"type\":"], "error: --json-schema: not JSON"),
        (
            ["-j", r#"{"type":"string","maxlength":3}"#],
            "error: --json-schema: \"maxlength\" at #, expected",
        ),
        (["-j", "{\"type\":\"objec\"}"], "Invalid type: objec"),
        (
            ["-j", r#"{"type":"string","pattern":"("}"#],
            "unclosed group",
        ),
        (
            ["-j", r##"{"$ref":"#"}"##],
            "does something in it contain itself",
        ),
    ] {
        let o = ask(&flags);
        ends(&o, 8);
        assert_eq!(out(&o), "");
        let text = err(&o);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].contains(what), "{text}");
        assert!(lines[1].starts_with("hint: "), "{text}");
    }
    let o = ask(&["--json", "--grammar", "root ::= ["]);
    ends(&o, 8);
    let v = json(&out(&o));
    assert_eq!(
        (&v["error"]["code"], &v["error"]["kind"]),
        (&8.into(), &"grammar".into())
    );
    ends(&ask(&["--grammar-file", missing.to_str().unwrap()]), 1);
    ends(&ask(&["--grammar", "root ::= \"a\"", "-j", "{}"]), 2);
}

#[test]
fn requests_have_grammars_of_their_own() {
    let lines = [
        r#"{"id":"flag","prompt":"What is 12+30?"}"#,
        r#"{"id":"schema","prompt":"What is 12+30?","json_schema":{"type":"boolean"}}"#,
        r#"{"id":"grammar","prompt":"What is 12+30?","grammar":"root ::= \"yes\" | \"no\""}"#,
        r#"{"id":"bad","prompt":"x","grammar":"root ::= a"}"#,
        r#"{"id":"both","prompt":"x","grammar":"root ::= \"a\"","json_schema":{}}"#,
    ];
    let args = [
        "batch",
        "--temp",
        "0",
        "-t",
        "2",
        "--grammar",
        "root ::= \"It is \" [0-9]{2} \"!\"",
    ];
    let o = pipe(&args, lines.join("\n").as_bytes());
    ends(&o, 9);
    let text = out(&o);
    let records: Vec<_> = text.lines().map(json).collect();
    assert_eq!(records[0]["text"], "It is 42!");
    assert!(
        ["true", "false"].contains(&records[1]["text"].as_str().unwrap()),
        "{text}"
    );
    assert!(
        ["yes", "no"].contains(&records[2]["text"].as_str().unwrap()),
        "{text}"
    );
    assert_eq!(records[3]["error"]["code"], 8);
    assert_eq!(records[4]["error"]["code"], 2);
}
