//! `lemma kv eval`: problems under a grid of policies, pool sizes and seeds.
//!
//! Every problem is solved under `full` first: that is what the others are measured against, where shares of a chain of unknown length
//! come from, and the result under any pool that the chain fits, since policies agree bit for bit until the first page is recycled.
//! Then come the cells, side by side, one problem a core, each with a session and a pool of its own over the one mapped model.

use std::collections::HashMap;

use lemma_engine::conversation::think_tags;
use lemma_engine::error::Error as EngineError;
use lemma_engine::eval::facts::Form;
use lemma_engine::eval::grid::{Budget, Cell, Contender, cells};
use lemma_engine::eval::solve::{Lengths, Setting, Solved, Task};
use lemma_engine::eval::{fingerprint, text_hash, workers};
use lemma_engine::model::Model;
use serde_json::{Value, json};

use super::facts::{self, Facts};
use super::log::Log;
use super::progress::Progress;
use super::report::{Column, Report};
use super::{budgets, contenders, describe_options, n_jobs, problems, refuse_pool_flags};
use crate::args::Invocation;
use crate::args::config;
use crate::args::kv::EvalArgs;
use crate::fail::{Failure, Result};
use crate::signals::Polling;
use crate::term::Term;
use crate::{load, sampling};

/// A problem in a cell.
struct Job {
    task: usize,
    cell: Cell,
    lengths: Lengths,
    /// Tokens that it will take, more or less.
    work: f64,
}

/// A run of the grid.
struct Eval {
    setting: Setting,
    tasks: Vec<Task>,
    contenders: Vec<Contender>,
    log: Log,
    n_jobs: usize,
    term: Term,
    verbose: bool,
    results: HashMap<(usize, Cell), Solved>,
}

pub(crate) fn run(args: &EvalArgs, invocation: &Invocation, term: Term) -> Result {
    refuse_pool_flags(invocation)?;
    let source =
        config::model_source(args.model.model.as_ref(), invocation.model_from_env(), None)?;
    let load = config::load_options(&args.model, &args.kv, &args.compute)?;
    let contenders = contenders(&args.grid.policies, &load.kv)?;
    let budgets = budgets(&args.grid.budgets)?;
    let problems = problems(&args.files, args.grid.limit)?;
    let model = load::model(&source, &load)?.model;
    let sampling = sampling_params(invocation, &model)?;
    let sampled = sampling.temp > 0.0;
    let header = header(&model, &load, &sampling, args);
    if let Some(dir) = &args.output {
        std::fs::create_dir_all(dir).map_err(|e| Failure::file(dir, &e))?;
    }
    let log_path = args.output.as_ref().map(|d| d.join("log.jsonl"));
    let log = Log::open(log_path.as_deref(), &header)?;
    let setting = Setting {
        tags: think_tags(&model),
        model,
        load,
        sampling,
        n_predict: args.grid.n_predict,
    };
    let tasks = problems.into_iter().map(|p| setting.task(p));
    let tasks = tasks.collect::<std::result::Result<Vec<_>, EngineError>>()?;
    let cells = cells(&contenders, &budgets, args.seeds.max(1), sampled);
    let mut eval = Eval {
        setting,
        tasks,
        contenders,
        log,
        n_jobs: n_jobs(args.grid.jobs),
        term,
        verbose: args.common.verbose,
        results: HashMap::new(),
    };

    let polling = Polling::begin();
    let (full, rest): (Vec<Cell>, Vec<Cell>) = cells.iter().partition(|c| c.budget.is_none());
    let mut ended = eval.phase(&full).and_then(|()| eval.phase(&rest));
    let mut facts = None;
    if let (Ok(()), Some(n)) = (&ended, args.facts) {
        match eval.facts(n, &budgets, facts::form(None, &source)) {
            Ok(f) => facts = Some(f),
            Err(e) => ended = Err(e),
        }
    }
    drop(polling);
    // What is done is shown even if not all is.
    if ended.is_ok() || ended.as_ref().is_err_and(Failure::is_quiet) {
        let mut report = eval.report(&cells, header);
        report.facts = facts;
        report.write(args)?;
    }
    if ended.is_err() && args.output.is_some() {
        crate::out::note("stopped; the same command goes on from here");
    }
    ended
}

/// Greedy unless a temperature is asked for.
fn sampling_params(
    invocation: &Invocation,
    model: &Model,
) -> Result<lemma_engine::sampling::SamplerParams> {
    let mut given = config::sampling(&invocation.matches)?;
    if given.flags.temp.is_none() && given.env.temp.is_none() {
        given.flags.temp = Some(0.0);
    }
    let mut params = sampling::resolve(&given, None, model).params;
    params.seed = Some(params.seed.unwrap_or(0));
    Ok(params)
}

/// What a log of this run says of it.
fn header(
    model: &Model,
    load: &lemma_engine::options::LoadOptions,
    sampling: &lemma_engine::sampling::SamplerParams,
    args: &EvalArgs,
) -> Value {
    json!({
        "v": 1,
        "kind": "kv eval",
        "lemma": env!("CARGO_PKG_VERSION"),
        "model": { "name": model.name(), "fingerprint": fingerprint(model) },
        "options": describe_options(load),
        "auto": model.what_auto_means(load),
        "sampling": format!("{sampling:?}"),
        "n_predict": args.grid.n_predict,
    })
}

impl Eval {
    /// Runs some cells over all problems, after taking what the log has and what `full` says about pools that are large enough.
    fn phase(&mut self, cells: &[Cell]) -> Result {
        let mut jobs = Vec::new();
        for task in 0..self.tasks.len() {
            for &cell in cells {
                if let Some(solved) = self.known(task, cell) {
                    self.results.insert((task, cell), solved);
                } else {
                    jobs.push(self.job(task, cell));
                }
            }
        }
        self.run(&jobs)
    }

    /// What is known of a problem in a cell without running it.
    fn known(&self, task: usize, cell: Cell) -> Option<Solved> {
        let record = self.log.get(&self.key(task, cell));
        if let Some(solved) = record.and_then(Solved::from_json) {
            return Some(solved);
        }
        let contender = &self.contenders[cell.contender];
        if contender.info.whole_context || !contender.computes_like(&self.contenders[0]) {
            return None;
        }
        let full = self.full(task, cell.seed)?;
        let tokens = contender.tokens(cell.budget?, self.lengths(task, cell.seed).chain);
        full.reuse(tokens)
    }

    /// The result under `full`; with greedy decoding there is one for all seeds.
    fn full(&self, task: usize, seed: u64) -> Option<&Solved> {
        let cell = |seed| Cell {
            contender: 0,
            budget: None,
            seed,
        };
        self.results
            .get(&(task, cell(seed)))
            .or_else(|| self.results.get(&(task, cell(0))))
    }

    /// Lengths from the file, or from the run under `full`.
    fn lengths(&self, task: usize, seed: u64) -> Lengths {
        let t = &self.tasks[task];
        let n_prompt = t.prompt.tokens.len();
        let full = self.full(task, seed);
        let from_file = t.problem.reply_tokens(n_prompt);
        let reference = from_file.or_else(|| full.filter(|f| f.finished()).map(|f| f.n_reply));
        let reply = reference.or_else(|| full.map(|f| f.n_reply));
        Lengths {
            chain: n_prompt + reply.unwrap_or(0),
            reference,
        }
    }

    fn job(&self, task: usize, cell: Cell) -> Job {
        let lengths = self.lengths(task, cell.seed);
        let n_prompt = self.tasks[task].prompt.tokens.len();
        let reply = lengths.reference.unwrap_or(1000);
        Job {
            task,
            cell,
            lengths,
            work: n_prompt as f64 / 8.0 + reply as f64,
        }
    }

    /// Names a result in the log.
    fn key(&self, task: usize, cell: Cell) -> String {
        let p = &self.tasks[task].problem;
        let said = p.messages.iter().map(|m| m.content.as_str());
        let right = p.answers.iter().chain(&p.accepted).map(String::as_str);
        let hash = text_hash(said.chain(right));
        let budget = cell.budget.map_or("-".to_owned(), |b| b.to_string());
        let label = &self.contenders[cell.contender].label;
        format!("{} {} {} {label} {budget} {}", p.set, p.id, hash, cell.seed)
    }

    /// Runs jobs side by side; each result goes to the log as it comes.
    fn run(&mut self, jobs: &[Job]) -> Result {
        let total = jobs.iter().map(|j| j.work).sum();
        let mut progress = Progress::new(self.term, self.verbose, total, jobs.len());
        let keys = jobs.iter().map(|j| self.key(j.task, j.cell));
        let keys: Vec<String> = keys.collect();
        let jobs: Vec<(usize, &Job)> = jobs.iter().enumerate().collect();
        let what = match jobs.first() {
            Some((_, job)) if job.cell.budget.is_some() => "grid",
            _ => "full",
        };
        let mut failure = None;
        // The workers read these; the log and the results are this thread's.
        let (setting, tasks, contenders) = (&self.setting, &self.tasks, &self.contenders);
        let (log, results) = (&mut self.log, &mut self.results);
        let solve = |&(_, job): &(usize, &Job), stop: &dyn Fn() -> bool| {
            let contender = &contenders[job.cell.contender];
            let (budget, seed) = (job.cell.budget, job.cell.seed);
            let task = &tasks[job.task];
            setting.solve(task, contender, budget, seed, job.lengths, stop)
        };
        workers::run(self.n_jobs, &jobs, solve, |event| {
            match event {
                Some(((i, job), Ok(Some(solved)))) => {
                    progress.done(job.work);
                    let mut record = solved.to_json();
                    record["key"] = keys[*i].as_str().into();
                    let problem = &tasks[job.task].problem;
                    record["set"] = problem.set.as_str().into();
                    record["id"] = problem.id.as_str().into();
                    let label = &contenders[job.cell.contender].label;
                    record["policy"] = label.as_str().into();
                    record["budget"] = job.cell.budget.map(|b| b.to_string()).into();
                    record["seed"] = job.cell.seed.into();
                    if let Err(e) = log.write(&record) {
                        failure.get_or_insert(e);
                    }
                    results.insert((job.task, job.cell), solved);
                }
                Some((_, Err(e))) => {
                    failure.get_or_insert(Failure::from(e));
                }
                Some((_, Ok(None))) | None => {}
            }
            progress.paint(what);
            super::go_on(failure.as_ref())
        });
        progress.clear();
        super::ended(failure)
    }

    /// Planted facts under the same policies, `n` chains a variant. Shares of a chain say nothing here: a pool of 1,024 stands for them.
    fn facts(&self, n: u64, budgets: &[Budget], form: Form) -> Result<Facts> {
        let mut tokens: Vec<Budget> = budgets.to_vec();
        tokens.retain(|b| !b.is_share());
        if tokens.is_empty() {
            tokens.push(Budget::Tokens(1024));
        }
        let model = &self.setting.model;
        let plan = facts::Plan {
            contenders: &self.contenders,
            budgets: &tokens,
            ages: facts::default_ages(model),
            n_chains: n,
            form,
        };
        facts::measure(plan, model, &self.setting.load, self.n_jobs, |work, n| {
            Progress::new(self.term, self.verbose, work, n)
        })
    }

    /// Results by column, seeds of a problem together.
    fn report(&self, cells: &[Cell], header: Value) -> Report {
        let mut columns: Vec<Column> = Vec::new();
        for &cell in cells {
            let contender = &self.contenders[cell.contender];
            let label = contender.label.clone();
            let at = columns
                .iter()
                .position(|c| c.label == label && c.budget == cell.budget);
            let at = at.unwrap_or_else(|| {
                columns.push(Column::new(label, contender.info.name, cell.budget));
                columns.len() - 1
            });
            columns[at].n_seeds += 1;
            for (i, task) in self.tasks.iter().enumerate() {
                if let Some(solved) = self.results.get(&(i, cell)) {
                    let key = (task.problem.set.clone(), task.problem.id.clone());
                    let runs = columns[at].results.entry(key).or_default();
                    runs.push(solved.clone());
                }
            }
        }
        Report::new(
            header,
            columns,
            self.tasks.iter().map(|t| &t.problem),
            cells.len(),
        )
    }
}
