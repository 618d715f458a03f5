//! Batches with AVX2: products of bytes are added up in 16 bits as long as they fit, then in 32.
//!
//! A vector holds half of the sixteen rows. Bytes that use all eight bits are multiplied by magnitude, with their signs moved
//! to the activations.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::gemm::{NONE, ROWS, Tile, Unpack, unpack};
use crate::activations::{G32, G256, GROUP};
use std::arch::x86_64::*;

unpack!("avx2,fma,f16c");

/// Tokens that are worked on at a time.
const N: usize = 4;

/// Transposes 16 x 16 double words; rows of `from` are 256 bytes apart.
///
/// # Safety
/// Pointers are valid for that, and aligned to 32.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose(from: *const u8, to: *mut u8) {
    for rows in 0..2 {
        for columns in 0..2 {
            // SAFETY: a quarter, by the caller.
            unsafe {
                let a: [__m256i; 8] = std::array::from_fn(|r| {
                    _mm256_load_si256(from.add(256 * (8 * rows + r) + 32 * columns).cast())
                });
                let mut b = a;
                for i in 0..4 {
                    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
                }
                let mut c = b;
                for i in 0..2 {
                    c[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
                    c[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
                    c[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
                    c[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
                }
                // c[4 i + j] holds, in half k, column 4 k + j of rows 4 i .. 4 i + 4.
                let to = to.add(8 * 64 * columns + 32 * rows);
                for j in 0..4 {
                    let low = _mm256_permute2x128_si256::<0x20>(c[j], c[4 + j]);
                    let high = _mm256_permute2x128_si256::<0x31>(c[j], c[4 + j]);
                    _mm256_store_si256(to.add(64 * j).cast(), low);
                    _mm256_store_si256(to.add(64 * (4 + j)).cast(), high);
                }
            }
        }
    }
}

/// Sums of products of eight rows and `N` tokens over `STEPS * 4 * M` columns, multiplied by 16-bit `factor`s and added up in
/// 32 bits. `w` goes on after 64 bytes, `x` after `GROUP` words.
///
/// # Safety
/// Pointers are valid for that.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sub_block<const M: usize>(
    w: *const u8,
    x: *const i32,
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
                    let x = _mm256_sign_epi8(_mm256_set1_epi32(*x.add(GROUP * k + t)), w);
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
                    let x = _mm256_set1_epi32(*x.add(GROUP * k + t));
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

/// Formats of 256 values with scales for `SUB` of them; quants are `2^OFFSET` too large, if not `NONE`. See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn mul_256<
    const SUB: usize,
    const OFFSET: u32,
    const M: usize,
    const MINS: bool,
>(
    tile: &Tile,
    x: *const u8,
    n: usize,
    _: usize,
    _: usize,
    acc: &mut [[f32; ROWS]; 8],
) {
    // SAFETY: by the caller; arrays are as long as the loops say.
    unsafe {
        let x = &*x.cast::<G256>();
        let pairs = if SUB == 16 {
            x.pairs16.as_ptr()
        } else {
            x.pairs32.as_ptr()
        };
        for (half, first) in [(0, 0), (0, N), (8, 0), (8, N)] {
            if first >= n {
                continue;
            }
            let scales = |j: usize| _mm256_load_si256(tile.scales[j].as_ptr().add(half).cast());
            let pair = |i: usize, t: usize| {
                let [a, b] = (*pairs.add(i))[first + t];
                _mm256_set1_epi32(i32::from(a) & 0xffff | i32::from(b) << 16)
            };
            let mut sums = [_mm256_setzero_si256(); N];
            if OFFSET != NONE {
                for i in 0..128 / SUB {
                    let low = _mm256_and_si256(scales(2 * i), _mm256_set1_epi32(0xffff));
                    let two = _mm256_or_si256(low, _mm256_slli_epi32::<16>(scales(2 * i + 1)));
                    for t in 0..N {
                        sums[t] = _mm256_sub_epi32(sums[t], _mm256_madd_epi16(two, pair(i, t)));
                    }
                }
                for t in 0..N {
                    sums[t] = _mm256_sll_epi32(sums[t], _mm_cvtsi32_si128(OFFSET as i32));
                }
            }
            for j in 0..256 / SUB {
                let w = tile.q.as_ptr().add(16 * SUB * j + 4 * half);
                let xq = x.q.as_ptr().cast::<i32>().add(GROUP * SUB / 4 * j + first);
                sums = sub_block::<M>(w, xq, SUB / 4, twice(scales(j)), sums);
            }
            let d = _mm256_load_ps(tile.d[0].as_ptr().add(half));
            for t in 0..N {
                let d = _mm256_mul_ps(d, _mm256_set1_ps(x.d[first + t]));
                let to = acc[first + t].as_mut_ptr().add(half);
                let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), d, _mm256_loadu_ps(to));
                _mm256_storeu_ps(to, sum);
            }
            if MINS {
                let mut sums = [_mm256_setzero_si256(); N];
                for i in 0..128 / SUB {
                    let mins = _mm256_load_si256(tile.mins[i].as_ptr().add(half).cast());
                    for t in 0..N {
                        let p = _mm256_madd_epi16(mins, pair(i, t));
                        sums[t] = _mm256_add_epi32(sums[t], p);
                    }
                }
                let m = _mm256_load_ps(tile.m[0].as_ptr().add(half));
                for t in 0..N {
                    let m = _mm256_mul_ps(m, _mm256_set1_ps(x.d[first + t]));
                    let to = acc[first + t].as_mut_ptr().add(half);
                    let sum = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(sums[t]), m, _mm256_loadu_ps(to));
                    _mm256_storeu_ps(to, sum);
                }
            }
        }
    }
}

/// Formats of 32 values; quants are 128, shifted right by `SHIFT`, too large, if not `NONE`. See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn mul_32<const SHIFT: u32, const M: usize, const MINS: bool>(
    tile: &Tile,
    x: *const u8,
    n: usize,
    n32: usize,
    stride: usize,
    acc: &mut [[f32; ROWS]; 8],
) {
    // SAFETY: by the caller; arrays are as long as the loops say.
    unsafe {
        let one = _mm256_set1_epi16(1);
        for (half, first) in [(0, 0), (0, N), (8, 0), (8, N)] {
            if first >= n {
                continue;
            }
            let at = |t: usize| acc[first + t].as_ptr().add(half);
            let mut total: [__m256; N] = std::array::from_fn(|t| _mm256_loadu_ps(at(t)));
            for b in 0..n32 {
                let x = &*x.cast::<G32>().add(b * stride);
                let mut sums = [_mm256_setzero_si256(); N];
                if SHIFT != NONE {
                    for t in 0..N {
                        sums[t] = _mm256_set1_epi32(x.minus_sum[first + t] >> SHIFT);
                    }
                }
                let w = tile.q.as_ptr().add(8 * 64 * b + 4 * half);
                let xq = x.q.as_ptr().cast::<i32>().add(first);
                sums = sub_block::<M>(w, xq, 8, one, sums);
                let d = _mm256_load_ps(tile.d[b].as_ptr().add(half));
                for t in 0..N {
                    let d = _mm256_mul_ps(d, _mm256_set1_ps(x.d[first + t]));
                    total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), d, total[t]);
                }
                if MINS {
                    let m = _mm256_load_ps(tile.m[b].as_ptr().add(half));
                    for t in 0..N {
                        total[t] = _mm256_fmadd_ps(m, _mm256_set1_ps(x.s[first + t]), total[t]);
                    }
                }
            }
            for t in 0..N {
                _mm256_storeu_ps(acc[first + t].as_mut_ptr().add(half), total[t]);
            }
        }
    }
}
