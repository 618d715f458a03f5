//! Pages of rows in blocks of 32 small numbers, as `q8_0` and its kind, whose quants are multiplied as whole numbers.
//!
//! [`turn`](super::turn) has written the page with four quants in each lane that are multiplied and added up together: of keys four
//! channels of a token, of values a channel of four tokens. So a vector has sixteen tokens, or channels, side by side, and the sum of a
//! block comes out where its scale is.
//!
//! What they are multiplied with is rounded: queries to 16 bits, relative to their largest number, once for all pages; weights of a page,
//! times the scales of its tokens, to 15, relative to the largest of both, for each block. Where quants have four bits, eight are
//! enough, each block of a query relative to its own largest number: that is off by less than a 250th of it, where keys are off by up to a
//! 16th. Sums within a block are exact, and blocks are added up in one order, so rows give the same whichever of them go together.
//!
//! Vectors multiply bytes. Numbers of 16 bits are two of them ([`Words::PLANES`]) where that takes one instruction, pairs of 16-bit
//! numbers elsewhere; the sums are the same.

use super::{Ahead, BLOCK, CHUNK, Chunk, Rows, SPAN, TINY};
use crate::lanes::{LANES, multiversion};
use crate::simd::{Simd, for_isa};
use crate::words::{ROUND, Words};
use crate::{Isa, PAGE};

/// The largest number that queries are rounded to: both bytes of it are signed.
const LIMIT: f32 = 32639.0;
/// The largest that weights are rounded to, of small values and of others.
pub(super) const WEIGHT: [f32; 2] = [255.0, 32766.0];
// 32 of the largest queries with bytes fit 32 bits, and so do offsets.
const _: () = assert!(BLOCK as u64 * 255 * 32639 < 1 << 31);

/// Lanes with quants of a block: of channels, of which each token has so many, and of tokens.
pub(super) const QUADS: [usize; 2] = [BLOCK / 4, PAGE / 4];

/// Blocks whose weights are rounded together.
const SOME: usize = 4;

/// What is taken off the unsigned quants of keys, of small ones and of others: bits of it.
const OFFSETS: [u32; 2] = [7, 3];

/// Queries in 16 bits.
#[derive(Clone, Copy)]
pub(crate) struct Rounded<'a> {
    /// Bits of four channels as [`Words::dot_words`] wants them: `[dim / 4, n, 2]`.
    pub(crate) quads: &'a [f32],
    /// In 8 bits, for what is small itself: bits of four channels, `[dim / 4, n]`.
    pub(crate) bytes: &'a [f32],
    /// Bits of the sums of a block, of what is in `quads` and in `bytes`, negative, times [`OFFSETS`], and what one of the numbers in `bytes`
    /// is worth: `[3, dim / 32, n]`.
    pub(crate) blocks: &'a [f32],
    /// What one of the numbers in `quads` is worth: `[n]`.
    pub(crate) step: &'a [f32],
}

/// A page, turned, `dim` channels wide.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    /// Bits of four quants: unsigned ones of keys, `[blocks, 8, PAGE]`, signed ones of values, `[blocks, 4, 32]`.
    pub(super) quads: &'a [f32],
    /// Whether quants are small, keys below 16 and values not above 9.
    pub(super) small: bool,
    /// Scales, `[blocks, PAGE]`; of values without signs, relative to the largest of their block, times one of [`WEIGHT`].
    pub(super) d: &'a [f32],
    /// What is added to each number, likewise; empty if there is nothing.
    pub(super) m: &'a [f32],
    /// Of values the largest scale of a block, over that: `[blocks]`.
    pub(super) unit: &'a [f32],
}

/// Whether vectors of `isa` have [`Words::PLANES`].
pub(crate) fn has_planes(isa: Isa) -> bool {
    !matches!(isa, Isa::Scalar | Isa::Avx2)
}

for_isa! {
    /// Logits of small keys.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn small_logits<S, W>(rows: Rows<'_>, q: Rounded<'_>, keys: Blocks<'_>, next: &[u8], to: &mut [f32]) small_logits_s;

    /// Logits of others.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn large_logits<S, W>(rows: Rows<'_>, q: Rounded<'_>, keys: Blocks<'_>, next: &[u8], to: &mut [f32]) large_logits_s;

    /// Adds small values.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn add_small<S, W>(rows: Rows<'_>, values: Blocks<'_>, dim: usize, next: &[u8], chunk: &mut Chunk<'_>, page: usize) add_small_s;

    /// Adds others.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn add_large<S, W>(rows: Rows<'_>, values: Blocks<'_>, dim: usize, next: &[u8], chunk: &mut Chunk<'_>, page: usize) add_large_s;
}

/// Logits of page number `page`; `logits` has room for a chunk.
///
/// # Safety
/// `isa` is available.
pub(super) unsafe fn logits(
    isa: Isa,
    rows: Rows<'_>,
    q: Rounded<'_>,
    keys: Blocks<'_>,
    next: &[u8],
    logits: &mut [f32],
    page: usize,
) {
    let to = &mut logits[page * PAGE..];
    // SAFETY: by the caller.
    unsafe {
        match keys.small {
            true => small_logits(isa, rows, q, keys, next, to),
            false => large_logits(isa, rows, q, keys, next, to),
        }
    }
}

/// Adds the values of page number `page`.
///
/// # Safety
/// `isa` is available.
pub(super) unsafe fn add_values(
    isa: Isa,
    rows: Rows<'_>,
    values: Blocks<'_>,
    dim: usize,
    next: &[u8],
    chunk: &mut Chunk<'_>,
    page: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        match values.small {
            true => add_small(isa, rows, values, dim, next, chunk, page),
            false => add_large(isa, rows, values, dim, next, chunk, page),
        }
    }
}

/// For each kind of quants, one or the other.
macro_rules! kinds {
    ($logits:ident, $add:ident, $small:literal) => {
        #[inline(always)]
        unsafe fn $logits<S: Simd, W: Words>(
            rows: Rows<'_>,
            q: Rounded<'_>,
            keys: Blocks<'_>,
            next: &[u8],
            to: &mut [f32],
        ) {
            // SAFETY: by the caller.
            unsafe { all_products::<S, W, $small>(rows, q, keys, next, to) }
        }

        #[inline(always)]
        unsafe fn $add<S: Simd, W: Words>(
            rows: Rows<'_>,
            values: Blocks<'_>,
            dim: usize,
            next: &[u8],
            chunk: &mut Chunk<'_>,
            page: usize,
        ) {
            // SAFETY: by the caller.
            unsafe { all_sums::<S, W, $small>(rows, values, dim, next, chunk, page) }
        }
    };
}
kinds!(small_logits_s, add_small_s, true);
kinds!(large_logits_s, add_large_s, false);

multiversion! {
    /// Rounds a query relative to its largest number, and each block relative to its own: number `r` of `n`. Returns what one of the
    /// former is worth; the others see [`Rounded`].
    pub(crate) fn round_query(q: &[f32], r: usize, n: usize, planes: bool, quads: &mut [f32], bytes: &mut [f32], blocks: &mut [f32]) -> f32 {
        let (largest, bad) = largest(q);
        let step = largest / LIMIT;
        let per_step = 1.0 / step;
        let (offsets, rest) = blocks.split_at_mut(q.len() / BLOCK * n);
        let (small, steps) = rest.split_at_mut(q.len() / BLOCK * n);
        let to = quads.chunks_exact_mut(BLOCK / 4 * n * 2).zip(bytes.chunks_exact_mut(BLOCK / 4 * n));
        for (block, (q, (quads, bytes))) in q.as_chunks::<BLOCK>().0.iter().zip(to).enumerate() {
            let (most, bad) = self::largest(q);
            let byte_step = most / 127.0;
            let per_byte = 1.0 / byte_step;
            let (mut x, mut y, mut sums) = ([0; BLOCK], [0; BLOCK], [0; 2]);
            for i in 0..BLOCK {
                // Not fused, so that all instruction sets round alike.
                x[i] = ((q[i] * per_step + ROUND).to_bits() as i16).cast_unsigned();
                y[i] = (q[i] * per_byte + ROUND).to_bits() as u8;
                sums[0] += i32::from(x[i].cast_signed());
                sums[1] += i32::from(y[i].cast_signed());
            }
            let to = quads.chunks_exact_mut(2 * n).zip(bytes.chunks_exact_mut(n));
            let from = x.as_chunks::<4>().0.iter().zip(y.as_chunks::<4>().0);
            for ((x, y), (quads, bytes)) in from.zip(to) {
                let quad = if planes {
                    let mut planes = [[0; 4]; 2];
                    for i in 0..4 {
                        // The lower byte is taken to be signed, so the upper one may be one more.
                        planes[0][i] = (x[i].wrapping_add(128) >> 8) as u8;
                        planes[1][i] = x[i] as u8;
                    }
                    planes.map(u32::from_le_bytes)
                } else {
                    [[x[0], x[2]], [x[1], x[3]]].map(|[a, b]| u32::from(a) | u32::from(b) << 16)
                };
                quads[2 * r..2 * r + 2].copy_from_slice(&quad.map(f32::from_bits));
                bytes[r] = f32::from_bits(u32::from_le_bytes(*y));
            }
            offsets[block * n + r] = f32::from_bits((-sums[0] << OFFSETS[0]).cast_unsigned());
            small[block * n + r] = f32::from_bits((-sums[1] << OFFSETS[1]).cast_unsigned());
            steps[block * n + r] = byte_step + bad;
        }
        step + bad
    }
}

/// The largest absolute value, and zero, or what is not a number where some number is not: that shall not be lost in rounding.
#[inline(always)]
fn largest(q: &[f32]) -> (f32, f32) {
    let (mut most, mut bad) = ([0.0f32; LANES], [0.0; LANES]);
    for q in q.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            bad[i] += q[i] * 0.0;
            let abs = q[i].abs();
            most[i] = if abs > most[i] { abs } else { most[i] };
        }
    }
    (most.into_iter().fold(TINY, f32::max), bad.into_iter().sum())
}

/// Products of all rows with keys.
#[inline(always)]
unsafe fn all_products<S: Simd, W: Words, const SMALL: bool>(
    rows: Rows<'_>,
    q: Rounded<'_>,
    keys: Blocks<'_>,
    next: &[u8],
    to: &mut [f32],
) {
    let (n, blocks) = (rows.n(), keys.d.len() / PAGE);
    assert!(to.len() + SPAN >= n * SPAN + PAGE);
    let to = to.as_mut_ptr();
    assert!(keys.d.len() == blocks * PAGE && keys.quads.len() == blocks * QUADS[0] * PAGE);
    assert!(keys.m.is_empty() || keys.m.len() == keys.d.len());
    assert!(q.quads.len() == 2 * n * blocks * QUADS[0] && q.blocks.len() == 3 * n * blocks);
    assert!(q.step.len() == n && q.bytes.len() == n * blocks * QUADS[0]);
    let mut r = 0;
    // SAFETY: lengths are asserted; the rest is by the caller.
    unsafe {
        while r < n {
            let next = if r == 0 { next } else { &[] };
            let at = (q, r, n);
            let to = to.add(r * SPAN);
            r += match n - r {
                6 | 9.. => products::<S, W, 6, SMALL>(at, keys, next, to),
                4.. => products::<S, W, 4, SMALL>(at, keys, next, to),
                3 => products::<S, W, 3, SMALL>(at, keys, next, to),
                2 => products::<S, W, 2, SMALL>(at, keys, next, to),
                _ => products::<S, W, 1, SMALL>(at, keys, next, to),
            };
        }
    }
}

/// Products of `R` rows with keys, small ones or not. Returns `R`.
#[inline(always)]
unsafe fn products<S: Simd, W: Words, const R: usize, const SMALL: bool>(
    (q, r, n): (Rounded<'_>, usize, usize),
    keys: Blocks<'_>,
    next: &[u8],
    to: *mut f32,
) -> usize {
    let blocks = keys.d.len() / PAGE;
    let mut logits = [[0.0; PAGE]; R];
    // SAFETY: by the caller.
    unsafe {
        let q_quads: *const [u32; 2] = q.quads.as_ptr().cast();
        let q_bytes: *const u32 = q.bytes.as_ptr().cast();
        let offsets = q.blocks.as_ptr().add(if SMALL { blocks * n } else { 0 });
        let offsets: *const u32 = offsets.add(r).cast();
        let steps = q.blocks.as_ptr().add(2 * blocks * n + r);
        let mut ahead = Ahead::new(next, blocks * (PAGE / W::N));
        for block in 0..blocks {
            let mut q_quads = q_quads.add(block * QUADS[0] * n + r);
            let mut q_bytes = q_bytes.add(block * QUADS[0] * n + r);
            let k_quads = keys.quads.as_ptr().add(block * QUADS[0] * PAGE);
            let first_quads = (q_quads, q_bytes);
            for first in (0..PAGE).step_by(W::N) {
                (q_quads, q_bytes) = first_quads;
                ahead.step::<S>();
                let mut sums = [[W::splat(0); 2]; R];
                for (r, sums) in sums.iter_mut().enumerate() {
                    sums[1] = W::splat(*offsets.add(block * n + r));
                }
                for i in 0..QUADS[0] {
                    let codes = W::load(k_quads.add(i * PAGE + first).cast());
                    for (r, sums) in sums.iter_mut().enumerate() {
                        if SMALL {
                            // Two sums, since a product has to wait for the one before it.
                            let part = (i + 1) % 2;
                            let q = W::splat(*q_bytes.add(r));
                            sums[part] = W::dot_bytes(sums[part], codes, q);
                        } else {
                            let [a, b] = *q_quads.add(r);
                            *sums = W::dot_words(*sums, codes, [W::splat(a), W::splat(b)]);
                        }
                    }
                    (q_quads, q_bytes) = (q_quads.add(n), q_bytes.add(n));
                }
                let d = keys.d.as_ptr().add(block * PAGE + first);
                for (r, (logits, sums)) in logits.iter_mut().zip(sums).enumerate() {
                    let to = logits.as_mut_ptr().add(first);
                    if SMALL {
                        let step = *steps.add(block * n + r);
                        W::add_products(to, W::add(sums[0], sums[1]), d, step);
                    } else {
                        W::add_products(to, W::join(sums), d, 1.0);
                    }
                }
            }
            if !keys.m.is_empty() {
                for (r, logits) in logits.iter_mut().enumerate() {
                    let offset = (*offsets.add(block * n + r)).cast_signed() as f32;
                    let sum = -offset / (1 << OFFSETS[usize::from(SMALL)]) as f32;
                    let step = if SMALL {
                        *steps.add(block * n + r)
                    } else {
                        1.0
                    };
                    let sum = S::splat(sum * step);
                    for t in (0..PAGE).step_by(S::N) {
                        let m = S::load(keys.m.as_ptr().add(block * PAGE + t));
                        let to = logits.as_mut_ptr().add(t);
                        S::store(to, S::fma(sum, m, S::load(to)));
                    }
                }
            }
        }
        for (i, logits) in logits.iter().enumerate() {
            let step = if SMALL { 1.0 } else { q.step[r + i] };
            let step = S::splat(step);
            for t in (0..PAGE).step_by(S::N) {
                let x = S::mul(S::load(logits.as_ptr().add(t)), step);
                S::store(to.add(i * SPAN + t), x);
            }
        }
    }
    R
}

/// Weighted sums of all rows.
#[inline(always)]
unsafe fn all_sums<S: Simd, W: Words, const SMALL: bool>(
    rows: Rows<'_>,
    values: Blocks<'_>,
    dim: usize,
    next: &[u8],
    chunk: &mut Chunk<'_>,
    page: usize,
) {
    let blocks = dim / BLOCK;
    assert!(dim.is_multiple_of(BLOCK) && values.unit.len() == blocks);
    assert!(values.d.len() == blocks * PAGE && values.quads.len() == blocks * QUADS[1] * BLOCK);
    assert!(values.m.is_empty() || values.m.len() == values.d.len());
    assert!(chunk.acc.len() == rows.n() * dim && page < CHUNK);
    assert!(chunk.logits.len() == rows.n() * SPAN && chunk.page_sum.len() == rows.n() * CHUNK);
    let (n, mut r) = (rows.n(), 0);
    // SAFETY: lengths are asserted; the rest is by the caller.
    unsafe {
        while r < n {
            let next = if r == 0 { next } else { &[] };
            let p = chunk.logits.as_ptr().add(r * SPAN + page * PAGE);
            let p = (p, chunk.page_sum.as_ptr().add(r * CHUNK + page));
            let acc = chunk.acc.as_mut_ptr().add(r * dim);
            r += match (n - r, W::N) {
                (6 | 9.., 16) => weighted_sums::<S, W, 6, 2, SMALL>(p, values, next, acc),
                (6 | 9.., _) => weighted_sums::<S, W, 6, 1, SMALL>(p, values, next, acc),
                (4.., 16) => weighted_sums::<S, W, 4, 2, SMALL>(p, values, next, acc),
                (4.., _) => weighted_sums::<S, W, 4, 1, SMALL>(p, values, next, acc),
                (3, 16) => weighted_sums::<S, W, 3, 2, SMALL>(p, values, next, acc),
                (3, _) => weighted_sums::<S, W, 3, 1, SMALL>(p, values, next, acc),
                (2, _) => weighted_sums::<S, W, 2, 2, SMALL>(p, values, next, acc),
                _ => weighted_sums::<S, W, 1, 2, SMALL>(p, values, next, acc),
            };
        }
    }
}

/// `acc[r] += sum of p[r][t] * v[t]` for `R` rows, `D` vectors of a value, small or not, at a time. Returns `R`.
#[inline(always)]
unsafe fn weighted_sums<S: Simd, W: Words, const R: usize, const D: usize, const SMALL: bool>(
    (p, sums): (*const f32, *const f32),
    values: Blocks<'_>,
    next: &[u8],
    acc: *mut f32,
) -> usize {
    let blocks = values.unit.len();
    let dim = blocks * BLOCK;
    // SAFETY: by the caller.
    unsafe {
        // Weights relative to the largest of the page.
        let mut weights = [[0.0; PAGE]; R];
        let mut most = [0.0; R];
        for r in 0..R {
            let p = p.add(r * SPAN);
            let mut largest = S::splat(TINY);
            for t in (0..PAGE).step_by(S::N) {
                largest = S::max(S::load(p.add(t)), largest);
            }
            let largest = S::largest(largest);
            let factor = S::splat(1.0 / largest);
            for t in (0..PAGE).step_by(S::N) {
                let weight = S::mul(S::load(p.add(t)), factor);
                S::store(weights[r].as_mut_ptr().add(t), weight);
            }
            // What is not a number is one of the sums, too.
            most[r] = largest + *sums.add(r * CHUNK) * 0.0;
        }
        let mut ahead = Ahead::new(next, blocks * (BLOCK / W::N / D));
        // The compiler would move rounded numbers from register to register if they were read at once.
        let mut quads = [[[[0; 2]; QUADS[1]]; R]; SOME];
        let mut bytes = [[[0; QUADS[1]]; R]; SOME];
        for (first, units) in (0..).step_by(SOME).zip(values.unit.chunks(SOME)) {
            for block in first..first + units.len() {
                let d = values.d.as_ptr().add(block * PAGE);
                for (r, weights) in weights.iter().enumerate() {
                    match SMALL {
                        true => W::round_bytes(weights.as_ptr(), d, &mut bytes[block - first][r]),
                        false => W::round_words(weights.as_ptr(), d, &mut quads[block - first][r]),
                    }
                }
                if !values.m.is_empty() {
                    add_mins::<S, R>(
                        p,
                        values.m.as_ptr().add(block * PAGE),
                        acc.add(block * BLOCK),
                        dim,
                    );
                }
            }
            for (block, (unit, (quads, bytes))) in
                (first..).zip(units.iter().zip(quads.iter().zip(&bytes)))
            {
                let v_quads = values.quads.as_ptr().add(block * QUADS[1] * BLOCK);
                for at in (0..BLOCK).step_by(D * W::N) {
                    ahead.step::<S>();
                    let mut sums = [[[W::splat(0); 2]; D]; R];
                    for j in 0..QUADS[1] {
                        let mut codes = [W::splat(0); D];
                        for (i, codes) in codes.iter_mut().enumerate() {
                            *codes = W::load(v_quads.add(j * BLOCK + at + i * W::N).cast());
                        }
                        for (r, sums) in sums.iter_mut().enumerate() {
                            if SMALL {
                                let p = W::splat(bytes[r][j]);
                                for (sum, codes) in sums.iter_mut().zip(codes) {
                                    sum[0] = W::dot_bytes(sum[0], p, codes);
                                }
                            } else {
                                let p = [W::splat(quads[r][j][0]), W::splat(quads[r][j][1])];
                                for (sum, codes) in sums.iter_mut().zip(codes) {
                                    *sum = W::dot_signed(*sum, p, codes);
                                }
                            }
                        }
                    }
                    for (r, sums) in sums.iter().enumerate() {
                        let to = acc.add(r * dim + block * BLOCK + at);
                        for (i, sum) in sums.iter().enumerate() {
                            let sum = if SMALL { sum[0] } else { W::join(*sum) };
                            W::add_scaled(to.add(i * W::N), sum, most[r] * unit);
                        }
                    }
                }
            }
        }
    }
    R
}

/// Adds the weighted sum of a block's minimums, `m`, to its numbers: of `R` rows of `p`, and of `acc`, which are `dim` apart.
#[inline(always)]
unsafe fn add_mins<S: Simd, const R: usize>(
    p: *const f32,
    m: *const f32,
    acc: *mut f32,
    dim: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        for r in 0..R {
            let mut sum = S::splat(0.0);
            for t in (0..PAGE).step_by(S::N) {
                sum = S::fma(S::load(p.add(r * SPAN + t)), S::load(m.add(t)), sum);
            }
            let (sum, to) = (S::splat(S::sum(sum)), acc.add(r * dim));
            for i in (0..BLOCK).step_by(S::N) {
                S::store(to.add(i), S::add(S::load(to.add(i)), sum));
            }
        }
    }
}
