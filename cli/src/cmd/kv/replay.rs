//! `lemma kv replay`: chains that are given, under a grid of policies, beside the full cache.

use std::collections::BTreeMap;
use std::io::Write as _;

use lemma_engine::conversation::think_tags;
use lemma_engine::eval::fingerprint;
use lemma_engine::eval::grid::{Cell, Contender, cells};
use lemma_engine::eval::problem::Problem;
use lemma_engine::eval::replay::{Divergence, Replayed, Trace, replay};
use lemma_engine::eval::solve::{Setting, Task};
use lemma_engine::eval::workers;
use lemma_engine::sampling::SamplerParams;
use serde_json::{Value, json};

use super::progress::Progress;
use super::report::Table;
use super::{budgets, contenders, describe_options, items, n_jobs, refuse_pool_flags};
use crate::args::Invocation;
use crate::args::config;
use crate::args::kv::ReplayArgs;
use crate::fail::{Failure, Result};
use crate::signals::Polling;
use crate::term::Term;
use crate::{load, out};

/// A line of input.
enum Source {
    Problem(Box<Problem>),
    Trace(Trace),
}

/// A chain to make or to read.
enum Job {
    Task(Box<Task>),
    Trace(Trace),
}

/// What came of a chain: itself, and each cell of the grid over it.
type Read = (Trace, Vec<Replayed>);

/// The run.
struct Replay {
    setting: Setting,
    contenders: Vec<Contender>,
    cells: Vec<Cell>,
    jobs: Vec<Job>,
}

pub(crate) fn run(args: &ReplayArgs, invocation: &Invocation, term: Term) -> Result {
    refuse_pool_flags(invocation)?;
    let source =
        config::model_source(args.model.model.as_ref(), invocation.model_from_env(), None)?;
    let load = config::load_options(&args.model, &args.kv, &args.compute)?;
    let contenders = contenders(&args.grid.policies, &load.kv)?;
    let budgets = budgets(&args.grid.budgets)?;
    let parse = |line: &str, set: &str, number| match Trace::parse(line, set, number) {
        Some(trace) => Ok(Source::Trace(trace)),
        None => Ok(Source::Problem(Box::new(Problem::parse(
            line, set, number,
        )?))),
    };
    let id = |s: &Source| match s {
        Source::Problem(p) => p.id.clone(),
        Source::Trace(t) => format!("{} {}", t.set, t.id),
    };
    let sources = items(&args.files, args.grid.limit, &parse, &id)?;
    let model = load::model(&source, &load)?.model;
    let setting = Setting {
        tags: think_tags(&model),
        model,
        load,
        sampling: SamplerParams {
            temp: 0.0,
            seed: Some(0),
            ..SamplerParams::default()
        },
        n_predict: args.grid.n_predict,
    };
    let jobs = sources.into_iter().map(|s| match s {
        Source::Problem(p) => Ok(Job::Task(Box::new(setting.task(*p)?))),
        Source::Trace(t) => Ok(Job::Trace(t)),
    });
    let jobs = jobs.collect::<Result<Vec<_>>>()?;
    // full beside itself says nothing.
    let cells = cells(&contenders, &budgets, args.seeds.max(1), false);
    let cells = cells.into_iter().filter(|c| c.budget.is_some()).collect();
    let replay = Replay {
        setting,
        contenders,
        cells,
        jobs,
    };
    let polling = Polling::begin();
    let progress = Progress::new(term, args.common.verbose, replay.work(), replay.jobs.len());
    let read = replay.run(n_jobs(args.grid.jobs), progress);
    drop(polling);
    let read = read?;
    if let Some(path) = &args.record {
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(path)?;
            let lines = read
                .iter()
                .map(|(trace, _)| format!("{}\n", crate::record::text(&trace.to_json())));
            file.write_all(lines.collect::<String>().as_bytes())
        };
        write().map_err(|e| Failure::file(path, &e))?;
    }
    if args.json {
        out::json(&replay.json(&read))
    } else {
        out::put(&replay.markdown(&read))
    }
}

impl Replay {
    /// Tokens of all chains, more or less.
    fn work(&self) -> f64 {
        self.jobs.iter().map(Job::work).sum()
    }

    /// Reads every chain; results in the order of the input, whatever runs beside what.
    fn run(&self, n_jobs: usize, mut progress: Progress) -> Result<Vec<Read>> {
        let mut read: BTreeMap<usize, Read> = BTreeMap::new();
        let mut failure = None;
        let jobs: Vec<(usize, &Job)> = self.jobs.iter().enumerate().collect();
        let work = |&(_, job): &(usize, &Job), stop: &dyn Fn() -> bool| self.read(job, stop);
        workers::run(n_jobs, &jobs, work, |event| {
            match event {
                Some(((i, job), Ok(Some(result)))) => {
                    progress.done(job.work());
                    read.insert(*i, result);
                }
                Some((_, Err(e))) => {
                    failure.get_or_insert(e);
                }
                Some((_, Ok(None))) | None => {}
            }
            progress.paint("chain");
            super::go_on(failure.as_ref())
        });
        progress.clear();
        super::ended(failure)?;
        Ok(read.into_values().collect())
    }

    fn read(&self, job: &Job, stop: &dyn Fn() -> bool) -> Result<Option<Read>> {
        let made;
        let trace = match job {
            Job::Trace(t) => t,
            Job::Task(task) => {
                made = self.setting.trace(task, stop)?;
                match &made {
                    Some(t) => t,
                    None => return Ok(None),
                }
            }
        };
        let options = |c: &Cell| {
            let contender = &self.contenders[c.contender];
            let tokens = c.budget.map(|b| contender.tokens(b, trace.tokens.len()));
            contender.options(tokens, c.seed)
        };
        let options: Vec<_> = self.cells.iter().map(options).collect();
        let (model, load) = (&self.setting.model, &self.setting.load);
        let read = replay(model, load, trace, &options, stop)?;
        Ok(read.map(|r| (trace.clone(), r)))
    }

    /// Cells of one policy and budget: `(label, budget, indices of the cells of its seeds)`.
    fn rows(&self) -> Vec<(&str, String, Vec<usize>)> {
        let mut rows: Vec<(&str, String, Vec<usize>)> = Vec::new();
        for (i, c) in self.cells.iter().enumerate() {
            let label = self.contenders[c.contender].label.as_str();
            let budget = c.budget.map_or_else(String::new, |b| b.to_string());
            match rows.iter_mut().find(|r| r.0 == label && r.1 == budget) {
                Some(r) => r.2.push(i),
                None => rows.push((label, budget, vec![i])),
            }
        }
        rows
    }

    fn json(&self, read: &[Read]) -> Value {
        let text = |id: u32| {
            let bytes = self.setting.model.tokenizer().decode(&[id], false, true);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let divergence =
            |d: Divergence| json!({ "pos": d.pos, "full": text(d.full), "policy": text(d.policy) });
        let rows: Vec<Value> = self
            .rows()
            .into_iter()
            .map(|(label, budget, cells)| {
                let all = Summary::of(read, &cells);
                let chains: Vec<Value> = read
                    .iter()
                    .flat_map(|(t, r)| cells.iter().map(move |&c| (t, &r[c], self.cells[c].seed)))
                    .map(|(t, r, seed)| {
                        let mut v = r.to_json();
                        v["set"] = t.set.as_str().into();
                        v["id"] = t.id.as_str().into();
                        v["seed"] = seed.into();
                        v["first_divergence"] = r.first.map(divergence).into();
                        v
                    })
                    .collect();
                let mut v = all.sum.to_json();
                v["policy"] = label.into();
                v["budget"] = budget.into();
                v["diverged"] = all.diverged.len().into();
                v["no_room"] = all.no_room.into();
                v["chains"] = chains.into();
                if let Some(o) = v.as_object_mut() {
                    o.remove("first_divergence");
                }
                v
            })
            .collect();
        json!({
            "v": 1,
            "kind": "kv replay",
            "model": { "name": self.setting.model.name(), "fingerprint": fingerprint(&self.setting.model) },
            "options": describe_options(&self.setting.load),
            "auto": self.setting.model.what_auto_means(&self.setting.load),
            "chains": read.len(),
            "tokens": read.iter().map(|(t, _)| t.tokens.len() - t.n_prompt).sum::<usize>(),
            "rows": rows,
        })
    }

    fn markdown(&self, read: &[Read]) -> String {
        let tokens: usize = read.iter().map(|(t, _)| t.tokens.len() - t.n_prompt).sum();
        let mut text = format!(
            "# Replay on {}\n\n{} chains, {tokens} tokens. KL (from full) and NLL in nats a token; top-1: share of tokens whose best \
             candidate is the same; missed: share of full's attention on pages that were recycled; first: position in the reply at which \
             the best candidate first differs (median).\n\n",
            self.setting.model.name(),
            read.len(),
        );
        let mut t = Table::new(&[
            "policy",
            "size",
            "KL",
            "max KL",
            "NLL − full",
            "top-1",
            "missed",
            "diverged",
            "first",
            "no room",
        ]);
        for (label, budget, cells) in self.rows() {
            let s = Summary::of(read, &cells);
            let n = s.sum.n.max(1) as f64;
            let mut row = vec![label.to_owned(), budget];
            if s.sum.n == 0 {
                row.extend((0..7).map(|_| String::new()));
            } else {
                row.extend([
                    format!("{:.5}", s.sum.kl / n),
                    format!("{:.2}", s.sum.kl_max),
                    format!("{:+.5}", (s.sum.nll - s.sum.nll_full) / n).replace('-', "−"),
                    format!("{:.2} %", 100.0 * s.sum.agree as f64 / n),
                    format!(
                        "{:.3} %",
                        100.0 * s.sum.missed / s.sum.n_steps.max(1) as f64
                    ),
                    format!("{} of {}", s.diverged.len(), s.n),
                    s.median().map_or(String::new(), |m| m.to_string()),
                ]);
            }
            row.push(match s.no_room {
                0 => String::new(),
                n => n.to_string(),
            });
            t.row(row);
        }
        text.push_str(&t.text());
        text
    }
}

/// Sums over chains and seeds.
struct Summary {
    sum: Replayed,
    /// Replays that took place.
    n: usize,
    /// Places of the first divergence within the reply, in order.
    diverged: Vec<usize>,
    /// Chains whose prompt does not fit.
    no_room: usize,
}

impl Summary {
    fn of(read: &[Read], cells: &[usize]) -> Self {
        let mut s = Self {
            sum: Replayed::default(),
            n: 0,
            diverged: Vec::new(),
            no_room: 0,
        };
        for (trace, results) in read {
            for r in cells.iter().map(|&c| &results[c]) {
                if !r.fits {
                    s.no_room += 1;
                    continue;
                }
                s.n += 1;
                s.sum.add(r);
                s.diverged.extend(r.first.map(|d| d.pos - trace.n_prompt));
            }
        }
        s.diverged.sort_unstable();
        s
    }

    fn median(&self) -> Option<usize> {
        self.diverged.get(self.diverged.len() / 2).copied()
    }
}

impl Job {
    fn work(&self) -> f64 {
        match self {
            Job::Trace(t) => (t.tokens.len() - t.n_prompt) as f64,
            Job::Task(task) => {
                let known = task.problem.reply_tokens(task.prompt.tokens.len());
                known.unwrap_or(1000) as f64
            }
        }
    }
}
