//! `lemma kv`: what KV policies cost, measured.

mod eval;
mod facts;
mod log;
mod plot;
mod progress;
mod replay;
mod report;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lemma_engine::error::Error as EngineError;
use lemma_engine::eval::grid::{Budget, Contender, split_specs};
use lemma_engine::eval::problem::Problem;
use lemma_engine::options::{KvOptions, LoadOptions};

use super::{Line, Lines};
use crate::args::Invocation;
use crate::args::kv::{KvCommand, KvCommandArgs};
use crate::fail::{Failure, INTERRUPT, Result};
use crate::signals;
use crate::term::Term;

pub(crate) fn run(args: &KvCommandArgs, invocation: &Invocation, term: Term) -> Result {
    match &args.command {
        KvCommand::Eval(a) => eval::run(a, invocation, term),
        KvCommand::Facts(a) => facts::run(a, invocation, term),
        KvCommand::Replay(a) => replay::run(a, invocation, term),
    }
}

/// Whether workers take more jobs: not after a failure, nor when the user said stop.
fn go_on(failure: Option<&Failure>) -> ControlFlow<()> {
    if signals::interrupted() || failure.is_some() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// How a run of jobs ended: with its first failure, by the user, or well.
fn ended(failure: Option<Failure>) -> Result {
    match failure {
        Some(f) => Err(f),
        None if signals::interrupted() => Err(Failure::quiet(INTERRUPT)),
        None => Ok(()),
    }
}

/// The contenders of a grid, `full` first.
fn contenders(lists: &[String], base: &KvOptions) -> Result<Vec<Contender>> {
    let full = Contender::parse("full", base)?;
    let mut out = vec![full];
    for spec in lists.iter().flat_map(|list| split_specs(list)) {
        if out.iter().all(|c| c.label != spec) {
            out.push(Contender::parse(&spec, base)?);
        }
    }
    Ok(out)
}

/// The budgets of a grid, each once, tokens before shares.
fn budgets(lists: &[String]) -> Result<Vec<Budget>> {
    let words = lists.iter().flat_map(|list| list.split(','));
    let parsed = words
        .filter(|w| !w.trim().is_empty())
        .map(|w| Budget::parse(w.trim()));
    let mut out = parsed.collect::<std::result::Result<Vec<_>, EngineError>>()?;
    out.sort_unstable();
    out.dedup();
    Ok(out)
}

/// The problems of some files, in turns: a run that is cut short has some of each.
fn problems(files: &[PathBuf], limit: Option<usize>) -> Result<Vec<Problem>> {
    let parse = |line: &str, set: &str, number| Ok(Problem::parse(line, set, number)?);
    items(files, limit, &parse, &|p: &Problem| p.id.clone())
}

/// The items of some files, at most `limit` of each, the files taking turns.
fn items<T>(
    files: &[PathBuf],
    limit: Option<usize>,
    parse: &dyn Fn(&str, &str, u64) -> Result<T>,
    id: &dyn Fn(&T) -> String,
) -> Result<Vec<T>> {
    let mut sets: Vec<std::vec::IntoIter<T>> = Vec::new();
    let mut names = HashSet::new();
    for path in files {
        let stem = path.file_stem().unwrap_or(path.as_os_str());
        let name = crate::term::escape(&stem.to_string_lossy());
        if !names.insert(name.clone()) {
            return Err(Failure::usage(format!("two files are called {name}"))
                .hint("results go by the names of the files"));
        }
        let limit = limit.unwrap_or(usize::MAX);
        sets.push(read(path, &name, limit, parse, id)?.into_iter());
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

fn read<T>(
    path: &Path,
    set: &str,
    limit: usize,
    parse: &dyn Fn(&str, &str, u64) -> Result<T>,
    id: &dyn Fn(&T) -> String,
) -> Result<Vec<T>> {
    let mut lines = Lines::open(Some(path))?;
    let mut ids = HashSet::new();
    let mut out = Vec::new();
    while out.len() < limit
        && let Some(Line { number, text }) = lines.next()?
    {
        let parsed = text.and_then(|t| parse(&t, set, number));
        let item = parsed.map_err(|e| lines.locate(number, e))?;
        if !ids.insert(id(&item)) {
            let twice = Failure::usage(format!("id {:?} occurs twice", id(&item)));
            return Err(lines.locate(number, twice));
        }
        out.push(item);
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
fn n_jobs(asked: Option<usize>) -> usize {
    let cores = lemma_engine::backend::cpu::default_threads;
    asked.filter(|&n| n > 0).unwrap_or_else(cores)
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
