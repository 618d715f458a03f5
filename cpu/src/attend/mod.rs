//! The inner parts of attention: rows of queries with the keys of a page, the softmax over a chunk of pages, and the weighted sums of a
//! page's values.
//!
//! A chunk is gone through twice, first its keys and then its values. Between the two the largest logit of the whole chunk is known, so
//! what has been summed up need never be scaled again, and the products of one page do not wait for the softmax of another.

mod ahead;
mod blocks;
mod codes;
mod turn;

pub(crate) use blocks::{Blocks, Rounded, has_planes, round_query};
pub(crate) use turn::{Part, is_turned, turn};

use crate::lanes::{self, multiversion};
use crate::simd::{Simd, for_isa};
use crate::words::Words;
use crate::{Isa, PAGE};
use ahead::Ahead;
use lemma_quant::pages::{TileK4, TileV2};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Pages of a chunk; a constant, so that sums do not depend on the number of workers.
pub(crate) const CHUNK: usize = 16;
/// Tokens of a chunk.
pub(crate) const SPAN: usize = CHUNK * PAGE;

/// The largest number that queries and weights are rounded to, with room for a unit in the last place of what it is made of.
const LIMIT: f32 = 32766.0;

/// Below this the largest of them, or of products with scales, or the sum of weights, is as good as nothing. Over it even the largest
/// scale is finite.
const TINY: f32 = 1e-20;

/// Quants of a block that has a scale in rows of small numbers.
pub(crate) const BLOCK: usize = 32;

/// Rows of queries that read the same keys: the heads of a group, for some tokens.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Rows of a token.
    pub(crate) group: usize,
    /// The tokens of the page that each token of the batch sees, from and to: `[n / group]`.
    pub(crate) seen: &'a [(u8, u8)],
}

/// What rows learn from a chunk.
pub(crate) struct Chunk<'a> {
    /// Logits, later their exponentials relative to the largest one: `[n, SPAN]`.
    pub(crate) logits: &'a mut [f32],
    /// Sums of a page's exponentials: `[n, CHUNK]`.
    pub(crate) page_sum: &'a mut [f32],
    /// The largest logit: `[n]`.
    pub(crate) max: &'a mut [f32],
    /// Sum of exponentials: `[n]`.
    pub(crate) sum: &'a mut [f32],
    /// Sum of values, weighted by them: `[n, dim_v]`.
    pub(crate) acc: &'a mut [f32],
}

/// The keys of a head in a page: `[PAGE, dim]`.
#[derive(Clone, Copy)]
pub(crate) enum Keys<'a> {
    /// Decoded.
    F32(&'a [f32]),
    /// As they are in the pool; worth it where few rows read them, since decoding means to write them as well.
    F16(&'a [u8]),
    /// As they are in the pool, with the scale of every channel and its zero, `[2, dim]`, as `x = scale * q + zero`.
    K4(&'a [TileK4], &'a [f32]),
    /// Turned.
    Blocks(Blocks<'a>),
}

/// The values of a head in a page: `[PAGE, stride]`.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    /// Decoded.
    F32(&'a [f32]),
    /// As they are in the pool.
    F16(&'a [u8]),
    /// As they are in the pool.
    V2(&'a [TileV2]),
    /// Turned.
    Blocks(Blocks<'a>),
}

/// Queries of all rows.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// Times the scale of logits: `[n, dim]`.
    pub(crate) q: &'a [f32],
    /// The largest absolute value that any row of a token has in a channel: `[n / group, dim]`.
    pub(crate) most: &'a [f32],
    /// The same in 16 bits.
    pub(crate) rounded: Rounded<'a>,
    pub(crate) softcap: Option<f32>,
}

/// Logits of page number `page` of the chunk. Dimensions are multiples of 16. `next` is what the pool is asked for next: only the caller
/// knows where it is, so the processor does not read ahead by itself.
///
/// # Safety
/// `isa` is available.
pub(crate) unsafe fn logits(
    isa: Isa,
    rows: Rows<'_>,
    queries: Queries<'_>,
    keys: Keys<'_>,
    next: &[u8],
    chunk: &mut Chunk<'_>,
    page: usize,
) {
    assert!(chunk.logits.len() == rows.n() * SPAN && page < CHUNK);
    // Functions of their own: the compiler does worse where one has all kernels.
    // SAFETY: by the caller.
    unsafe {
        match keys {
            Keys::Blocks(keys) => {
                blocks::logits(isa, rows, queries.rounded, keys, next, chunk.logits, page);
            }
            _ => logits_of_all(isa, rows, queries, keys, next, chunk, page),
        }
    }
    bound(isa, rows, queries.softcap, chunk, page);
}

/// Adds the values of page number `page` of the chunk, the first `dim` of each token.
///
/// # Safety
/// `isa` is available.
pub(crate) unsafe fn add_values(
    isa: Isa,
    rows: Rows<'_>,
    values: Values<'_>,
    dim: usize,
    next: &[u8],
    chunk: &mut Chunk<'_>,
    page: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        match values {
            Values::Blocks(values) => blocks::add_values(isa, rows, values, dim, next, chunk, page),
            _ => add_all_values(isa, rows, values, dim, next, chunk, page),
        }
    }
}

for_isa! {
    /// Logits of page number `page` of the chunk. Dimensions are multiples of 16. `next` is what the pool is asked for next: only the
    /// caller knows where it is, so the processor does not read ahead by itself.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn logits_of_all<S, W>(rows: Rows<'_>, queries: Queries<'_>, keys: Keys<'_>, next: &[u8], chunk: &mut Chunk<'_>, page: usize) logits_s;

    /// From the logits of a chunk of `n_pages` to weights of values.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn softmax<S>(chunk: &mut Chunk<'_>, n_pages: usize) softmax_s;

    /// Adds the values of page number `page` of the chunk, the first `dim` of each token.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn add_all_values<S, W>(rows: Rows<'_>, values: Values<'_>, dim: usize, next: &[u8], chunk: &mut Chunk<'_>, page: usize) add_values_s;

    /// `to = keep * to + a * from`, a multiple of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn accumulate<S>(to: &mut [f32], keep: f32, from: &[f32], a: f32) accumulate_s;
}

impl Rows<'_> {
    fn n(&self) -> usize {
        self.group * self.seen.len()
    }

    /// The tokens of the page that any of `rows` sees.
    fn seen_by(&self, rows: Range<usize>) -> Range<usize> {
        let tokens = rows.start / self.group..(rows.end - 1) / self.group + 1;
        let seen = self.seen[tokens].iter().filter(|s| s.0 < s.1);
        let (from, to) = seen.fold((PAGE, 0), |(from, to), s| {
            (from.min(usize::from(s.0)), to.max(usize::from(s.1)))
        });
        from..to
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

#[inline(always)]
unsafe fn logits_s<S: Simd, W: Words>(
    rows: Rows<'_>,
    queries: Queries<'_>,
    keys: Keys<'_>,
    next: &[u8],
    chunk: &mut Chunk<'_>,
    page: usize,
) {
    let (n, q) = (rows.n(), queries.q);
    let dim = q.len() / n;
    assert!(dim.is_multiple_of(16) && q.len() == n * dim);
    assert!(chunk.logits.len() == n * SPAN && page < CHUNK);
    assert!(rows.seen.iter().all(|s| usize::from(s.1) <= PAGE));
    // SAFETY: lengths are asserted; the instruction set is available.
    unsafe {
        let to = chunk.logits.as_mut_ptr().add(page * PAGE);
        match keys {
            Keys::F32(k) => {
                assert_eq!(k.len(), PAGE * dim);
                all_products::<S, F32>(rows, q.as_ptr(), k.as_ptr(), dim, next, to);
            }
            Keys::F16(k) => {
                assert_eq!(k.len(), 2 * PAGE * dim);
                all_products::<S, F16>(rows, q.as_ptr(), k.as_ptr().cast(), dim, next, to);
            }
            Keys::K4(tiles, scales) => {
                codes::all_products::<S, W>(rows, queries, (tiles, scales), next, to);
            }
            Keys::Blocks(_) => unreachable!("these have a function of their own"),
        }
    }
}

multiversion! {
    /// Bounds the logits of a page, and takes those of tokens that are not seen away.
    fn bound(rows: Rows<'_>, softcap: Option<f32>, chunk: &mut Chunk<'_>, page: usize) {
        for (logits, r) in chunk.logits.chunks_exact_mut(SPAN).zip(0..) {
            let logits = &mut logits[page * PAGE..][..PAGE];
            if let Some(cap) = softcap {
                for logit in &mut *logits {
                    let x = *logit / cap;
                    *logit = cap * lanes::tanh::<FMA>(x);
                }
            }
            let seen = rows.seen[r / rows.group];
            if seen != (0, PAGE as u8) {
                let seen = usize::from(seen.0)..usize::from(seen.1);
                for t in (0..PAGE).filter(|t| !seen.contains(t)) {
                    logits[t] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Up to six rows at a time, so that a key is read and converted once for them. Which rows go together makes no difference to
/// what comes out.
#[inline(always)]
unsafe fn all_products<S: Simd, K: Stored>(
    rows: Rows<'_>,
    q: *const f32,
    k: *const K::T,
    dim: usize,
    next: &[u8],
    to: *mut f32,
) {
    let (n, mut r) = (rows.n(), 0);
    // SAFETY: by the caller.
    unsafe {
        // As many sums of products as leave registers for keys: up to 24 of 32, or 12 of 16. Seven rows are four
        // and three, and eight are twice four, which are as fast as eight with two tokens.
        while r < n {
            let next = if r == 0 { next } else { &[] };
            let (q, to) = (q.add(r * dim), to.add(r * SPAN));
            r += match (n - r, S::N) {
                (6 | 9.., 16) => products::<S, K, 6, 4, 4>(q, k, dim, next, to),
                (6 | 7 | 9.., 8) => products::<S, K, 6, 4, 2>(q, k, dim, next, to),
                (4.., 16) => products::<S, K, 4, 4, 4>(q, k, dim, next, to),
                (4.., 8) => products::<S, K, 4, 4, 2>(q, k, dim, next, to),
                (3, 16) => products::<S, K, 3, 4, 4>(q, k, dim, next, to),
                (2.., 16) => products::<S, K, 2, 8, 8>(q, k, dim, next, to),
                (2.., 8) => products::<S, K, 2, 4, 4>(q, k, dim, next, to),
                (_, 16) => products::<S, K, 1, 16, 16>(q, k, dim, next, to),
                _ => products::<S, K, 1, 8, 8>(q, k, dim, next, to),
            };
        }
    }
}

/// Products of `R` rows with the keys of a page; `T` tokens are summed up together, of which `P` go through the dimensions at a
/// time. Returns `R`.
#[inline(always)]
unsafe fn products<S: Simd, K: Stored, const R: usize, const T: usize, const P: usize>(
    q: *const f32,
    k: *const K::T,
    dim: usize,
    next: &[u8],
    to: *mut f32,
) -> usize {
    // SAFETY: by the caller; `dim` is a multiple of `N`.
    unsafe {
        let mut fours = [[MaybeUninit::uninit(); PAGE / 4]; R];
        let often = S::N == 16;
        let mut ahead = Ahead::new(next, PAGE / P * if often { dim / S::N } else { 1 });
        for first in (0..PAGE).step_by(T) {
            let mut sums = [[S::splat(0.0); T]; R];
            for pass in (0..T).step_by(P) {
                let mut part = [[S::splat(0.0); P]; R];
                if !often {
                    ahead.step::<S>();
                }
                for i in (0..dim).step_by(S::N) {
                    if often {
                        ahead.step::<S>();
                    }
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
        for (r, fours) in fours.iter().enumerate() {
            // All of them are written: steps of `T` tokens make a page.
            S::sums(
                fours.map(|x| x.assume_init()),
                &mut *to.add(r * SPAN).cast(),
            );
        }
    }
    R
}

#[inline(always)]
unsafe fn softmax_s<S: Simd>(chunk: &mut Chunk<'_>, n_pages: usize) {
    let n = chunk.max.len();
    assert!(n_pages <= CHUNK && chunk.logits.len() == n * SPAN);
    assert!(chunk.sum.len() == n && chunk.page_sum.len() == n * CHUNK);
    // Pages are summed up in fours.
    let end = n_pages.next_multiple_of(4) * PAGE;
    let rows = (chunk.logits.as_chunks_mut::<SPAN>().0.iter_mut())
        .zip(chunk.page_sum.as_chunks_mut::<CHUNK>().0);
    for ((logits, page_sum), (max, sum)) in rows.zip(chunk.max.iter_mut().zip(&mut *chunk.sum)) {
        logits[n_pages * PAGE..end].fill(f32::NEG_INFINITY);
        let logits = logits.as_mut_ptr();
        // SAFETY: lengths are asserted; the instruction set is available.
        unsafe {
            let mut most = [S::splat(f32::NEG_INFINITY); PAGE];
            for page in (0..end).step_by(PAGE) {
                for i in (0..PAGE).step_by(S::N) {
                    // In this order what is not a number is passed over.
                    most[i] = S::max(S::load(logits.add(page + i)), most[i]);
                }
            }
            let mut all = most[0];
            for i in (0..PAGE).step_by(S::N) {
                all = S::max(all, most[i]);
            }
            *max = S::largest(all);
            // A row that sees nothing stays at minus infinity.
            let minus_max = S::splat(-max.max(-f32::MAX));
            let mut fours = [S::fours([S::splat(0.0); 4]); CHUNK / 4];
            for (fours, first) in fours.iter_mut().zip((0..end).step_by(4 * PAGE)) {
                let mut pages = [S::splat(0.0); 4];
                for (page, sum) in pages.iter_mut().enumerate() {
                    for i in (0..PAGE).step_by(S::N) {
                        let x = logits.add(first + page * PAGE + i);
                        let e = S::exp(S::add(S::load(x), minus_max));
                        S::store(x, e);
                        *sum = S::add(*sum, e);
                    }
                }
                *fours = S::fours(pages);
            }
            S::sums(fours, page_sum);
            let mut all = S::splat(0.0);
            for i in (0..CHUNK).step_by(S::N) {
                all = S::add(all, S::load(page_sum.as_ptr().add(i)));
            }
            *sum = S::sum(all);
        }
    }
}

#[inline(always)]
unsafe fn add_values_s<S: Simd, W: Words>(
    rows: Rows<'_>,
    values: Values<'_>,
    dim: usize,
    next: &[u8],
    chunk: &mut Chunk<'_>,
    page: usize,
) {
    let n = rows.n();
    assert!(dim.is_multiple_of(16) && chunk.acc.len() == n * dim && page < CHUNK);
    assert!(chunk.logits.len() == n * SPAN && chunk.page_sum.len() == n * CHUNK);
    assert!(rows.seen.iter().all(|s| usize::from(s.1) <= PAGE));
    // SAFETY: lengths are asserted; the instruction set is available.
    unsafe {
        let p = chunk.logits.as_ptr().add(page * PAGE);
        let acc = chunk.acc.as_mut_ptr();
        match values {
            Values::F32(v) => {
                let stride = v.len() / PAGE;
                assert!(dim <= stride);
                all_sums::<S, F32>(rows, p, (v.as_ptr(), stride), dim, next, acc);
            }
            Values::F16(v) => {
                let stride = v.len() / 2 / PAGE;
                assert!(dim <= stride);
                all_sums::<S, F16>(rows, p, (v.as_ptr().cast(), stride), dim, next, acc);
            }
            Values::V2(tiles) => {
                let sums = chunk.page_sum.as_ptr().add(page);
                codes::all_sums::<S, W>(rows, (p, sums), tiles, dim, next, acc);
            }
            Values::Blocks(_) => unreachable!("these have a function of their own"),
        }
    }
}

/// Up to six rows at a time, as with keys.
#[inline(always)]
unsafe fn all_sums<S: Simd, V: Stored>(
    rows: Rows<'_>,
    p: *const f32,
    v: (*const V::T, usize),
    dim: usize,
    next: &[u8],
    acc: *mut f32,
) {
    let (n, mut r) = (rows.n(), 0);
    // SAFETY: by the caller.
    unsafe {
        while r < n {
            let next = if r == 0 { next } else { &[] };
            r += match (n - r, S::N) {
                (6 | 9.., 16) => weighted_sums::<S, V, 6, 4, 1>(rows, r, p, v, dim, next, acc),
                (6 | 7 | 9.., 8) => weighted_sums::<S, V, 6, 2, 1>(rows, r, p, v, dim, next, acc),
                (4.., 16) => weighted_sums::<S, V, 4, 4, 1>(rows, r, p, v, dim, next, acc),
                (4.., 8) => weighted_sums::<S, V, 4, 2, 1>(rows, r, p, v, dim, next, acc),
                (3, 16) => weighted_sums::<S, V, 3, 4, 1>(rows, r, p, v, dim, next, acc),
                (2.., 8 | 16) => weighted_sums::<S, V, 2, 4, 1>(rows, r, p, v, dim, next, acc),
                _ => weighted_sums::<S, V, 1, 8, 4>(rows, r, p, v, dim, next, acc),
            };
        }
    }
}

/// `acc[r] += sum of p[r][t] * v[t]` for `R` rows from row `r` on over the tokens that any of them sees: `D` vectors of a value at a time as
/// far as there are so many, then `E`, then one. Returns `R`.
#[inline(always)]
unsafe fn weighted_sums<S: Simd, V: Stored, const R: usize, const D: usize, const E: usize>(
    rows: Rows<'_>,
    r: usize,
    p: *const f32,
    v: (*const V::T, usize),
    dim: usize,
    next: &[u8],
    acc: *mut f32,
) -> usize {
    let seen = rows.seen_by(r..r + R);
    if !seen.is_empty() {
        // SAFETY: by the caller.
        unsafe {
            let (p, acc) = (p.add(r * SPAN), acc.add(r * dim));
            let often = if S::N == 16 { seen.len() } else { 1 };
            let mut ahead = Ahead::new(next, often * (dim / (D * S::N)).max(1));
            let at = weighted_sum::<S, V, R, D>(p, &seen, v, dim, &mut ahead, acc, 0);
            let at = match E {
                1 => at,
                _ => weighted_sum::<S, V, R, E>(p, &seen, v, dim, &mut ahead, acc, at),
            };
            weighted_sum::<S, V, R, 1>(p, &seen, v, dim, &mut ahead, acc, at);
        }
    }
    R
}

/// The part of it from dimension `at` on with `D` vectors. Returns where the next part has to begin.
#[inline(always)]
unsafe fn weighted_sum<S: Simd, V: Stored, const R: usize, const D: usize>(
    p: *const f32,
    seen: &Range<usize>,
    (v, stride): (*const V::T, usize),
    dim: usize,
    ahead: &mut Ahead<'_>,
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
            if S::N != 16 {
                ahead.step::<S>();
            }
            for t in seen.clone() {
                if S::N == 16 {
                    ahead.step::<S>();
                }
                let mut values = [S::splat(0.0); D];
                for (d, value) in values.iter_mut().enumerate() {
                    *value = V::load::<S>(v.add(t * stride + at + d * S::N));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let p = S::splat(*p.add(r * SPAN + t));
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
