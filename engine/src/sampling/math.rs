//! Arithmetic over rows of logits.

use super::Candidate;

/// Lanes of the accumulators. Independent of the machine, so that sums are too.
const LANES: usize = 8;

/// `e^x` for `x <= 0`, to about 2 ulp; exactly 0 below -87.
///
/// Written out because libm's `expf` differs between platforms, which would make a seed mean different things on
/// different machines, and because this form vectorises. Range reduction `x = n ln 2 + r` and a degree 5
/// polynomial for `e^r`, as in Cephes (S. Moshier).
#[inline]
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    /// 1.5 * 2^23: adding and subtracting it rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let y = if x > -87.0 { x } else { -87.0 };
    let shifted = y * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = y - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    // The low bits of `shifted` are n itself.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x > -87.0 { e * scale } else { 0.0 }
}

/// Largest entry; minus infinity for an empty row. NaN entries are skipped.
pub(super) fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (m, &x) in lanes.iter_mut().zip(chunk) {
            *m = if x > *m { x } else { *m };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// `Σ exp(x - max)` over a row without NaN, summed in f64.
pub(super) fn sum_exp(row: &[f32], max: f32) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (s, &x) in lanes.iter_mut().zip(chunk) {
            *s += f64::from(exp_nonpositive(x - max));
        }
    }
    let tail: f64 = rest
        .iter()
        .map(|&x| f64::from(exp_nonpositive(x - max)))
        .sum();
    lanes.iter().sum::<f64>() + tail
}

/// The token with the largest entry, the lowest id on ties; `None` if all are NaN or minus infinity.
pub(super) fn argmax(row: &[f32]) -> Option<u32> {
    first_from(row, max(row))
}

/// What greedy sampling takes: the token with the largest of `logits`, shape `[n_vocab]`, the lowest id on ties. NaN counts as impossible,
/// plus infinity as the largest finite number; `None` if no token is possible.
pub fn best(logits: &[f32]) -> Option<u32> {
    first_from(logits, max(logits).min(f32::MAX))
}

/// The first token whose entry is `least` or larger; none is if that is minus infinity.
fn first_from(row: &[f32], least: f32) -> Option<u32> {
    if least == f32::NEG_INFINITY {
        return None;
    }
    let id = row.iter().position(|&x| x >= least);
    id.map(|i| i as u32)
}

/// Copies `logits` to `out`, NaN becoming minus infinity and plus infinity the largest finite number, so that
/// differences of logits are never NaN.
pub(super) fn copy_sane(out: &mut [f32], logits: &[f32]) {
    for (o, &x) in out.iter_mut().zip(logits) {
        let x = if x.is_nan() { f32::NEG_INFINITY } else { x };
        *o = if x < f32::MAX { x } else { f32::MAX };
    }
}

/// Fills in `p` with the softmax over the candidates.
pub(super) fn softmax(cands: &mut [Candidate]) {
    let max = cands.iter().fold(
        f32::NEG_INFINITY,
        |m, c| if c.logit > m { c.logit } else { m },
    );
    let mut sum = 0.0_f64;
    for c in cands.iter_mut() {
        c.p = exp_nonpositive(c.logit - max);
        sum += f64::from(c.p);
    }
    for c in cands.iter_mut() {
        c.p = (f64::from(c.p) / sum) as f32;
    }
}

/// Natural logarithm of the probability that a plain softmax over `logits` (shape `[n_vocab]`) gives to token `id`.
///
/// This is the model's own opinion, before penalties, truncation and temperature. NaN entries count as impossible.
/// Returns minus infinity for an id outside the row.
pub fn log_prob(logits: &[f32], id: u32) -> f32 {
    let Some(&x) = logits.get(id as usize) else {
        return f32::NEG_INFINITY;
    };
    if x.is_nan() {
        return f32::NEG_INFINITY;
    }
    (f64::from(x) - log_sum_exp(logits)) as f32
}

/// The `n` most probable tokens of a plain softmax over `logits` (shape `[n_vocab]`) with the natural logarithms of
/// their probabilities, best first, lowest id first on ties. Impossible tokens are left out.
pub fn top_log_probs(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let lse = log_sum_exp(logits);
    let mut best = Vec::new();
    super::filter::top(logits, n, &mut best);
    best.iter()
        .map(|c| (c.id, (f64::from(c.logit) - lse) as f32))
        .collect()
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = max(logits);
    if max.is_infinite() {
        return f64::from(max);
    }
    let sum: f64 = if logits.iter().fold(false, |any, x| any | x.is_nan()) {
        logits
            .iter()
            .filter(|x| !x.is_nan())
            .map(|&x| f64::from(exp_nonpositive(x - max)))
            .sum()
    } else {
        sum_exp(logits, max)
    };
    f64::from(max) + sum.ln()
}
