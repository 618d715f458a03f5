//! A tile of rows with many tokens.
//!
//! Sixteen rows are unpacked to bytes once, 256 columns at a time, and lie so that a vector holds four columns of each
//! row. Multiplying it with four columns of a token, repeated in all lanes, adds to sixteen results at once, one for
//! each row: no lanes have to be folded in the end. Eight tokens share the loads of weights.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::{TileFn, UnpackFn};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::activations::{G32, G256, GROUP};
use lemma_quant::GgmlType;
use std::arch::x86_64::*;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;

/// Up to 256 columns of sixteen rows.
#[repr(C, align(64))]
pub(crate) struct Tile {
    /// Quants, made unsigned: `[columns / 4][row][4 columns]`.
    q: [u8; 256 * ROWS],
    /// Quants row by row, before they are interleaved.
    plain: [u8; 256 * ROWS],
    /// Scales of sub-blocks.
    pub(super) scales: [[i32; ROWS]; 16],
    /// Minimums of sub-blocks, two neighbours for each row.
    pub(super) mins: [[[i16; 2]; ROWS]; 8],
    /// Scales of blocks.
    pub(super) d: [[f32; ROWS]; 8],
    /// Scales of minimums, or minimums, of blocks.
    pub(super) m: [[f32; ROWS]; 8],
}

/// How a format is unpacked.
///
/// # Safety
/// `SIZE` is the size of a block, and `unpack` reads nothing outside of it.
pub(super) unsafe trait Unpack {
    /// Bytes of a block.
    const SIZE: usize;
    /// Values in a block.
    const LEN: usize;

    /// Writes a block's quants to `q`, made unsigned, and its scales to `tile`, for row `r` and the tile's block `b`.
    ///
    /// # Safety
    /// `w` is valid for a block, `q` for as many bytes as it has values and aligned to 32, and the instruction
    /// set is available.
    unsafe fn unpack(w: *const u8, q: *mut u8, tile: &mut Tile, r: usize, b: usize);
}

/// What is needed for batches of a type.
pub(super) fn kernel(ty: GgmlType) -> Option<(UnpackFn, TileFn)> {
    Some(match ty {
        GgmlType::Q4_0 => (unpack::<q4_0::Q4_0>, mul_32::<4, false>),
        GgmlType::Q4_1 => (unpack::<q4_0::Q4_1>, mul_32::<NONE, true>),
        GgmlType::Q5_0 => (unpack::<q5_0::Q5_0>, mul_32::<3, false>),
        GgmlType::Q5_1 => (unpack::<q5_0::Q5_1>, mul_32::<NONE, true>),
        GgmlType::Q8_0 => (unpack::<q8_0::Q8_0>, mul_32::<0, false>),
        GgmlType::IQ4_NL => (unpack::<iq4_nl::IQ4NL>, mul_32::<0, false>),
        GgmlType::MXFP4 => (unpack::<mxfp4::MXFP4>, mul_32::<3, false>),
        GgmlType::Q2_K => (unpack::<q2_k::Q2K>, mul_256::<16, NONE, true>),
        GgmlType::Q3_K => (unpack::<q3_k::Q3K>, mul_256::<16, 3, false>),
        GgmlType::Q4_K => (unpack::<q4_k::Q4K>, mul_256::<32, NONE, true>),
        GgmlType::Q5_K => (unpack::<q5_k::Q5K>, mul_256::<32, NONE, true>),
        GgmlType::Q6_K => (unpack::<q6_k::Q6K>, mul_256::<16, 0, false>),
        GgmlType::IQ4_XS => (unpack::<iq4_xs::IQ4XS>, mul_256::<32, 0, false>),
        _ => return None,
    })
}

/// No offset. Otherwise quants were made unsigned by adding 128 (of formats with scales for 16: 32), shifted right by
/// this; activations come with their sums times as much.
const NONE: u32 = 32;

/// See [`UnpackFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn unpack<F: Unpack>(w: *const u8, row_size: usize, n: usize, n32: usize, tile: &mut Tile) {
    let q = tile.plain.as_mut_ptr();
    for r in 0..ROWS {
        // Rows that are missing repeat the last one; their results are not used.
        // SAFETY: by the caller; a row of `plain` has 256 bytes.
        unsafe {
            let w = w.add(r.min(n - 1) * row_size);
            for b in 0..n32 * 32 / F::LEN {
                let w = w.add(b * F::SIZE);
                // The next columns of the row come when this tile has met all tokens.
                let next = w.wrapping_add(F::SIZE * 256 / F::LEN).cast::<i8>();
                _mm_prefetch::<_MM_HINT_T0>(next);
                if F::LEN == 256 {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64));
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(128));
                }
                F::unpack(w, q.add(256 * r + F::LEN * b), tile, r, b);
            }
        }
    }
    for c in 0..n32.div_ceil(2) {
        // SAFETY: 64 columns of 16 rows.
        unsafe {
            transpose(
                tile.plain.as_ptr().add(64 * c),
                tile.q.as_mut_ptr().add(64 * ROWS * c),
            );
        }
    }
}

/// Transposes 16 x 16 double words; rows of `from` are 256 bytes apart.
///
/// # Safety
/// Pointers are valid for that, and aligned to 64.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose(from: *const u8, to: *mut u8) {
    // SAFETY: by the caller.
    unsafe {
        let a: [__m512i; 16] = std::array::from_fn(|r| _mm512_load_si512(from.add(256 * r).cast()));
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
        for j in 0..4 {
            let (p, q, r, s) = (c[j], c[4 + j], c[8 + j], c[12 + j]);
            let pq_low = _mm512_shuffle_i32x4::<0x88>(p, q);
            let pq_high = _mm512_shuffle_i32x4::<0xdd>(p, q);
            let rs_low = _mm512_shuffle_i32x4::<0x88>(r, s);
            let rs_high = _mm512_shuffle_i32x4::<0xdd>(r, s);
            let store = |k: usize, v| _mm512_store_si512(to.add(64 * (4 * k + j)).cast(), v);
            store(0, _mm512_shuffle_i32x4::<0x88>(pq_low, rs_low));
            store(2, _mm512_shuffle_i32x4::<0xdd>(pq_low, rs_low));
            store(1, _mm512_shuffle_i32x4::<0x88>(pq_high, rs_high));
            store(3, _mm512_shuffle_i32x4::<0xdd>(pq_high, rs_high));
        }
    }
}

/// Tokens come in pairs: a kernel for each count of them. The last one of an odd number is computed in vain.
macro_rules! for_tokens {
    ($f:ident::<$($g:tt),*>, $n:ident, $($arg:expr),*) => {
        match $n {
            1 => $f::<1, $($g),*>($($arg),*),
            2 => $f::<2, $($g),*>($($arg),*),
            3 | 4 => $f::<4, $($g),*>($($arg),*),
            5 | 6 => $f::<6, $($g),*>($($arg),*),
            _ => $f::<8, $($g),*>($($arg),*),
        }
    };
}

/// Formats of 256 values with scales for `SUB` of them. See [`TileFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_256<const SUB: usize, const SHIFT: u32, const MINS: bool>(
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

/// Formats of 32 values. See [`TileFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_32<const SHIFT: u32, const MINS: bool>(
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
