//! Batches with AVX2 of formats whose quants use all eight bits, as numbers of 16 bits.
//!
//! AVX2 does not multiply signed bytes. Moving signs to the activations makes four instructions of 32 products, three of which wait for the
//! same two units of a processor; of numbers of 16 bits there are two products and two sums, which do not. Scales of sub-blocks are
//! multiplied into the quants when those are spread, so that nothing is left to be done until the end of a block.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::bytes::ROWS;
use super::gemm_256::{Sums, add_32, add_256, halves, in_register, twice};
use super::unpack::Tile;
use crate::activations::{X32, X256};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// From so many tokens on, spreading the quants of a tile pays.
pub(super) const FROM: usize = 16;
/// Tokens at a time.
const N: usize = 4;
/// Steps of four columns in a tile.
const STEPS: usize = 64;

/// Quants of a tile. A step is two vectors for each half of the rows: the first and third of its columns, then the second and fourth.
#[repr(C, align(32))]
struct Words([[[i32; ROWS]; 2]; STEPS]);

/// Activations of some tokens in the same order.
#[repr(C, align(32))]
struct Spread([[[i32; STEPS]; 2]; N]);

/// The first and third of every four signed bytes in 16 bits, then the second and fourth.
#[inline]
#[target_feature(enable = "avx2")]
fn spread(bytes: __m256i) -> [__m256i; 2] {
    let first = _mm256_slli_epi16::<8>(bytes);
    [first, bytes].map(|v| _mm256_srai_epi16::<8>(v))
}

/// Spreads the quants of `steps` times four columns, times the scales of `SUB` columns each, if that is not 0.
///
/// # Safety
/// The instruction set is available.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn spread_tile<const SUB: usize>(
    tile: &Tile,
    steps: usize,
    to: &mut MaybeUninit<Words>,
) -> *const i32 {
    let to = to.as_mut_ptr().cast::<i32>();
    for k in 0..steps.min(STEPS) {
        // SAFETY: a tile has as many steps, and as many scales.
        unsafe {
            let factors = match SUB {
                0 => None,
                _ => Some(halves(tile.scales[4 * k / SUB].as_ptr()).map(|s| twice(s))),
            };
            for h in 0..2 {
                let q = _mm256_load_si256(tile.q.as_ptr().add(64 * k + 32 * h).cast());
                let q = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
                for (part, mut v) in spread(q).into_iter().enumerate() {
                    if let Some(factors) = factors {
                        v = _mm256_mullo_epi16(v, factors[h]);
                    }
                    let at = (2 * k + part) * ROWS + 8 * h;
                    _mm256_store_si256(to.add(at).cast(), v);
                }
            }
        }
    }
    to
}

/// Spreads 32 activations of token `t`, which are those of eight steps from `step` on.
///
/// # Safety
/// They are there, there is room for them, and the instruction set is available.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn spread_token(q: *const i8, t: usize, step: usize, to: *mut i32) {
    // SAFETY: by the caller.
    unsafe {
        for (part, v) in spread(_mm256_loadu_si256(q.cast())).into_iter().enumerate() {
            let at = (2 * t + part) * STEPS + step;
            _mm256_store_si256(to.add(at).cast(), v);
        }
    }
}

/// Sums of products of all rows and tokens over some steps.
///
/// # Safety
/// They are there, and the instruction set is available.
#[inline(always)]
unsafe fn products(w: *const i32, x: *const i32, steps: std::ops::Range<usize>) -> Sums<N> {
    // SAFETY: by the caller.
    unsafe {
        let mut sums = [[_mm256_setzero_si256(); N]; 2];
        for k in steps {
            for part in 0..2 {
                let w = halves(w.add((2 * k + part) * ROWS));
                for t in 0..N {
                    let x = _mm256_set1_epi32(*x.add((2 * t + part) * STEPS + k));
                    for h in 0..2 {
                        sums[h][t] = _mm256_add_epi32(sums[h][t], _mm256_madd_epi16(w[h], x));
                        in_register(&mut sums[h][t]);
                    }
                }
            }
        }
        sums
    }
}

/// Formats of 256 values with scales for `SUB` of them. See `TilesFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn mul_256<const SUB: usize>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    acc: &mut [[f32; ROWS]],
) {
    let (mut words, mut spread) = (MaybeUninit::uninit(), MaybeUninit::<Spread>::uninit());
    let spread = spread.as_mut_ptr().cast::<i32>();
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        // SAFETY: by the caller; what is read has been written.
        unsafe {
            let w = spread_tile::<SUB>(tile, STEPS, &mut words);
            for t in (0..n).step_by(N) {
                // Tokens that are missing repeat the last one.
                let x: [*const X256; N] =
                    std::array::from_fn(|i| x.cast::<X256>().add((t + i).min(n - 1)));
                for (i, x) in x.iter().enumerate() {
                    for part in 0..8 {
                        let q = (**x).q.as_ptr().add(32 * part);
                        spread_token(q, i, 8 * part, spread);
                    }
                }
                let sums = products(w, spread, 0..STEPS);
                add_256::<N, false>(tile, x, sums, sums, &mut acc[t..]);
            }
        }
    }
}

/// Formats of 32 values. See `TilesFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn mul_32(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    let (mut words, mut spread) = (MaybeUninit::uninit(), MaybeUninit::<Spread>::uninit());
    let spread = spread.as_mut_ptr().cast::<i32>();
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        // SAFETY: by the caller; what is read has been written.
        unsafe {
            let w = spread_tile::<0>(tile, 8 * n32, &mut words);
            for t in (0..n).step_by(N) {
                let at: [usize; N] = std::array::from_fn(|i| (t + i).min(n - 1));
                let mut total =
                    [0, 8].map(|half| at.map(|t| _mm256_loadu_ps(acc[t].as_ptr().add(half))));
                let block = |b: usize| at.map(|t| x.cast::<X32>().add(b * n + t));
                for b in 0..n32 {
                    for (i, x) in block(b).into_iter().enumerate() {
                        spread_token((*x).q.as_ptr(), i, 8 * b, spread);
                    }
                }
                for b in 0..n32 {
                    let x = block(b);
                    let sums = products(w, spread, 8 * b..8 * b + 8);
                    add_32::<N, false>(tile, b, x, sums, &mut total);
                }
                for h in 0..2 {
                    for i in 0..N.min(n - t) {
                        _mm256_storeu_ps(acc[t + i].as_mut_ptr().add(8 * h), total[h][i]);
                    }
                }
            }
        }
    }
}
