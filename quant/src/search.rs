//! The searches for good scales that the better quantizers share.
//!
//! A scale that maps the largest value to the largest code is rarely the best one: moving it a little costs the
//! extremes something and gives the many small values more. Each search tries a number of scales, computes the
//! least-squares optimum for the codes that result, and keeps the best. They follow ggml's sequence of float
//! operations, so that a file quantized here is the one that ggml makes.

use crate::num::{max_by_abs, nearest_int};

/// Groups whose magnitudes stay below this are taken for zero.
pub(crate) const GROUP_MAX_EPS: f32 = 1e-15;

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

/// Code of `v`, as a signed number in `-nmax..nmax`.
#[inline]
fn signed_code(v: f32, nmax: i32) -> i32 {
    nearest_int(v).clamp(-nmax, nmax - 1)
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

/// Scale for codes `-nmax..nmax`, minimising the error weighted by `w`. `l` receives the codes plus `nmax`.
pub(crate) fn symmetric(nmax: i32, x: &[f32], w: &[f32], l: &mut [u8]) -> f32 {
    let max = max_by_abs(x);
    if max.abs() < GROUP_MAX_EPS {
        l.fill(0);
        return 0.0;
    }
    let mut encode = |iscale: f32| {
        for (l, &x) in l.iter_mut().zip(x) {
            *l = (signed_code(iscale * x, nmax) + nmax) as u8;
        }
    };
    let iscale = -nmax as f32 / max;
    encode(iscale);
    let (sum_lx, sum_l2) = fit(x, w, |x| signed_code(iscale * x, nmax));
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|&s| s != 0) {
        let iscale = -(nmax as f32 + 0.1 * step as f32) / max;
        let (sum_lx, sum_l2) = fit(x, w, |x| signed_code(iscale * x, nmax));
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            encode(iscale);
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}

/// Scale for codes `-nmax..nmax`, found by changing one code at a time while that improves the fit. Weights are
/// the squares of the values. `l` receives the codes plus `nmax`.
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

/// Which scales [`affine`] tries, and how it judges them.
pub(crate) struct AffineSearch {
    /// Largest code.
    pub nmax: i32,
    /// Offset to `nmax` of the first trial.
    pub first: f32,
    /// Distance of the trials.
    pub step: f32,
    /// Trials after the first.
    pub steps: i32,
    /// Judge by absolute instead of squared errors.
    pub absolute: bool,
}

/// Scale and subtracted minimum for codes `0..=nmax`: `x = scale * l - min`, with `min >= 0`.
pub(crate) fn affine(s: &AffineSearch, x: &[f32], w: &[f32], l: &mut [u8]) -> (f32, f32) {
    let nmax = s.nmax as f32;
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = w[0];
    let mut sum_x = sum_w * x[0];
    for (&x, &w) in x.iter().zip(w).skip(1) {
        if x < min {
            min = x;
        }
        if x > max {
            max = x;
        }
        sum_w += w;
        sum_x += w * x;
    }
    if min > 0.0 {
        // The stored minimum is unsigned and subtracted: a positive one cannot be had.
        min = 0.0;
    }
    if max == min {
        l.fill(0);
        return (0.0, -min);
    }
    let code = |iscale: f32, low: f32, x: f32| nearest_int(iscale * (x - low)).clamp(0, s.nmax);
    let error = |scale: f32, min: f32, x: f32, l: i32| {
        let diff = scale * l as f32 + min - x;
        if s.absolute { diff.abs() } else { diff * diff }
    };

    let iscale = nmax / (max - min);
    let mut scale = 1.0 / iscale;
    let mut best = 0.0;
    for ((l, &x), &w) in l.iter_mut().zip(x).zip(w) {
        let code = code(iscale, min, x);
        *l = code as u8;
        best += w * error(scale, min, x, code);
    }
    for step in 0..=s.steps {
        // Each trial starts from the best minimum so far, not from that of the data.
        let low = min;
        let iscale = (s.first + s.step * step as f32 + nmax) / (max - low);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for (&x, &w) in x.iter().zip(w) {
            let l = code(iscale, low, x) as f32;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let det = sum_w * sum_l2 - sum_l * sum_l;
        if det > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det;
            if this_min > 0.0 {
                this_min = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let mut this_error = 0.0;
            for (&x, &w) in x.iter().zip(w) {
                this_error += w * error(this_scale, this_min, x, code(iscale, low, x));
            }
            if this_error < best {
                for (l, &x) in l.iter_mut().zip(x) {
                    *l = code(iscale, low, x) as u8;
                }
                best = this_error;
                scale = this_scale;
                min = this_min;
            }
        }
    }
    (scale, -min)
}

/// The search that quantizers with an importance use.
pub(crate) const fn thorough(nmax: i32) -> AffineSearch {
    AffineSearch {
        nmax,
        first: -0.9,
        step: 0.05,
        steps: 36,
        absolute: false,
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
