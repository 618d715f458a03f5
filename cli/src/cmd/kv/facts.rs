//! `lemma kv facts`: what a policy still knows of what was said long ago.

use std::collections::BTreeMap;
use std::sync::Arc;

use lemma_engine::conversation::think_tags;
use lemma_engine::eval::facts::{Asked, Chain, Form, MAX_AGES, Variant, ask, chain};
use lemma_engine::eval::fingerprint;
use lemma_engine::eval::grid::{Budget, Cell, Contender, cells};
use lemma_engine::eval::workers;
use lemma_engine::model::Model;
use lemma_engine::options::LoadOptions;
use serde_json::{Value, json};

use super::progress::Progress;
use super::report::Table;
use super::{budgets, contenders, n_jobs, refuse_pool_flags};
use crate::args::Invocation;
use crate::args::config::{self, ModelSource};
use crate::args::kv::{FactForm, FactsArgs};
use crate::fail::{Failure, Result};
use crate::signals::Polling;
use crate::term::Term;
use crate::{load, out};

/// Answers to the questions of some chains: by age, how many were right, how many there were, and the sum of log-probabilities.
type Known = BTreeMap<usize, (usize, usize, f64)>;

/// What was asked, and what came of it.
pub(super) struct Facts {
    labels: Vec<String>,
    cells: Vec<Cell>,
    ages: Vec<usize>,
    n_chains: u64,
    form: Form,
    /// By cell and variant; absent where no prompt fits.
    known: BTreeMap<(usize, Variant), Known>,
}

pub(crate) fn run(args: &FactsArgs, invocation: &Invocation, term: Term) -> Result {
    refuse_pool_flags(invocation)?;
    let source =
        config::model_source(args.model.model.as_ref(), invocation.model_from_env(), None)?;
    let load = config::load_options(&args.model, &args.kv, &args.compute)?;
    let contenders = contenders(&args.policies, &load.kv)?;
    let budgets = budgets(&args.budgets)?;
    if budgets.iter().any(|b| b.is_share()) {
        return Err(Failure::usage("--budgets: expected numbers of tokens"));
    }
    let plan = Plan {
        contenders: &contenders,
        budgets: &budgets,
        ages: ages(&args.ages)?,
        n_chains: args.chains,
        form: form(args.form, &source),
    };
    let model = load::model(&source, &load)?.model;
    let polling = Polling::begin();
    let (jobs, verbose) = (n_jobs(args.jobs), args.common.verbose);
    let facts = measure(plan, &model, &load, jobs, |work, n| {
        Progress::new(term, verbose, work, n)
    });
    drop(polling);
    let facts = facts?;
    if args.json {
        let mut json = facts.json();
        json["model"] = json!({ "name": model.name(), "fingerprint": fingerprint(&model) });
        out::json(&json)
    } else {
        let title = format!("# Planted facts, {}\n\n", model.name());
        out::put(&(title + &facts.markdown()))
    }
}

/// What to measure.
pub(super) struct Plan<'a> {
    pub(super) contenders: &'a [Contender],
    /// Numbers of tokens.
    pub(super) budgets: &'a [Budget],
    pub(super) ages: Vec<usize>,
    /// Chains for each variant.
    pub(super) n_chains: u64,
    pub(super) form: Form,
}

/// The language of the chains for a model.
pub(super) fn form(asked: Option<FactForm>, source: &ModelSource) -> Form {
    match (asked, source) {
        (Some(FactForm::Notes), _) | (None, ModelSource::Path(_)) => Form::Notes,
        (Some(FactForm::Table), _) | (None, ModelSource::Bundled) => Form::Table,
    }
}

/// Makes the chains and reads them in every cell.
pub(super) fn measure(
    plan: Plan<'_>,
    model: &Arc<Model>,
    load: &LoadOptions,
    n_jobs: usize,
    progress: impl Fn(f64, usize) -> Progress,
) -> Result<Facts> {
    // What is asked for after so many tokens makes a chain longer than that.
    check_context(model, plan.ages.iter().copied().max(), load.n_ctx)?;
    let chains = chains(model, plan.form, &plan.ages, plan.n_chains)?;
    let longest = chains.iter().map(|c| c.tokens.len()).max();
    check_context(model, longest, load.n_ctx)?;
    let mut facts = Facts {
        labels: plan.contenders.iter().map(|c| c.label.clone()).collect(),
        cells: cells(plan.contenders, plan.budgets, 1, false),
        ages: plan.ages,
        n_chains: plan.n_chains,
        form: plan.form,
        known: BTreeMap::new(),
    };
    facts.run(plan.contenders, model, load, &chains, n_jobs, progress)?;
    Ok(facts)
}

/// The default ages, as far as the context allows.
pub(super) fn default_ages(model: &Model) -> Vec<usize> {
    let most = model.hparams().n_ctx_train as usize / 5 * 4;
    let all = [512, 1024, 2048, 4096, 8192].into_iter();
    all.filter(|&age| age <= most).collect()
}

fn ages(list: &str) -> Result<Vec<usize>> {
    let words = list.split(',').filter(|w| !w.trim().is_empty());
    let parsed = words.map(|w| w.trim().parse::<usize>().ok().filter(|&n| n > 0));
    match parsed.collect::<Option<Vec<usize>>>() {
        Some(mut ages) if (1..=MAX_AGES).contains(&ages.len()) => {
            ages.sort_unstable();
            Ok(ages)
        }
        _ => Err(Failure::usage(format!(
            "--ages {}: expected one to {MAX_AGES} numbers of tokens",
            crate::term::escape(list)
        ))),
    }
}

fn chains(model: &Model, form: Form, ages: &[usize], n: u64) -> Result<Vec<Chain>> {
    let tags = think_tags(model);
    let mut out = Vec::new();
    for seed in 0..n {
        for variant in Variant::ALL {
            out.push(chain(model, tags.as_ref(), form, variant, ages, seed)?);
        }
    }
    Ok(out)
}

/// Ages beyond the context are a mistake, not a failure of memory.
fn check_context(model: &Model, longest: Option<usize>, n_ctx: Option<u32>) -> Result {
    let longest = longest.unwrap_or(0);
    let n_ctx = n_ctx.unwrap_or(model.hparams().n_ctx_train) as usize;
    if longest < n_ctx {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "chains of {longest} tokens, expected at most {n_ctx}"
    ))
    .hint("--ages with smaller numbers makes them shorter"))
}

impl Facts {
    fn run(
        &mut self,
        contenders: &[Contender],
        model: &Arc<Model>,
        load: &LoadOptions,
        chains: &[Chain],
        n_jobs: usize,
        progress: impl Fn(f64, usize) -> Progress,
    ) -> Result {
        let cells = self.cells.iter().enumerate();
        let jobs: Vec<(usize, &Cell, &Chain)> = chains
            .iter()
            .flat_map(|c| cells.clone().map(move |(i, cell)| (i, cell, c)))
            .collect();
        let work = |c: &Chain| (c.tokens.len() - c.n_prompt) as f64;
        let mut progress = progress(jobs.iter().map(|j| work(j.2)).sum(), jobs.len());
        let read = |&(_, cell, chain): &(usize, &Cell, &Chain), stop: &dyn Fn() -> bool| {
            let contender = &contenders[cell.contender];
            let tokens = cell.budget.map(|b| contender.tokens(b, chain.tokens.len()));
            let kv = contender.options(tokens, cell.seed);
            ask(model, load, chain, kv, stop)
        };
        let mut results: Vec<(usize, Variant, Vec<Asked>)> = Vec::new();
        let mut failure = None;
        workers::run(n_jobs, &jobs, read, |event| {
            match event {
                Some((&(i, _, chain), Ok(asked))) => {
                    progress.done(work(chain));
                    results.extend(asked.map(|a| (i, chain.variant, a)));
                }
                Some((_, Err(e))) => {
                    failure.get_or_insert(Failure::from(e));
                }
                None => {}
            }
            progress.paint("chain");
            super::go_on(failure.as_ref())
        });
        progress.clear();
        super::ended(failure)?;
        for (cell, variant, asked) in results {
            let known = self.known.entry((cell, variant)).or_default();
            for a in asked {
                let k = known.entry(a.age).or_default();
                k.0 += usize::from(a.right);
                k.1 += 1;
                k.2 += a.logprob;
            }
        }
        Ok(())
    }

    fn label(&self, cell: usize) -> (String, String) {
        let c = self.cells[cell];
        let budget = c.budget.map_or("–".to_owned(), |b| b.to_string());
        (self.labels[c.contender].clone(), budget)
    }

    pub(super) fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .known
            .iter()
            .map(|(&(cell, variant), known)| {
                let (label, budget) = self.label(cell);
                let ages: Vec<Value> = known
                    .iter()
                    .map(|(age, &(right, n, logprob))| {
                        let mean = (logprob / n.max(1) as f64 * 1e4).round() / 1e4;
                        json!({ "age": age, "right": right, "n": n, "logprob": mean })
                    })
                    .collect();
                json!({ "policy": label, "budget": budget, "variant": variant.name(), "ages": ages })
            })
            .collect();
        json!({
            "v": 1,
            "kind": "kv facts",
            "form": match self.form { Form::Notes => "notes", Form::Table => "table" },
            "chains": self.n_chains,
            "rows": rows,
        })
    }

    /// The table and what it means, without a title.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "Share of facts whose every token is the first choice when they are asked for, by tokens since they were \
             first said; {} chains a row, one question an age.\n\n",
            self.n_chains
        );
        let titles: Vec<String> = self.ages.iter().map(ToString::to_string).collect();
        let titles: Vec<&str> = ["fact", "policy", "size"]
            .into_iter()
            .chain(titles.iter().map(String::as_str))
            .collect();
        let mut t = Table::new(&titles);
        for variant in Variant::ALL {
            for cell in 0..self.cells.len() {
                let (label, budget) = self.label(cell);
                let mut row = vec![variant.name().to_owned(), label, budget];
                let known = self.known.get(&(cell, variant));
                row.extend(self.ages.iter().map(|age| {
                    let k = known.and_then(|k| k.get(age));
                    k.map_or("no room".to_owned(), |&(right, n, _)| {
                        format!("{:.2}", right as f64 / n.max(1) as f64)
                    })
                }));
                t.row(row);
            }
        }
        text.push_str(&t.text());
        text
    }
}
