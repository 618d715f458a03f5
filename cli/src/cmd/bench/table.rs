//! The results of `lemma bench`, as a table or for programs.

use std::io::Write as _;

use serde_json::{Map, Value};

use crate::args::tools::BenchFormat;
use crate::fail::Result;
use crate::stats::grouped;
use crate::term::{Term, escape};
use crate::{out, record, repl};

/// Rows in the form that was asked for, each written when it is there.
pub(super) struct Table {
    format: BenchFormat,
    term: Term,
    n: usize,
    /// Tokens a second that memory would stream, for each number of threads, if it was measured.
    pub(super) ceilings: Vec<(Option<usize>, f64)>,
}

const CSV: &[&str] = &[
    "test",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "backend",
    "n_threads",
    "n_batch",
    "n_ubatch",
    "type_k",
    "type_v",
    "kv_policy",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "resident_bytes",
    "read_gb_s",
    "copy_gb_s",
    "of_ceiling",
    "vs_avg_ts",
    "vs_ratio",
];

impl Table {
    pub(super) fn new(format: BenchFormat, term: Term) -> Self {
        Self {
            format,
            term,
            n: 0,
            ceilings: Vec::new(),
        }
    }

    /// What part of the ceiling a row of decoding comes to.
    fn share(&self, row: &Map<String, Value>) -> Option<f64> {
        let n_threads = row.get("n_threads")?.as_u64().map(|n| n as usize);
        let (_, most) = self.ceilings.iter().find(|(n, _)| *n == n_threads)?;
        let decodes = row.get("n_gen")?.as_u64()? > 0;
        let rate = row.get("avg_ts")?.as_f64()?;
        decodes.then_some(rate / most)
    }

    pub(super) fn row(&mut self, mut row: Map<String, Value>) -> Result {
        if let Some(share) = self.share(&row) {
            row.insert("of_ceiling".into(), record::number(share));
        }
        out::erase(&self.term);
        let first = self.n == 0;
        self.n += 1;
        match self.format {
            BenchFormat::Json => out::put(&format!(
                "{}{}",
                if first { "[\n" } else { ",\n" },
                record::pretty(&Value::Object(row))
            )),
            BenchFormat::Jsonl => out::json(&Value::Object(row)),
            BenchFormat::Csv => {
                if first {
                    out::line(&CSV.join(","))?;
                }
                let cell = |key: &&str| match row.get(*key) {
                    None | Some(Value::Null) => String::new(),
                    Some(Value::String(s)) => format!("\"{}\"", s.replace('"', "\"\"")),
                    Some(v) => v.to_string(),
                };
                out::line(&CSV.iter().map(cell).collect::<Vec<_>>().join(","))
            }
            BenchFormat::Md => self.markdown(&row, first),
        }
    }

    fn markdown(&self, row: &Map<String, Value>, first: bool) -> Result {
        let text = |key: &str| {
            row.get(key)
                .and_then(Value::as_str)
                .unwrap_or("")
                .to_owned()
        };
        let float = |key: &str| row.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        let int = |key: &str| row.get(key).and_then(Value::as_u64);
        if first {
            let more = match self.ceilings.is_empty() {
                true => ["", ""],
                false => [" of ceiling |", " ---------: |"],
            };
            out::line(&format!(
                "| model                          |       size |     params | threads |            test |                  t/s |   resident |{}",
                more[0]
            ))?;
            out::line(&format!(
                "| ------------------------------ | ---------: | ---------: | ------: | --------------: | -------------------: | ---------: |{}",
                more[1]
            ))?;
        }
        let threads = int("n_threads").map_or("auto".to_owned(), |n| n.to_string());
        let share = match (self.ceilings.is_empty(), row.get("of_ceiling")) {
            (true, _) => String::new(),
            (false, None) => format!(" {:>10} |", ""),
            (false, Some(s)) => format!(" {:>8.0} % |", 100.0 * s.as_f64().unwrap_or(0.0)),
        };
        let gbs = [
            ("memory reads", "read_gb_s"),
            ("memory copies", "copy_gb_s"),
        ];
        let found = gbs.map(|(name, key)| Some((name, row.get(key)?.as_f64()?)));
        for (name, gb) in found.into_iter().flatten() {
            out::line(&format!(
                "| {name:<30} | {:>10} | {:>10} | {threads:>7} | {:>15} | {gb:>15.2} GB/s | {:>10} |{share}",
                "", "", "ceiling", ""
            ))?;
        }
        if found[0].is_some() {
            return Ok(());
        }
        let params = match int("model_n_params").unwrap_or(0) {
            n if n >= 1_000_000_000 => format!("{:.2} B", n as f64 / 1e9),
            n => format!("{:.2} M", n as f64 / 1e6),
        };
        let resident = int("resident_bytes").map_or(String::new(), repl::size);
        let mut rate = format!("{:.2} ± {:.2}", float("avg_ts"), float("stddev_ts"));
        if row.contains_key("kv_recycled") {
            rate = format!("{:.2}", float("avg_ts"));
        }
        if let Some(ratio) = row.get("vs_ratio").and_then(Value::as_f64) {
            rate = format!(
                "{:.2} : {:.2} = {ratio:.2}",
                float("avg_ts"),
                float("vs_avg_ts")
            );
        }
        out::line(&format!(
            "| {:<30} | {:>10} | {params:>10} | {threads:>7} | {:>15} | {rate:>20} | {resident:>10} |{share}",
            escape(&text("model_type")),
            repl::size(int("model_size").unwrap_or(0)),
            text("test"),
        ))
    }

    pub(super) fn finish(self) -> Result {
        if self.format == BenchFormat::Json {
            out::put(if self.n == 0 { "[]\n" } else { "\n]\n" })?;
        } else if self.n == 0 {
            out::note(&format!("nothing to measure: {} tests", grouped(0)));
        }
        let _ = std::io::stdout().flush();
        Ok(())
    }
}
