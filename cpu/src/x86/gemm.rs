//! A tile of rows with many tokens.
//!
//! Sixteen rows are unpacked to bytes once, 256 columns at a time, and lie so that a vector holds four columns of each
//! row. Multiplying it with four columns of a token, repeated in all lanes, adds to sixteen results at once, one for
//! each row: no lanes have to be folded in the end. Eight tokens share the loads of weights.

use super::{TileFn, UnpackFn};
use super::{gemm_avx2, gemm_avx512};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::Isa;
use lemma_quant::GgmlType;
use std::arch::x86_64::*;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;

/// Up to 256 columns of sixteen rows.
#[repr(C, align(64))]
pub(crate) struct Tile {
    /// Quants, made unsigned: `[columns / 4][row][4 columns]`.
    pub(super) q: [u8; 256 * ROWS],
    /// Quants row by row, before they are interleaved.
    pub(super) plain: [u8; 256 * ROWS],
    /// Scales of sub-blocks.
    pub(super) scales: [[i32; ROWS]; 16],
    /// Minimums of sub-blocks, two neighbours for each row.
    pub(super) mins: [[[i16; 2]; ROWS]; 8],
    /// Scales of blocks.
    pub(super) d: [[f32; ROWS]; 8],
    /// Scales of minimums, or minimums, of blocks.
    pub(super) m: [[f32; ROWS]; 8],
}

/// Begins to read the next columns of a row: they come when those from `w` on have met all tokens.
#[inline(always)]
pub(super) fn prefetch_next<F: Unpack>(w: *const u8) {
    let next = w.wrapping_add(F::SIZE * 256 / F::LEN).cast::<i8>();
    for line in 0..if F::LEN == 256 { 3 } else { 1 } {
        // SAFETY: a prefetch cannot fault.
        #[allow(unused_unsafe, reason = "older compilers ask for it")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64 * line));
        }
    }
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
    /// Values that share a scale of their own, in formats of 256.
    const SUB: usize = 32;
    /// Whether those have minimums as well.
    const MINS: bool = false;

    /// Writes a block's quants to `q`, made unsigned.
    ///
    /// # Safety
    /// `w` is valid for a block, `q` for as many bytes as it has values and aligned to 32, and the instruction
    /// set is available.
    unsafe fn quants(w: *const u8, q: *mut u8);

    /// The scale of a block, and that of its minimums, or its minimum.
    ///
    /// # Safety
    /// As for `quants`.
    unsafe fn d(w: *const u8) -> [f32; 2];

    /// Scales and minimums of sub-blocks, 16 bits each; of formats of 256 values.
    ///
    /// # Safety
    /// As for `quants`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales(_: *const u8) -> [__m256i; 2] {
        [_mm256_setzero_si256(); 2]
    }
}

/// What is needed for batches of a type.
pub(super) fn kernel(ty: GgmlType, isa: Isa) -> Option<(UnpackFn, TileFn)> {
    match isa {
        Isa::Scalar => None,
        Isa::Avx2 => avx2(ty),
        Isa::Avx512 | Isa::Amx => avx512(ty),
    }
}

/// Unpacking and multiplying, by type.
macro_rules! kernels {
    ($isa:ident, $module:ident, $($ty:ident: $format:ty, $mul:expr;)*) => {
        fn $isa(ty: GgmlType) -> Option<(UnpackFn, TileFn)> {
            use $module::{mul_32, mul_256, unpack};
            Some(match ty {
                $(GgmlType::$ty => (unpack::<$format>, $mul),)*
                _ => return None,
            })
        }
    };
}

kernels! {
    avx512, gemm_avx512,
    Q4_0: q4_0::Q4_0, mul_32::<4, false>;
    Q4_1: q4_0::Q4_1, mul_32::<NONE, true>;
    Q5_0: q5_0::Q5_0, mul_32::<3, false>;
    Q5_1: q5_0::Q5_1, mul_32::<NONE, true>;
    Q8_0: q8_0::Q8_0, mul_32::<0, false>;
    IQ4_NL: iq4_nl::IQ4NL, mul_32::<0, false>;
    MXFP4: mxfp4::MXFP4, mul_32::<3, false>;
    Q2_K: q2_k::Q2K, mul_256::<16, NONE, true>;
    Q3_K: q3_k::Q3K, mul_256::<16, 3, false>;
    Q4_K: q4_k::Q4K, mul_256::<32, NONE, true>;
    Q5_K: q5_k::Q5K, mul_256::<32, NONE, true>;
    Q6_K: q6_k::Q6K, mul_256::<16, 0, false>;
    IQ4_XS: iq4_xs::IQ4XS, mul_256::<32, 0, false>;
}

// Next to last: how many products of four columns fit 16 bits, or none if signs are needed.
kernels! {
    avx2, gemm_avx2,
    Q4_0: q4_0::Q4_0, mul_32::<4, 8, false>;
    Q4_1: q4_0::Q4_1, mul_32::<NONE, 8, true>;
    Q5_0: q5_0::Q5_0, mul_32::<3, 4, false>;
    Q5_1: q5_0::Q5_1, mul_32::<NONE, 4, true>;
    Q8_0: q8_0::Q8_0, mul_32::<NONE, 0, false>;
    IQ4_NL: iq4_nl::IQ4NL, mul_32::<NONE, 0, false>;
    MXFP4: mxfp4::MXFP4, mul_32::<3, 4, false>;
    Q2_K: q2_k::Q2K, mul_256::<16, NONE, 4, true>;
    Q3_K: q3_k::Q3K, mul_256::<16, 2, 4, false>;
    Q4_K: q4_k::Q4K, mul_256::<32, NONE, 8, true>;
    Q5_K: q5_k::Q5K, mul_256::<32, NONE, 4, true>;
    Q6_K: q6_k::Q6K, mul_256::<16, 5, 2, false>;
    IQ4_XS: iq4_xs::IQ4XS, mul_256::<32, NONE, 0, false>;
}

/// No offset. Otherwise quants were made unsigned by adding 128 (of formats with scales for 16: 32), shifted right by
/// this; activations come with their sums times as much. For `gemm_avx2::mul_256`, it is the power of two itself.
pub(super) const NONE: u32 = 32;

/// Makes `unpack` for an instruction set, which brings its own `transpose`. See [`UnpackFn`].
macro_rules! unpack {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(super) unsafe fn unpack<F: Unpack>(
            w: *const u8,
            row_size: usize,
            n: usize,
            n32: usize,
            tile: &mut Tile,
        ) {
            let q = tile.plain.as_mut_ptr();
            for r in 0..ROWS {
                // Rows that are missing repeat the last one; their results are not used.
                // SAFETY: by the caller; a row of `plain` has 256 bytes.
                unsafe {
                    let w = w.add(r.min(n - 1) * row_size);
                    for b in 0..n32 * 32 / F::LEN {
                        let w = w.add(b * F::SIZE);
                        super::gemm::prefetch_next::<F>(w);
                        F::quants(w, q.add(256 * r + F::LEN * b));
                        let [d, m] = F::d(w);
                        (tile.d[b][r], tile.m[b][r]) = (d, m);
                        if F::LEN == 256 {
                            let mut words = [[0i16; 16]; 2];
                            for (to, from) in words.iter_mut().zip(F::scales(w)) {
                                _mm256_storeu_si256(to.as_mut_ptr().cast(), from);
                            }
                            for j in 0..256 / F::SUB {
                                tile.scales[j][r] = i32::from(words[0][j]);
                                if F::MINS {
                                    tile.mins[j / 2][r][j % 2] = words[1][j];
                                }
                            }
                        }
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
    };
}
pub(super) use unpack;

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
pub(super) use for_tokens;
