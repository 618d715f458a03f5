//! The tables of an evaluation, as Markdown and as JSON.

use std::collections::{BTreeMap, BTreeSet};

use lemma_engine::eval::grid::Budget;
use lemma_engine::eval::problem::Problem;
use lemma_engine::eval::summary::{ByProblem, Difference, difference, means};
use lemma_engine::options::KvOptions;
use serde_json::{Map, Value, json};

use super::facts::Facts;
use super::plot;
use crate::args::kv::EvalArgs;
use crate::fail::{Failure, Result};
use crate::out;

/// A policy with a budget: one row of the table.
pub(super) struct Column {
    /// The policy with its options.
    pub(super) label: String,
    /// The policy.
    pub(super) policy: &'static str,
    /// `None` for a policy that keeps everything.
    pub(super) budget: Option<Budget>,
    pub(super) n_seeds: usize,
    pub(super) results: ByProblem,
}

impl Column {
    pub(super) fn new(label: String, policy: &'static str, budget: Option<Budget>) -> Self {
        Self {
            label,
            policy,
            budget,
            n_seeds: 0,
            results: ByProblem::new(),
        }
    }

    pub(super) fn budget_name(&self) -> String {
        self.budget.map_or("–".to_owned(), |b| b.to_string())
    }
}

/// Everything that was found.
pub(super) struct Report {
    header: Value,
    pub(super) columns: Vec<Column>,
    /// Problems by set.
    sets: BTreeMap<String, usize>,
    n_wanted: usize,
    /// Planted facts, if they were asked for.
    pub(super) facts: Option<Facts>,
}

/// The controls that a policy is compared with at equal bytes.
const CONTROLS: [&str; 2] = ["window", "random"];

impl Report {
    pub(super) fn new<'a>(
        header: Value,
        columns: Vec<Column>,
        problems: impl Iterator<Item = &'a Problem>,
        n_cells: usize,
    ) -> Self {
        let mut sets = BTreeMap::new();
        for p in problems {
            *sets.entry(p.set.clone()).or_insert(0) += 1;
        }
        let n_wanted = n_cells * sets.values().sum::<usize>();
        Self {
            header,
            columns,
            sets,
            n_wanted,
            facts: None,
        }
    }

    /// To stdout, and to the files of the directory.
    pub(super) fn write(&self, args: &EvalArgs) -> Result {
        let (json, table) = (self.json(), self.markdown());
        if let Some(dir) = &args.output {
            let write = |name: &str, data: &[u8]| {
                let path = dir.join(name);
                std::fs::write(&path, data).map_err(|e| Failure::file(&path, &e))
            };
            let pretty = format!("{}\n", crate::record::pretty(&json));
            write("results.json", pretty.as_bytes())?;
            write("table.md", table.as_bytes())?;
            if let Some(png) = plot::accuracy(self) {
                write("accuracy.png", &png)?;
            }
        }
        if args.json {
            out::json(&json)
        } else {
            out::put(&table)
        }
    }

    fn full(&self) -> Option<&Column> {
        self.columns.iter().find(|c| c.policy == "full")
    }

    /// The control of a name at the same budget.
    fn control(&self, name: &str, of: &Column) -> Option<&Column> {
        self.columns
            .iter()
            .find(|c| c.label == name && c.budget == of.budget && c.label != of.label)
    }

    /// The paired difference against another column.
    fn versus(&self, a: &Column, b: Option<&Column>) -> Option<Difference> {
        difference(&a.results, &b?.results)
    }

    fn n_done(&self) -> usize {
        let runs = self.columns.iter().flat_map(|c| c.results.values());
        runs.map(Vec::len).sum()
    }

    /// Results of a column within a set.
    pub(super) fn within(&self, column: &Column, set: &str) -> ByProblem {
        let own = column.results.iter().filter(|((s, _), _)| s == set);
        own.map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    pub(super) fn set_names(&self) -> impl Iterator<Item = &str> {
        self.sets.keys().map(String::as_str)
    }

    pub(super) fn model_name(&self) -> &str {
        self.header["model"]["name"].as_str().unwrap_or_default()
    }

    fn json(&self) -> Value {
        let difference = |d: Option<Difference>| d.map_or(Value::Null, |d| d.to_json());
        let rows: Vec<Value> = self
            .columns
            .iter()
            .map(|c| {
                let mut row = Map::new();
                row.insert("policy".into(), c.label.as_str().into());
                row.insert(
                    "budget".into(),
                    c.budget.map_or(Value::Null, |b| b.to_string().into()),
                );
                row.insert("seeds".into(), c.n_seeds.into());
                if let Value::Object(m) = means(&c.results).to_json() {
                    row.extend(m);
                }
                if c.budget.is_some() {
                    row.insert("minus_full".into(), difference(self.versus(c, self.full())));
                }
                for name in CONTROLS {
                    if let Some(control) = self.control(name, c) {
                        let d = self.versus(c, Some(control));
                        row.insert(format!("minus_{name}"), difference(d));
                    }
                }
                let sets = self
                    .set_names()
                    .map(|s| (s.to_owned(), means(&self.within(c, s)).to_json()));
                row.insert("sets".into(), Value::Object(sets.collect()));
                Value::Object(row)
            })
            .collect();
        json!({
            "v": 1,
            "run": self.header,
            "problems": self.sets,
            "results": self.n_done(),
            "results_wanted": self.n_wanted,
            "rows": rows,
            "facts": self.facts.as_ref().map(Facts::json),
        })
    }

    fn markdown(&self) -> String {
        let n: usize = self.sets.values().sum();
        let mut text = format!(
            "# KV policies on {}\n\n{n} problems of {} sets, {} results{}. \
             Sizes are tokens, or shares of prompt and reply; the prompt counts. \
             Intervals: 95 %, paired bootstrap over problems. \
             Speed is that of one thread beside others.\n",
            self.model_name(),
            self.sets.len(),
            self.n_done(),
            match self.n_wanted - self.n_done() {
                0 => String::new(),
                n => format!(" ({n} are missing)"),
            },
        );
        text.push_str("\n## All problems\n\n");
        text.push_str(&self.main_table());
        if let Some(table) = self.control_table() {
            text.push_str("\n## Against the controls, equal bytes\n\n");
            text.push_str(&table);
        }
        if self.sets.len() > 1 {
            text.push_str("\n## Right answers by set\n\n");
            text.push_str(&self.set_table());
        }
        if let Some(facts) = &self.facts {
            text.push_str("\n## Planted facts\n\n");
            text.push_str(&facts.markdown());
        }
        text
    }

    fn main_table(&self) -> String {
        let mut t = Table::new(&[
            "policy",
            "size",
            "right",
            "minus full",
            "reply tokens",
            "finished",
            "recycling",
            "KV MiB mean",
            "peak",
            "tok/s",
            "s/answer",
            "n",
        ]);
        for c in self.columns.iter().filter(|c| !c.results.is_empty()) {
            let m = means(&c.results);
            let mib = |b: f64| format!("{:.2}", b / f64::from(1 << 20));
            let against = match c.budget {
                None => String::new(),
                Some(_) => self.versus(c, self.full()).map_or(String::new(), show),
            };
            let mut fits = String::new();
            if m.fits < 0.9999 {
                fits = format!(" ({:.0} % no room)", (1.0 - m.fits) * 100.0);
            }
            t.row(vec![
                c.label.clone(),
                c.budget_name(),
                format!("{:.3}{fits}", m.right),
                against,
                format!("{:.0}", m.reply),
                percent(m.finished),
                percent(m.recycling),
                mib(m.kv_bytes),
                mib(m.peak_bytes as f64),
                format!("{:.0}", m.tps),
                format!("{:.2}", m.seconds),
                m.n.to_string(),
            ]);
        }
        t.text()
    }

    /// Every policy that is no control against each control.
    fn control_table(&self) -> Option<String> {
        let present: Vec<&str> = CONTROLS
            .into_iter()
            .filter(|n| self.columns.iter().any(|c| c.label == *n))
            .collect();
        let titles: Vec<String> = ["policy".into(), "size".into()]
            .into_iter()
            .chain(present.iter().map(|n| format!("minus {n}")))
            .collect();
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        let mut t = Table::new(&titles);
        let others = self
            .columns
            .iter()
            .filter(|c| c.budget.is_some() && !c.results.is_empty())
            .filter(|c| !present.contains(&c.label.as_str()));
        for c in others {
            let mut cells = vec![mark_default(c), c.budget_name()];
            cells.extend(present.iter().map(|name| {
                let control = self.control(name, c);
                self.versus(c, control).map_or(String::new(), show)
            }));
            t.row(cells);
        }
        (!present.is_empty() && !t.rows.is_empty()).then(|| t.text())
    }

    fn set_table(&self) -> String {
        let names: Vec<&str> = self.set_names().collect();
        let titles: Vec<&str> = ["policy", "size"]
            .into_iter()
            .chain(names.iter().copied())
            .collect();
        let mut t = Table::new(&titles);
        for c in self.columns.iter().filter(|c| !c.results.is_empty()) {
            let mut cells = vec![c.label.clone(), c.budget_name()];
            cells.extend(names.iter().map(|set| {
                let m = means(&self.within(c, set));
                match m.n {
                    0 => String::new(),
                    _ if m.fits == 0.0 => "*".to_owned(),
                    _ => format!("{:.2}", m.right),
                }
            }));
            t.row(cells);
        }
        let mut text = t.text();
        if text.contains("| *") {
            text.push_str("\n`*`: no prompt fits the pool; counted as unsolved.\n");
        }
        text
    }

    /// Budgets of the grid in order: labels of the axis.
    pub(super) fn budgets(&self) -> Vec<Budget> {
        let all: BTreeSet<Budget> = self.columns.iter().filter_map(|c| c.budget).collect();
        all.into_iter().collect()
    }
}

/// The name of a column, bold if it is the policy in force by default.
fn mark_default(c: &Column) -> String {
    if c.label == KvOptions::default().policy {
        format!("**{}**", c.label)
    } else {
        c.label.clone()
    }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// `−0.120 [−0.180, −0.060]`
fn show(d: Difference) -> String {
    let signed = |x: f64| format!("{x:+.3}").replace('-', "−");
    format!("{} [{}, {}]", signed(d.mean), signed(d.low), signed(d.high))
}

/// A Markdown table whose columns are aligned in the source as well.
pub(super) struct Table {
    titles: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(titles: &[&str]) -> Self {
        Self {
            titles: titles.iter().map(|t| (*t).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(super) fn text(&self) -> String {
        let width = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i));
            let all = cells.chain(self.titles.get(i));
            all.map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.titles.len()).map(width).collect();
        let line = |cells: &[String]| {
            let padded = cells
                .iter()
                .zip(&widths)
                .map(|(c, &w)| format!(" {c}{} |", " ".repeat(w - c.chars().count())));
            format!("|{}\n", padded.collect::<String>())
        };
        let rule: String = widths
            .iter()
            .map(|w| format!("{}|", "-".repeat(w + 2)))
            .collect();
        let mut text = line(&self.titles);
        text.push_str(&format!("|{rule}\n"));
        for r in &self.rows {
            text.push_str(&line(r));
        }
        text
    }
}
