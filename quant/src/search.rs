//! The searches for good scales that the better quantizers share.
//!
//! A scale that maps the largest value to the largest code is rarely the best one: moving it a little costs the
//! extremes something and gives the many small values more. Each search tries a number of scales, computes the
//! least-squares optimum for the codes that result, and keeps the best. They follow ggml's sequence of float
//! operations, so that a file quantized here is the one that ggml makes.
//!
//! That sequence leaves nothing to do at once within a group of values: its sums are of one value after the other. But a block has
//! many groups, and what is done to one is done to all. So they lie side by side ([`Groups`]), every operation is one over
//! all lanes, branches are choices between two results, and the compiler makes vectors of it.

use crate::num::{max_by_abs, nearest_int};

/// Groups whose magnitudes stay below this are taken for zero.
pub(crate) const GROUP_MAX_EPS: f32 = 1e-15;

/// A number for each of `L` groups.
pub(crate) type Lanes<const L: usize> = [f32; L];
/// `L` groups of `N` values side by side: `[value, group]`.
pub(crate) type Groups<const N: usize, const L: usize> = [Lanes<L>; N];

/// Puts groups that lie one after the other side by side.
#[inline]
pub(crate) fn side_by_side<const N: usize, const L: usize>(x: &[f32]) -> Groups<N, L> {
    let mut groups = [[0.0; L]; N];
    for (j, x) in x.chunks_exact(N).enumerate() {
        for (group, &x) in groups.iter_mut().zip(x) {
            group[j] = x;
        }
    }
    groups
}

/// The inverse of [`side_by_side`], for codes.
#[inline]
fn one_by_one<const N: usize, const L: usize>(codes: &[[u8; L]; N], l: &mut [u8]) {
    for (j, l) in l.chunks_exact_mut(N).enumerate() {
        for (l, codes) in l.iter_mut().zip(codes) {
            *l = codes[j];
        }
    }
}

/// At 1.5 * 2^23 a float's last place is one: what is added to it is rounded to an integer, ties to even.
const MAGIC: f32 = 12_582_912.0;

/// `v` within `low..=high`.
#[inline(always)]
fn within(v: f32, low: f32, high: f32) -> f32 {
    let v = if v > low { v } else { low };
    if v < high { v } else { high }
}

/// The integer in `low..=high` nearest to `v`, which is a number.
#[inline(always)]
fn rounded(v: f32, low: f32, high: f32) -> f32 {
    within(v, low, high) + MAGIC - MAGIC
}

/// The same as the bits of a byte. NaN, which comes from a scale that overflows, counts as 0.
#[inline(always)]
pub(crate) fn code(v: f32, low: f32, high: f32) -> u8 {
    let v = if v.is_nan() { 0.0 } else { v };
    (within(v, low, high) + MAGIC).to_bits() as u8
}

/// Smallest and largest value. NaNs are passed over; without any number the result is (`f32::MAX`, `f32::MIN`).
pub(crate) fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, f32::MIN), |(min, max), &v| {
        (if v < min { v } else { min }, if v > max { v } else { max })
    })
}

/// Mean of the squares.
pub(crate) fn mean_square(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32
}

/// Weights of the errors of `N` values, from their importance: larger values count for more, but `floor` (a mean
/// square) keeps small ones from counting for nothing.
pub(crate) fn weigh<const N: usize>(x: &[f32], importance: &[f32], floor: f32) -> [f32; N] {
    std::array::from_fn(|i| importance[i] * (floor + x[i] * x[i]).sqrt())
}

/// The two sums whose quotient is the least-squares scale for codes `l`: `sum w x l` and `sum w l^2`.
#[inline]
pub(crate) fn fit(x: &[f32], w: &[f32], code: impl Fn(f32) -> i32) -> (f32, f32) {
    let (mut sum_lx, mut sum_l2) = (0.0, 0.0);
    for (&x, &w) in x.iter().zip(w) {
        let l = code(x) as f32;
        sum_lx += w * x * l;
        sum_l2 += w * l * l;
    }
    (sum_lx, sum_l2)
}

/// Scales for codes `-nmax..nmax` of each group, minimising the error weighted by `w`. `l` receives the codes plus `nmax`, group
/// after group.
pub(crate) fn symmetric<const N: usize, const L: usize>(
    nmax: i32,
    x: &[f32],
    w: &[f32],
    l: &mut [u8],
) -> Lanes<L> {
    let (low, high) = (-nmax as f32, (nmax - 1) as f32);
    let (x, w) = (&side_by_side::<N, L>(x), &side_by_side::<N, L>(w));
    let max = max_by_abs_of(x);
    let sums = |iscale: &Lanes<L>| {
        let (mut sum_lx, mut sum_l2) = ([0.0; L], [0.0; L]);
        for (x, w) in x.iter().zip(w) {
            for j in 0..L {
                let l = rounded(iscale[j] * x[j], low, high);
                sum_lx[j] += w[j] * x[j] * l;
                sum_l2[j] += w[j] * l * l;
            }
        }
        (sum_lx, sum_l2)
    };
    let mut iscale = max.map(|max| -nmax as f32 / max);
    let (sum_lx, sum_l2) = sums(&iscale);
    let (mut scale, mut best) = ([0.0; L], [0.0; L]);
    for j in 0..L {
        let is_zero = sum_l2[j] == 0.0;
        scale[j] = if is_zero { 0.0 } else { sum_lx[j] / sum_l2[j] };
        best[j] = scale[j] * sum_lx[j];
    }
    for step in (-9..=9).filter(|&s| s != 0) {
        let trial = max.map(|max| -(nmax as f32 + 0.1 * step as f32) / max);
        let (sum_lx, sum_l2) = sums(&trial);
        for j in 0..L {
            let (lx, l2) = (sum_lx[j], sum_l2[j]);
            if l2 > 0.0 && lx * lx > best[j] * l2 {
                iscale[j] = trial[j];
                scale[j] = lx / l2;
                best[j] = scale[j] * lx;
            }
        }
    }
    let mut codes = [[0; L]; N];
    for (codes, x) in codes.iter_mut().zip(x) {
        for j in 0..L {
            codes[j] = code(iscale[j] * x[j], low, high).wrapping_add(nmax as u8);
        }
    }
    for j in 0..L {
        if max[j].abs() < GROUP_MAX_EPS {
            scale[j] = 0.0;
            codes.iter_mut().for_each(|codes| codes[j] = 0);
        }
    }
    one_by_one(&codes, l);
    scale
}

/// The value of largest magnitude of each group, with its sign; the first one of equals.
#[inline]
pub(crate) fn max_by_abs_of<const N: usize, const L: usize>(x: &Groups<N, L>) -> Lanes<L> {
    x.iter().fold([0.0; L], |mut max, x| {
        for j in 0..L {
            max[j] = if x[j].abs() > max[j].abs() {
                x[j]
            } else {
                max[j]
            };
        }
        max
    })
}

/// Code of `v`, as a signed number in `-nmax..nmax`.
#[inline]
fn signed_code(v: f32, nmax: i32) -> i32 {
    nearest_int(v).clamp(-nmax, nmax - 1)
}

/// Scale for codes `-nmax..nmax`, found by changing one code at a time while that improves the fit. Weights are
/// the squares of the values. `l` receives the codes plus `nmax`. One group at a time: most have no change after the first look,
/// and side by side all would wait for those that do.
pub(crate) fn symmetric_by_descent(nmax: i32, x: &[f32], l: &mut [u8]) -> f32 {
    let max = max_by_abs(x);
    if max.abs() < GROUP_MAX_EPS {
        l.fill(0);
        return 0.0;
    }
    let iscale = -nmax as f32 / max;
    let code = |l: u8| (i32::from(l) - nmax) as f32;
    let (mut sum_lx, mut sum_l2) = (0.0, 0.0);
    for (l, &x) in l.iter_mut().zip(x) {
        let w = x * x;
        *l = (signed_code(iscale * x, nmax) + nmax) as u8;
        sum_lx += w * x * code(*l);
        sum_l2 += w * code(*l) * code(*l);
    }
    for _ in 0..5 {
        let mut changed = false;
        for (l, &x) in l.iter_mut().zip(x) {
            let w = x * x;
            // The sums without this value give the scale it should have been rounded with.
            let mut lx = sum_lx - w * x * code(*l);
            if lx > 0.0 {
                let mut l2 = sum_l2 - w * code(*l) * code(*l);
                let new = (signed_code(x * l2 / lx, nmax) + nmax) as u8;
                if new != *l {
                    lx += w * x * code(new);
                    l2 += w * code(new) * code(new);
                    if l2 > 0.0 && lx * lx * sum_l2 > sum_lx * sum_lx * l2 {
                        *l = new;
                        (sum_lx, sum_l2) = (lx, l2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 }
}

/// Which scales [`affine`] tries.
pub(crate) struct AffineSearch {
    /// Largest code.
    pub nmax: i32,
    /// Offset to `nmax` of the first trial.
    pub first: f32,
    /// Distance of the trials.
    pub step: f32,
    /// Trials after the first.
    pub steps: i32,
}

/// Scales and subtracted minimums for codes `0..=nmax` of each group: `x = scale * l - min`, with `min >= 0`. Trials are judged by
/// absolute errors if they are `ABSOLUTE`, by squared ones otherwise. `l` receives the codes, group after group.
pub(crate) fn affine<const N: usize, const L: usize, const ABSOLUTE: bool>(
    s: &AffineSearch,
    x: &Groups<N, L>,
    w: &Groups<N, L>,
    l: &mut [u8],
) -> (Lanes<L>, Lanes<L>) {
    let nmax = s.nmax as f32;
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = w[0];
    let mut sum_x: Lanes<L> = std::array::from_fn(|j| w[0][j] * x[0][j]);
    for (x, w) in x.iter().zip(w).skip(1) {
        for j in 0..L {
            min[j] = if x[j] < min[j] { x[j] } else { min[j] };
            max[j] = if x[j] > max[j] { x[j] } else { max[j] };
            sum_w[j] += w[j];
            sum_x[j] += w[j] * x[j];
        }
    }
    // The stored minimum is unsigned and subtracted: a positive one cannot be had.
    let min_of_data = min.map(|min| if min > 0.0 { 0.0 } else { min });
    min = min_of_data;
    let error = |scale: f32, min: f32, x: f32, l: f32| {
        let diff = scale * l + min - x;
        if ABSOLUTE { diff.abs() } else { diff * diff }
    };

    let mut iscale: Lanes<L> = std::array::from_fn(|j| nmax / (max[j] - min[j]));
    let mut low = min;
    let mut scale = iscale.map(|iscale| 1.0 / iscale);
    let mut best = [0.0; L];
    for (x, w) in x.iter().zip(w) {
        for j in 0..L {
            let l = rounded(iscale[j] * (x[j] - low[j]), 0.0, nmax);
            best[j] += w[j] * error(scale[j], min[j], x[j], l);
        }
    }
    for step in 0..=s.steps {
        // Each trial starts from the best minimum so far, not from that of the data.
        let offset = s.first + s.step * step as f32 + nmax;
        let from = min;
        let trial: Lanes<L> = std::array::from_fn(|j| offset / (max[j] - from[j]));
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; L], [0.0; L], [0.0; L]);
        let mut codes = [[0.0; L]; N];
        for ((codes, x), w) in codes.iter_mut().zip(x).zip(w) {
            for j in 0..L {
                let l = rounded(trial[j] * (x[j] - from[j]), 0.0, nmax);
                codes[j] = l;
                sum_l[j] += w[j] * l;
                sum_l2[j] += w[j] * l * l;
                sum_xl[j] += w[j] * l * x[j];
            }
        }
        let (mut det, mut this_scale, mut this_min) = ([0.0; L], [0.0; L], [0.0; L]);
        for j in 0..L {
            det[j] = sum_w[j] * sum_l2[j] - sum_l[j] * sum_l[j];
            let scale = (sum_w[j] * sum_xl[j] - sum_x[j] * sum_l[j]) / det[j];
            let min = (sum_l2[j] * sum_x[j] - sum_l[j] * sum_xl[j]) / det[j];
            let is_above = min > 0.0;
            this_min[j] = if is_above { 0.0 } else { min };
            this_scale[j] = if is_above {
                sum_xl[j] / sum_l2[j]
            } else {
                scale
            };
        }
        let mut this_error = [0.0; L];
        for ((codes, x), w) in codes.iter().zip(x).zip(w) {
            for j in 0..L {
                this_error[j] += w[j] * error(this_scale[j], this_min[j], x[j], codes[j]);
            }
        }
        for j in 0..L {
            if det[j] > 0.0 && this_error[j] < best[j] {
                best[j] = this_error[j];
                scale[j] = this_scale[j];
                min[j] = this_min[j];
                (iscale[j], low[j]) = (trial[j], from[j]);
            }
        }
    }
    let mut codes = [[0; L]; N];
    for (codes, x) in codes.iter_mut().zip(x) {
        for j in 0..L {
            codes[j] = code(iscale[j] * (x[j] - low[j]), 0.0, nmax);
        }
    }
    for j in 0..L {
        if max[j] == min_of_data[j] {
            (scale[j], min[j]) = (0.0, min_of_data[j]);
            codes.iter_mut().for_each(|codes| codes[j] = 0);
        }
    }
    one_by_one(&codes, l);
    (scale, min.map(|min| -min))
}

/// The search that quantizers with an importance use.
pub(crate) const fn thorough(nmax: i32) -> AffineSearch {
    AffineSearch {
        nmax,
        first: -0.9,
        step: 0.05,
        steps: 36,
    }
}

/// Scale for codes `0..=nmax` of non-negative numbers, minimising the error weighted by `w`.
pub(crate) fn positive(nmax: i32, x: &[f32], w: &[f32], l: &mut [u8]) -> f32 {
    let max = x.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    if max < GROUP_MAX_EPS {
        l.fill(0);
        return 0.0;
    }
    let code = |v: f32| nearest_int(v).clamp(0, nmax);
    let error = |iscale: f32| {
        let scale = 1.0 / iscale;
        let mut sum = 0.0;
        for (&x, &w) in x.iter().zip(w) {
            let diff = x - scale * code(iscale * x) as f32;
            sum += w * diff * diff;
        }
        sum
    };
    let mut iscale = nmax as f32 / max;
    let mut best = error(iscale);
    for step in (-4..=4).filter(|&s| s != 0) {
        let trial = (0.1 * step as f32 + nmax as f32) / max;
        let this = error(trial);
        if this < best {
            best = this;
            iscale = trial;
        }
    }
    let (mut sum_lx, mut sum_l2) = fit(x, w, |x| code(iscale * x));
    for (l, &x) in l.iter_mut().zip(x) {
        *l = code(iscale * x) as u8;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((l, &x), &w) in l.iter_mut().zip(x).zip(w) {
            let old = f32::from(*l);
            let (mut lx, mut l2) = (sum_lx - w * x * old, sum_l2 - w * old * old);
            if lx > 0.0 && l2 > 0.0 {
                let new = code(x * l2 / lx);
                if new as f32 != old {
                    lx += w * x * new as f32;
                    l2 += w * new as f32 * new as f32;
                    if lx * lx * sum_l2 > sum_lx * sum_lx * l2 {
                        *l = new as u8;
                        (sum_lx, sum_l2) = (lx, l2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 }
}
