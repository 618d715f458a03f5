//! `lemma kv`: evaluations that can be cut, go on, and come out the same whatever runs beside what.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{err, lemma, temp};
use serde_json::Value;

const PROBLEMS: &str = r#"{"id":"a","prompt":"What is 347 + 589?","answer":"936"}
{"id":"b","prompt":"12+7+5","answer":"24"}
{"id":"c","prompt":"What is 48 * 57?","answer":"1"}
"#;

fn dir(name: &str) -> PathBuf {
    let dir = temp(&format!("kv-{name}"));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("sums.jsonl"), PROBLEMS).unwrap();
    dir
}

fn eval(dir: &Path, more: &[&str]) -> Output {
    lemma(&["kv", "eval"])
        .arg(dir.join("sums.jsonl"))
        .args([
            "--policies",
            "window,random,raas",
            "--budgets",
            "64,80%,1/1",
        ])
        .args(more)
        .output()
        .unwrap()
}

/// The results without what a clock says.
fn results(out: &Output) -> Value {
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    fn strip(v: &mut Value) {
        if let Some(o) = v.as_object_mut() {
            o.retain(|k, _| k != "tokens_per_s" && k != "s_per_answer");
            o.values_mut().for_each(strip);
        }
        if let Some(list) = v.as_array_mut() {
            list.iter_mut().for_each(strip);
        }
    }
    let mut v = serde_json::from_slice(&out.stdout).unwrap();
    strip(&mut v);
    v
}

#[test]
fn the_same_whatever_runs_beside_it() {
    let dir = dir("same");
    let one = results(&eval(&dir, &["--json", "--jobs", "1"]));
    let many = results(&eval(&dir, &["--json", "--jobs", "4"]));
    assert_eq!(one, many);
    let rows = one["rows"].as_array().unwrap();
    // full; window and raas under three sizes; random too.
    assert_eq!(rows.len(), 10);
    assert_eq!(rows[0]["policy"], "full");
    assert_eq!(rows[0]["right"].to_string(), "0.6667");
    let whole = rows.iter().filter(|r| r["budget"] == "1/1");
    for r in whole {
        assert_eq!(r["minus_full"]["mean"].to_string(), "0.0", "{r}");
        assert_eq!(r["mean_reply_tokens"], rows[0]["mean_reply_tokens"], "{r}");
    }
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn goes_on_where_it_was_cut() {
    let dir = dir("cut");
    let out = dir.join("out");
    let o = ["--json", "-o", out.to_str().unwrap()];
    let whole = results(&eval(&dir, &o));
    for name in ["table.md", "results.json", "accuracy.png"] {
        assert!(out.join(name).exists(), "{name}");
    }
    assert!(
        fs::read(out.join("accuracy.png"))
            .unwrap()
            .starts_with(b"\x89PNG")
    );
    let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
    // Cut in the middle of the fifth result.
    let cut: usize = log.lines().take(5).map(|l| l.len() + 1).sum();
    fs::write(out.join("log.jsonl"), &log[..cut + 20]).unwrap();
    assert_eq!(results(&eval(&dir, &o)), whole);
    let again = fs::read_to_string(out.join("log.jsonl")).unwrap();
    assert_eq!(again.lines().count(), log.lines().count());
    // Nothing is left to do.
    results(&eval(&dir, &o));
    assert_eq!(fs::read_to_string(out.join("log.jsonl")).unwrap(), again);
    // Other options are another measurement.
    let other = eval(&dir, &["-o", out.to_str().unwrap(), "--kv-recent", "2"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(err(&other).contains("results of another options"));
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn usage() {
    let dir = dir("usage");
    for (more, said) in [
        (&["--policies", "raaz"][..], "raaz"),
        (&["--policies", "raas:alpha=2"], "alpha"),
        (&["--budgets", "7"], "budget \"7\""),
        (&["--kv-budget", "512"], "--budgets"),
    ] {
        let out = eval(&dir, more);
        let err = err(&out);
        assert_eq!(out.status.code(), Some(2), "{err}");
        assert!(err.contains(said), "{err}");
        assert!(out.stdout.is_empty());
    }
    fs::write(dir.join("sums.jsonl"), "{\"prompt\":\"x\"}\n").unwrap();
    let err = err(&eval(&dir, &[]));
    assert!(err.contains("sums.jsonl:1: "), "{err}");
    let _ = fs::remove_dir_all(dir);
}

/// An eighth of a short chain is less than a pool can have.
#[test]
fn a_share_is_two_pages_at_least() {
    let dir = dir("short");
    let file = dir.join("sums.jsonl");
    fs::write(&file, "{\"prompt\":\"12+30\",\"answer\":\"42\"}\n").unwrap();
    for what in ["eval", "replay"] {
        let args = ["kv", what, "--json", "--policies", "raas"];
        let budgets = ["--budgets", "1/8,1/2", "--seeds", "1"];
        let o = lemma(&args).arg(&file).args(budgets).output().unwrap();
        assert_eq!(o.status.code(), Some(0), "{}", err(&o));
    }
    let _ = fs::remove_dir_all(dir);
}

/// One chain of some 200 tokens.
const CHAIN: &str = "{\"prompt\":\"What is 4821 * 37?\",\"answer\":\"178377\"}\n";

fn replay(file: &Path, more: &[&str]) -> Value {
    let o = lemma(&["kv", "replay", "--json", "--policies", "window,random,raas"])
        .args(["--budgets", "1/2,1/1"])
        .arg(file)
        .args(more)
        .output()
        .unwrap();
    results(&o)
}

#[test]
fn a_replay_is_the_same_every_time_and_zero_where_nothing_is_forgotten() {
    let dir = dir("replay");
    let (file, recorded) = (dir.join("chain.jsonl"), dir.join("recorded.jsonl"));
    fs::write(&file, CHAIN).unwrap();
    let record = ["--record", recorded.to_str().unwrap(), "--jobs", "1"];
    let first = replay(&file, &record);
    let again = replay(&recorded, &["--jobs", "2"]);
    assert_eq!(first["rows"], again["rows"]);
    let number = |v: &Value| v.as_f64().unwrap();
    let mut missed = Vec::new();
    for r in first["rows"].as_array().unwrap() {
        if r["budget"] == "1/1" {
            assert_eq!((number(&r["kl"]), number(&r["missed"])), (0.0, 0.0), "{r}");
            assert_eq!(
                (number(&r["top1"]), number(&r["diverged"])),
                (1.0, 0.0),
                "{r}"
            );
            assert_eq!(number(&r["nll"]), number(&r["nll_full"]), "{r}");
        } else {
            assert!(number(&r["kl"]) > 0.0, "{r}");
            // `raas` still has all of it, in fewer bits.
            let least = if r["policy"] == "raas" { 0.0 } else { 0.001 };
            assert!((least..0.9).contains(&number(&r["missed"])), "{r}");
            missed.push((
                r["policy"].as_str().unwrap().to_owned(),
                number(&r["missed"]),
            ));
        }
    }
    let of = |name: &str| missed.iter().find(|m| m.0 == name).unwrap().1;
    assert!(of("raas") < of("random"), "{missed:?}");
    let _ = fs::remove_dir_all(dir);
}

#[test]
fn facts_are_known_in_full_and_forgotten_in_a_small_pool() {
    let o = common::run(&[
        "kv",
        "facts",
        "--json",
        "--ages",
        "64,192",
        "--chains",
        "1",
        "--budgets",
        "224",
        "--policies",
        "window",
    ]);
    let v = results(&o);
    for r in v["rows"].as_array().unwrap() {
        let right = |i: usize| r["ages"][i]["right"].as_u64().unwrap();
        if r["policy"] == "full" {
            assert_eq!((right(0), right(1)), (1, 1), "{r}");
        } else if r["variant"] == "once" {
            assert_eq!(right(1), 0, "{r}");
        }
    }
    let o = common::run(&["kv", "facts", "--ages", "1,2,3,4,5,6"]);
    common::ends(&o, 2);
}

#[test]
fn facts_are_not_older_than_the_context() {
    for (flag, n, what) in [
        ("--ages", "100000", "expected at most 16384"),
        ("--ages", "4294967295", "expected at most 16384"),
        ("--chains", "0", "--chains"),
        ("--chains", "18446744073709551615", "--chains"),
    ] {
        let o = lemma(&["kv", "facts", flag, n]).output().unwrap();
        assert_eq!(o.status.code(), Some(2), "{}", err(&o));
        assert!(err(&o).contains(what), "{}", err(&o));
    }
}
