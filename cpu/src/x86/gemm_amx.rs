//! Batches with AMX: up to sixteen tokens and sixteen rows at a time.
//!
//! A tile product of bytes costs the same whether it is over 32 columns or 64, and its sums leave the tiles through
//! memory. So formats of 256 have their scales multiplied into the weights when these are unpacked: a product of scale and
//! quant is whole, has up to 13 bits, and is split into its lower seven bits and the rest. Two tile products then sum up
//! all 256 columns, exactly, and what leaves the tiles is once for a block. Formats of 32 have their scales applied
//! outside, to every block's sums.
//!
//! Weights are the second factor, because tiles of rows as they are unpacked for vectors are just what it has to be; and
//! activations, as the first, lie token by token. So vectors hold the sums of sixteen rows here as well.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::amx::Tiles;
use super::bytes::{Avx512, ROWS};
use super::gemm::NONE;
use super::gemm_avx512::pairs;
use super::patterns::{self, Batch};
use super::ternary;
use super::unpack::{self, Tile, Unpack};
use super::{TilesFn, UnpackFn};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::activations::{X32, X256};
use lemma_quant::GgmlType;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Tokens of a tile.
const TOKENS: usize = 16;

/// Sums of bytes, as they leave the tiles: `[token][row]`.
#[repr(C, align(64))]
struct Exact([[i32; ROWS]; TOKENS]);

/// What is needed for batches of a type, and how many tokens it takes to be faster than vectors.
pub(super) fn kernel(ty: GgmlType) -> Option<(usize, UnpackFn, TilesFn)> {
    macro_rules! kernels {
        ($($ty:ident: $from:literal, $format:ty, $mul:expr $(, $offset:literal, $how:expr, $sub:literal)?;)*) => {
            match ty {
                $(GgmlType::$ty => ($from, kernels!(@ $format $(, $offset, $how, $sub)?), $mul),)*
                _ => return None,
            }
        };
        (@ $format:ty) => { super::gemm_avx512::unpack::<$format> };
        (@ $format:ty, $offset:literal, $how:expr, $sub:literal) => {
            unpack::<$format, $offset, { $how }, $sub>
        };
    }
    Some(kernels! {
        Q4_0: 48, q4_0::Q4_0, mul_32::<4, false>;
        Q4_1: 48, q4_0::Q4_1, mul_32::<NONE, true>;
        Q5_0: 48, q5_0::Q5_0, mul_32::<3, false>;
        Q5_1: 48, q5_0::Q5_1, mul_32::<NONE, true>;
        Q8_0: 48, q8_0::Q8_0, mul_32::<0, false>;
        IQ4_NL: 48, iq4_nl::IQ4NL, mul_32::<0, false>;
        MXFP4: 48, mxfp4::MXFP4, mul_32::<3, false>;
        Q2_K: 12, q2_k::Q2K, mul_256::<SCALED, 16, true>, 0, SCALED, 16;
        Q3_K: 12, q3_k::Q3K, mul_256::<NEGATED, 16, false>, 4, NEGATED, 16;
        Q4_K: 32, q4_k::Q4K, mul_256::<SPLIT, 32, true>, 0, SPLIT, 32;
        Q5_K: 32, q5_k::Q5K, mul_256::<SPLIT, 32, true>, 0, SPLIT, 32;
        Q6_K: 20, q6_k::Q6K, mul_256::<SPLIT, 16, false>, 32, SPLIT, 16;
        IQ4_XS: 30, iq4_xs::IQ4XS, mul_256::<SPLIT, 32, false>, 128, SPLIT, 32;
        IQ2_XXS: 30, Batch<patterns::IQ2XXS>, mul_256::<SPLIT, 32, false>, 128, SPLIT, 32;
        IQ2_XS: 30, Batch<patterns::IQ2XS>, mul_256::<SPLIT, 16, false>, 128, SPLIT, 16;
        IQ2_S: 30, Batch<patterns::IQ2S>, mul_256::<SPLIT, 16, false>, 128, SPLIT, 16;
        IQ3_XXS: 30, Batch<patterns::IQ3XXS>, mul_256::<SPLIT, 32, false>, 128, SPLIT, 32;
        IQ3_S: 30, Batch<patterns::IQ3S>, mul_256::<SPLIT, 32, false>, 128, SPLIT, 32;
        IQ1_S: 30, Batch<patterns::IQ1S>, mul_256::<SPLIT, 32, false>, 128, SPLIT, 32;
        IQ1_M: 30, Batch<patterns::IQ1M>, mul_256::<SPLIT, 16, false>, 128, SPLIT, 16;
        TQ1_0: 12, Batch<ternary::TQ1_0>, mul_256::<SCALED, 32, false>, 128, SCALED, 32;
        TQ2_0: 12, Batch<ternary::TQ2_0>, mul_256::<SCALED, 32, false>, 128, SCALED, 32;
    })
}

/// Products with scales fit a byte.
const SCALED: u8 = 1;
/// Their negatives do: `4 * 32` is one too large.
const NEGATED: u8 = 2;
/// They have seven bits and a signed rest.
const SPLIT: u8 = 3;

/// Upper bits begin here.
const BITS: u32 = 7;

/// See [`UnpackFn`]. Formats of 256, whose quants come `OFFSET` too large.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn unpack<F: Unpack, const OFFSET: i16, const HOW: u8, const SUB: usize>(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    next: *const u8,
    tile: &mut Tile,
) {
    // SAFETY: by the caller; a tile has 64 vectors of quants.
    unsafe {
        unpack::unpack::<F, Avx512>(w, row_size, n, n32, next, tile);
        let (q, high) = (tile.q.as_mut_ptr(), tile.high.as_mut_ptr());
        for j in 0..256 / SUB {
            let s = _mm512_load_si512(tile.scales[j].as_ptr().cast());
            let low = _mm512_and_si512(s, _mm512_set1_epi32(0xffff));
            let s = _mm512_or_si512(low, _mm512_slli_epi32::<16>(s));
            for k in j * SUB / 4..(j + 1) * SUB / 4 {
                let p = q.add(64 * k).cast();
                let (l, h) = scale::<OFFSET, HOW>(_mm512_load_si512(p), s);
                _mm512_store_si512(p, l);
                if HOW == SPLIT {
                    _mm512_store_si512(high.add(64 * k).cast(), h);
                }
            }
        }
    }
}

/// Products of quants with scales, twice for each row: the lower part and the upper part.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn scale<const OFFSET: i16, const HOW: u8>(q: __m512i, s: __m512i) -> (__m512i, __m512i) {
    let even_bytes = _mm512_set1_epi16(0xff);
    let offset = _mm512_set1_epi16(OFFSET);
    let product = |q: __m512i| {
        let q = match (HOW, OFFSET) {
            (NEGATED, _) => _mm512_sub_epi16(offset, q),
            (_, 0) => q,
            _ => _mm512_sub_epi16(q, offset),
        };
        _mm512_mullo_epi16(q, s)
    };
    let even = product(_mm512_and_si512(q, even_bytes));
    let odd = product(_mm512_srli_epi16::<8>(q));
    // Bytes of `a` where they are even, of `b` where they are odd.
    let join = |a, b| _mm512_ternarylogic_epi32::<0xca>(even_bytes, a, b);
    let low = join(even, _mm512_slli_epi16::<8>(odd));
    if HOW != SPLIT {
        return (low, low);
    }
    let high = join(
        _mm512_srai_epi16::<BITS>(even),
        _mm512_slli_epi16::<{ 8 - BITS }>(odd),
    );
    let mask = _mm512_set1_epi8(i8::MAX >> (7 - BITS));
    (_mm512_and_si512(low, mask), high)
}

/// 64 columns of both planes of weights with two groups of tokens.
macro_rules! split_two {
    ($k:literal) => {
        concat!(
            concat!("tileloadd tmm6, [{w} + {s64} + 1024 * ", $k, "]\n"),
            concat!("tileloadd tmm4, [{x0} + {sx} + 64 * ", $k, "]\n"),
            concat!("tileloadd tmm7, [{w} + {s64} + 4096 + 1024 * ", $k, "]\n"),
            concat!("tileloadd tmm5, [{x1} + {sx} + 64 * ", $k, "]\n"),
            "tdpbssd tmm0, tmm4, tmm6\n",
            "tdpbssd tmm1, tmm5, tmm6\n",
            "tdpbssd tmm2, tmm4, tmm7\n",
            "tdpbssd tmm3, tmm5, tmm7\n",
        )
    };
}

/// 64 columns of one plane of weights with two groups of tokens, in turns with other registers.
macro_rules! one_two {
    ($k:literal, $w:literal) => {
        concat!(
            concat!("tileloadd tmm", $w, ", [{w} + {s64} + 1024 * ", $k, "]\n"),
            concat!("tileloadd tmm4, [{x0} + {sx} + 64 * ", $k, "]\n"),
            concat!("tileloadd tmm5, [{x1} + {sx} + 64 * ", $k, "]\n"),
            concat!("tdpbssd tmm0, tmm4, tmm", $w, "\n"),
            concat!("tdpbssd tmm1, tmm5, tmm", $w, "\n"),
        )
    };
}

/// Sums over 256 columns with two groups of tokens: of the lower part for the first, for the second, then of the
/// upper part.
///
/// # Safety
/// Pointers are valid for 256 columns of as many tokens as the shapes say.
#[inline(always)]
unsafe fn product_256<const HOW: u8>(
    _: &Tiles,
    tile: &Tile,
    x: [*const X256; 2],
    to: &mut MaybeUninit<[Exact; 4]>,
) {
    // SAFETY: by the caller; registers are written before they are read.
    unsafe {
        if HOW == SPLIT {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                split_two!("0"), split_two!("1"), split_two!("2"), split_two!("3"),
                "tilestored [{to} + {s64}], tmm0",
                "tilestored [{to} + {s64} + 1024], tmm1",
                "tilestored [{to} + {s64} + 2048], tmm2",
                "tilestored [{to} + {s64} + 3072], tmm3",
                w = in(reg) &raw const *tile, x0 = in(reg) x[0], x1 = in(reg) x[1],
                to = in(reg) to.as_mut_ptr(), s64 = in(reg) 64usize, sx = in(reg) size_of::<X256>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        } else {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                one_two!("0", "6"), one_two!("1", "7"), one_two!("2", "6"), one_two!("3", "7"),
                "tilestored [{to} + {s64}], tmm0",
                "tilestored [{to} + {s64} + 1024], tmm1",
                w = in(reg) &raw const *tile, x0 = in(reg) x[0], x1 = in(reg) x[1],
                to = in(reg) to.as_mut_ptr(), s64 = in(reg) 64usize, sx = in(reg) size_of::<X256>(),
                out("tmm0") _, out("tmm1") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// Formats of 256 values with scales for `SUB` of them. See [`TilesFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_256<const HOW: u8, const SUB: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    _: usize,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller.
    unsafe {
        let x = x.cast::<X256>();
        let mut tiles = Tiles::new();
        let mut exact = MaybeUninit::<[Exact; 4]>::uninit();
        for t in (0..n).step_by(2 * TOKENS) {
            let both = (n - t).min(2 * TOKENS);
            let first = both.min(TOKENS);
            // Where there is no second group, a token is computed twice.
            let (second, rest) = match both - first {
                0 => (0, 1),
                rest => (TOKENS, rest),
            };
            tiles.shape(64, [first, rest]);
            let x = [x.add(t), x.add(t + second)];
            for (tile, acc) in rows.iter().zip(acc.chunks_mut(n)) {
                product_256::<HOW>(&tiles, tile, x, &mut exact);
                let exact = exact.as_ptr().cast::<Exact>();
                let acc = &mut acc[t..t + both];
                let (acc, more) = acc.split_at_mut(first);
                leave_256::<HOW, SUB, MINS>([exact, exact.add(2)], tile, x[0], acc);
                leave_256::<HOW, SUB, MINS>([exact.add(1), exact.add(3)], tile, x[1], more);
            }
        }
    }
}

/// From whole sums of both parts to sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn leave_256<const HOW: u8, const SUB: usize, const MINS: bool>(
    [low, high]: [*const Exact; 2],
    tile: &Tile,
    x: *const X256,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller; arrays are as long as the loops say.
    unsafe {
        let mut mins = [_mm512_setzero_si512(); 8];
        if MINS {
            for i in 0..128 / SUB {
                mins[i] = _mm512_load_si512(tile.mins[i].as_ptr().cast());
            }
        }
        let (d, m) = (
            _mm512_load_ps(tile.d[0].as_ptr()),
            _mm512_load_ps(tile.m[0].as_ptr()),
        );
        for (t, to) in acc.iter_mut().enumerate() {
            let x = x.add(t);
            let mut sum = _mm512_load_si512((*low).0[t].as_ptr().cast());
            if HOW == SPLIT {
                let high = _mm512_load_si512((*high).0[t].as_ptr().cast());
                sum = _mm512_add_epi32(sum, _mm512_slli_epi32::<BITS>(high));
            }
            let dx = _mm512_set1_ps((*x).d);
            let (sum, old) = (_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(to.as_ptr()));
            let d = _mm512_mul_ps(d, dx);
            let mut total = if HOW == NEGATED {
                _mm512_fnmadd_ps(sum, d, old)
            } else {
                _mm512_fmadd_ps(sum, d, old)
            };
            if MINS {
                let mut sum = _mm512_setzero_si512();
                for i in 0..128 / SUB {
                    let sums = _mm512_set1_epi32(*pairs::<SUB>(x).add(i));
                    sum = _mm512_dpwssd_epi32(sum, mins[i], sums);
                }
                total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(m, dx), total);
            }
            _mm512_storeu_ps(to.as_mut_ptr(), total);
        }
    }
}

/// Sums over 32 columns with one group of tokens.
///
/// # Safety
/// Pointers are valid for 32 columns of as many tokens as the shapes say.
macro_rules! product_32 {
    ($name:ident, $c:literal, $x:literal, $w:literal) => {
        #[inline(always)]
        unsafe fn $name(_: &Tiles, w: *const u8, x: *const X32, to: *mut Exact) {
            // SAFETY: by the caller; registers are written before they are read.
            unsafe {
                asm!(
                    concat!("tilezero tmm", $c),
                    concat!("tileloadd tmm", $x, ", [{x} + {sx}]"),
                    concat!("tileloadd tmm", $w, ", [{w} + {s64}]"),
                    concat!("tdpbsud tmm", $c, ", tmm", $x, ", tmm", $w),
                    concat!("tilestored [{to} + {s64}], tmm", $c),
                    w = in(reg) w, x = in(reg) x, to = in(reg) to,
                    s64 = in(reg) 64usize, sx = in(reg) size_of::<X32>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, preserves_flags),
                );
            }
        }
    };
}
product_32!(product_32_even, "0", "4", "6");
product_32!(product_32_odd, "1", "5", "7");

/// Formats of 32 values; quants are 128, shifted right by `SHIFT`, too large, if not `NONE`. See [`TilesFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_32<const SHIFT: u32, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller; a tile has room for eight of 32 columns.
    unsafe {
        let x = x.cast::<X32>();
        let mut tiles = Tiles::new();
        let mut exact = MaybeUninit::<[Exact; 8]>::uninit();
        let exact = exact.as_mut_ptr().cast::<Exact>();
        for t in (0..n).step_by(TOKENS) {
            let group = (n - t).min(TOKENS);
            tiles.shape(32, [group; 2]);
            for (tile, acc) in rows.iter().zip(acc.chunks_mut(n)) {
                for b in 0..n32 {
                    let (w, x) = (tile.q.as_ptr().add(512 * b), x.add(b * n + t));
                    if b % 2 == 0 {
                        product_32_even(&tiles, w, x, exact.add(b));
                    } else {
                        product_32_odd(&tiles, w, x, exact.add(b));
                    }
                }
                for (i, to) in acc[t..t + group].iter_mut().enumerate() {
                    let mut sum = _mm512_loadu_ps(to.as_ptr());
                    for b in 0..n32 {
                        let x = x.add(b * n + t + i);
                        let mut a = _mm512_load_si512((*exact.add(b)).0[i].as_ptr().cast());
                        if SHIFT != NONE {
                            let less = _mm512_set1_epi32((*x).minus_sum);
                            a = _mm512_add_epi32(a, _mm512_srai_epi32::<SHIFT>(less));
                        }
                        let d = _mm512_load_ps(tile.d[b].as_ptr());
                        let d = _mm512_mul_ps(d, _mm512_set1_ps((*x).d));
                        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), d, sum);
                        if MINS {
                            let m = _mm512_load_ps(tile.m[b].as_ptr());
                            sum = _mm512_fmadd_ps(m, _mm512_set1_ps((*x).s), sum);
                        }
                    }
                    _mm512_storeu_ps(to.as_mut_ptr(), sum);
                }
            }
        }
    }
}
