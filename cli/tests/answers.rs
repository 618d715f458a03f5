//! The binary with its bundled model: answers, streams, exit codes, signals.

#![cfg(bundled_model)]

mod common;

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{ends, err, json, lemma, out, pipe, run, temp};

/// Short and the same every time.
const GREEDY: [&str; 4] = ["--temp", "0", "-t", "2"];

fn ask(prompt: &str, more: &[&str]) -> std::process::Output {
    let mut args = vec!["-p", prompt];
    args.extend(GREEDY);
    args.extend(more);
    run(&args)
}

#[test]
fn one_answer_and_one_newline() {
    let o = ask("What is 7 * 8?", &[]);
    ends(&o, 0);
    let text = out(&o);
    assert!(text.contains("56"), "{text}");
    assert!(
        text.ends_with('\n') && !text.ends_with("\n\n") && !text.starts_with('\n'),
        "{text:?}"
    );
    assert!(!text.contains("think>") && !text.contains("<|im"), "{text}");
    assert_eq!(err(&o), "", "nothing on stderr unless it is a terminal");
}

#[test]
fn twenty_lines_of_pipe_are_one_prompt() {
    let lines: String = (0..20).map(|i| format!("line {i}\n")).collect();
    let mut args = vec!["--json", "-n", "400"];
    args.extend(GREEDY);
    let o = pipe(&args, lines.as_bytes());
    let text = out(&o);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        json(&text)["usage"]["prompt"].as_u64().unwrap() > 40,
        "{text}"
    );
}

#[test]
fn prompt_and_stdin_are_joined() {
    let mut args = vec!["-p", "What is 7 * 8?", "--json", "-n", "1"];
    args.extend(GREEDY);
    let alone = json(&out(&run(&args)))["usage"]["prompt"].as_u64().unwrap();
    let both = json(&out(&pipe(&args, b"and 9 * 9?\n")))["usage"]["prompt"]
        .as_u64()
        .unwrap();
    assert!(both > alone);
}

#[test]
fn the_same_command_gives_the_same_bytes() {
    let args = ["-p", "What is 12 + 34?", "--seed", "5", "--think", "show"];
    let first = run(&[&args[..], &["-t", "1"]].concat());
    let second = run(&[&args[..], &["-t", "2"]].concat());
    assert_eq!(out(&first), out(&second));
    assert!(out(&first).lines().count() > 2, "the thinking is shown");
}

#[test]
fn cut_while_thinking_is_code_7() {
    let o = ask("What is 47 * 86?", &["-n", "5"]);
    ends(&o, 7);
    assert_eq!(out(&o), "");
    assert!(
        err(&o).contains(
            "error: no answer: -n 5 was reached while the model was still thinking\nhint: "
        ),
        "{}",
        err(&o)
    );
    let o = ask("What is 47 * 86?", &["-n", "5", "--json"]);
    ends(&o, 7);
    let record = json(&out(&o));
    assert_eq!(
        (&record["ok"], &record["finish"], &record["error"]["code"]),
        (&false.into(), &"length".into(), &7.into())
    );
    assert!(!record["thinking"].as_str().unwrap().is_empty());
}

#[test]
fn a_thinking_budget_ends_in_an_answer() {
    let o = ask(
        "What is 47 * 86?",
        &["--reasoning-budget", "8", "-n", "200"],
    );
    assert!(!out(&o).contains("think>"), "{}", out(&o));
}

#[test]
fn json_says_who_set_what() {
    let o = lemma(&["-p", "What is 2 + 2?", "--json", "--temp", "0"])
        .env("LEMMA_TOP_K", "7")
        .output()
        .unwrap();
    ends(&o, 0);
    let r = json(&out(&o));
    assert_eq!(r["v"], 1);
    assert_eq!(r["sampling"]["temp"]["source"], "flag");
    assert_eq!(
        (
            &r["sampling"]["top_k"]["source"],
            &r["sampling"]["top_k"]["value"]
        ),
        (&"env".into(), &"7".into())
    );
    assert_eq!(r["sampling"]["min_p"]["source"], "builtin");
    for key in [
        "text", "thinking", "finish", "usage", "kv", "timing", "seed", "model",
    ] {
        assert!(!r[key].is_null(), "{key}");
    }
}

#[test]
fn events_in_order() {
    let o = ask("What is 2 + 2?", &["--stream-json"]);
    ends(&o, 0);
    let events: Vec<serde_json::Value> = out(&o).lines().map(json).collect();
    assert_eq!(events[0]["event"], "start");
    assert_eq!(events.last().unwrap()["event"], "end");
    let kinds: Vec<&str> = events
        .iter()
        .map(|e| e["event"].as_str().unwrap())
        .collect();
    let first_text = kinds.iter().position(|k| *k == "text").unwrap();
    assert!(
        kinds[1..first_text].iter().all(|k| *k == "think"),
        "{kinds:?}"
    );
    let text: String = events
        .iter()
        .filter(|e| e["event"] == "text")
        .map(|e| e["text"].as_str().unwrap())
        .collect();
    assert!(text.contains('4'), "{text}");
}

#[test]
fn thinking_on_stderr() {
    let o = ask("What is 2 + 2?", &["--think", "stderr"]);
    ends(&o, 0);
    assert!(!err(&o).is_empty() && !err(&o).contains('\u{1b}'));
    assert!(out(&o).contains('4'));
}

#[test]
fn a_prompt_that_does_not_fit_is_code_6() {
    let long = "1 + ".repeat(2000);
    let o = ask(&long, &["--kv-budget", "256"]);
    ends(&o, 6);
    assert!(err(&o).starts_with("error: "), "{}", err(&o));
    ends(&ask(&long, &["-c", "512"]), 6);
}

#[test]
fn a_small_pool_recycles_and_goes_on() {
    let o = ask(
        "What is 4321 * 8765?",
        &["--kv-budget", "80", "-n", "400", "--json"],
    );
    let r = json(&out(&o));
    assert!(r["kv"]["recycled"].as_u64().unwrap() > 0, "{r}");
    let pages = r["kv"]["pages"].as_u64().unwrap();
    assert!(
        (11..20).contains(&pages),
        "five pages of f16, most of them as k4/v2: {r}"
    );
}

#[test]
fn pages_are_demoted_before_they_go() {
    let trace = temp("demoted.jsonl");
    let o = ask(
        "What is 4321 * 8765?",
        &[
            "--kv-budget",
            "96",
            "--kv-demote",
            "q8_0",
            "-n",
            "400",
            "--json",
            "--kv-trace",
            trace.to_str().unwrap(),
        ],
    );
    let kv = &json(&out(&o))["kv"];
    assert!(kv["recycled"].as_u64().unwrap() > 0, "{kv}");
    assert!(kv["pages"].as_u64().unwrap() > 6, "more than without: {kv}");
    let lines = std::fs::read_to_string(&trace).unwrap();
    let (moved, gone): (Vec<_>, Vec<_>) =
        lines.lines().map(json).partition(|l| l["tier"] == "q8_0");
    let page = |l: &serde_json::Value| (l["layer"].as_u64(), l["first_pos"].as_u64());
    assert!(!gone.is_empty());
    for l in &gone {
        assert!(moved.iter().any(|m| page(m) == page(l)), "{l}");
        assert!(l["tokens"].is_array());
    }
    // A prompt that the first tier cannot hold is no reason to stop, one that all cannot hold is.
    let prompt = "1 + ".repeat(30);
    let budget = ["--kv-budget", "96", "--kv-demote", "q4_0", "-n", "1"];
    // It was read, and one token is no answer.
    ends(&ask(&prompt, &budget), 7);
    ends(
        &ask(&prompt, &["--kv-budget", "96", "--kv-demote", "none"]),
        6,
    );
    ends(&ask(&"1 + ".repeat(500), &budget), 6);
    ends(&ask(&prompt, &["--kv-demote", "f16"]), 2);
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let mut child = lemma(&[
        "-p",
        "What is 4321 * 8765?",
        "--think",
        "show",
        "--temp",
        "0",
    ])
    .spawn()
    .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut byte = [0];
    stdout.read_exact(&mut byte).unwrap();
    drop(stdout);
    let o = child.wait_with_output().unwrap();
    ends(&o, 141);
    assert_eq!(err(&o), "");
}

#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let Ok(full) = full else { return };
    let o = lemma(&["-p", "What is 2 + 2?", "--temp", "0"])
        .stdout(Stdio::from(full))
        .output()
        .unwrap();
    ends(&o, 1);
    assert!(err(&o).starts_with("error: stdout: "), "{}", err(&o));
}

/// Sends a signal once the child has begun to write.
fn signalled(signal: &str) -> std::process::Output {
    let mut child = lemma(&[
        "-p",
        "What is 98765432 * 12345678?",
        "--think",
        "show",
        "--temp",
        "0",
    ])
    .spawn()
    .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut byte = [0];
    stdout.read_exact(&mut byte).unwrap();
    let status = std::process::Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
    let start = Instant::now();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    let mut o = child.wait_with_output().unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{signal} took too long"
    );
    o.stdout = [&byte[..], &rest].concat();
    o
}

#[test]
fn interrupt_is_130_and_keeps_what_was_said() {
    let o = signalled("-INT");
    ends(&o, 130);
    assert!(out(&o).ends_with('\n'), "the last line is whole");
    assert_eq!(err(&o), "");
}

#[test]
fn terminate_is_143() {
    ends(&signalled("-TERM"), 143);
}

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
fn score_gives_log_probabilities() {
    let logits = temp("logits.bin");
    let input = b"{\"id\":1,\"text\":\"What is 2 + 2?\"}\n{\"id\":2,\"tokens\":[1,2,3]}\n{\"id\":3}\n{\"id\":4,\"tokens\":[99999]}\n";
    let o = pipe(
        &[
            "score",
            "--top",
            "2",
            "--logits",
            logits.to_str().unwrap(),
            "-ctk",
            "f32",
            "-ctv",
            "f32",
        ],
        input,
    );
    ends(&o, 9);
    let r: Vec<serde_json::Value> = out(&o).lines().map(json).collect();
    assert_eq!(r.len(), 4);
    let n = r[0]["tokens"].as_array().unwrap().len();
    let logprobs = r[0]["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), n);
    assert!(logprobs[0].is_null() && logprobs[1..].iter().all(|p| p.as_f64().unwrap() <= 0.0));
    let sum: f64 = logprobs[1..].iter().map(|p| p.as_f64().unwrap()).sum();
    assert!((sum - r[0]["sum"].as_f64().unwrap()).abs() < 1e-3);
    assert_eq!(r[0]["top"][1].as_array().unwrap().len(), 2);
    assert_eq!(
        (&r[2]["ok"], &r[2]["id"], &r[3]["ok"]),
        (&false.into(), &3.into(), &false.into())
    );
    let bytes = std::fs::metadata(&logits).unwrap().len();
    let _ = std::fs::remove_file(&logits);
    assert_eq!(bytes % (4 * (n as u64 + 3)), 0, "n_tokens × n_vocab floats");
}

#[test]
fn perplexity_of_its_own_words_is_low() {
    let o = ask("What is 7 * 8?", &["--think", "show"]);
    let own = pipe(
        &["perplexity", "--json", "-c", "32"],
        out(&o).repeat(4).as_bytes(),
    );
    let noise = pipe(
        &["perplexity", "--json", "-c", "32"],
        "zq xj kw vv ".repeat(40).as_bytes(),
    );
    ends(&own, 0);
    let ppl = |o: &std::process::Output| json(&out(o))["ppl"].as_f64().unwrap();
    assert!(ppl(&own) < ppl(&noise), "{} {}", out(&own), out(&noise));
}

#[test]
fn bench_reports_what_was_asked_for() {
    let o = run(&[
        "bench", "-p", "16,32", "-n", "8", "-d", "0,16", "-r", "2", "-t", "2", "-o", "json",
    ]);
    ends(&o, 0);
    let rows = json(&out(&o));
    let names: Vec<&str> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["test"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "pp16",
            "pp32",
            "tg8",
            "pp16 @ d16",
            "pp32 @ d16",
            "tg8 @ d16"
        ]
    );
    for r in rows.as_array().unwrap() {
        assert!(r["avg_ts"].as_f64().unwrap() > 0.0);
        assert_eq!(r["samples_ns"].as_array().unwrap().len(), 2);
    }
    let o = run(&[
        "bench",
        "-p",
        "0",
        "-n",
        "0",
        "--decode-to",
        "600",
        "-o",
        "jsonl",
        "--kv-budget",
        "128",
    ]);
    ends(&o, 0);
    let rows: Vec<serde_json::Value> = out(&o).lines().map(json).collect();
    assert_eq!(rows.last().unwrap()["test"], "decode@600");
    assert!(rows.last().unwrap()["kv_recycled"].as_u64().unwrap() > 0);
}
