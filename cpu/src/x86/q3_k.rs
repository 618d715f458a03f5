//! `q3_K`: 3 bits, with 6-bit signed scales for every 16 values.

use super::bytes::Bytes;
use super::q2_k::{crumbs_32, two_scales};
use super::unpack::{To, Unpack, byte};
use super::util::*;
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 110;
/// Where the low bits begin; before them are the third bits.
const QS: usize = 32;
/// Where the scales begin.
const SCALES: usize = 96;
/// Where the scale of the scales is.
const D: usize = 108;

/// The signed scales.
///
/// # Safety
/// `w` is valid for a block.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sub_scales(w: *const u8) -> __m128i {
    // SAFETY: by the caller.
    let (low, high) = unsafe {
        (
            u64::from_le_bytes(bytes(w.add(SCALES))),
            u64::from(u32::from_le_bytes(bytes(w.add(SCALES + 8)))),
        )
    };
    // Scale j: nibble j / 8 of byte j % 8, and bits 2 (j / 4) of upper byte j % 4; less 32.
    let nibbles = 0x0f0f_0f0f_0f0f_0f0f;
    let upper = |shifted: u64| shifted & 0x3030_3030;
    let first = low & nibbles | upper(high << 4) | upper(high << 2) << 32;
    let last = low >> 4 & nibbles | upper(high) | upper(high >> 2) << 32;
    _mm_sub_epi8(_mm_set_epi64x(last as i64, first as i64), _mm_set1_epi8(32))
}

/// 32 quants plus 4; run `i` of a row.
///
/// # Safety
/// `w` is valid for a block, and `i` is below 8.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn quants(w: *const u8, i: usize) -> __m256i {
    // SAFETY: by the caller.
    unsafe {
        let third = _mm256_loadu_si256(w.cast());
        let third = _mm256_srl_epi16(third, _mm_cvtsi32_si128(i as i32));
        let third = _mm256_slli_epi16::<2>(_mm256_and_si256(third, _mm256_set1_epi8(1)));
        _mm256_or_si256(crumbs_32(w.add(QS), i), third)
    }
}

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct Q3K;

    // SAFETY: offsets are within the 110 bytes.
    unsafe impl Rows256 for Q3K {
        const SIZE: usize = SIZE;
        const MINS: bool = false;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let scales = sub_scales(w);
                let sums = _mm256_loadu_si256(x.sum16.as_ptr().cast());
                let offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), sums);
                let offset = _mm256_slli_epi32::<2>(offset);
                let mut sum = _mm256_sub_epi32(_mm256_setzero_si256(), offset);
                for i in 0..8 {
                    let x = _mm256_load_si256(x.q.as_ptr().add(32 * i).cast());
                    let p = _mm256_maddubs_epi16(quants(w, i), x);
                    sum = P::words(sum, p, two_scales(scales, i));
                }
                (sum, _mm_setzero_si128())
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (f16x4(w.map(|w| w.add(D))), _mm_setzero_ps()) }
        }
    }
}

/// For batches.
pub(super) struct Q3K;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q3K {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d(B::shr(to.four(D - 2), 16));
            // See `sub_scales`.
            let [_, first, second, upper] = to.sixteen(SCALES - 4);
            let (low, mask) = (B::splat(0x0f0f_0f0f), B::splat(0x3030_3030));
            let scales = [
                B::or(B::and(first, low), B::and(B::shl(upper, 4), mask)),
                B::or(B::and(second, low), B::and(B::shl(upper, 2), mask)),
                B::or(B::and(B::shr(first, 4), low), B::and(upper, mask)),
                B::or(
                    B::and(B::shr(second, 4), low),
                    B::and(B::shr(upper, 2), mask),
                ),
            ];
            let less = B::splat(32);
            for (part, v) in scales.into_iter().enumerate() {
                for i in 0..2 {
                    let a = B::sub(byte::<B>(v, 2 * i), less);
                    let b = B::sub(byte::<B>(v, 2 * i + 1), less);
                    to.scales_of_two(2 * part + i, a, b, 2);
                }
            }
            for part in 0..2 {
                let third = to.sixteen(16 * part);
                for half in 0..2 {
                    let low = to.sixteen(QS + 32 * half + 16 * part);
                    for c in 0..4 {
                        for i in 0..4 {
                            let run = 4 * half + i;
                            let crumbs = B::shr(low[c], 2 * i as u32);
                            let crumbs = B::and(crumbs, B::splat(0x0303_0303));
                            let third = B::and(B::shr(third[c], run as u32), B::splat(0x0101_0101));
                            let v = B::or(crumbs, B::shl(third, 2));
                            to.quants(8 * run + 4 * part + c, v);
                        }
                    }
                }
            }
        }
    }
}
