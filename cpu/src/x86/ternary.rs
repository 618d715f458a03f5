//! `tq1_0` and `tq2_0`: values of -1, 0 and 1, in base three or in 2 bits.

use super::patterns::{Patterns, half, word};
use super::q2_k::crumbs_32;
use std::arch::x86_64::*;

pub(super) struct TQ2_0;

// SAFETY: offsets are within the 66 bytes.
unsafe impl Patterns for TQ2_0 {
    const SIZE: usize = 66;
    const SUB: usize = 32;
    const FACTOR: f32 = 1.0;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        unsafe { _mm256_sub_epi8(crumbs_32(w, i), _mm256_set1_epi8(1)) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(_: *const u8) -> __m128i {
        _mm_set1_epi8(1)
    }

    #[inline]
    unsafe fn d(w: *const u8) -> u16 {
        // SAFETY: by the caller.
        unsafe { half(w.add(64)) }
    }
}

pub(super) struct TQ1_0;

/// Powers of three that bring each digit of a byte to its top.
const POWERS: [i16; 5] = [1, 3, 9, 27, 81];

/// The digits on top of bytes times `powers` (of 16 bits, for two bytes each), less one.
#[inline]
#[target_feature(enable = "avx2")]
fn digits(v: __m256i, powers: __m256i) -> __m256i {
    let odd = _mm256_set1_epi16(0xff00_u16.cast_signed());
    let high = _mm256_mullo_epi16(_mm256_and_si256(v, odd), powers);
    let low = _mm256_andnot_si256(odd, _mm256_mullo_epi16(v, powers));
    let v = _mm256_or_si256(high, low);
    // Thirds of 256 begin at 0, 86 and 171.
    let from = |first: u8| {
        let first = _mm256_set1_epi8(first.cast_signed());
        _mm256_cmpeq_epi8(_mm256_max_epu8(v, first), v)
    };
    let digit = _mm256_sub_epi8(_mm256_set1_epi8(-1), from(86));
    _mm256_sub_epi8(digit, from(171))
}

// SAFETY: offsets are within the 54 bytes.
unsafe impl Patterns for TQ1_0 {
    const SIZE: usize = 54;
    const SUB: usize = 32;
    const FACTOR: f32 = 1.0;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        unsafe {
            if i < 5 {
                let power = _mm256_set1_epi16(POWERS[i]);
                return digits(_mm256_loadu_si256(w.cast()), power);
            }
            // Two digits of sixteen bytes; last the fifth, and four of four bytes.
            let first = _mm_loadu_si128(w.add(32).cast());
            let (second, powers) = if i < 7 {
                (first, _mm_set1_epi16(POWERS[2 * i - 9]))
            } else {
                let [_, three, nine, cube, _] = POWERS;
                (
                    _mm_set1_epi32(word(w.add(48)).cast_signed()),
                    _mm_set_epi16(cube, cube, nine, nine, three, three, 1, 1),
                )
            };
            let powers = _mm256_set_m128i(powers, _mm_set1_epi16(POWERS[2 * i - 10]));
            digits(_mm256_set_m128i(second, first), powers)
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(_: *const u8) -> __m128i {
        _mm_set1_epi8(1)
    }

    #[inline]
    unsafe fn d(w: *const u8) -> u16 {
        // SAFETY: by the caller.
        unsafe { half(w.add(52)) }
    }
}
