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
