//! Batches with AVX-512: products of bytes are added up by one instruction.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::gemm::{NONE, ROWS, Tile, Unpack, for_tokens, unpack};
use crate::activations::{G32, G256, GROUP};
use std::arch::x86_64::*;

unpack!("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni");

/// Transposes 16 x 16 double words; rows of `from` are 256 bytes apart.
///
/// # Safety
/// Pointers are valid for that, and aligned to 64.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose(from: *const u8, to: *mut u8) {
    // SAFETY: by the caller.
    unsafe {
        let a = std::array::from_fn(|r| _mm512_load_si512(from.add(256 * r).cast()));
        for (i, v) in transposed(a).into_iter().enumerate() {
            _mm512_store_si512(to.add(64 * i).cast(), v);
        }
    }
}

/// 16 x 16 double words, transposed.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(a: [__m512i; 16]) -> [__m512i; 16] {
    let mut b = a;
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    let mut c = b;
    for i in 0..4 {
        c[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        c[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        c[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        c[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    // c[4 i + j] holds, in lane k, column 4 k + j of rows 4 i .. 4 i + 4.
    let mut to = c;
    for j in 0..4 {
        let (p, q, r, s) = (c[j], c[4 + j], c[8 + j], c[12 + j]);
        let pq_low = _mm512_shuffle_i32x4::<0x88>(p, q);
        let pq_high = _mm512_shuffle_i32x4::<0xdd>(p, q);
        let rs_low = _mm512_shuffle_i32x4::<0x88>(r, s);
        let rs_high = _mm512_shuffle_i32x4::<0xdd>(r, s);
        to[j] = _mm512_shuffle_i32x4::<0x88>(pq_low, rs_low);
        to[8 + j] = _mm512_shuffle_i32x4::<0xdd>(pq_low, rs_low);
        to[4 + j] = _mm512_shuffle_i32x4::<0x88>(pq_high, rs_high);
        to[12 + j] = _mm512_shuffle_i32x4::<0xdd>(pq_high, rs_high);
    }
    to
}

/// Formats of 256 values with scales for `SUB` of them. See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn mul_256<const SUB: usize, const SHIFT: u32, const MINS: bool>(
    tile: &Tile,
    x: *const u8,
    n: usize,
    _: usize,
    _: usize,
    acc: &mut [[f32; ROWS]; 8],
) {
    // SAFETY: by the caller.
    unsafe {
        let x = &*x.cast::<G256>();
        for_tokens!(mul_256_n::<SUB, SHIFT, MINS>, n, tile, x, acc);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_256_n<const N: usize, const SUB: usize, const SHIFT: u32, const MINS: bool>(
    tile: &Tile,
    x: &G256,
    acc: &mut [[f32; ROWS]; 8],
) {
    // SAFETY: arrays are as long as the loops say.
    unsafe {
        let q = tile.q.as_ptr().cast::<__m512i>();
        let xq = x.q.as_ptr().cast::<i32>();
        let minus_sum = if SUB == 16 {
            x.minus_sum16.as_ptr()
        } else {
            x.minus_sum32.as_ptr()
        };
        let mut sum = [_mm512_setzero_si512(); N];
        for j in 0..256 / SUB {
            let mut a = [_mm512_setzero_si512(); N];
            if SHIFT != NONE {
                for t in 0..N {
                    let minus_sum = _mm512_set1_epi32((*minus_sum.add(j))[t]);
                    a[t] = _mm512_srai_epi32::<SHIFT>(minus_sum);
                }
            }
            for k in j * SUB / 4..(j + 1) * SUB / 4 {
                let w = _mm512_load_si512(q.add(k));
                for t in 0..N {
                    let x = _mm512_set1_epi32(*xq.add(GROUP * k + t));
                    a[t] = _mm512_dpbusd_epi32(a[t], w, x);
                }
            }
            let scale = _mm512_load_si512(tile.scales[j].as_ptr().cast());
            for t in 0..N {
                sum[t] = _mm512_add_epi32(sum[t], _mm512_mullo_epi32(a[t], scale));
            }
        }
        let d = _mm512_load_ps(tile.d[0].as_ptr());
        for t in 0..N {
            let d = _mm512_mul_ps(d, _mm512_set1_ps(x.d[t]));
            let to = acc[t].as_mut_ptr();
            let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[t]), d, _mm512_loadu_ps(to));
            _mm512_storeu_ps(to, sum);
        }
        if MINS {
            let pairs = if SUB == 16 {
                x.pairs16.as_ptr()
            } else {
                x.pairs32.as_ptr()
            };
            let mut sum = [_mm512_setzero_si512(); N];
            for i in 0..128 / SUB {
                let mins = _mm512_load_si512(tile.mins[i].as_ptr().cast());
                for t in 0..N {
                    let [a, b] = (*pairs.add(i))[t];
                    let pair = _mm512_set1_epi32(i32::from(a) & 0xffff | i32::from(b) << 16);
                    sum[t] = _mm512_dpwssd_epi32(sum[t], mins, pair);
                }
            }
            let m = _mm512_load_ps(tile.m[0].as_ptr());
            for t in 0..N {
                let m = _mm512_mul_ps(m, _mm512_set1_ps(x.d[t]));
                let to = acc[t].as_mut_ptr();
                let sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum[t]), m, _mm512_loadu_ps(to));
                _mm512_storeu_ps(to, sum);
            }
        }
    }
}

/// Formats of 32 values. See `TileFn`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn mul_32<const SHIFT: u32, const MINS: bool>(
    tile: &Tile,
    x: *const u8,
    n: usize,
    n32: usize,
    stride: usize,
    acc: &mut [[f32; ROWS]; 8],
) {
    // SAFETY: by the caller.
    unsafe {
        for_tokens!(mul_32_n::<SHIFT, MINS>, n, tile, x.cast(), n32, stride, acc);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_32_n<const N: usize, const SHIFT: u32, const MINS: bool>(
    tile: &Tile,
    x: *const G32,
    n32: usize,
    stride: usize,
    acc: &mut [[f32; ROWS]; 8],
) {
    // SAFETY: arrays are as long as the loops say; a tile has room for eight blocks.
    unsafe {
        let mut sum: [__m512; N] = std::array::from_fn(|t| _mm512_loadu_ps(acc[t].as_ptr()));
        for b in 0..n32 {
            let x = &*x.add(b * stride);
            let q = tile.q.as_ptr().cast::<__m512i>().add(8 * b);
            let xq = x.q.as_ptr().cast::<i32>();
            let mut a = [_mm512_setzero_si512(); N];
            if SHIFT != NONE {
                for t in 0..N {
                    a[t] = _mm512_srai_epi32::<SHIFT>(_mm512_set1_epi32(x.minus_sum[t]));
                }
            }
            for k in 0..8 {
                let w = _mm512_load_si512(q.add(k));
                for t in 0..N {
                    let x = _mm512_set1_epi32(*xq.add(GROUP * k + t));
                    a[t] = _mm512_dpbusd_epi32(a[t], w, x);
                }
            }
            let d = _mm512_load_ps(tile.d[b].as_ptr());
            for t in 0..N {
                let d = _mm512_mul_ps(d, _mm512_set1_ps(x.d[t]));
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[t]), d, sum[t]);
            }
            if MINS {
                let m = _mm512_load_ps(tile.m[b].as_ptr());
                for t in 0..N {
                    sum[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(x.s[t]), sum[t]);
                }
            }
        }
        for t in 0..N {
            _mm512_storeu_ps(acc[t].as_mut_ptr(), sum[t]);
        }
    }
}
