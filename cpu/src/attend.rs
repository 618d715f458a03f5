//! The inner part of attention: some rows of queries with one page.

use crate::PAGE;
use crate::simd::{Simd, for_isa};

/// Queries that read the same keys, and what each of them knows so far.
pub(crate) struct Rows<'a> {
    /// `[n, dim_k]`
    pub(crate) q: &'a [f32],
    /// The largest logit: `[n]`.
    pub(crate) max: &'a mut [f32],
    /// Sum of exponentials relative to it: `[n]`.
    pub(crate) sum: &'a mut [f32],
    /// Sum of values, weighted by them: `[n, dim_v]`.
    pub(crate) acc: &'a mut [f32],
    /// The tokens of the page that each row sees, from and to: `[n]`.
    pub(crate) seen: &'a [(u8, u8)],
    /// What the page contributed: the sum of its exponentials, relative to the largest logit after it: `[n]`.
    pub(crate) page_sum: &'a mut [f32],
}

/// A page of keys and values, decoded.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a> {
    /// `[PAGE, dim_k]`
    pub(crate) k: &'a [f32],
    /// `[PAGE, dim_v]`
    pub(crate) v: &'a [f32],
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
}

for_isa! {
    /// Takes a page into account. Dimensions are multiples of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn attend<S>(rows: &mut Rows<'_>, page: Page<'_>) attend_s;

    /// Decodes half-precision numbers, a multiple of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn decode_f16<S>(from: &[u8], to: &mut [f32]) decode_f16_s;

    /// `to += a * from`, a multiple of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn accumulate<S>(to: &mut [f32], keep: f32, from: &[f32], a: f32) accumulate_s;
}

#[inline(always)]
unsafe fn attend_s<S: Simd>(rows: &mut Rows<'_>, page: Page<'_>) {
    let n = rows.seen.len();
    let (dim_k, dim_v) = (page.k.len() / PAGE, page.v.len() / PAGE);
    assert!(dim_k.is_multiple_of(16) && dim_v.is_multiple_of(16));
    assert!(rows.q.len() == n * dim_k && rows.acc.len() == n * dim_v);
    assert!(rows.max.len() == n && rows.sum.len() == n && rows.page_sum.len() == n);
    for r in 0..n {
        let (from, to) = (usize::from(rows.seen[r].0), usize::from(rows.seen[r].1));
        rows.page_sum[r] = 0.0;
        if from >= to {
            continue;
        }
        assert!(to <= PAGE);
        // SAFETY: lengths are asserted above; the instruction set is available.
        unsafe {
            let q = rows.q.as_ptr().add(r * dim_k);
            let acc = rows.acc.as_mut_ptr().add(r * dim_v);
            let mut logits = [0.0; PAGE];
            products::<S>(q, page.k.as_ptr(), dim_k, &mut logits);
            for logit in &mut logits {
                *logit *= page.scale;
            }
            if let Some(cap) = page.softcap {
                for logit in &mut logits {
                    *logit = cap * (*logit / cap).tanh();
                }
            }
            if to - from < PAGE {
                logits[..from].fill(f32::NEG_INFINITY);
                logits[to..].fill(f32::NEG_INFINITY);
            }
            let mut max = S::load(logits.as_ptr());
            for i in (S::N..PAGE).step_by(S::N) {
                max = S::max(max, S::load(logits.as_ptr().add(i)));
            }
            let max = S::largest(max);
            if max > rows.max[r] {
                let mut rescale = [0.0; 16];
                S::store(rescale.as_mut_ptr(), S::exp(S::splat(rows.max[r] - max)));
                rows.max[r] = max;
                rows.sum[r] *= rescale[0];
                let rescale = S::splat(rescale[0]);
                for i in (0..dim_v).step_by(S::N) {
                    S::store(acc.add(i), S::mul(S::load(acc.add(i)), rescale));
                }
            }
            let minus_max = S::splat(-rows.max[r]);
            let mut sum = S::splat(0.0);
            for i in (0..PAGE).step_by(S::N) {
                let p = S::exp(S::add(S::load(logits.as_ptr().add(i)), minus_max));
                sum = S::add(sum, p);
                S::store(logits.as_mut_ptr().add(i), p);
            }
            rows.page_sum[r] = S::sum(sum);
            rows.sum[r] += rows.page_sum[r];
            weighted_sum::<S>(
                &logits[from..to],
                page.v.as_ptr().add(from * dim_v),
                dim_v,
                acc,
            );
        }
    }
}

/// Products of a query with the keys of a page.
#[inline(always)]
unsafe fn products<S: Simd>(q: *const f32, k: *const f32, dim: usize, out: &mut [f32; PAGE]) {
    // SAFETY: by the caller; `dim` is a multiple of `N`.
    unsafe {
        let mut sums = [S::splat(0.0); PAGE];
        if S::N == 16 {
            for i in (0..dim).step_by(S::N) {
                let q = S::load(q.add(i));
                for (t, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(q, S::load(k.add(t * dim + i)), *sum);
                }
            }
        } else {
            // Fewer registers: half of the tokens at a time.
            for half in [0, PAGE / 2] {
                let mut part = [S::splat(0.0); PAGE / 2];
                for i in (0..dim).step_by(S::N) {
                    let q = S::load(q.add(i));
                    for (t, sum) in part.iter_mut().enumerate() {
                        *sum = S::fma(q, S::load(k.add((half + t) * dim + i)), *sum);
                    }
                }
                sums[half..half + PAGE / 2].copy_from_slice(&part);
            }
        }
        S::sums(sums, out);
    }
}

/// `acc += sum of p[t] * v[t]`
#[inline(always)]
unsafe fn weighted_sum<S: Simd>(p: &[f32], v: *const f32, dim: usize, acc: *mut f32) {
    const WIDE: usize = 8;
    // SAFETY: by the caller; `dim` is a multiple of `N`.
    unsafe {
        let mut i = 0;
        while i + WIDE * S::N <= dim {
            let mut sums: [S::V; WIDE] = std::array::from_fn(|j| S::load(acc.add(i + j * S::N)));
            for (t, p) in p.iter().enumerate() {
                let p = S::splat(*p);
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = S::fma(p, S::load(v.add(t * dim + i + j * S::N)), *sum);
                }
            }
            for (j, sum) in sums.into_iter().enumerate() {
                S::store(acc.add(i + j * S::N), sum);
            }
            i += WIDE * S::N;
        }
        while i < dim {
            let mut sum = S::load(acc.add(i));
            for (t, p) in p.iter().enumerate() {
                sum = S::fma(S::splat(*p), S::load(v.add(t * dim + i)), sum);
            }
            S::store(acc.add(i), sum);
            i += S::N;
        }
    }
}

#[inline(always)]
unsafe fn decode_f16_s<S: Simd>(from: &[u8], to: &mut [f32]) {
    assert!(from.len() == 2 * to.len() && to.len().is_multiple_of(16));
    for i in (0..to.len()).step_by(S::N) {
        // SAFETY: lengths are asserted.
        unsafe {
            S::store(
                to.as_mut_ptr().add(i),
                S::load_f16(from.as_ptr().add(2 * i).cast()),
            );
        }
    }
}

#[inline(always)]
unsafe fn accumulate_s<S: Simd>(to: &mut [f32], keep: f32, from: &[f32], a: f32) {
    assert!(from.len() == to.len() && to.len().is_multiple_of(16));
    for i in (0..to.len()).step_by(S::N) {
        // SAFETY: lengths are asserted.
        unsafe {
            let p = to.as_mut_ptr().add(i);
            let kept = S::mul(S::load(p), S::splat(keep));
            S::store(p, S::fma(S::load(from.as_ptr().add(i)), S::splat(a), kept));
        }
    }
}
