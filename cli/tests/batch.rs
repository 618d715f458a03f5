//! `lemma batch`: requests and their records.

#![cfg(bundled_model)]

mod common;

use common::{ends, err, json, out, pipe, run, temp};

#[test]
fn log_probabilities_are_those_of_the_model() {
    let request = r#"{"id":"a","prompt":"What is 7 * 8?","logprobs":true,"seed":1}"#;
    let ask = |more: &[&str]| {
        let args = [&["batch", "-t", "2"][..], more].concat();
        let o = pipe(&args, request.as_bytes());
        ends(&o, 0);
        json(&out(&o))
    };
    let list = |r: &serde_json::Value| -> Vec<(u64, f64)> {
        let list = r["logprobs"].as_array().unwrap().iter();
        list.map(|p| (p["id"].as_u64().unwrap(), p["logprob"].as_f64().unwrap()))
            .collect()
    };
    let greedy = ask(&["--temp", "0"]);
    let probs = list(&greedy);
    assert!(probs.iter().all(|p| p.1 <= 0.0) && probs.iter().any(|p| p.1 < 0.0));
    let n = |key: &str| greedy["usage"][key].as_u64().unwrap() as usize;
    // The end of the reply is one of them.
    assert_eq!(probs.len(), n("thinking") + n("answer") + 1);
    // What was not changed by the sampler is not changed by its parameters.
    assert_eq!(list(&ask(&["--temp", "0.01", "--top-k", "1"])), probs);
    // And tokens that were not drawn have one as well.
    let closed = ask(&["--temp", "0", "--reasoning-budget", "4"]);
    assert_eq!(list(&closed)[..4], probs[..4]);
    assert!(list(&closed)[4].1 < -1.0, "{closed}");
}

#[test]
fn controls_that_a_prompt_brings_are_escaped_in_json() {
    let text = "\u{9b}2J\u{202e}x";
    let o = pipe(&["tokenize", "--jsonl"], json_line(text).as_bytes());
    let ids = json(&out(&o))["ids"].to_string();
    let line = format!("{{\"id\":\"{text}\",\"ids\":{ids}}}\n");
    let o = pipe(&["detokenize", "--jsonl"], line.as_bytes());
    ends(&o, 0);
    let written = out(&o);
    assert!(written.is_ascii(), "{written}");
    assert_eq!(json(&written)["text"], text);
}

fn json_line(text: &str) -> String {
    format!("{}\n", serde_json::json!({ "text": text }))
}

#[test]
fn batch_resumes_and_reports_failures() {
    let requests = temp("requests.jsonl");
    let results = temp("results.jsonl");
    let _ = std::fs::remove_file(&results);
    let good = "{\"id\":\"a\",\"prompt\":\"What is 2 + 2?\",\"temp\":0}\n{\"prompt\":\"What is 3 + 3?\",\"temp\":0}\n";
    std::fs::write(
        &requests,
        format!("{good}{{\"id\":\"bad\",\"prompt\":\"x\",\"tmep\":0}}\n\nnot json\n"),
    )
    .unwrap();
    let args = [
        "batch",
        requests.to_str().unwrap(),
        "-o",
        results.to_str().unwrap(),
        "-t",
        "2",
    ];
    let o = run(&args);
    ends(&o, 9);
    assert_eq!(out(&o), "");
    let text = std::fs::read_to_string(&results).unwrap();
    let records: Vec<serde_json::Value> = text.lines().map(json).collect();
    assert_eq!(records.len(), 4, "{text}");
    assert_eq!(
        (&records[0]["id"], &records[0]["ok"], &records[1]["id"]),
        (&"a".into(), &true.into(), &2.into())
    );
    assert!(records[0]["text"].as_str().unwrap().contains('4'));
    assert_eq!(
        (&records[2]["id"], &records[2]["error"]["code"]),
        (&"bad".into(), &2.into())
    );
    assert!(
        records[2]["error"]["hint"]
            .as_str()
            .unwrap()
            .contains("temp")
    );
    assert_eq!(records[3]["id"], 5);

    // The requests are not written over.
    let itself = requests.to_str().unwrap();
    let o = run(&["batch", itself, "-o", itself]);
    ends(&o, 2);
    assert!(err(&o).contains("the file of the requests"), "{}", err(&o));

    // An id that was there before is refused, now and when the run is repeated.
    let twice = format!(
        "{good}{{\"id\":\"a\",\"prompt\":\"What is 4 + 4?\"}}\n{{\"id\":2,\"prompt\":\"x\"}}\n"
    );
    for _ in 0..2 {
        let dir = temp("twice.jsonl");
        std::fs::write(&dir, &twice).unwrap();
        let o = run(&[
            "batch",
            dir.to_str().unwrap(),
            "-o",
            results.to_str().unwrap(),
        ]);
        ends(&o, 9);
        let text = std::fs::read_to_string(&results).unwrap();
        let last: Vec<_> = text.lines().rev().take(2).map(json).collect();
        assert!(last.iter().all(|record| record["id"].is_null()), "{text}");
        for (record, at) in last.iter().zip(["line 2,", "line 1,"]) {
            assert_eq!(record["error"]["code"], 2);
            assert!(
                record["error"]["message"].as_str().unwrap().contains(at),
                "{record}"
            );
        }
        let _ = std::fs::remove_file(dir);
    }
    let text = std::fs::read_to_string(&results).unwrap();
    assert_eq!(text.lines().count(), 6, "nothing fails twice: {text}");

    // Again: what succeeded is not asked again, what failed is.
    std::fs::write(&requests, good).unwrap();
    ends(&run(&args), 0);
    assert_eq!(
        std::fs::read_to_string(&results).unwrap(),
        text,
        "nothing was left to do"
    );
    let _ = (
        std::fs::remove_file(requests),
        std::fs::remove_file(results),
    );
}

#[test]
fn what_is_no_request_is_refused_and_what_was_mended_is_answered() {
    let results = temp("mended.jsonl");
    let args = ["batch", "--temp", "0", "-o", results.to_str().unwrap()];
    let ask = |line: &str| pipe(&args, line.as_bytes());
    let count = || std::fs::read_to_string(&results).unwrap().lines().count();
    let empty = r#"{"id":"a","prompt":""}"#;
    ends(&ask(empty), 9);
    ends(&ask(empty), 9);
    assert_eq!(count(), 1);
    ends(&ask(r#"{"id":"a","prompt":"What is 1+1?"}"#), 0);
    assert_eq!(count(), 2);
    let _ = std::fs::remove_file(results);
}

#[test]
fn system_messages_that_are_lost_are_spoken_of_once() {
    let line = "{\"prompt\":\"What is 1+1?\",\"system\":\"be kind\",\"temp\":0}\n";
    let o = pipe(&["batch"], line.repeat(2).as_bytes());
    ends(&o, 0);
    assert_eq!(err(&o).matches("no place for a system message").count(), 1);
}

#[test]
fn a_line_without_an_id_leaves_others_theirs() {
    let results = temp("numbers.jsonl");
    let _ = std::fs::remove_file(&results);
    let args = ["batch", "--temp", "0", "-o", results.to_str().unwrap()];
    let requests = b"{\"id\":2,\"prompt\":\"What is 1+1?\"}\n{\"prompt\":\"What is 2+2?\"}\n";
    for _ in 0..2 {
        ends(&pipe(&args, requests), 0);
        let text = std::fs::read_to_string(&results).unwrap();
        let ids: Vec<_> = text.lines().map(|l| json(l)["id"].clone()).collect();
        assert_eq!(ids, [json("2"), json("\"line 2\"")]);
    }
    let _ = std::fs::remove_file(results);
}
