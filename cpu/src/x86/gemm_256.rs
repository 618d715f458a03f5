//! Batches with vectors of 256 bits, which hold half of the sixteen rows.
//!
//! AVX2 adds up products of bytes in 16 bits as long as they fit, then in 32. Bytes that use all eight bits are multiplied by
//! magnitude, with their signs moved to the activations. With AVX-VNNI neither is needed.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::bytes::ROWS;
use super::dots::{self, Dots};
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
    unsafe { unpack::unpack::<F, super::bytes::Avx2>(w, row_size, n, n32, next, tile) };
}

/// In place of how many products of four columns fit 16 bits: signs are needed.
const SIGNS: usize = 0;
/// In place of it: products are added up in 32 bits at once.
const ALL: usize = usize::MAX;

/// Adds sums of products of eight rows and `N` tokens over `4 * steps` columns to `sums`, each times the `scale` of its row, which
/// fits 16 bits. `w` goes on after 64 bytes.
///
/// # Safety
/// Pointers are valid for that, and the instruction set is available.
#[inline(always)]
unsafe fn sub_block<P: Dots, const N: usize, const M: usize>(
    w: *const u8,
    x: [*const i32; N],
    steps: usize,
    scale: Option<__m256i>,
    mut sums: [__m256i; N],
) -> [__m256i; N] {
    // SAFETY: by the caller.
    unsafe {
        if M == ALL {
            let mut a = match scale {
                Some(_) => [_mm256_setzero_si256(); N],
                None => sums,
            };
            for k in 0..steps {
                let w = _mm256_load_si256(w.add(64 * k).cast());
                for t in 0..N {
                    a[t] = P::bytes(a[t], w, _mm256_set1_epi32(*x[t].add(k)));
                }
            }
            let Some(scale) = scale else { return a };
            for t in 0..N {
                sums[t] = _mm256_add_epi32(sums[t], _mm256_mullo_epi32(a[t], scale));
            }
            return sums;
        }
        let factor = match scale {
            Some(scale) => twice(scale),
            None => _mm256_set1_epi16(1),
        };
        if M == SIGNS {
            for k in 0..steps {
                let w = _mm256_load_si256(w.add(64 * k).cast());
                let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                let magnitude = _mm256_abs_epi8(w);
                for t in 0..N {
                    let x = _mm256_sign_epi8(_mm256_set1_epi32(*x[t].add(k)), w);
                    sums[t] = P::words(sums[t], _mm256_maddubs_epi16(magnitude, x), factor);
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
                sums[t] = P::words(sums[t], a[t], factor);
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

/// Formats of 256 values with scales for `SUB` of them, and offsets or minimums; and formats of 32 values, whose quants are 128,
/// shifted right by `SHIFT`, too large, if not `NONE`. See `TilesFn`.
macro_rules! tiles {
    ($features:literal, $dots:ty, $m:expr $(, $parameter:ident)?) => {
        #[target_feature(enable = $features)]
        pub(in super::super) unsafe fn mul_256<
            const SUB: usize,
            $(const $parameter: usize,)?
            const MINS: bool,
        >(
            rows: &[Tile],
            x: *const u8,
            n: usize,
            _: usize,
            acc: &mut [[f32; ROWS]],
        ) {
            // SAFETY: by the caller.
            unsafe {
                match n {
                    1 | 2 => mul_256_n::<$dots, 2, SUB, { $m }, MINS>(rows, x, n, acc),
                    _ => mul_256_n::<$dots, 4, SUB, { $m }, MINS>(rows, x, n, acc),
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(in super::super) unsafe fn mul_32<
            const SHIFT: u32,
            $(const $parameter: usize,)?
            const MINS: bool,
        >(
            rows: &[Tile],
            x: *const u8,
            n: usize,
            n32: usize,
            acc: &mut [[f32; ROWS]],
        ) {
            // SAFETY: by the caller.
            unsafe {
                match n {
                    1 | 2 => mul_32_n::<$dots, 2, SHIFT, { $m }, MINS>(rows, x, n, n32, acc),
                    _ => mul_32_n::<$dots, 4, SHIFT, { $m }, MINS>(rows, x, n, n32, acc),
                }
            }
        }
    };
}

/// With AVX2: `M` says how many products of four columns fit 16 bits, or `SIGNS`.
pub(super) mod avx2 {
    pub(in super::super) use super::unpack;
    use super::*;

    tiles!("avx2,fma,f16c", dots::Avx2, M, M);
}

/// With AVX-VNNI.
pub(super) mod avx_vnni {
    pub(in super::super) use super::unpack;
    use super::*;

    tiles!("avx2,fma,f16c,avxvnni", dots::AvxVnni, ALL);
}

/// `N` tokens at a time.
#[inline(always)]
unsafe fn mul_256_n<P: Dots, const N: usize, const SUB: usize, const M: usize, const MINS: bool>(
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
                if MINS || M != SIGNS {
                    for i in 0..128 / SUB {
                        let two = _mm256_load_si256(tile.mins[i].as_ptr().add(half).cast());
                        for t in 0..N {
                            let sums = _mm256_set1_epi32(*pairs::<SUB>(x[t]).add(i));
                            mins[t] = P::words(mins[t], two, sums);
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
                    sums = sub_block::<P, N, M>(w, xq, SUB / 4, Some(scales), sums);
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

/// `N` tokens at a time.
#[inline(always)]
unsafe fn mul_32_n<P: Dots, const N: usize, const SHIFT: u32, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
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
                    let q = x.map(|x| (*x).q.as_ptr().cast());
                    sums = sub_block::<P, N, M>(w, q, 8, None, sums);
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
