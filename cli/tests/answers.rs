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
fn a_pool_that_is_too_small_says_which_would_do() {
    let budget = |n: usize| ask("What is 1+1?", &["--kv-budget", &n.to_string(), "-n", "1"]);
    let o = budget(32);
    ends(&o, 6);
    let hint = err(&o);
    let enough = hint.split("--kv-budget ").nth(1).unwrap();
    let enough: usize = enough.split(' ').next().unwrap().parse().unwrap();
    ends(&budget(enough), 7);
    ends(&budget(enough - 16), 6);
}

#[test]
fn tokens_that_are_not_there_are_refused() {
    let o = ask("What is 1+1?", &["-l", "99999+1"]);
    ends(&o, 2);
    assert!(err(&o).starts_with("error: --logit-bias: token 99999, expected a number below "));
}

#[test]
fn a_prompt_is_shown_token_by_token() {
    let o = ask("What is 1+1?", &["--verbose-prompt", "-n", "1"]);
    assert!(
        err(&o).contains("  \\n\n") && !err(&o).contains("{a}"),
        "{}",
        err(&o)
    );
}

#[test]
fn a_stop_string_at_the_beginning_is_an_answer() {
    let o = ask("What is 1+1?", &["-r", "The"]);
    ends(&o, 0);
    assert_eq!((out(&o).as_str(), err(&o).as_str()), ("\n", ""));
    let record = json(&out(&ask("What is 1+1?", &["-r", "The", "--json"])));
    assert_eq!(
        (&record["ok"], &record["finish"], &record["text"]),
        (&true.into(), &"stop".into(), &"".into())
    );
}

#[test]
fn what_comes_behind_an_answer_does_not_take_it_back() {
    let go_on = ["--ignore-eos", "-n", "80", "--json"];
    let record = json(&out(&ask("What is 12+30?", &go_on)));
    assert_eq!(record["ok"], true, "{record}");
    assert!(record["text"].as_str().unwrap().contains("42"), "{record}");
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_prompt() {
    let plain = json(&out(&ask("What is 1+1?", &["--json", "-n", "1"])));
    let args = [&["--json", "-n", "1"][..], &GREEDY].concat();
    let marked = json(&out(&pipe(&args, b"\xef\xbb\xbfWhat is 1+1?\n")));
    assert_eq!(plain["usage"]["prompt"], marked["usage"]["prompt"]);
}

#[test]
fn a_system_message_that_is_lost_is_spoken_of() {
    let note = "note: this model's chat template has no place for a system message\n";
    assert_eq!(err(&ask("What is 1+1?", &["-sys", "be kind"])), note);
    let template = ["-sys", "be kind", "--chat-template", "chatml", "-n", "400"];
    assert!(!err(&ask("What is 1+1?", &template)).contains("note: "));
}

#[test]
fn every_failure_is_a_record() {
    for (args, code) in [
        (&["-p", ""][..], 2),
        (&["-f", "/no/such"], 1),
        (&["-p", "x", "-jf", "/no/such"], 1),
        (&["-p", "x", "-sysf", "/no/such"], 1),
        (&["-p", "x", "--temp", "warm"], 2),
        (&["-p", "x", "-m", "/no/such"], 3),
        // What is not understood at all.
        (&["-p", "x", "-b", "0"], 2),
        (&["-p", "x", "-n", "foo"], 2),
        (&["-p", "x", "--nope"], 2),
    ] {
        let o = run(&[args, &["--json"]].concat());
        ends(&o, code);
        assert_eq!(json(&out(&o))["error"]["code"], code, "{args:?}");
        let o = run(&[args, &["--stream-json"]].concat());
        ends(&o, code);
        let event = json(&out(&o));
        assert_eq!(
            (&event["event"], &event["ok"]),
            (&"end".into(), &false.into()),
            "{args:?}"
        );
    }
    // Records of other commands are not of this kind.
    let o = run(&["devices", "--json", "--nope"]);
    ends(&o, 2);
    assert_eq!(out(&o), "");
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
    // The note says whose choice it is.
    for (policy, how) in [("raas", "by time stamp"), ("window", "as window chooses")] {
        let o = ask(
            "What is 4321 * 8765?",
            &["--kv-budget", "80", "-n", "400", "--kv-policy", policy],
        );
        let note = format!("recycling pages {how} from here");
        assert!(err(&o).contains(&note), "{}", err(&o));
    }
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
    // How many threads there were is said whether asked for or not.
    assert!(rows.last().unwrap()["n_threads"].as_u64().unwrap() > 0);
}

#[test]
fn numbers_that_make_no_sense_are_usage_errors() {
    for (args, said) in [
        (
            &["bench", "-p", "0", "-n", "0", "--decode-to", "0"][..],
            "--decode-to 0: ",
        ),
        (
            &["bench", "-p", "0", "-n", "0", "--decode-to", "4294967295"],
            "--decode-to 4294967295: ",
        ),
        (
            &["bench", "-p", "0", "-n", "4", "-d", "18446744073709551615"],
            "-d 18446744073709551615: ",
        ),
        (
            &["bench", "-p", "99999999999", "-n", "0"],
            "-p 99999999999: ",
        ),
        (&["bench", "-p", "4294967295", "-n", "0"], "-p 4294967295: "),
        (
            &["perplexity", "-p", "one two three", "--chunks", "0"],
            "--chunks 0: ",
        ),
    ] {
        let o = run(args);
        ends(&o, 2);
        assert!(err(&o).contains(said), "{}", err(&o));
    }
}
