//! `lemma bench --vs COMMAND`: another program, measured in turn with this one.
//!
//! Machines are noisy for seconds at a time; two programs measured one after the other meet different machines. So each round
//! runs every test once here and the command once, and what counts is the median of the rounds' ratios.

use std::collections::HashMap;
use std::process::{Command, Stdio};

use serde_json::{Map, Value};

use super::table::Table;
use super::{Bench, Measured, Test, mean};
use crate::fail::{Failure, Result};
use crate::term::escape;
use crate::{out, record};

/// What tells tests apart: `(n_prompt, n_gen, n_depth)`.
type Key = (u64, u64, u64);

impl Test {
    fn key(&self) -> Key {
        (self.n_prompt as u64, self.n_gen as u64, self.n_depth as u64)
    }
}

/// Runs all rounds and writes a row for each test, with the other's numbers and the ratios.
pub(super) fn alternate(bench: &Bench, tests: &[Test], command: &str, table: &mut Table) -> Result {
    let mut ours: Vec<Option<Measured>> = tests.iter().map(|_| None).collect();
    let mut theirs: HashMap<Key, Vec<f64>> = HashMap::new();
    for round in 1..=bench.repetitions {
        for (test, ours) in tests.iter().zip(&mut ours) {
            let m = bench.measure(test, 1)?;
            match ours {
                Some(all) => all.ns.extend(m.ns),
                None => *ours = Some(m),
            }
        }
        bench.progress(&format!(
            "{}: {round} of {}",
            escape(command),
            bench.repetitions
        ));
        for (key, rate) in results(command, &output(command)?)? {
            theirs.entry(key).or_default().push(rate);
        }
        bench.progress("");
    }
    for m in ours.into_iter().flatten() {
        let (name, rates) = (m.test.name(), m.rates());
        let other = theirs.get(&m.test.key()).filter(|o| o.len() == rates.len());
        let mut row = m.row();
        match other {
            Some(other) => compare(&mut row, &rates, other),
            None => out::note(&format!("{name}: not among the results of the command")),
        }
        table.row(row)?;
    }
    Ok(())
}

fn compare(row: &mut Map<String, Value>, ours: &[f64], theirs: &[f64]) {
    let mut ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    ratios.sort_by(f64::total_cmp);
    let numbers = |x: &[f64]| x.iter().map(|&x| record::number(x)).collect::<Value>();
    row.insert("vs_avg_ts".into(), record::number(mean(theirs).0));
    row.insert("vs_samples_ts".into(), numbers(theirs));
    row.insert("vs_ratio".into(), record::number(median(&ratios)));
    row.insert("vs_ratios".into(), numbers(&ratios));
}

/// The middle of sorted numbers.
fn median(sorted: &[f64]) -> f64 {
    let n = sorted.len();
    match n {
        0 => f64::NAN,
        _ => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
    }
}

/// What the command prints.
fn output(command: &str) -> Result<String> {
    let (shell, flag) = if cfg!(windows) {
        ("cmd", "/C")
    } else {
        ("sh", "-c")
    };
    let result = Command::new(shell)
        .args([flag, command])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Failure::runtime(format!("{shell}: {}", crate::fail::plain(&e))))?;
    if !result.status.success() {
        let stderr = String::from_utf8_lossy(&result.stderr);
        let last = stderr.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("");
        let mut what = format!("{}: {}", escape(command), result.status);
        if !last.is_empty() {
            what.push_str(&format!(": {}", escape(last)));
        }
        return Err(Failure::runtime(what));
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}

/// Tests and rates in a JSON array of results, or in lines of one result each.
fn results(command: &str, text: &str) -> Result<Vec<(Key, f64)>> {
    let rows = match serde_json::from_str(text.trim()) {
        Ok(Value::Array(rows)) => rows,
        _ => text
            .lines()
            .filter_map(|l| serde_json::from_str(l).ok())
            .collect(),
    };
    let found: Vec<_> = rows
        .iter()
        .filter_map(|row| {
            let int = |key: &str| row.get(key).and_then(Value::as_u64).unwrap_or(0);
            let rate = row.get("avg_ts")?.as_f64().filter(|r| *r > 0.0)?;
            Some(((int("n_prompt"), int("n_gen"), int("n_depth")), rate))
        })
        .collect();
    if found.is_empty() {
        return Err(Failure::runtime(format!(
            "{}: printed no results, expected JSON as of llama-bench -o json",
            escape(command)
        )));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_results() {
        let array = r#"[{"n_prompt":256,"n_gen":0,"n_depth":0,"avg_ts":105.5},{"n_prompt":0,"n_gen":48,"avg_ts":31.0}]"#;
        let want = [((256, 0, 0), 105.5), ((0, 48, 0), 31.0)];
        assert_eq!(results("x", array).ok().unwrap(), want);
        let lines = array[1..array.len() - 1].replace("},{", "}\nnoise\n{");
        assert_eq!(results("x", &lines).ok().unwrap(), want);
        for nothing in ["", "[]", "error", r#"[{"avg_ts":0}]"#] {
            assert!(results("x", nothing).is_err(), "{nothing}");
        }
    }

    #[test]
    fn ratios_are_paired() {
        let mut row = Map::new();
        compare(&mut row, &[10.0, 20.0, 60.0], &[10.0, 10.0, 20.0]);
        assert_eq!(row["vs_ratio"].as_f64(), Some(2.0));
        assert_eq!(median(&[1.0, 3.0]), 2.0);
    }

    #[test]
    fn a_command_that_fails_says_why() {
        let failed = output("echo one >&2; echo two >&2; exit 3").err().unwrap();
        assert!(format!("{failed:?}").contains("two"));
        assert_eq!(output("echo 7").ok().unwrap(), "7\n");
    }
}
