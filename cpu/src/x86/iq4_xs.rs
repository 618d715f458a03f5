//! `iq4_xs`: nibbles that stand for the values of a table, with 6-bit scales for every 32 values.

use super::bytes::Bytes;
use super::iq4_nl::{UNSIGNED, table};
use super::unpack::{To, Unpack, nibbles};
use super::util::*;
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 136;
/// Where the nibbles begin.
const QS: usize = 8;

/// The signed scales, 16 bits each.
///
/// # Safety
/// `w` is valid for 8 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sub_scales(w: *const u8) -> __m128i {
    // SAFETY: by the caller.
    let (high, low) = unsafe {
        (
            u16::from_le_bytes(bytes(w.add(2))),
            u32::from_le_bytes(bytes(w.add(4))),
        )
    };
    // Every 16-bit lane has all of the bits; multiplying moves those of lane j to the top.
    let two = _mm_set1_epi16(high as i16);
    let two = _mm_mullo_epi16(two, _mm_set_epi16(1, 4, 16, 64, 256, 1024, 4096, 16384));
    let two = _mm_srli_epi16::<14>(two);
    let nibbles = u64::from(low);
    let spread = (nibbles | nibbles << 16) & 0x0000_ffff_0000_ffff;
    let spread = (spread | spread << 8) & 0x00ff_00ff_00ff_00ff;
    let spread = (spread | spread << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    let four = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(spread as i64));
    let six = _mm_or_si128(four, _mm_slli_epi16::<4>(two));
    _mm_sub_epi16(six, _mm_set1_epi16(32))
}

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::q4_k::rows::scale;
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct IQ4XS;

    // SAFETY: offsets are within the 136 bytes.
    unsafe impl Rows256 for IQ4XS {
        const SIZE: usize = SIZE;
        const MINS: bool = false;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let scales = sub_scales(w);
                let mut sum = _mm256_setzero_si256();
                for j in 0..8 {
                    let v = _mm256_shuffle_epi8(table(), nibbles_32(w.add(QS + 16 * j)));
                    let x = _mm256_load_si256(x.q.as_ptr().add(32 * j).cast());
                    let magnitude = _mm256_abs_epi8(v);
                    let p = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, v));
                    sum = P::words(sum, p, scale(scales, j));
                }
                (sum, _mm_setzero_si128())
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (f16x4(w), _mm_setzero_ps()) }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Dots, Four256, quarter_numbers, sums_of_rows};
    use super::*;

    pub(in super::super) struct IQ4XS;

    // SAFETY: offsets are within the 136 bytes.
    unsafe impl Four256 for IQ4XS {
        const SIZE: usize = SIZE;

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let zero = _mm512_setzero_si512();
                let mask = _mm512_set1_epi8(15);
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(UNSIGNED.as_ptr().cast()));
                // Of each half: the first 16 of four runs of 32, the others, and what 128 times both comes to.
                let x: [[__m512i; 3]; 2] = std::array::from_fn(|h| {
                    let [a, b] =
                        [0, 64].map(|i| _mm512_load_si512(x.q.as_ptr().add(128 * h + i).cast()));
                    let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                    let high = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
                    let offset = _mm512_set1_epi8(-128);
                    let offset =
                        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, offset, low), offset, high);
                    [low, high, _mm512_sub_epi32(zero, offset)]
                });
                let mut sums = [zero; 4];
                for (sum, w) in sums.iter_mut().zip(w) {
                    let scales = scales(w);
                    for (h, [x_low, x_high, offset]) in x.into_iter().enumerate() {
                        let q = _mm512_loadu_si512(w.add(QS + 64 * h).cast());
                        let low = _mm512_shuffle_epi8(table, _mm512_and_si512(q, mask));
                        let high = _mm512_and_si512(_mm512_srli_epi64::<4>(q), mask);
                        let high = _mm512_shuffle_epi8(table, high);
                        let p = _mm512_dpbusd_epi32(offset, low, x_low);
                        let p = _mm512_dpbusd_epi32(p, high, x_high);
                        *sum = _mm512_add_epi32(*sum, _mm512_mullo_epi32(p, scales[h]));
                    }
                }
                Dots {
                    sums: sums_of_rows(sums),
                    d: f16x4(w),
                    mins: None,
                }
            }
        }
    }

    /// The signed scales, each for a quarter.
    ///
    /// # Safety
    /// `w` is valid for 8 bytes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scales(w: *const u8) -> [__m512i; 2] {
        // SAFETY: by the caller.
        let [high, low] =
            [2, 4].map(|i| unsafe { _mm512_set1_epi32(i32::from_le_bytes(bytes(w.add(i)))) });
        let j = quarter_numbers();
        [0, 4].map(|first| {
            let j = _mm512_add_epi32(j, _mm512_set1_epi32(first));
            let four = _mm512_srlv_epi32(low, _mm512_slli_epi32::<2>(j));
            let four = _mm512_and_si512(four, _mm512_set1_epi32(15));
            let two = _mm512_srlv_epi32(high, _mm512_slli_epi32::<1>(j));
            let two = _mm512_and_si512(two, _mm512_set1_epi32(3));
            let six = _mm512_or_si512(four, _mm512_slli_epi32::<4>(two));
            _mm512_sub_epi32(six, _mm512_set1_epi32(32))
        })
    }
}

/// For batches.
pub(super) struct IQ4XS;

// SAFETY: offsets are within the block.
unsafe impl Unpack for IQ4XS {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            let [d, low, _, _] = to.sixteen(0);
            to.d(d);
            for i in 0..4 {
                let mut scales = [d; 2];
                for (j, scale) in (2 * i as u32..).zip(&mut scales) {
                    let four = B::and(B::shr(low, 4 * j), B::splat(15));
                    let two = B::and(B::shr(d, 16 + 2 * j), B::splat(3));
                    *scale = B::sub(B::or(four, B::shl(two, 4)), B::splat(32));
                }
                to.scales_of_two(i, scales[0], scales[1], 7);
            }
            for part in 0..8 {
                for (c, v) in to.sixteen(QS + 16 * part).into_iter().enumerate() {
                    let [low, high] = nibbles::<B>(v);
                    to.quants(8 * part + c, B::look_up(UNSIGNED, low));
                    to.quants(8 * part + 4 + c, B::look_up(UNSIGNED, high));
                }
            }
        }
    }
}
