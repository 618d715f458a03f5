//! Batches with AMX: sixteen rows and sixteen tokens at a time.
//!
//! A tile product of bytes costs the same whether it is over 32 columns or 64, and its sums leave the tiles through
//! memory. So formats of 256 have their scales multiplied into the weights when these are unpacked: a product of scale and
//! quant is whole, has up to 13 bits, and is split into its lower seven bits and the rest. Two tile products then sum up
//! all 256 columns, exactly, and what leaves the tiles is once for a block. Formats of 32 have their scales applied
//! outside, to every block's sums.
//!
//! Weights lie row by row, as they are unpacked; activations are interleaved for all matrices at once. So vectors hold
//! sixteen tokens here, and results are turned in the end.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::amx::Tiles;
use super::gemm::{ROWS, Unpack, prefetch_next};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::activations::{G32, G256, WIDE};
use lemma_quant::GgmlType;
use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Up to 256 columns of sixteen rows.
#[repr(C, align(64))]
pub(crate) struct Block {
    /// Quants, or the lower bits of their products with scales.
    low: [[u8; 256]; ROWS],
    /// The upper bits.
    high: [[u8; 256]; ROWS],
    /// Minimums of sub-blocks.
    mins: [[i16; 16]; ROWS],
    /// Scales of blocks.
    d: [[f32; 8]; ROWS],
    /// Scales of minimums, or minimums, of blocks.
    m: [[f32; 8]; ROWS],
}

/// Sums of sixteen rows and sixteen tokens: `[row][token]`.
pub(crate) type Sums = [[f32; WIDE]; ROWS];

/// Sums of bytes, as they leave the tiles.
#[repr(C, align(64))]
struct Exact([[i32; WIDE]; ROWS]);

/// Unpacks up to 256 columns (`n32` times 32) of `n` rows (1 to 16) that are `row_size` bytes apart.
///
/// # Safety
/// The instruction set is available; pointers are valid for what the sizes say.
pub(crate) type UnpackFn =
    unsafe fn(w: *const u8, row_size: usize, n: usize, n32: usize, block: &mut Block);

/// Adds products of some blocks of rows with `groups` of interleaved activations to `acc`, `[groups, stride]`. Blocks of 32
/// columns are `groups` blocks of activations apart.
///
/// # Safety
/// As for [`UnpackFn`].
pub(crate) type BlocksFn = unsafe fn(
    blocks: &[Block],
    x: *const u8,
    groups: usize,
    n32: usize,
    acc: &mut [Sums],
    stride: usize,
);

/// What is needed for batches of a type.
pub(super) fn kernel(ty: GgmlType) -> Option<(UnpackFn, BlocksFn)> {
    macro_rules! kernels {
        ($($ty:ident: $format:ty, $offset:expr, $mul:expr;)*) => {
            match ty {
                $(GgmlType::$ty => (unpack::<$format, $offset, { $mul.0 }>, $mul.1),)*
                _ => return None,
            }
        };
    }
    Some(kernels! {
        Q4_0: q4_0::Q4_0, 8, (PLAIN, mul_32::<false>);
        Q4_1: q4_0::Q4_1, 0, (PLAIN, mul_32::<true>);
        Q5_0: q5_0::Q5_0, 16, (PLAIN, mul_32::<false>);
        Q5_1: q5_0::Q5_1, 0, (PLAIN, mul_32::<true>);
        Q8_0: q8_0::Q8_0, 128, (PLAIN, mul_32::<false>);
        IQ4_NL: iq4_nl::IQ4NL, 128, (PLAIN, mul_32::<false>);
        MXFP4: mxfp4::MXFP4, 16, (PLAIN, mul_32::<false>);
        Q2_K: q2_k::Q2K, 0, (SCALED, mul_256::<SCALED, 16, true>);
        Q3_K: q3_k::Q3K, 4, (NEGATED, mul_256::<NEGATED, 16, false>);
        Q4_K: q4_k::Q4K, 0, (SPLIT, mul_256::<SPLIT, 32, true>);
        Q5_K: q5_k::Q5K, 0, (SPLIT, mul_256::<SPLIT, 32, true>);
        Q6_K: q6_k::Q6K, 32, (SPLIT, mul_256::<SPLIT, 16, false>);
        IQ4_XS: iq4_xs::IQ4XS, 128, (SPLIT, mul_256::<SPLIT, 32, false>);
    })
}

/// Quants without their scales.
const PLAIN: u8 = 0;
/// Products with scales fit a byte.
const SCALED: u8 = 1;
/// Their negatives do: `4 * 32` is one too large.
const NEGATED: u8 = 2;
/// They have seven bits and a signed rest.
const SPLIT: u8 = 3;

/// Upper bits begin here.
const BITS: u32 = 7;

/// See [`UnpackFn`]. Quants come `OFFSET` too large.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn unpack<F: Unpack, const OFFSET: i16, const HOW: u8>(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    block: &mut Block,
) {
    for r in 0..ROWS {
        // Rows that are missing repeat the last one; their results are not used.
        // SAFETY: by the caller; a row of the block has 256 bytes.
        unsafe {
            let w = w.add(r.min(n - 1) * row_size);
            let low = block.low[r].as_mut_ptr();
            for b in 0..n32 * 32 / F::LEN {
                let w = w.add(b * F::SIZE);
                prefetch_next::<F>(w);
                F::quants(w, low.add(F::LEN * b));
                [block.d[r][b], block.m[r][b]] = F::d(w);
            }
            if HOW == PLAIN {
                if OFFSET != 0 {
                    let offset = _mm512_set1_epi8(OFFSET as i8);
                    for c in 0..n32.div_ceil(2) {
                        let p = low.add(64 * c).cast();
                        _mm512_store_si512(p, _mm512_sub_epi8(_mm512_load_si512(p), offset));
                    }
                }
            } else {
                let [scales, mins] = F::scales(w);
                _mm256_storeu_si256(block.mins[r].as_mut_ptr().cast(), mins);
                let scales = _mm512_castsi256_si512(scales);
                for c in 0..4 {
                    let p = low.add(64 * c).cast();
                    let s = spread::<F>(scales, c);
                    let (l, h) = scale::<OFFSET, HOW>(_mm512_load_si512(p), s);
                    _mm512_store_si512(p, l);
                    if HOW == SPLIT {
                        _mm512_store_si512(block.high[r].as_mut_ptr().add(64 * c).cast(), h);
                    }
                }
            }
        }
    }
}

/// The scales of columns `64 c ..`, one for each two.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn spread<F: Unpack>(scales: __m512i, c: usize) -> __m512i {
    let first = c * 64 / F::SUB;
    // SAFETY: an array of as many bytes.
    let lanes: __m512i = unsafe {
        std::mem::transmute::<[i16; 32], _>(std::array::from_fn(|i| {
            (first + 2 * i / F::SUB) as i16
        }))
    };
    _mm512_permutexvar_epi16(lanes, scales)
}

/// Products of 64 quants with scales, one for each two: the lower part and the upper part.
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
            concat!("tileloadd tmm6, [{x0} + {s64} + 1024 * ", $k, "]\n"),
            concat!("tileloadd tmm4, [{w} + {s256} + 64 * ", $k, "]\n"),
            concat!("tileloadd tmm7, [{x1} + {s64} + 1024 * ", $k, "]\n"),
            concat!("tileloadd tmm5, [{w} + {s256} + 4096 + 64 * ", $k, "]\n"),
            "tdpbssd tmm0, tmm4, tmm6\n",
            "tdpbssd tmm1, tmm4, tmm7\n",
            "tdpbssd tmm2, tmm5, tmm6\n",
            "tdpbssd tmm3, tmm5, tmm7\n",
        )
    };
}

/// 64 columns of one plane of weights with two groups of tokens, in turns with other registers.
macro_rules! one_two {
    ($k:literal, $w:literal) => {
        concat!(
            concat!("tileloadd tmm6, [{x0} + {s64} + 1024 * ", $k, "]\n"),
            concat!("tileloadd tmm", $w, ", [{w} + {s256} + 64 * ", $k, "]\n"),
            concat!("tileloadd tmm7, [{x1} + {s64} + 1024 * ", $k, "]\n"),
            concat!("tdpbssd tmm0, tmm", $w, ", tmm6\n"),
            concat!("tdpbssd tmm1, tmm", $w, ", tmm7\n"),
        )
    };
}

/// Sums over 256 columns with two groups of tokens: of the lower part for the first, for the second, then of the
/// upper part.
///
/// # Safety
/// Pointers are valid for 256 columns, and tiles are 64 bytes wide.
#[inline(always)]
unsafe fn product_256<const HOW: u8>(
    _: &Tiles,
    block: &Block,
    x: [*const G256<WIDE>; 2],
    to: &mut [Exact; 4],
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
                w = in(reg) block.low.as_ptr(), x0 = in(reg) x[0], x1 = in(reg) x[1],
                to = in(reg) to.as_mut_ptr(), s64 = in(reg) 64usize, s256 = in(reg) 256usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        } else {
            asm!(
                "tilezero tmm0", "tilezero tmm1",
                one_two!("0", "4"), one_two!("1", "5"), one_two!("2", "4"), one_two!("3", "5"),
                "tilestored [{to} + {s64}], tmm0",
                "tilestored [{to} + {s64} + 1024], tmm1",
                w = in(reg) block.low.as_ptr(), x0 = in(reg) x[0], x1 = in(reg) x[1],
                to = in(reg) to.as_mut_ptr(), s64 = in(reg) 64usize, s256 = in(reg) 256usize,
                out("tmm0") _, out("tmm1") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// Formats of 256 values with scales for `SUB` of them. See [`BlocksFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_256<const HOW: u8, const SUB: usize, const MINS: bool>(
    blocks: &[Block],
    x: *const u8,
    groups: usize,
    _: usize,
    acc: &mut [Sums],
    stride: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        let x = x.cast::<G256<WIDE>>();
        let tiles = Tiles::new(64);
        // While the tiles work on one, vectors work on what left them before.
        let mut exact = [const { MaybeUninit::<[Exact; 4]>::uninit() }; 2];
        let mut turn = 0;
        let mut last = None;
        for g in (0..groups).step_by(2) {
            // An odd one out is computed twice.
            let pair = [x.add(g), x.add((g + 1).min(groups - 1))];
            for (i, block) in blocks.iter().enumerate() {
                product_256::<HOW>(&tiles, block, pair, &mut *exact[turn].as_mut_ptr());
                turn ^= 1;
                if let Some((g, block, i)) = last.replace((g, block, i)) {
                    let exact = &*exact[turn].as_ptr();
                    leave_256::<HOW, SUB, MINS>(exact, block, x, g, groups, i, acc, stride);
                }
            }
        }
        if let Some((g, block, i)) = last {
            let exact = &*exact[turn ^ 1].as_ptr();
            leave_256::<HOW, SUB, MINS>(exact, block, x, g, groups, i, acc, stride);
        }
    }
}

/// From whole sums of groups `g` and the next to sums of block of rows `i`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[allow(clippy::too_many_arguments, reason = "half of a loop")]
unsafe fn leave_256<const HOW: u8, const SUB: usize, const MINS: bool>(
    exact: &[Exact; 4],
    block: &Block,
    x: *const G256<WIDE>,
    g: usize,
    groups: usize,
    i: usize,
    acc: &mut [Sums],
    stride: usize,
) {
    for j in 0..(groups - g).min(2) {
        let acc = &mut acc[(g + j) * stride + i];
        // SAFETY: by the caller; arrays are as long as the loops say.
        unsafe {
            let x = &*x.add(g + j);
            let pairs = if SUB == 16 {
                x.pairs16.as_ptr()
            } else {
                x.pairs32.as_ptr()
            };
            let xd = _mm512_load_ps(x.d.as_ptr());
            for r in 0..ROWS {
                let mut sum = _mm512_load_si512(exact[j].0[r].as_ptr().cast());
                if HOW == SPLIT {
                    let high = _mm512_load_si512(exact[2 + j].0[r].as_ptr().cast());
                    sum = _mm512_add_epi32(sum, _mm512_slli_epi32::<BITS>(high));
                }
                let d = _mm512_mul_ps(_mm512_set1_ps(block.d[r][0]), xd);
                let to = acc[r].as_mut_ptr();
                let (sum, old) = (_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(to));
                let mut total = if HOW == NEGATED {
                    _mm512_fnmadd_ps(sum, d, old)
                } else {
                    _mm512_fmadd_ps(sum, d, old)
                };
                if MINS {
                    let mut sum = _mm512_setzero_si512();
                    let mins = block.mins[r].as_ptr().cast::<i32>();
                    for i in 0..128 / SUB {
                        let pairs = _mm512_load_si512(pairs.add(i).cast());
                        sum = _mm512_dpwssd_epi32(sum, _mm512_set1_epi32(*mins.add(i)), pairs);
                    }
                    let m = _mm512_mul_ps(_mm512_set1_ps(block.m[r][0]), xd);
                    total = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum), m, total);
                }
                _mm512_storeu_ps(to, total);
            }
        }
    }
}

/// Sums over 32 columns with one group of tokens.
///
/// # Safety
/// Pointers are valid for 32 columns, and tiles are 32 bytes wide.
macro_rules! product_32 {
    ($name:ident, $c:literal, $w:literal, $x:literal) => {
        #[inline(always)]
        unsafe fn $name(_: &Tiles, w: *const u8, x: *const G32<WIDE>, to: *mut Exact) {
            // SAFETY: by the caller; registers are written before they are read.
            unsafe {
                asm!(
                    concat!("tilezero tmm", $c),
                    concat!("tileloadd tmm", $x, ", [{x} + {s64}]"),
                    concat!("tileloadd tmm", $w, ", [{w} + {s256}]"),
                    concat!("tdpbssd tmm", $c, ", tmm", $w, ", tmm", $x),
                    concat!("tilestored [{to} + {s64}], tmm", $c),
                    w = in(reg) w, x = in(reg) x, to = in(reg) to,
                    s64 = in(reg) 64usize, s256 = in(reg) 256usize,
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

/// Formats of 32 values. See [`BlocksFn`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn mul_32<const MINS: bool>(
    blocks: &[Block],
    x: *const u8,
    groups: usize,
    n32: usize,
    acc: &mut [Sums],
    stride: usize,
) {
    // SAFETY: by the caller; a block has room for eight of 32 columns.
    unsafe {
        let x = x.cast::<G32<WIDE>>();
        let tiles = Tiles::new(32);
        let mut exact = [const { MaybeUninit::<[Exact; 8]>::uninit() }; 2];
        let mut turn = 0;
        let mut last = None;
        for g in 0..groups {
            for (i, block) in blocks.iter().enumerate() {
                let to = exact[turn].as_mut_ptr().cast::<Exact>();
                for b in 0..n32 {
                    let (w, x) = (block.low[0].as_ptr().add(32 * b), x.add(b * groups + g));
                    if b % 2 == 0 {
                        product_32_even(&tiles, w, x, to.add(b));
                    } else {
                        product_32_odd(&tiles, w, x, to.add(b));
                    }
                }
                turn ^= 1;
                if let Some((g, block, i)) = last.replace((g, block, i)) {
                    let (exact, x) = (exact[turn].as_ptr().cast(), x.add(g));
                    leave_32::<MINS>(exact, block, x, groups, n32, &mut acc[g * stride + i]);
                }
            }
        }
        if let Some((g, block, i)) = last {
            let (exact, x) = (exact[turn ^ 1].as_ptr().cast(), x.add(g));
            leave_32::<MINS>(exact, block, x, groups, n32, &mut acc[g * stride + i]);
        }
    }
}

/// From whole sums of blocks of 32 to sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn leave_32<const MINS: bool>(
    exact: *const Exact,
    block: &Block,
    x: *const G32<WIDE>,
    groups: usize,
    n32: usize,
    acc: &mut Sums,
) {
    // SAFETY: by the caller; arrays are as long as the loops say.
    unsafe {
        let mut sum: [__m512; ROWS] = std::array::from_fn(|r| _mm512_loadu_ps(acc[r].as_ptr()));
        for b in 0..n32 {
            let (exact, x) = (&*exact.add(b), &*x.add(b * groups));
            let (xd, xs) = (_mm512_loadu_ps(x.d.as_ptr()), _mm512_loadu_ps(x.s.as_ptr()));
            for r in 0..ROWS {
                let a = _mm512_cvtepi32_ps(_mm512_load_si512(exact.0[r].as_ptr().cast()));
                let d = _mm512_mul_ps(_mm512_set1_ps(block.d[r][b]), xd);
                sum[r] = _mm512_fmadd_ps(a, d, sum[r]);
                if MINS {
                    sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(block.m[r][b]), xs, sum[r]);
                }
            }
        }
        for r in 0..ROWS {
            _mm512_storeu_ps(acc[r].as_mut_ptr(), sum[r]);
        }
    }
}

/// Turns sums of rows and tokens into sums of tokens and rows.
///
/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn turn(sums: &Sums, to: &mut Sums) {
    // SAFETY: sixteen vectors on both sides.
    unsafe {
        let rows = std::array::from_fn(|r| _mm512_castps_si512(_mm512_loadu_ps(sums[r].as_ptr())));
        let turned = super::gemm_avx512::transposed(rows);
        for (to, v) in to.iter_mut().zip(turned) {
            _mm512_storeu_ps(to.as_mut_ptr(), _mm512_castsi512_ps(v));
        }
    }
}
