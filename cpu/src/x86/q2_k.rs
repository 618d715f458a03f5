//! `q2_K`: 2 bits, with 4-bit scales and minimums for every 16 values.

use super::bytes::Bytes;
use super::q4_k::scale_pairs;
use super::unpack::{To, Unpack, byte, nibbles, two_bytes};
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 84;
/// Where the quants begin.
const QS: usize = 16;
/// Where the scales of scales and minimums are.
const D: usize = 80;

/// 32 quants; run `i` of a row.
///
/// # Safety
/// `w` is valid for a block, and `i` is below 8.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn crumbs_32(qs: *const u8, i: usize) -> __m256i {
    // SAFETY: by the caller.
    let q = unsafe { _mm256_loadu_si256(qs.add(32 * (i / 4)).cast()) };
    let q = _mm256_srl_epi16(q, _mm_cvtsi32_si128(2 * (i % 4) as i32));
    _mm256_and_si256(q, _mm256_set1_epi8(3))
}

/// Bytes `2i` and `2i + 1` of `scales` as 16-bit numbers, eight of each.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn two_scales(scales: __m128i, i: usize) -> __m256i {
    let eight = 0x0202_0202_0202_0202 * i as i64;
    let pick = _mm_set_epi64x(eight + 0x0101_0101_0101_0101, eight);
    _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, pick))
}

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct Q2K;

    // SAFETY: offsets are within the 84 bytes.
    unsafe impl Rows256 for Q2K {
        const SIZE: usize = SIZE;
        const MINS: bool = true;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let packed = _mm_loadu_si128(w.cast());
                let mask = _mm_set1_epi8(15);
                let scales = _mm_and_si128(packed, mask);
                let mins = _mm_and_si128(_mm_srli_epi16::<4>(packed), mask);
                let sums = _mm256_loadu_si256(x.sum16.as_ptr().cast());
                let mins = _mm256_madd_epi16(_mm256_cvtepu8_epi16(mins), sums);
                let mins = _mm_add_epi32(
                    _mm256_castsi256_si128(mins),
                    _mm256_extracti128_si256::<1>(mins),
                );
                let mut sum = _mm256_setzero_si256();
                for i in 0..8 {
                    let x = _mm256_load_si256(x.q.as_ptr().add(32 * i).cast());
                    let p = _mm256_maddubs_epi16(crumbs_32(w.add(QS), i), x);
                    sum = P::words(sum, p, two_scales(scales, i));
                }
                (sum, mins)
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { scale_pairs(w.map(|w| w.add(D))) }
        }
    }
}

/// For batches.
pub(super) struct Q2K;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q2K {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d_and_m(to.four(D));
            for (part, v) in to.sixteen(0).into_iter().enumerate() {
                let [scales, mins] = nibbles::<B>(v);
                for i in 0..4 {
                    to.scale(4 * part + i, byte::<B>(scales, i));
                }
                to.mins(2 * part, two_bytes::<B>(mins, 0));
                to.mins(2 * part + 1, two_bytes::<B>(mins, 1));
            }
            for part in 0..4 {
                for (c, v) in to.sixteen(QS + 16 * part).into_iter().enumerate() {
                    for i in 0..4 {
                        let crumbs = B::and(B::shr(v, 2 * i), B::splat(0x0303_0303));
                        let run = 4 * (part / 2) + i as usize;
                        to.quants(8 * run + 4 * (part % 2) + c, crumbs);
                    }
                }
            }
        }
    }
}
