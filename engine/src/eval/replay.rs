//! A given chain of tokens under a policy, beside the same chain under `full`.
//!
//! Free-running text cannot be compared token by token once it differs. Here both caches read the same tokens (those of the recorded
//! chain, whatever they would have said), so each position says how far what the policy forgot changes the prediction. Nothing is
//! drawn, so the numbers are the same every time, and one pass gives them all.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::error::Error;
use crate::kv::PageMeta;
use crate::model::Model;
use crate::options::{Aggregate, KvBudget, KvOptions, LoadOptions};
use crate::session::Session;

/// A chain of tokens: a prompt, and what was said then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The set that it belongs to.
    pub set: String,
    /// Its name within the set.
    pub id: String,
    /// Ids.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub n_prompt: usize,
}

/// The first position at which the policy's best token is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// Position of the token that is predicted.
    pub pos: usize,
    /// The best token under `full`.
    pub full: u32,
    /// The best token under the policy.
    pub policy: u32,
}

/// How a policy compares with `full` over the reply of a trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Replayed {
    /// Whether the prompt fits the pool; if not, nothing was compared.
    pub fits: bool,
    /// Predictions compared.
    pub n: usize,
    /// Kullback–Leibler divergence from `full`, in nats, summed over predictions.
    pub kl: f64,
    /// The largest at one position.
    pub kl_max: f64,
    /// Negative log-likelihood of the trace under `full`, summed.
    pub nll_full: f64,
    /// The same under the policy.
    pub nll: f64,
    /// Predictions whose best token is the same.
    pub agree: usize,
    /// Share of `full`'s attention that lies on pages which the policy has recycled: mean over query heads and layers, summed over steps.
    pub missed: f64,
    /// Steps that `missed` is summed over.
    pub n_steps: usize,
    /// Where the best tokens first differ.
    pub first: Option<Divergence>,
    /// Pages recycled, the most of any layer.
    pub recycled: u64,
    /// Bytes of the pool.
    pub kv_bytes: u64,
}

/// A policy's side of a replay.
struct Side {
    session: Session,
    out: Replayed,
}

/// Replays a trace under several policies at once. `cells` are contenders with their options; `None` when `stop` said so on the way.
///
/// # Errors
/// Those of sessions, except that a prompt which does not fit is a result.
pub fn replay(
    model: &Arc<Model>,
    load: &LoadOptions,
    trace: &Trace,
    cells: &[KvOptions],
    stop: &dyn Fn() -> bool,
) -> Result<Option<Vec<Replayed>>, Error> {
    let mut full = full_session(model, load, trace)?;
    let mut sides = Vec::with_capacity(cells.len());
    for kv in cells {
        sides.push(side(model, load, trace, kv)?);
    }
    let mut reference = Vec::new();
    for pos in trace.n_prompt..trace.tokens.len() {
        if stop() {
            return Ok(None);
        }
        let next = trace.tokens[pos];
        log_softmax(full.logits(), &mut reference);
        for s in sides.iter_mut().filter(|s| s.out.fits) {
            s.compare(&reference, pos, next);
        }
        // The last token is predicted and not read.
        if pos + 1 == trace.tokens.len() {
            break;
        }
        full.decode(next)?;
        for s in sides.iter_mut().filter(|s| s.out.fits) {
            match s.session.decode(next) {
                Ok(()) => s.watch(&full),
                Err(Error::PromptTooLong(_)) => s.out.fits = false,
                Err(e) => return Err(e),
            }
        }
    }
    Ok(Some(sides.into_iter().map(Side::end).collect()))
}

fn options(load: &LoadOptions, trace: &Trace, kv: KvOptions) -> LoadOptions {
    LoadOptions {
        n_threads: Some(1),
        n_ctx: Some(trace.tokens.len() as u32 + 1),
        kv,
        ..load.clone()
    }
}

fn full_session(model: &Arc<Model>, load: &LoadOptions, trace: &Trace) -> Result<Session, Error> {
    let kv = KvOptions {
        policy: "full".to_owned(),
        budget: KvBudget::Default,
        // Means over the heads of a layer add up to one.
        aggregate: Aggregate::Mean,
        ..load.kv.clone()
    };
    let mut session = Session::new(model.clone(), &options(load, trace, kv))?;
    session.watch_masses();
    prefill(&mut session, trace)?;
    Ok(session)
}

fn side(
    model: &Arc<Model>,
    load: &LoadOptions,
    trace: &Trace,
    kv: &KvOptions,
) -> Result<Side, Error> {
    let mut session = Session::new(model.clone(), &options(load, trace, kv.clone()))?;
    let fits = match prefill(&mut session, trace) {
        Ok(()) => true,
        Err(Error::PromptTooLong(_)) => false,
        Err(e) => return Err(e),
    };
    let out = Replayed {
        fits,
        ..Replayed::default()
    };
    Ok(Side { session, out })
}

fn prefill(session: &mut Session, trace: &Trace) -> Result<(), Error> {
    let prompt = &trace.tokens[..trace.n_prompt];
    session.prefill(prompt, prompt.len(), &mut |_, _| {
        std::ops::ControlFlow::Continue(())
    })
}

impl Side {
    /// Compares the predictions of the token at `pos`. `reference` are `full`'s log-probabilities.
    fn compare(&mut self, reference: &[f64], pos: usize, next: u32) {
        let logits = self.session.logits();
        let shift = log_sum(logits);
        let mut kl = 0.0;
        for (&p, &x) in reference.iter().zip(logits) {
            kl += p.exp() * (p - (f64::from(x) - shift));
        }
        let policy = best(logits.iter().map(|&x| f64::from(x)));
        let full = best(reference.iter().copied());
        let o = &mut self.out;
        o.n += 1;
        // Rounding may leave it a hair below zero.
        o.kl += kl.max(0.0);
        o.kl_max = o.kl_max.max(kl);
        o.nll_full -= reference[next as usize];
        o.nll -= f64::from(logits[next as usize]) - shift;
        if full == policy {
            o.agree += 1;
        } else {
            o.first.get_or_insert(Divergence { pos, full, policy });
        }
    }

    /// Takes the attention of the step that both have just made.
    fn watch(&mut self, full: &Session) {
        let (n, all) = (self.session.n_tables(), full.n_tables());
        let mut missed = 0.0;
        for t in 0..n {
            // Where heads have tables of their own, each is compared with its layer.
            let of = full.kv_pages(t * all / n);
            missed += missed_share(of, self.session.kv_pages(t));
        }
        self.out.missed += missed / n.max(1) as f64;
        self.out.n_steps += 1;
    }

    fn end(self) -> Replayed {
        let kv = self.session.kv();
        Replayed {
            recycled: kv.recycled,
            kv_bytes: kv.bytes,
            ..self.out
        }
    }
}

/// Mass of the pages of `all` that `held` has not; both in position order. A page of `all` that is held in part counts in part.
fn missed_share(all: &[PageMeta], held: &[PageMeta]) -> f64 {
    let mut missed = 0.0;
    let mut i = 0;
    for page in all {
        let (start, end) = (page.first_pos, page.first_pos + page.len);
        let mut covered = 0;
        while let Some(h) = held.get(i) {
            let (from, to) = (h.first_pos, h.first_pos + h.len);
            covered += to.min(end).saturating_sub(from.max(start));
            if to > end {
                break;
            }
            i += 1;
        }
        let share = 1.0 - f64::from(covered) / f64::from(page.len.max(1));
        missed += share * f64::from(page.w);
    }
    missed
}

fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    max + sum.ln()
}

fn log_softmax(logits: &[f32], out: &mut Vec<f64>) {
    let shift = log_sum(logits);
    out.clear();
    out.extend(logits.iter().map(|&x| f64::from(x) - shift));
}

/// The first of the largest.
fn best(values: impl Iterator<Item = f64>) -> u32 {
    let mut out = (0, f64::NEG_INFINITY);
    for (i, v) in values.enumerate() {
        if v > out.1 {
            out = (i as u32, v);
        }
    }
    out.0
}

impl Trace {
    /// Reads a line of recorded traces: `{"id":…,"tokens":[…],"n_prompt":…}`. `None` if it is none.
    pub fn parse(line: &str, set: &str, number: u64) -> Option<Self> {
        let v: Value = serde_json::from_str(line).ok()?;
        let ids = v["tokens"].as_array()?.iter();
        let ids = ids.map(|t| t.as_u64().and_then(|t| u32::try_from(t).ok()));
        let tokens: Vec<u32> = ids.collect::<Option<_>>()?;
        let n_prompt = v["n_prompt"].as_u64().unwrap_or(1) as usize;
        let id = v["id"].as_str().map(str::to_owned);
        (0 < n_prompt && n_prompt < tokens.len()).then(|| Self {
            set: v["set"].as_str().unwrap_or(set).to_owned(),
            id: id.unwrap_or_else(|| number.to_string()),
            tokens,
            n_prompt,
        })
    }

    /// As a line of recorded traces.
    pub fn to_json(&self) -> Value {
        json!({ "set": self.set, "id": self.id, "n_prompt": self.n_prompt, "tokens": self.tokens })
    }
}

impl Replayed {
    /// Adds another replay of the same policy: sums and the largest, the later of two divergences is forgotten.
    pub fn add(&mut self, other: &Self) {
        self.n += other.n;
        self.kl += other.kl;
        self.kl_max = self.kl_max.max(other.kl_max);
        self.nll_full += other.nll_full;
        self.nll += other.nll;
        self.agree += other.agree;
        self.missed += other.missed;
        self.n_steps += other.n_steps;
        self.first = self.first.or(other.first);
        self.recycled = self.recycled.max(other.recycled);
        self.kv_bytes = self.kv_bytes.max(other.kv_bytes);
        self.fits |= other.fits;
    }

    /// As fields of a record; means over predictions.
    pub fn to_json(&self) -> Value {
        let mean = |x: f64, n: usize| if n > 0 { x / n as f64 } else { 0.0 };
        json!({
            "fits": self.fits,
            "n": self.n,
            "kl": mean(self.kl, self.n),
            "kl_max": self.kl_max,
            "nll_full": mean(self.nll_full, self.n),
            "nll": mean(self.nll, self.n),
            "top1": mean(self.agree as f64, self.n),
            "missed": mean(self.missed, self.n_steps),
            "first_divergence": self.first.map(|d| json!({ "pos": d.pos, "full": d.full, "policy": d.policy })),
            "recycled": self.recycled,
            "kv_bytes": self.kv_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(first_pos: u32, len: u32, w: f32) -> PageMeta {
        PageMeta {
            tier: 0,
            slot: 0,
            first_pos,
            len,
            stamp: 0,
            w,
            sum: 0.0,
            gap: 0,
            pinned: false,
            range: 0.0,
            double: u32::MAX,
        }
    }

    #[test]
    fn what_is_missed() {
        let all = [page(0, 16, 0.5), page(16, 16, 0.25), page(32, 4, 0.25)];
        let missed = |held: &[PageMeta]| missed_share(&all, held);
        assert_eq!(missed(&all), 0.0);
        assert_eq!(missed(&[all[0], all[2]]), 0.25);
        assert_eq!(missed(&[]), 1.0);
        // Pages of another size: 8 of the second page's tokens are held.
        assert_eq!(
            missed(&[
                page(0, 8, 0.0),
                page(8, 8, 0.0),
                page(24, 8, 0.0),
                page(32, 4, 0.0)
            ]),
            0.125
        );
        assert_eq!(missed(&[page(0, 32, 0.0), page(32, 4, 0.0)]), 0.0);
    }

    #[test]
    fn log_probabilities() {
        let mut out = Vec::new();
        log_softmax(&[0.0, 0.0, f32::NEG_INFINITY], &mut out);
        assert!((out[0] + 2f64.ln()).abs() < 1e-12 && out[2] == f64::NEG_INFINITY);
        assert_eq!(best([1.0, 3.0, 3.0].into_iter()), 1);
    }
}
