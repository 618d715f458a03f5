//! Batches with AVX-512: products of bytes are added up by one instruction.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::bytes::{Avx512, ROWS};
use super::gemm::{NONE, for_tokens};
use super::unpack::{self, Tile, Unpack};
use crate::activations::{X32, X256};
use std::arch::x86_64::*;

/// Tokens that are worked on at a time.
const N: usize = 8;

/// See `UnpackFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn unpack<F: Unpack>(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    next: *const u8,
    tile: &mut Tile,
) {
    // SAFETY: by the caller.
    unsafe { unpack::unpack::<F, Avx512>(w, row_size, n, n32, next, tile) };
}

/// Formats of 256 values with scales for `SUB` of them, and offsets or minimums. See `TilesFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn mul_256<const SUB: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    _: usize,
    acc: &mut [[f32; ROWS]],
) {
    let x = x.cast::<X256>();
    for (tile, acc) in rows.iter().zip(acc.chunks_mut(n)) {
        for t in (0..n).step_by(N) {
            // SAFETY: by the caller.
            unsafe {
                for_tokens!(mul_256_n::<SUB, MINS>, n - t, tile, x.add(t), &mut acc[t..]);
            }
        }
    }
}

// In the loop over tokens, the compiler would load the tile before it, and write it to the stack for want of registers.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_256_n<const N: usize, const SUB: usize, const MINS: bool>(
    tile: &Tile,
    x: *const X256,
    acc: &mut [[f32; ROWS]],
) {
    assert!(acc.len() >= N);
    // SAFETY: arrays are as long as the loops say.
    unsafe {
        let q = tile.q.as_ptr().cast::<__m512i>();
        // Scales times offsets, or minimums, times sums of activations.
        let mut mins = [_mm512_setzero_si512(); N];
        for i in 0..128 / SUB {
            let two = _mm512_load_si512(tile.mins[i].as_ptr().cast());
            for t in 0..N {
                let sums = pairs::<SUB>(x.add(t));
                mins[t] = _mm512_dpwssd_epi32(mins[t], two, _mm512_set1_epi32(*sums.add(i)));
            }
        }
        let mut sum = if MINS {
            [_mm512_setzero_si512(); N]
        } else {
            mins
        };
        for j in 0..256 / SUB {
            let mut a = [_mm512_setzero_si512(); N];
            for k in j * SUB / 4..(j + 1) * SUB / 4 {
                let w = _mm512_load_si512(q.add(k));
                for t in 0..N {
                    let x = _mm512_set1_epi32(*(*x.add(t)).q.as_ptr().cast::<i32>().add(k));
                    a[t] = _mm512_dpbusd_epi32(a[t], w, x);
                }
            }
            let scale = _mm512_load_si512(tile.scales[j].as_ptr().cast());
            for t in 0..N {
                sum[t] = _mm512_add_epi32(sum[t], _mm512_mullo_epi32(a[t], scale));
            }
        }
        let (d, m) = (
            _mm512_load_ps(tile.d[0].as_ptr()),
            _mm512_load_ps(tile.m[0].as_ptr()),
        );
        for t in 0..N {
            let dx = _mm512_set1_ps((*x.add(t)).d);
            let to = acc[t].as_mut_ptr();
            let old = _mm512_loadu_ps(to);
            let mut total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_mul_ps(d, dx), old);
            if MINS {
                let m = _mm512_mul_ps(m, dx);
                total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins[t]), m, total);
            }
            _mm512_storeu_ps(to, total);
        }
    }
}

/// Sums of activations, two neighbours in each number.
#[inline(always)]
pub(super) unsafe fn pairs<const SUB: usize>(x: *const X256) -> *const i32 {
    // SAFETY: by the caller.
    unsafe {
        if SUB == 16 {
            (*x).sum16.as_ptr().cast()
        } else {
            (*x).sum32.as_ptr().cast()
        }
    }
}

/// Formats of 32 values; quants are 128, shifted right by `SHIFT`, too large, if not `NONE`. See `TilesFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn mul_32<const SHIFT: u32, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    let x = x.cast::<X32>();
    for (tile, acc) in rows.iter().zip(acc.chunks_mut(n)) {
        for t in (0..n).step_by(N) {
            // SAFETY: by the caller.
            unsafe {
                for_tokens!(
                    mul_32_n::<SHIFT, MINS>,
                    n - t,
                    tile,
                    x.add(t),
                    n,
                    n32,
                    &mut acc[t..]
                );
            }
        }
    }
}

// In the loop over tokens, the compiler would load the tile before it, and write it to the stack for want of registers.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_32_n<const N: usize, const SHIFT: u32, const MINS: bool>(
    tile: &Tile,
    x: *const X32,
    stride: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    assert!(acc.len() >= N);
    // SAFETY: arrays are as long as the loops say; a tile has room for eight blocks.
    unsafe {
        let mut sum: [__m512; N] = std::array::from_fn(|t| _mm512_loadu_ps(acc[t].as_ptr()));
        for b in 0..n32 {
            let x = x.add(b * stride);
            let q = tile.q.as_ptr().cast::<__m512i>().add(8 * b);
            let mut a = [_mm512_setzero_si512(); N];
            if SHIFT != NONE {
                for t in 0..N {
                    a[t] = _mm512_srai_epi32::<SHIFT>(_mm512_set1_epi32((*x.add(t)).minus_sum));
                }
            }
            for k in 0..8 {
                let w = _mm512_load_si512(q.add(k));
                for t in 0..N {
                    let x = _mm512_set1_epi32(*(*x.add(t)).q.as_ptr().cast::<i32>().add(k));
                    a[t] = _mm512_dpbusd_epi32(a[t], w, x);
                }
            }
            let d = _mm512_load_ps(tile.d[b].as_ptr());
            for t in 0..N {
                let d = _mm512_mul_ps(d, _mm512_set1_ps((*x.add(t)).d));
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[t]), d, sum[t]);
            }
            if MINS {
                let m = _mm512_load_ps(tile.m[b].as_ptr());
                for t in 0..N {
                    sum[t] = _mm512_fmadd_ps(m, _mm512_set1_ps((*x.add(t)).s), sum[t]);
                }
            }
        }
        for t in 0..N {
            _mm512_storeu_ps(acc[t].as_mut_ptr(), sum[t]);
        }
    }
}
