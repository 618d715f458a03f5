//! The inner part of attention: some rows of queries with one page.

use crate::PAGE;
use crate::lanes;
use crate::simd::{Simd, for_isa};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Queries that read the same keys, and what each of them knows so far.
pub(crate) struct Rows<'a> {
    /// Times the scale of logits: `[n, dim_k]`.
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

/// The keys or values of a head in a page: `[PAGE, dim]`.
#[derive(Clone, Copy)]
pub(crate) enum Tokens<'a> {
    /// Decoded.
    F32(&'a [f32]),
    /// As they are in the pool; worth it where few rows read them, since decoding means to write them as well.
    F16(&'a [u8]),
}

/// A page of keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a> {
    /// `[PAGE, dim_k]`
    pub(crate) k: Tokens<'a>,
    /// `[PAGE, dim_v]`, or the keys, if values are what they begin with.
    pub(crate) v: Tokens<'a>,
    pub(crate) dim_v: usize,
    pub(crate) softcap: Option<f32>,
    /// The keys and values of the page that comes next, as they are in the pool. Only the caller knows where it is, so
    /// the processor does not read ahead by itself.
    pub(crate) next: [&'a [u8]; 2],
}

/// Begins to read part `i` of `n` of what comes next.
#[inline(always)]
fn read_ahead<S: Simd>(next: &[u8], i: usize, n: usize) {
    let lines = next.len() / 64;
    for line in lines * i / n..lines * (i + 1) / n {
        S::prefetch(next.as_ptr().wrapping_add(64 * line));
    }
}

impl Tokens<'_> {
    fn dim(&self) -> usize {
        match self {
            Tokens::F32(x) => x.len() / PAGE,
            Tokens::F16(x) => x.len() / 2 / PAGE,
        }
    }
}

/// How numbers are stored.
trait Stored {
    type T;

    /// Reads a vector of them.
    ///
    /// # Safety
    /// The instruction set is available, and `p` is valid for `S::N` numbers.
    unsafe fn load<S: Simd>(p: *const Self::T) -> S::V;
}

struct F32;
struct F16;

impl Stored for F32 {
    type T = f32;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: by the caller.
        unsafe { S::load(p) }
    }
}

impl Stored for F16 {
    type T = u16;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::V {
        // SAFETY: by the caller.
        unsafe { S::load_f16(p) }
    }
}

for_isa! {
    /// Takes a page into account. Dimensions are multiples of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn attend<S>(rows: &mut Rows<'_>, page: Page<'_>) attend_s;

    /// `to += a * from`, a multiple of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn accumulate<S>(to: &mut [f32], keep: f32, from: &[f32], a: f32) accumulate_s;
}

#[inline(always)]
unsafe fn attend_s<S: Simd>(rows: &mut Rows<'_>, page: Page<'_>) {
    let n = rows.seen.len();
    let (dim_k, stride_v) = (page.k.dim(), page.v.dim());
    assert!(dim_k.is_multiple_of(16) && page.dim_v.is_multiple_of(16) && page.dim_v <= stride_v);
    assert!(rows.q.len() == n * dim_k && rows.acc.len() == n * page.dim_v);
    assert!(rows.max.len() == n && rows.sum.len() == n && rows.page_sum.len() == n);
    assert!(rows.seen.iter().all(|s| usize::from(s.1) <= PAGE));
    // SAFETY: lengths are asserted above; the instruction set is available.
    unsafe {
        match (page.k, page.v) {
            (Tokens::F32(k), Tokens::F32(v)) => {
                all_rows::<S, F32, F32>(rows, (k.as_ptr(), dim_k), (v.as_ptr(), stride_v), &page);
            }
            (Tokens::F16(k), Tokens::F16(v)) => {
                let (k, v) = (k.as_ptr().cast(), v.as_ptr().cast());
                all_rows::<S, F16, F16>(rows, (k, dim_k), (v, stride_v), &page);
            }
            (Tokens::F16(k), Tokens::F32(v)) => {
                let k = k.as_ptr().cast();
                all_rows::<S, F16, F32>(rows, (k, dim_k), (v.as_ptr(), stride_v), &page);
            }
            (Tokens::F32(k), Tokens::F16(v)) => {
                let v = v.as_ptr().cast();
                all_rows::<S, F32, F16>(rows, (k.as_ptr(), dim_k), (v, stride_v), &page);
            }
        }
    }
}

/// Up to six rows at a time, so that a key and a value are read and converted once for them. Which rows go together
/// makes no difference to what comes out.
#[inline(always)]
unsafe fn all_rows<S: Simd, K: Stored, V: Stored>(
    rows: &mut Rows<'_>,
    k: (*const K::T, usize),
    v: (*const V::T, usize),
    page: &Page<'_>,
) {
    let n = rows.seen.len();
    let mut r = 0;
    // SAFETY: by the caller.
    unsafe {
        // As many sums of products as leave registers for keys: up to 24 of 32, or 12 of 16. Seven rows are four
        // and three, and eight are twice four, which are as fast as eight with two tokens.
        while r < n {
            match (n - r, S::N) {
                (6 | 9.., 16) => r += some_rows::<S, K, V, 6, 4, 4>(rows, r, k, v, page),
                (6 | 7 | 9.., 8) => r += some_rows::<S, K, V, 6, 4, 2>(rows, r, k, v, page),
                (4.., 16) => r += some_rows::<S, K, V, 4, 4, 4>(rows, r, k, v, page),
                (4.., 8) => r += some_rows::<S, K, V, 4, 4, 2>(rows, r, k, v, page),
                (3, 16) => r += some_rows::<S, K, V, 3, 4, 4>(rows, r, k, v, page),
                (2.., 16) => r += some_rows::<S, K, V, 2, 8, 8>(rows, r, k, v, page),
                (2.., 8) => r += some_rows::<S, K, V, 2, 4, 4>(rows, r, k, v, page),
                (_, 16) => r += some_rows::<S, K, V, 1, 16, 16>(rows, r, k, v, page),
                _ => r += some_rows::<S, K, V, 1, 8, 8>(rows, r, k, v, page),
            }
        }
    }
}

/// `R` rows from row `r` on; `T` tokens are summed up together, of which `P` go through the dimensions at a time.
/// Returns `R`.
#[inline(always)]
unsafe fn some_rows<
    S: Simd,
    K: Stored,
    V: Stored,
    const R: usize,
    const T: usize,
    const P: usize,
>(
    rows: &mut Rows<'_>,
    r: usize,
    (k, dim_k): (*const K::T, usize),
    v: (*const V::T, usize),
    page: &Page<'_>,
) -> usize {
    let dim_v = page.dim_v;
    let (mut from, mut to) = (PAGE, 0);
    for seen in rows.seen[r..r + R].iter().filter(|s| s.0 < s.1) {
        from = from.min(usize::from(seen.0));
        to = to.max(usize::from(seen.1));
    }
    if from >= to {
        rows.page_sum[r..r + R].fill(0.0);
        return R;
    }
    let mut logits = [[0.0; PAGE]; R];
    // SAFETY: by the caller.
    unsafe {
        let q = rows.q.as_ptr().add(r * dim_k);
        let next = if r == 0 { page.next } else { [&[] as &[u8]; 2] };
        products::<S, K, R, T, P>(q, k, dim_k, next, &mut logits);
        softmax::<S, R>(rows, r, &mut logits, page, dim_v);
        let acc = rows.acc.as_mut_ptr().add(r * dim_v);
        let seen = from..to;
        let mut at = 0;
        match (R, S::N) {
            (1, _) => {
                at = weighted_sum::<S, V, R, 8>(&logits, &seen, v, dim_v, acc, at);
                at = weighted_sum::<S, V, R, 4>(&logits, &seen, v, dim_v, acc, at);
            }
            (_, 16) | (2, _) => {
                at = weighted_sum::<S, V, R, 4>(&logits, &seen, v, dim_v, acc, at);
            }
            _ => at = weighted_sum::<S, V, R, 2>(&logits, &seen, v, dim_v, acc, at),
        }
        weighted_sum::<S, V, R, 1>(&logits, &seen, v, dim_v, acc, at);
    }
    R
}

/// Products of `R` rows with the keys of a page.
#[inline(always)]
unsafe fn products<S: Simd, K: Stored, const R: usize, const T: usize, const P: usize>(
    q: *const f32,
    k: *const K::T,
    dim: usize,
    next: [&[u8]; 2],
    out: &mut [[f32; PAGE]; R],
) {
    // SAFETY: by the caller; `dim` is a multiple of `N`.
    unsafe {
        let mut fours = [[MaybeUninit::uninit(); PAGE / 4]; R];
        for first in (0..PAGE).step_by(T) {
            for next in next {
                read_ahead::<S>(next, first / T, PAGE / T);
            }
            let mut sums = [[S::splat(0.0); T]; R];
            for pass in (0..T).step_by(P) {
                let mut part = [[S::splat(0.0); P]; R];
                for i in (0..dim).step_by(S::N) {
                    let mut keys = [S::splat(0.0); P];
                    for (t, key) in keys.iter_mut().enumerate() {
                        *key = K::load::<S>(k.add((first + pass + t) * dim + i));
                    }
                    for (r, part) in part.iter_mut().enumerate() {
                        let q = S::load(q.add(r * dim + i));
                        for (part, key) in part.iter_mut().zip(keys) {
                            *part = S::fma(q, key, *part);
                        }
                    }
                }
                for (sums, part) in sums.iter_mut().zip(&part) {
                    sums[pass..pass + P].copy_from_slice(part);
                }
            }
            for (fours, sums) in fours.iter_mut().zip(&sums) {
                for (i, sums) in sums.as_chunks::<4>().0.iter().enumerate() {
                    fours[first / 4 + i].write(S::fours(*sums));
                }
            }
        }
        for (fours, out) in fours.iter().zip(out) {
            // All of them are written: steps of `T` tokens make a page.
            S::sums(fours.map(|x| x.assume_init()), out);
        }
    }
}

/// From products of rows with keys to weights of values, relative to the largest logit of each row so far.
#[inline(always)]
unsafe fn softmax<S: Simd, const R: usize>(
    rows: &mut Rows<'_>,
    r: usize,
    logits: &mut [[f32; PAGE]; R],
    page: &Page<'_>,
    dim_v: usize,
) {
    if let Some(cap) = page.softcap {
        for logit in logits.as_flattened_mut() {
            let x = *logit / cap;
            *logit = cap
                * match S::N {
                    1 => lanes::tanh::<false>(x),
                    _ => lanes::tanh::<true>(x),
                };
        }
    }
    for (logits, seen) in logits.iter_mut().zip(&rows.seen[r..r + R]) {
        if *seen != (0, PAGE as u8) {
            for t in (0..PAGE).filter(|&t| t < usize::from(seen.0) || t >= usize::from(seen.1)) {
                logits[t] = f32::NEG_INFINITY;
            }
        }
    }
    const { assert!(R <= 8) };
    let mut keep = [1.0; R];
    // SAFETY: the instruction set is available; there are `R` rows from `r` on.
    unsafe {
        for (i, logits) in logits.iter().enumerate() {
            let logits = logits.as_ptr();
            let max = (1..PAGE / S::N).fold(S::load(logits), |max, i| {
                S::max(max, S::load(logits.add(i * S::N)))
            });
            let old = rows.max[r + i];
            // Rare after the first pages.
            if S::any_above(max, S::splat(old)) {
                let new = S::largest(max);
                rows.max[r + i] = new;
                keep[i] = lanes::exp::<false>(old - new);
                let factor = S::splat(keep[i]);
                let acc = rows.acc.as_mut_ptr().add((r + i) * dim_v);
                for i in (0..dim_v).step_by(S::N) {
                    S::store(acc.add(i), S::mul(S::load(acc.add(i)), factor));
                }
            }
        }
        // Without branches, so that the exponentials of all rows are under way together.
        let mut sums = [[S::splat(0.0); 4]; 2];
        for (i, logits) in logits.iter_mut().enumerate() {
            // A row that has seen nothing yet, and sees nothing here, stays at minus infinity.
            let minus_max = S::splat(-rows.max[r + i].max(-f32::MAX));
            let mut parts = [S::splat(0.0); PAGE];
            let parts = &mut parts[..PAGE / S::N];
            for (part, logits) in parts.iter_mut().zip(logits.chunks_exact_mut(S::N)) {
                *part = S::exp(S::add(S::load(logits.as_ptr()), minus_max));
                S::store(logits.as_mut_ptr(), *part);
            }
            // Halves are added until one vector is left: the same sum for any `R`, so that a token alone gives what it
            // gives in a batch.
            let mut half = parts.len() / 2;
            while half > 0 {
                for i in 0..half {
                    parts[i] = S::add(parts[i], parts[i + half]);
                }
                half /= 2;
            }
            sums[i / 4][i % 4] = parts[0];
        }
        let first = S::fours(sums[0]);
        let second = if R > 4 { S::fours(sums[1]) } else { first };
        let mut page_sums = [0.0; 16];
        S::sums([first, second, first, second], &mut page_sums);
        for i in 0..R {
            rows.sum[r + i] = rows.sum[r + i] * keep[i] + page_sums[i];
        }
        rows.page_sum[r..r + R].copy_from_slice(&page_sums[..R]);
    }
}

/// `acc[r] += sum of p[r][t] * v[t]` for `R` rows over the tokens that any of them sees, `D` vectors of a value at a
/// time, from dimension `at` on for as long as there are so many. Returns where the next part has to begin.
#[inline(always)]
unsafe fn weighted_sum<S: Simd, V: Stored, const R: usize, const D: usize>(
    p: &[[f32; PAGE]; R],
    seen: &Range<usize>,
    (v, stride): (*const V::T, usize),
    dim: usize,
    acc: *mut f32,
    mut at: usize,
) -> usize {
    // SAFETY: by the caller; `dim` is a multiple of `N`.
    unsafe {
        while at + D * S::N <= dim {
            let mut sums = [[S::splat(0.0); D]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (d, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(acc.add(r * dim + at + d * S::N));
                }
            }
            for t in seen.clone() {
                let mut values = [S::splat(0.0); D];
                for (d, value) in values.iter_mut().enumerate() {
                    *value = V::load::<S>(v.add(t * stride + at + d * S::N));
                }
                for (p, sums) in p.iter().zip(&mut sums) {
                    let p = S::splat(*p.as_ptr().add(t));
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum = S::fma(p, value, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (d, sum) in sums.iter().enumerate() {
                    S::store(acc.add(r * dim + at + d * S::N), *sum);
                }
            }
            at += D * S::N;
        }
    }
    at
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
