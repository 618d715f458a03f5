//! Pages of `k4` and `v2`, whose quants are multiplied as they are, as whole numbers.
//!
//! What belongs to a page's scales goes to the other side: a query times the scale of every channel, and a weight times the scale of every
//! token, are rounded to 16 bits for the page. That is off by at most a 65,000th of the largest of them (of the loudest head of a group, of the largest scale of a tile), where steps of the page itself are off by up to
//! half a step; so sums differ from those of decoded numbers by far less than these do from what was stored. Sums of whole numbers are
//! exact, so rows give the same whichever of them go together.

use super::{Ahead, LIMIT, Queries, Rows, SPAN, TINY};
use crate::PAGE;
use crate::simd::Simd;
use crate::words::Words;
use lemma_quant::pages::{TILE, TileK4, TileV2, scale};
use std::mem::MaybeUninit;

/// Sums of so many channels of the largest numbers fit 32 bits.
const MAX_DIM: usize = 4096;
const _: () = assert!(MAX_DIM as u64 * 15 * 32767 < 1 << 31);

/// Channels whose scaled queries are kept at a time.
const CHANNELS: usize = 128;

/// Products of all rows with keys; see [`super::Keys::K4`].
#[inline(always)]
pub(super) unsafe fn all_products<S: Simd, W: Words>(
    rows: Rows<'_>,
    queries: Queries<'_>,
    (tiles, scales): (&[TileK4], &[f32]),
    next: &[u8],
    to: *mut f32,
) {
    let dim = tiles.len() * TILE;
    assert!(dim <= MAX_DIM && scales.len() == 2 * dim);
    assert!(queries.q.len() == rows.n() * dim);
    assert!(queries.most.len() == rows.seen.len() * dim);
    // SAFETY: lengths are asserted; the rest is by the caller.
    unsafe {
        for (token, most) in queries.most.chunks_exact(dim).enumerate() {
            if rows.seen[token].0 >= rows.seen[token].1 {
                continue;
            }
            // The largest product of a token's queries and scales becomes the largest number.
            let mut bounds = S::splat(TINY);
            for i in (0..dim).step_by(S::N) {
                let d = S::load(scales.as_ptr().add(i));
                // In this order what is not a number is passed over.
                bounds = S::max(S::mul(S::load(most.as_ptr().add(i)), d), bounds);
            }
            let step = S::largest(bounds) / LIMIT;
            let mut r = token * rows.group;
            let end = r + rows.group;
            while r < end {
                let next = if r == 0 { next } else { &[] };
                let (q, to) = (queries.q.as_ptr().add(r * dim), to.add(r * SPAN));
                let keys = (tiles, scales.as_ptr(), step);
                r += match (end - r, W::N) {
                    (6 | 9.., 16) => products::<S, W, 6, 4>(q, keys, next, to),
                    (6 | 9.., _) => products::<S, W, 6, 1>(q, keys, next, to),
                    (4.., 16) => products::<S, W, 4, 4>(q, keys, next, to),
                    (4.., _) => products::<S, W, 4, 2>(q, keys, next, to),
                    (3, 16) => products::<S, W, 3, 4>(q, keys, next, to),
                    (3, _) => products::<S, W, 3, 2>(q, keys, next, to),
                    (2, _) => products::<S, W, 2, 4>(q, keys, next, to),
                    _ => products::<S, W, 1, 4>(q, keys, next, to),
                };
            }
        }
    }
}

/// Products of `R` rows with keys, whose rounded queries are multiples of `step`, `T` fourths of the page's tokens at a time. Returns
/// `R`.
#[inline(always)]
unsafe fn products<S: Simd, W: Words, const R: usize, const T: usize>(
    q: *const f32,
    (tiles, scales, step): (&[TileK4], *const f32, f32),
    next: &[u8],
    to: *mut f32,
) -> usize {
    const { assert!(R <= 8) };
    let dim = tiles.len() * TILE;
    // SAFETY: by the caller; `dim` is a multiple of `TILE`, which is one of `N`.
    unsafe {
        // Zeros are not rounded, since those of channels that are far from zero are large.
        let mut zeros = [S::splat(0.0); 8];
        for i in (0..dim).step_by(S::N) {
            let zero = S::load(scales.add(dim + i));
            for (r, sum) in zeros[..R].iter_mut().enumerate() {
                *sum = S::fma(S::load(q.add(r * dim + i)), zero, *sum);
            }
        }
        let [a, b, c, d, e, f, g, h] = zeros;
        let first = S::fours([a, b, c, d]);
        let second = if R > 4 { S::fours([e, f, g, h]) } else { first };
        let mut zeros = [0.0; 16];
        S::sums([first, second, first, second], &mut zeros);

        let nibbles = W::splat(0x000f_000f);
        let mut sums = [[W::splat(0); 4]; R];
        let mut scaled = [0.0; CHANNELS];
        // Of a row `CHANNELS / N`, one row after the other.
        let mut rounded = [[MaybeUninit::uninit(); CHANNELS / 4]; R];
        let rounded = rounded.as_flattened_mut();
        let per_step = 1.0 / step;
        let mut ahead = Ahead::new(next, dim / W::N * 4 / T);
        for (part, tiles) in tiles.chunks(CHANNELS / TILE).enumerate() {
            let (at, len) = (part * CHANNELS, tiles.len() * TILE);
            let vectors = len / W::N;
            for i in (0..len).step_by(S::N) {
                let d = S::mul(S::load(scales.add(at + i)), S::splat(per_step));
                S::store(scaled.as_mut_ptr().add(i), d);
            }
            for r in 0..R {
                for i in 0..vectors {
                    let q = q.add(r * dim + at + i * W::N);
                    let fours = W::round_fours(q, scaled.as_ptr().add(i * W::N));
                    rounded.get_unchecked_mut(r * vectors + i).write(fours);
                }
            }
            for first in (0..4).step_by(T) {
                let mut part = [[W::splat(0); T]; R];
                for (part, sums) in part.iter_mut().zip(&sums) {
                    part.copy_from_slice(&sums[first..first + T]);
                }
                for i in 0..vectors {
                    ahead.step::<S>();
                    let tile = tiles.get_unchecked(i * W::N / TILE);
                    let channel = i * W::N % TILE;
                    // Of each of these fourths two tokens in a word: those with even numbers in the lower bits.
                    let mut words = [W::splat(0); T];
                    for (t, word) in words.iter_mut().enumerate() {
                        let half = if first + t < 2 { &tile.a } else { &tile.b };
                        *word = W::turn(W::load(half.as_ptr().add(channel).cast()));
                        if (first + t) % 2 == 1 {
                            *word = W::shr::<4>(*word);
                        }
                    }
                    for odd in 0..2 {
                        let mut codes = [W::splat(0); T];
                        for (code, word) in codes.iter_mut().zip(&mut words) {
                            *code = W::and(*word, nibbles);
                            *word = W::shr::<8>(*word);
                        }
                        for (r, part) in part.iter_mut().enumerate() {
                            let q = rounded.get_unchecked(r * vectors + i).assume_init_ref()[odd];
                            for (part, code) in part.iter_mut().zip(codes) {
                                *part = W::dot(*part, code, q);
                            }
                        }
                    }
                }
                for (part, sums) in part.iter().zip(&mut sums) {
                    sums[first..first + T].copy_from_slice(part);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            W::tokens(sums, step, zeros[r], &mut *to.add(r * SPAN).cast());
        }
    }
    R
}

/// Weighted sums of all rows. Of `p`, the weights and the sums of a page's weights, which are [`super::CHUNK`] apart.
#[inline(always)]
pub(super) unsafe fn all_sums<S: Simd, W: Words>(
    rows: Rows<'_>,
    (p, sums): (*const f32, *const f32),
    tiles: &[TileV2],
    dim: usize,
    next: &[u8],
    acc: *mut f32,
) {
    assert_eq!(dim, tiles.len() * TILE);
    let (n, mut r) = (rows.n(), 0);
    // SAFETY: by the caller.
    unsafe {
        while r < n {
            let next = if r == 0 { next } else { &[] };
            let p = (p.add(r * SPAN), sums.add(r * super::CHUNK));
            let acc = acc.add(r * dim);
            r += match (n - r, W::N) {
                (6 | 9.., 16) => weighted_sums::<S, W, 6, 2>(p, tiles, next, acc),
                (6 | 9.., _) => weighted_sums::<S, W, 6, 1>(p, tiles, next, acc),
                (4.., 16) => weighted_sums::<S, W, 4, 2>(p, tiles, next, acc),
                (4.., _) => weighted_sums::<S, W, 4, 1>(p, tiles, next, acc),
                (3, _) => weighted_sums::<S, W, 3, 2>(p, tiles, next, acc),
                (2, _) => weighted_sums::<S, W, 2, 2>(p, tiles, next, acc),
                _ => weighted_sums::<S, W, 1, 2>(p, tiles, next, acc),
            };
        }
    }
}

/// `acc[r] += sum of p[r][t] * v[t]` for `R` rows, `D` vectors of a value at a time. Returns `R`.
#[inline(always)]
unsafe fn weighted_sums<S: Simd, W: Words, const R: usize, const D: usize>(
    (p, sums): (*const f32, *const f32),
    tiles: &[TileV2],
    next: &[u8],
    acc: *mut f32,
) -> usize {
    let dim = tiles.len() * TILE;
    // SAFETY: by the caller.
    unsafe {
        // Weights, of which none is larger than their sum.
        let mut weights = [[0.0; PAGE]; R];
        let mut total = [0.0; R];
        for r in 0..R {
            let sum = *sums.add(r * super::CHUNK);
            // Unlike with `max`, what is not a number stays so.
            total[r] = if sum < TINY { TINY } else { sum };
            let factor = S::splat(LIMIT / total[r]);
            for t in (0..PAGE).step_by(S::N) {
                let weight = S::mul(S::load(p.add(r * SPAN + t)), factor);
                S::store(weights[r].as_mut_ptr().add(t), weight);
            }
        }
        let mut ahead = Ahead::new(next, tiles.len());
        for (i, tile) in tiles.iter().enumerate() {
            ahead.step::<S>();
            let scales = scales(tile);
            let mut pairs = [[0; PAGE / 2]; R];
            for (weights, pairs) in weights.iter().zip(&mut pairs) {
                W::round_halves(weights.as_ptr(), scales.d.as_ptr(), pairs);
            }
            for at in (0..TILE).step_by(D * W::N) {
                let mut words = [W::splat(0); D];
                for (i, words) in words.iter_mut().enumerate() {
                    *words = W::load(tile.qs.as_ptr().add(at + i * W::N).cast());
                }
                let mut sums = [[W::splat(0); D]; R];
                // The codes of tokens `j` and `j + 8`, times 8, where they are before zeros are added.
                let mut codes = words;
                for codes in &mut codes {
                    *codes = W::shl::<3>(*codes);
                }
                add_pair::<W, R, D>(&mut sums, &codes, &scales, &pairs, 0);
                let mut codes = words;
                for codes in &mut codes {
                    *codes = W::shl::<1>(*codes);
                }
                add_pair::<W, R, D>(&mut sums, &codes, &scales, &pairs, 1);
                for words in &mut words {
                    *words = W::shr::<1>(*words);
                }
                for j in 2..PAGE / 2 {
                    add_pair::<W, R, D>(&mut sums, &words, &scales, &pairs, j);
                    for words in &mut words {
                        *words = W::shr::<2>(*words);
                    }
                }
                for (r, sums) in sums.iter().enumerate() {
                    let to = acc.add(r * dim + i * TILE + at);
                    for (i, sum) in sums.iter().enumerate() {
                        W::add_scaled(to.add(i * W::N), *sum, total[r] * scales.unit);
                    }
                }
            }
        }
    }
    R
}

/// Adds two tokens, number `j` and the one 8 behind it, whose codes lie three bits above the end of 16-bit numbers.
#[inline(always)]
unsafe fn add_pair<W: Words, const R: usize, const D: usize>(
    sums: &mut [[W::I; D]; R],
    words: &[W::I; D],
    scales: &Scales,
    pairs: &[[u32; PAGE / 2]; R],
    j: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        let (eights, zeros) = (W::splat(0x0018_0018), W::splat(scales.zeros[j]));
        let mut codes = *words;
        for codes in &mut codes {
            *codes = W::add16(W::and(*codes, eights), zeros);
        }
        for (sums, pairs) in sums.iter_mut().zip(pairs) {
            let p = W::splat(pairs[j]);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum = W::dot(*sum, codes, p);
            }
        }
    }
}

/// Scales of a tile's tokens.
struct Scales {
    /// Relative to the largest one.
    d: [f32; PAGE],
    /// Zeros in eighths of a step, in pairs of 16-bit numbers that are 8 tokens apart.
    zeros: [u32; PAGE / 2],
    /// An eighth of the largest scale, over [`LIMIT`].
    unit: f32,
}

#[inline(always)]
fn scales(tile: &TileV2) -> Scales {
    let most = scale(tile.d.iter().fold(1, |a, b| a.max(*b)));
    let per_most = 1.0 / most;
    let (mut d, mut zeros) = ([0.0; PAGE], [0; PAGE / 2]);
    for (d, byte) in d.iter_mut().zip(tile.d) {
        *d = scale(byte) * per_most;
    }
    for (i, pair) in zeros.iter_mut().enumerate() {
        let (low, high) = (i32::from(tile.zero[i]), i32::from(tile.zero[i + 8]));
        *pair = low as u32 & 0xffff | (high as u32) << 16;
    }
    Scales {
        d,
        zeros,
        unit: most * (0.125 / LIMIT),
    }
}
