//! What a grid of results says: means by cell, and intervals of paired differences.
//!
//! Policies are compared on the same problems, so what counts is the difference problem by problem. Its 95 % interval is that of a
//! bootstrap over problems (the runs of a problem under several seeds stay together), drawn within each set so that every replicate has the
//! same number of problems of each kind.

use std::collections::BTreeMap;

use rand_core::Rng;
use rand_pcg::Pcg32;
use serde_json::{Value, json};

use super::solve::Solved;

/// Replicates of a bootstrap.
const REPLICATES: usize = 4000;

/// Means over the problems of a cell, seeds averaged first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Means {
    /// Problems.
    pub n: usize,
    /// Share of right answers.
    pub right: f64,
    /// Share of problems whose prompt fits the pool.
    pub fits: f64,
    /// Tokens of a reply.
    pub reply: f64,
    /// Share of replies that came to their end before the cap.
    pub finished: f64,
    /// The largest pool, in bytes.
    pub peak_bytes: u64,
    /// Bytes of the pool.
    pub kv_bytes: f64,
    /// Share of replies under which pages were recycled.
    pub recycling: f64,
    /// Tokens a second while decoding.
    pub tps: f64,
    /// Seconds for an answer, prompt included.
    pub seconds: f64,
}

/// Results of one cell by problem; a problem's seeds together.
pub type ByProblem = BTreeMap<(String, String), Vec<Solved>>;

/// Means over the problems of one cell.
pub fn means(results: &ByProblem) -> Means {
    let mut m = Means {
        n: results.len(),
        ..Means::default()
    };
    let (mut decode_s, mut decoded) = (0.0, 0.0);
    for runs in results.values() {
        let share = 1.0 / (runs.len().max(1) * results.len()) as f64;
        for s in runs {
            let yes = |b: bool| f64::from(u8::from(b)) * share;
            m.right += yes(s.right);
            m.fits += yes(s.fits);
            m.finished += yes(s.finished());
            m.recycling += yes(s.recycled > 0);
            m.reply += s.n_reply as f64 * share;
            m.kv_bytes += s.kv_bytes as f64 * share;
            m.seconds += (s.prefill_s + s.decode_s) * share;
            m.peak_bytes = m.peak_bytes.max(s.kv_bytes);
            decode_s += s.decode_s;
            decoded += s.n_reply.saturating_sub(1) as f64;
        }
    }
    if decode_s > 0.0 {
        m.tps = decoded / decode_s;
    }
    m
}

impl Means {
    /// As fields of a record.
    pub fn to_json(&self) -> Value {
        let round = |x: f64| (x * 1e4).round() / 1e4;
        json!({
            "n": self.n,
            "right": round(self.right),
            "fits": round(self.fits),
            "mean_reply_tokens": round(self.reply),
            "finished": round(self.finished),
            "recycling": round(self.recycling),
            "peak_kv_bytes": self.peak_bytes,
            "mean_kv_bytes": self.kv_bytes.round() as u64,
            "tokens_per_s": round(self.tps),
            "s_per_answer": round(self.seconds),
        })
    }
}

/// A difference of shares of right answers and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Problems that both have.
    pub n: usize,
    /// `a - b`.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Difference {
    /// As fields of a record.
    pub fn to_json(&self) -> Value {
        let round = |x: f64| (x * 1e4).round() / 1e4;
        json!({ "n": self.n, "mean": round(self.mean), "low": round(self.low), "high": round(self.high) })
    }
}

/// The paired difference of `a` and `b` over the problems that both have; `None` if there are none.
pub fn difference(a: &ByProblem, b: &ByProblem) -> Option<Difference> {
    let right =
        |runs: &[Solved]| runs.iter().filter(|s| s.right).count() as f64 / runs.len().max(1) as f64;
    // By set, in a fixed order: the interval does not depend on the order of the results.
    let mut strata: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (key, runs) in a {
        if let Some(other) = b.get(key) {
            let d = right(runs) - right(other);
            strata.entry(&key.0).or_default().push(d);
        }
    }
    let strata: Vec<Vec<f64>> = strata.into_values().collect();
    let n: usize = strata.iter().map(Vec::len).sum();
    if n == 0 {
        return None;
    }
    let mean = strata.iter().flatten().sum::<f64>() / n as f64;
    let (low, high) = interval(&strata, n);
    Some(Difference { n, mean, low, high })
}

/// The 2.5 and 97.5 % quantiles of the mean over bootstrap replicates, drawn within strata.
fn interval(strata: &[Vec<f64>], n: usize) -> (f64, f64) {
    let mut rng = Pcg32::new(0x6c65_6d6d_6120, 0x0a02_bdbf_7bb3_c0a7);
    let mut means: Vec<f64> = (0..REPLICATES)
        .map(|_| {
            let mut sum = 0.0;
            for stratum in strata {
                for _ in 0..stratum.len() {
                    let r = u64::from(rng.next_u32());
                    sum += stratum[((r * stratum.len() as u64) >> 32) as usize];
                }
            }
            sum / n as f64
        })
        .collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |q: f64| means[((REPLICATES - 1) as f64 * q).round() as usize];
    (at(0.025), at(0.975))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(right: bool) -> Solved {
        Solved {
            right,
            fits: true,
            finish: if right { "eos" } else { "length" }.into(),
            reused: false,
            n_prompt: 10,
            n_reply: 101,
            budget_tokens: 64,
            kv_bytes: 1000,
            recycled: 1,
            prefill_s: 0.5,
            decode_s: 1.0,
            tail: String::new(),
        }
    }

    fn cell(rights: &[&[bool]]) -> ByProblem {
        let keys = (0..).map(|i| ("set".to_owned(), format!("{i}")));
        keys.zip(
            rights
                .iter()
                .map(|r| r.iter().map(|&r| result(r)).collect()),
        )
        .collect()
    }

    #[test]
    fn seeds_of_a_problem_weigh_one_problem() {
        let m = means(&cell(&[&[true, false], &[true], &[false]]));
        assert_eq!((m.n, m.right, m.finished), (3, 0.5, 0.5));
        assert_eq!((m.tps, m.seconds, m.peak_bytes), (100.0, 1.5, 1000));
    }

    #[test]
    fn an_interval_covers_what_it_should() {
        let yes: Vec<&[bool]> = vec![&[true]; 100];
        let mixed: Vec<&[bool]> = (0..100)
            .map(|i| if i < 80 { &[true][..] } else { &[false][..] })
            .collect();
        let d = difference(&cell(&mixed), &cell(&yes)).unwrap();
        // The standard error of a share of 0.2 over 100 is 0.04.
        assert!((d.mean + 0.2).abs() < 1e-12);
        assert!(
            (d.low + 0.28).abs() < 0.02 && (d.high + 0.12).abs() < 0.02,
            "{d:?}"
        );
        let same = difference(&cell(&mixed), &cell(&mixed)).unwrap();
        assert_eq!((same.mean, same.low, same.high), (0.0, 0.0, 0.0));
        assert_eq!(difference(&cell(&yes), &ByProblem::new()), None);
    }
}
