//! `lemma kv`: what KV policies cost, measured.

mod eval;
mod log;
mod plot;
mod progress;
mod report;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use lemma_engine::error::Error as EngineError;
use lemma_engine::eval::grid::{Budget, Contender, split_specs};
use lemma_engine::eval::problem::Problem;
use lemma_engine::options::{KvOptions, LoadOptions};

use super::{Line, Lines};
use crate::args::Invocation;
use crate::args::kv::{GridArgs, KvCommand, KvCommandArgs};
use crate::fail::{Failure, Result};
use crate::term::Term;

pub(crate) fn run(args: &KvCommandArgs, invocation: &Invocation, term: Term) -> Result {
    match &args.command {
        KvCommand::Eval(a) => eval::run(a, invocation, term),
    }
}

/// The contenders of a grid, `full` first.
fn contenders(args: &GridArgs, base: &KvOptions) -> Result<Vec<Contender>> {
    let full = Contender::parse("full", base)?;
    let mut out = vec![full];
    for spec in args.policies.iter().flat_map(|list| split_specs(list)) {
        if out.iter().all(|c| c.label != spec) {
            out.push(Contender::parse(&spec, base)?);
        }
    }
    Ok(out)
}

/// The budgets of a grid, each once, tokens before shares.
fn budgets(args: &GridArgs) -> Result<Vec<Budget>> {
    let words = args.budgets.iter().flat_map(|list| list.split(','));
    let parsed = words
        .filter(|w| !w.trim().is_empty())
        .map(|w| Budget::parse(w.trim()));
    let mut out = parsed.collect::<std::result::Result<Vec<_>, EngineError>>()?;
    out.sort_unstable();
    out.dedup();
    Ok(out)
}

/// The problems of some files, at most `limit` of each, the files taking turns: a run that is cut short has some of each.
fn problems(files: &[PathBuf], limit: Option<usize>) -> Result<Vec<Problem>> {
    let mut sets: Vec<std::vec::IntoIter<Problem>> = Vec::new();
    let mut names = HashSet::new();
    for path in files {
        let stem = path.file_stem().unwrap_or(path.as_os_str());
        let name = crate::term::escape(&stem.to_string_lossy());
        if !names.insert(name.clone()) {
            return Err(Failure::usage(format!("two files are called {name}"))
                .hint("results go by the names of the files"));
        }
        sets.push(read(path, &name, limit.unwrap_or(usize::MAX))?.into_iter());
    }
    let mut out = Vec::new();
    loop {
        let before = out.len();
        out.extend(sets.iter_mut().filter_map(Iterator::next));
        if out.len() == before {
            return Ok(out);
        }
    }
}

fn read(path: &Path, set: &str, limit: usize) -> Result<Vec<Problem>> {
    let mut lines = Lines::open(Some(path))?;
    let mut ids = HashSet::new();
    let mut out = Vec::new();
    while out.len() < limit
        && let Some(Line { number, text }) = lines.next()?
    {
        let parsed = text.and_then(|t| Ok(Problem::parse(&t, set, number)?));
        let problem = parsed.map_err(|e| lines.locate(number, e))?;
        if !ids.insert(problem.id.clone()) {
            let twice = Failure::usage(format!("id {:?} occurs twice", problem.id));
            return Err(lines.locate(number, twice));
        }
        out.push(problem);
    }
    if out.is_empty() {
        return Err(Failure::usage(format!(
            "{}: no problems in it",
            crate::term::escape_path(path)
        )));
    }
    Ok(out)
}

/// Refuses flags whose place the grid takes.
fn refuse_pool_flags(invocation: &Invocation) -> Result {
    let typed = |id: &str| {
        invocation.matches.value_source(id) == Some(clap::parser::ValueSource::CommandLine)
    };
    for (id, flag, instead) in [
        ("kv_budget", "--kv-budget", "--budgets"),
        ("kv_mem", "--kv-mem", "--budgets"),
        ("kv_policy", "--kv-policy", "--policies"),
        ("kv_trace", "--kv-trace", "lemma batch with --kv-trace"),
    ] {
        if typed(id) {
            return Err(Failure::usage(format!("{flag} does not go with a grid"))
                .hint(format!("{instead} does that")));
        }
    }
    Ok(())
}

/// How many problems run side by side.
fn n_jobs(args: &GridArgs) -> usize {
    let cores = lemma_engine::backend::cpu::default_threads;
    args.jobs.filter(|&n| n > 0).unwrap_or_else(cores)
}

/// What must be the same for results to be compared: options that no cell of the grid sets.
fn describe_options(load: &LoadOptions) -> String {
    let mut kv = load.kv.clone();
    let plain = KvOptions::default();
    (kv.policy, kv.budget) = (plain.policy, plain.budget);
    format!(
        "{kv:?} isa={:?} backend={:?} n_ctx={:?} n_ubatch={}",
        load.isa, load.backend, load.n_ctx, load.n_ubatch
    )
}
