//! Truncation: which tokens may still be drawn.
//!
//! Each stage shortens the list in place and keeps its order. Papers: top-k (Fan et al. 2018, arXiv 1805.04833),
//! top-p (Holtzman et al. 2019, arXiv 1904.09751), typical (Meister et al. 2022, arXiv 2202.00666), min-p (Nguyen
//! et al. 2024, arXiv 2407.01082), top-nσ (Tang et al. 2024, arXiv 2411.07641), XTC (P. E. Weidmann 2024,
//! text-generation-webui pull request 6335).

use super::{Candidate, best_first, math};

/// Mass by which a nucleus may fall short through rounding alone.
const SLACK: f64 = 1e-6;

/// Top-nσ: minus infinity for every logit below `max - n * std`, both over the finite logits.
pub(super) fn top_n_sigma(logits: &mut [f32], n: f32) {
    if n <= 0.0 || logits.len() <= 1 {
        return;
    }
    let finite = || {
        logits
            .iter()
            .filter(|x| **x != f32::NEG_INFINITY)
            .map(|&x| f64::from(x))
    };
    let count = finite().count();
    if count == 0 {
        return;
    }
    let mean = finite().sum::<f64>() / count as f64;
    let variance = finite().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count as f64;
    let floor = (f64::from(math::max(logits)) - f64::from(n) * variance.sqrt()) as f32;
    for x in logits.iter_mut() {
        *x = if *x < floor { f32::NEG_INFINITY } else { *x };
    }
}

/// The `k` largest logits in no particular order; lower ids win ties; NaN and minus infinity are never taken.
///
/// One scan against the k-th best found so far. Blocks without a better entry, nearly all of them, cost one
/// vectorised comparison.
pub(super) fn top_k(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    const BLOCK: usize = 64;
    out.clear();
    if k == 0 {
        return;
    }
    let limit = k.saturating_mul(2).max(k.saturating_add(256));
    let mut threshold = f32::NEG_INFINITY;
    let mut base = 0_u32;
    for block in logits.chunks(BLOCK) {
        if block.iter().fold(false, |any, &x| any | (x > threshold)) {
            for (i, &logit) in block.iter().enumerate() {
                // Ties lose: the ids in `out` are lower.
                if logit > threshold {
                    out.push(Candidate::new(base + i as u32, logit));
                }
            }
            if out.len() >= limit {
                out.select_nth_unstable_by(k - 1, best_first);
                out.truncate(k);
                threshold = out[k - 1].logit;
            }
        }
        base += block.len() as u32;
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, best_first);
        out.truncate(k);
    }
}

/// The `k` largest of `logits`, best first, lower ids first on ties; NaN and minus infinity are never taken, plus infinity counts as
/// the largest finite number. Nothing is allocated if `out` has room for `2 k + 320`.
pub fn top(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    top_k(logits, k, out);
    out.sort_unstable_by(best_first);
}

/// All tokens with a logit of at least `floor`, in order of id.
pub(super) fn at_least(logits: &[f32], floor: f32, out: &mut Vec<Candidate>) {
    const BLOCK: usize = 64;
    let floor = if floor > f32::MIN { floor } else { f32::MIN };
    out.clear();
    let mut base = 0_u32;
    for block in logits.chunks(BLOCK) {
        if block.iter().fold(false, |any, &x| any | (x >= floor)) {
            for (i, &logit) in block.iter().enumerate() {
                if logit >= floor {
                    out.push(Candidate::new(base + i as u32, logit));
                }
            }
        }
        base += block.len() as u32;
    }
}

/// Something to be kept in order of `key`, then id, until enough probability has come together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranked {
    key: f32,
    id: u32,
    p: f32,
}

impl Ranked {
    fn order(a: &Self, b: &Self) -> std::cmp::Ordering {
        a.key.total_cmp(&b.key).then(a.id.cmp(&b.id))
    }
}

/// The last item, in order of key and id, of the shortest prefix for which `enough(mass, count)` holds; the very
/// last item if none does. Weighted quickselect: expected O(n), reorders `items`. `items` is not empty.
fn prefix_end(items: &mut [Ranked], enough: impl Fn(f64, usize) -> bool) -> Ranked {
    let (mut rest, mut mass, mut count) = (items, 0.0_f64, 0_usize);
    while rest.len() > 1 {
        let mid = (rest.len() - 1) / 2;
        rest.select_nth_unstable_by(mid, Ranked::order);
        let left: f64 = rest[..=mid].iter().map(|r| f64::from(r.p)).sum();
        if enough(mass + left, count + mid + 1) {
            rest = &mut rest[..=mid];
        } else {
            mass += left;
            count += mid + 1;
            rest = &mut rest[mid + 1..];
        }
    }
    rest[0]
}

/// Keeps the candidates up to the end of that prefix, ranking them by `key`.
fn keep_prefix(
    cands: &mut Vec<Candidate>,
    scratch: &mut Vec<Ranked>,
    key: impl Fn(&Candidate) -> f32,
    enough: impl Fn(f64, usize) -> bool,
) {
    if cands.is_empty() {
        return;
    }
    scratch.clear();
    scratch.extend(cands.iter().map(|c| Ranked {
        key: key(c),
        id: c.id,
        p: c.p,
    }));
    let end = prefix_end(scratch, enough);
    cands.retain(|c| {
        Ranked::order(
            &Ranked {
                key: key(c),
                id: c.id,
                p: c.p,
            },
            &end,
        )
        .is_le()
    });
}

/// Locally typical sampling: the tokens whose surprise is closest to the entropy, until their mass exceeds `p`.
pub(super) fn typical(
    cands: &mut Vec<Candidate>,
    scratch: &mut Vec<Ranked>,
    p: f32,
    min_keep: usize,
) {
    if p >= 1.0 {
        return;
    }
    math::softmax(cands);
    let entropy: f64 = cands
        .iter()
        .filter(|c| c.p > 0.0)
        .map(|c| -f64::from(c.p) * f64::from(c.p).ln())
        .sum();
    let key = |c: &Candidate| (-f64::from(c.p).ln() - entropy).abs() as f32;
    keep_prefix(cands, scratch, key, |mass, n| {
        mass > f64::from(p) && n >= min_keep
    });
}

/// Top-p (nucleus): the most probable tokens until their mass reaches `p`. Wants `p` of the candidates filled in.
pub(super) fn top_p(
    cands: &mut Vec<Candidate>,
    scratch: &mut Vec<Ranked>,
    p: f32,
    min_keep: usize,
) {
    if p >= 1.0 {
        return;
    }
    keep_prefix(
        cands,
        scratch,
        |c| -c.logit,
        |mass, n| mass + SLACK >= f64::from(p) && n >= min_keep,
    );
}

/// Min-p: drops tokens less probable than `p` times the best.
pub(super) fn min_p(
    cands: &mut Vec<Candidate>,
    scratch: &mut Vec<Ranked>,
    p: f32,
    min_keep: usize,
) {
    if p <= 0.0 || cands.is_empty() {
        return;
    }
    let max = cands.iter().fold(
        f32::NEG_INFINITY,
        |m, c| if c.logit > m { c.logit } else { m },
    );
    // Above 1 the best itself would go; it always stays.
    let floor = max + p.min(1.0).ln();
    if cands.iter().filter(|c| c.logit >= floor).count() >= min_keep {
        cands.retain(|c| c.logit >= floor);
    } else {
        keep_prefix(cands, scratch, |c| -c.logit, |_, n| n >= min_keep);
    }
}

/// XTC, "exclude top choices": of the tokens with a probability of at least `threshold`, keeps only the least
/// probable one. The caller has drawn the lot. At most half can pass a threshold above 0.5, which turns it off.
pub(super) fn xtc(cands: &mut Vec<Candidate>, threshold: f32, min_keep: usize) {
    if threshold > 0.5 || cands.len() < 2 {
        return;
    }
    math::softmax(cands);
    let above = |c: &&Candidate| c.p >= threshold;
    let n_above = cands.iter().filter(above).count();
    if n_above < 2 || cands.len() - (n_above - 1) < min_keep {
        return;
    }
    let Some(last) = cands
        .iter()
        .filter(above)
        .max_by(|a, b| best_first(a, b))
        .copied()
    else {
        return;
    };
    cands.retain(|c| c.p < threshold || c.id == last.id);
}
