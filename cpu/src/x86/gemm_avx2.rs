//! Batches with AVX2: products of bytes are added up in 16 bits as long as they fit, then in 32.
//!
//! A vector holds half of the sixteen rows. Bytes that use all eight bits are multiplied by magnitude, with their signs moved
//! to the activations.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::bytes::{Avx2, ROWS};
use super::gemm::NONE;
use super::gemm_avx512::pairs;
use super::unpack::{self, Tile, Unpack};
use crate::activations::{X32, X256};
use std::arch::x86_64::*;

/// See `UnpackFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn unpack<F: Unpack>(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    next: *const u8,
    tile: &mut Tile,
) {
    // SAFETY: by the caller.
    unsafe { unpack::unpack::<F, Avx2>(w, row_size, n, n32, next, tile) };
}

/// Sums of products of eight rows and `N` tokens over `STEPS * 4 * M` columns, multiplied by 16-bit `factor`s and added up in
/// 32 bits. `w` goes on after 64 bytes.
///
/// # Safety
/// Pointers are valid for that.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sub_block<const N: usize, const M: usize>(
    w: *const u8,
    x: [*const i32; N],
    steps: usize,
    factor: __m256i,
    mut sums: [__m256i; N],
) -> [__m256i; N] {
    // SAFETY: by the caller.
    unsafe {
        if M == 0 {
            for k in 0..steps {
                let w = _mm256_load_si256(w.add(64 * k).cast());
                let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                let magnitude = _mm256_abs_epi8(w);
                for t in 0..N {
                    let x = _mm256_sign_epi8(_mm256_set1_epi32(*x[t].add(k)), w);
                    let p = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), factor);
                    sums[t] = _mm256_add_epi32(sums[t], p);
                }
            }
            return sums;
        }
        for part in 0..steps / M {
            let mut a = [_mm256_setzero_si256(); N];
            for k in part * M..(part + 1) * M {
                let w = _mm256_load_si256(w.add(64 * k).cast());
                for t in 0..N {
                    let x = _mm256_set1_epi32(*x[t].add(k));
                    a[t] = _mm256_add_epi16(a[t], _mm256_maddubs_epi16(w, x));
                }
            }
            for t in 0..N {
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(a[t], factor));
            }
        }
        sums
    }
}

/// The same 16-bit number in both halves of every word. Words fit 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn twice(words: __m256i) -> __m256i {
    let low = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
    _mm256_or_si256(low, _mm256_slli_epi32::<16>(words))
}

/// Formats of 256 values with scales for `SUB` of them, and offsets or minimums. See `TilesFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn mul_256<const SUB: usize, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    _: usize,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller.
    unsafe {
        match n {
            1 | 2 => mul_256_n::<2, SUB, M, MINS>(rows, x, n, acc),
            _ => mul_256_n::<4, SUB, M, MINS>(rows, x, n, acc),
        }
    }
}

/// `N` tokens at a time.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn mul_256_n<const N: usize, const SUB: usize, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    acc: &mut [[f32; ROWS]],
) {
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        for (t, half) in (0..n).step_by(N).flat_map(|t| [(t, 0), (t, 8)]) {
            // SAFETY: by the caller; arrays are as long as the loops say.
            unsafe {
                // Tokens that are missing repeat the last one.
                let x: [*const X256; N] =
                    std::array::from_fn(|i| x.cast::<X256>().add((t + i).min(n - 1)));
                let mut mins = [_mm256_setzero_si256(); N];
                // Signed bytes have no offset.
                if MINS || M != 0 {
                    for i in 0..128 / SUB {
                        let two = _mm256_load_si256(tile.mins[i].as_ptr().add(half).cast());
                        for t in 0..N {
                            let sums = _mm256_set1_epi32(*pairs::<SUB>(x[t]).add(i));
                            mins[t] = _mm256_add_epi32(mins[t], _mm256_madd_epi16(two, sums));
                        }
                    }
                }
                let mut sums = if MINS {
                    [_mm256_setzero_si256(); N]
                } else {
                    mins
                };
                for j in 0..256 / SUB {
                    let w = tile.q.as_ptr().add(16 * SUB * j + 4 * half);
                    let xq = x.map(|x| (*x).q.as_ptr().cast::<i32>().add(SUB / 4 * j));
                    let scales = _mm256_load_si256(tile.scales[j].as_ptr().add(half).cast());
                    sums = sub_block::<N, M>(w, xq, SUB / 4, twice(scales), sums);
                }
                let (d, m) = (
                    _mm256_load_ps(tile.d[0].as_ptr().add(half)),
                    _mm256_load_ps(tile.m[0].as_ptr().add(half)),
                );
                for i in 0..N.min(n - t) {
                    let dx = _mm256_set1_ps((*x[i]).d);
                    let to = acc[t + i].as_mut_ptr().add(half);
                    let (sum, d) = (_mm256_cvtepi32_ps(sums[i]), _mm256_mul_ps(d, dx));
                    let mut total = _mm256_fmadd_ps(sum, d, _mm256_loadu_ps(to));
                    if MINS {
                        let (sum, m) = (_mm256_cvtepi32_ps(mins[i]), _mm256_mul_ps(m, dx));
                        total = _mm256_fnmadd_ps(sum, m, total);
                    }
                    _mm256_storeu_ps(to, total);
                }
            }
        }
    }
}

/// Formats of 32 values; quants are 128, shifted right by `SHIFT`, too large, if not `NONE`. See `TilesFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn mul_32<const SHIFT: u32, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller.
    unsafe {
        match n {
            1 | 2 => mul_32_n::<2, SHIFT, M, MINS>(rows, x, n, n32, acc),
            _ => mul_32_n::<4, SHIFT, M, MINS>(rows, x, n, n32, acc),
        }
    }
}

/// `N` tokens at a time.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn mul_32_n<const N: usize, const SHIFT: u32, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    let one = _mm256_set1_epi16(1);
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        for (t, half) in (0..n).step_by(N).flat_map(|t| [(t, 0), (t, 8)]) {
            // SAFETY: by the caller; arrays are as long as the loops say.
            unsafe {
                let at: [usize; N] = std::array::from_fn(|i| (t + i).min(n - 1));
                let mut total = at.map(|t| _mm256_loadu_ps(acc[t].as_ptr().add(half)));
                for b in 0..n32 {
                    let x = at.map(|t| x.cast::<X32>().add(b * n + t));
                    let mut sums = [_mm256_setzero_si256(); N];
                    if SHIFT != NONE {
                        for t in 0..N {
                            sums[t] = _mm256_set1_epi32((*x[t]).minus_sum >> SHIFT);
                        }
                    }
                    let w = tile.q.as_ptr().add(8 * 64 * b + 4 * half);
                    sums = sub_block::<N, M>(w, x.map(|x| (*x).q.as_ptr().cast()), 8, one, sums);
                    let d = _mm256_load_ps(tile.d[b].as_ptr().add(half));
                    for t in 0..N {
                        let d = _mm256_mul_ps(d, _mm256_set1_ps((*x[t]).d));
                        total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), d, total[t]);
                    }
                    if MINS {
                        let m = _mm256_load_ps(tile.m[b].as_ptr().add(half));
                        for t in 0..N {
                            total[t] = _mm256_fmadd_ps(m, _mm256_set1_ps((*x[t]).s), total[t]);
                        }
                    }
                }
                for i in 0..N.min(n - t) {
                    _mm256_storeu_ps(acc[t + i].as_mut_ptr().add(half), total[i]);
                }
            }
        }
    }
}
