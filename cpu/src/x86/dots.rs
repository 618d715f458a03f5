//! Sums of products of whole numbers in vectors of 256 bits, with what an instruction set has for them.
//!
//! They are exact, so that kernels give the same bits whichever of these they are made of.

use std::arch::asm;
use std::arch::x86_64::*;

/// Products that are added up.
///
/// # Safety
/// Every function asks for the instruction set.
pub(crate) unsafe trait Dots {
    /// What [`Dots::signed`] has added to its first factors.
    const OFFSET: i32;

    /// `sum`, and in each lane four neighbouring products of the unsigned bytes `u` and the signed bytes `s`. With [`Avx2`], two
    /// neighbouring ones have to fit 16 bits, which holds for `u` below 128.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn bytes(sum: __m256i, u: __m256i, s: __m256i) -> __m256i;

    /// `sum`, and in each lane two neighbouring products of signed 16-bit numbers.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i;

    /// The same in as few instructions as there are, for loops with many sums: the compiler makes two of the one for [`Dots::words`], since
    /// that takes fewer clocks from `sum` on.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn words_of_many(sum: __m256i, a: __m256i, b: __m256i) -> __m256i;

    /// Sums of four neighbouring products of signed bytes, `w` plus [`Dots::OFFSET`] and `x`, which is not -128.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn signed(w: __m256i, x: __m256i) -> __m256i;
}

/// Products of bytes are added up in 16 bits first.
pub(crate) struct Avx2;

// SAFETY: the functions are what they are called.
unsafe impl Dots for Avx2 {
    const OFFSET: i32 = 0;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn bytes(sum: __m256i, u: __m256i, s: __m256i) -> __m256i {
        let two = _mm256_maddubs_epi16(u, s);
        _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn words_of_many(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn signed(w: __m256i, x: __m256i) -> __m256i {
        // 128 * 127 twice still fits 16 bits.
        let two = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_madd_epi16(two, _mm256_set1_epi16(1))
    }
}

/// One instruction multiplies and adds up.
macro_rules! fused {
    ($isa:ident, $features:literal, $bytes:ident, $words:ident, $assembly:literal) => {
        // SAFETY: the functions are what they are called.
        unsafe impl Dots for $isa {
            const OFFSET: i32 = 128;

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn bytes(sum: __m256i, u: __m256i, s: __m256i) -> __m256i {
                $bytes(sum, u, s)
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn words(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
                $words(sum, a, b)
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn words_of_many(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
                let mut sum = sum;
                // SAFETY: the instruction reads and writes registers alone.
                unsafe {
                    asm!($assembly, inout(ymm_reg) sum, in(ymm_reg) a, in(ymm_reg) b, options(pure, nomem, nostack, preserves_flags));
                }
                sum
            }

            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn signed(w: __m256i, x: __m256i) -> __m256i {
                let u = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                $bytes(_mm256_setzero_si256(), u, x)
            }
        }
    };
}

/// The instructions in the encoding that needs no AVX-512.
pub(crate) struct AvxVnni;

fused!(
    AvxVnni,
    "avx2,avxvnni",
    _mm256_dpbusd_avx_epi32,
    _mm256_dpwssd_avx_epi32,
    "{{vex}} vpdpwssd {0}, {1}, {2}"
);

/// The same instructions with AVX-512.
pub(super) struct Avx512;

fused!(
    Avx512,
    "avx2,avx512f,avx512vl,avx512vnni",
    _mm256_dpbusd_epi32,
    _mm256_dpwssd_epi32,
    "vpdpwssd {0}, {1}, {2}"
);
