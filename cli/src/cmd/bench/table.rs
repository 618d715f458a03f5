//! The results of `lemma bench`, as a table or for programs.

use std::io::Write as _;

use serde_json::{Map, Value};

use crate::args::tools::BenchFormat;
use crate::fail::Result;
use crate::stats::grouped;
use crate::term::{Term, escape};
use crate::{out, repl};

/// Rows in the form that was asked for, each written when it is there.
pub(super) struct Table {
    format: BenchFormat,
    term: Term,
    n: usize,
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
    "vs_avg_ts",
    "vs_ratio",
];

impl Table {
    pub(super) fn new(format: BenchFormat, term: Term) -> Self {
        Self { format, term, n: 0 }
    }

    pub(super) fn row(&mut self, row: Map<String, Value>) -> Result {
        if self.term.err_tty {
            out::err("\r\x1b[K");
        }
        let first = self.n == 0;
        self.n += 1;
        match self.format {
            BenchFormat::Json => out::put(&format!(
                "{}{:#}",
                if first { "[\n" } else { ",\n" },
                Value::Object(row)
            )),
            BenchFormat::Jsonl => out::line(&Value::Object(row).to_string()),
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
            out::line(
                "| model                          |       size |     params | threads |            test |                  t/s |   resident |",
            )?;
            out::line(
                "| ------------------------------ | ---------: | ---------: | ------: | --------------: | -------------------: | ---------: |",
            )?;
        }
        let threads = int("n_threads").map_or("auto".to_owned(), |n| n.to_string());
        if let Some(gb) = row.get("read_gb_s").and_then(Value::as_f64) {
            return out::line(&format!(
                "| {:<30} | {:>10} | {:>10} | {threads:>7} | {:>15} | {gb:>15.2} GB/s | {:>10} |",
                "memory reads", "", "", "ceiling", ""
            ));
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
            "| {:<30} | {:>10} | {params:>10} | {threads:>7} | {:>15} | {rate:>20} | {resident:>10} |",
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
