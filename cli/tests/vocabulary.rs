//! Commands that look at a file without running it.

#![cfg(bundled_model)]

mod common;

use common::{ends, err, json, out, pipe, run, temp};

#[test]
fn tokens_there_and_back() {
    let o = run(&["tokenize", "--ids", "What is 47 * 86?"]);
    ends(&o, 0);
    let ids = json(&out(&o));
    assert!(ids.as_array().unwrap().len() > 4);
    let back = run(&["detokenize", out(&o).trim()]);
    ends(&back, 0);
    assert_eq!(out(&back), "What is 47 * 86?\n");
    let piped = pipe(&["tokenize", "--ids"], b"What is 47 * 86?");
    assert_eq!(out(&piped), out(&o));
    let count = run(&["tokenize", "--count", "What is 47 * 86?"]);
    assert_eq!(
        out(&count).trim().parse::<usize>().unwrap(),
        ids.as_array().unwrap().len()
    );
}

#[test]
fn control_tokens_can_be_taken_as_text() {
    let n = |args: &[&str]| json(&out(&run(args))).as_array().unwrap().len();
    let special = n(&["tokenize", "--ids", "<|im_start|>"]);
    let text = n(&["tokenize", "--ids", "--no-parse-special", "<|im_start|>"]);
    assert!(special < text, "{special} {text}");
}

#[test]
fn lines_of_json() {
    let o = pipe(
        &["tokenize", "--jsonl"],
        b"{\"text\":\"12\"}\n{\"id\":\"x\",\"text\":\"34\"}\n",
    );
    ends(&o, 0);
    let r: Vec<serde_json::Value> = out(&o).lines().map(json).collect();
    assert!(r[0]["ids"].is_array() && r[0].get("id").is_none());
    assert_eq!(r[1]["id"], "x");
    let o = pipe(
        &["tokenize", "--jsonl"],
        b"{\"txt\":\"12\"}\n{\"text\":\"34\"}\n",
    );
    ends(&o, 9);
    let r: Vec<serde_json::Value> = out(&o).lines().map(json).collect();
    assert_eq!((&r[0]["ok"], r[1]["ids"].is_array()), (&false.into(), true));
    let o = pipe(&["detokenize", "--jsonl"], b"{\"ids\":[1,2]}\n");
    ends(&o, 0);
    assert!(json(&out(&o))["text"].is_string());
}

#[test]
fn a_token_out_of_range_is_named() {
    let o = run(&["detokenize", "1", "99999"]);
    ends(&o, 2);
    assert!(
        err(&o).starts_with("error: token 99999: expected a number below "),
        "{}",
        err(&o)
    );
}

#[test]
fn the_template_and_what_it_makes() {
    let o = run(&["template"]);
    ends(&o, 0);
    assert!(out(&o).contains("message.role"));
    let o = run(&["template", "-p", "hi"]);
    ends(&o, 0);
    assert!(
        out(&o).ends_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        "{}",
        out(&o)
    );
}

#[test]
fn errors_call_stdin_by_its_name() {
    let o = pipe(&["template", "-f", "-"], b"no JSON\n");
    ends(&o, 2);
    assert!(err(&o).starts_with("error: stdin: not JSON"), "{}", err(&o));
}

#[test]
fn a_template_that_was_given_is_not_the_model_s_fault() {
    let path = temp("template.jinja");
    std::fs::write(&path, "{% if").unwrap();
    let file = path.to_str().unwrap();
    for (args, name) in [
        (["--chat-template", "{{ foo("], "--chat-template"),
        (["--chat-template-file", file], file),
    ] {
        for command in [&["template"][..], &["-p", "x"]] {
            let o = run(&[command, &args[..]].concat());
            ends(&o, 2);
            assert!(
                err(&o).starts_with(&format!("error: {name}: ")),
                "{}",
                err(&o)
            );
        }
    }
    let _ = std::fs::remove_file(path);
}

#[test]
fn inspect_lists_metadata_and_tensors() {
    let o = run(&["inspect"]);
    ends(&o, 0);
    assert!(out(&o).contains("general.architecture") && out(&o).contains("token_embd.weight"));
    let o = run(&["inspect", "--json"]);
    ends(&o, 0);
    let j = json(&out(&o));
    assert_eq!(j["metadata"]["general.architecture"], "qwen3");
    assert!(
        j["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .any(|t| t["name"] == "token_embd.weight")
    );
}

#[test]
fn check_reads_every_weight() {
    let o = run(&["check"]);
    ends(&o, 0);
    assert!(
        out(&o).ends_with("ok\n") && out(&o).contains("all finite"),
        "{}",
        out(&o)
    );
}

#[test]
fn synth_shapes_and_types() {
    let o = run(&["synth", "--list"]);
    ends(&o, 0);
    assert!(out(&o).lines().count() > 1);
    let o = run(&["synth", "x", "--type", "q4_k_m"]);
    ends(&o, 2);
}
