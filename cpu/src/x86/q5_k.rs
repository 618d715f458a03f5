//! `q5_K`: `q4_K` with a fifth bit.

use super::bytes::Bytes;
use super::q4_k::{header, scale_pairs, scales_and_mins};
use super::unpack::{To, Unpack, nibbles};
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 176;
/// Where the fifth bits begin.
const QH: usize = 16;
/// Where the low bits begin.
const QS: usize = 48;

/// Quants of values `64 g ..`, two runs of 32.
///
/// # Safety
/// `w` is valid for a block, and `g` is below 4.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn quants(w: *const u8, qh: __m256i, g: usize) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(15);
    let fifth = _mm256_set1_epi8(16);
    // SAFETY: by the caller.
    let q = unsafe { _mm256_loadu_si256(w.add(QS + 32 * g).cast()) };
    // Bits 2g and 2g + 1 of every byte, moved to bit 4.
    let qh = _mm256_srl_epi16(qh, _mm_cvtsi32_si128(2 * g as i32));
    let low = _mm256_and_si256(_mm256_slli_epi16::<4>(qh), fifth);
    let high = _mm256_and_si256(_mm256_slli_epi16::<3>(qh), fifth);
    (
        _mm256_or_si256(_mm256_and_si256(q, mask), low),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16::<4>(q), mask), high),
    )
}

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::q4_k::rows::scale;
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct Q5K;

    // SAFETY: offsets are within the 176 bytes.
    unsafe impl Rows256 for Q5K {
        const SIZE: usize = SIZE;
        const MINS: bool = true;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let (scales, mins) = scales_and_mins(w, x);
                let qh = _mm256_loadu_si256(w.add(QH).cast());
                let mut sum = [_mm256_setzero_si256(); 2];
                for g in 0..4 {
                    let (low, high) = quants(w, qh, g);
                    let x_low = _mm256_load_si256(x.q.as_ptr().add(64 * g).cast());
                    let x_high = _mm256_load_si256(x.q.as_ptr().add(64 * g + 32).cast());
                    let low = _mm256_maddubs_epi16(low, x_low);
                    let high = _mm256_maddubs_epi16(high, x_high);
                    sum[0] = P::words(sum[0], low, scale(scales, 2 * g));
                    sum[1] = P::words(sum[1], high, scale(scales, 2 * g + 1));
                }
                (_mm256_add_epi32(sum[0], sum[1]), mins)
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { scale_pairs(w) }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Dots, Four256};
    use super::super::q4_k::avx512::dots;
    use super::*;

    pub(in super::super) struct Q5K;

    // SAFETY: offsets are within the 176 bytes.
    unsafe impl Four256 for Q5K {
        const SIZE: usize = SIZE;

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots {
            // SAFETY: by the caller.
            unsafe {
                dots(w, x, |w| {
                    let (mask, fifth) = (_mm512_set1_epi8(15), _mm512_set1_epi8(16));
                    // The upper half of 64 bytes of nibbles takes the bits two further.
                    let qh = _mm512_broadcast_i64x4(_mm256_loadu_si256(w.add(QH).cast()));
                    let two = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
                    let qh = _mm512_srlv_epi64(qh, two);
                    let bits = [
                        [_mm512_slli_epi64::<4>(qh), _mm512_slli_epi64::<3>(qh)],
                        [qh, _mm512_srli_epi64::<1>(qh)],
                    ];
                    std::array::from_fn(|g| {
                        let q = _mm512_loadu_si512(w.add(QS + 64 * g).cast());
                        let four = [q, _mm512_srli_epi64::<4>(q)];
                        std::array::from_fn(|i| {
                            let bit = _mm512_and_si512(bits[g][i], fifth);
                            _mm512_or_si512(_mm512_and_si512(four[i], mask), bit)
                        })
                    })
                })
            }
        }
    }
}

/// For batches.
pub(super) struct Q5K;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q5K {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            header(to);
            for part in 0..2 {
                let fifth = to.sixteen(QH + 16 * part);
                for g in 0..4 {
                    let low = to.sixteen(QS + 32 * g + 16 * part);
                    for c in 0..4 {
                        for (half, v) in nibbles::<B>(low[c]).into_iter().enumerate() {
                            let bit = B::shr(fifth[c], (2 * g + half) as u32);
                            let bit = B::and(B::shl(bit, 4), B::splat(0x1010_1010));
                            to.quants(16 * g + 8 * half + 4 * part + c, B::or(v, bit));
                        }
                    }
                }
            }
        }
    }
}
