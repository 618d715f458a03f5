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

macro_rules! rows {
    ($isa:ident, $features:literal) => {
        pub(super) mod $isa {
            use super::super::q4_k::avx2::scale;
            use super::super::rows::Rows256;
            use super::*;

            pub(in super::super) struct IQ4XS;

            // SAFETY: offsets are within the 136 bytes.
            unsafe impl Rows256 for IQ4XS {
                const SIZE: usize = SIZE;
                const MINS: bool = false;

                #[inline]
                #[target_feature(enable = $features)]
                unsafe fn dot(w: *const u8, x: &X256) -> (__m256i, __m128i) {
                    // SAFETY: by the caller; offsets into `x` end at 256.
                    unsafe {
                        let scales = sub_scales(w);
                        let mut sum = _mm256_setzero_si256();
                        for j in 0..8 {
                            let v = _mm256_shuffle_epi8(table(), nibbles_32(w.add(QS + 16 * j)));
                            let x = _mm256_load_si256(x.q.as_ptr().add(32 * j).cast());
                            let magnitude = _mm256_abs_epi8(v);
                            let p = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, v));
                            let p = _mm256_madd_epi16(p, scale(scales, j));
                            sum = _mm256_add_epi32(sum, p);
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
    };
}
rows!(avx2, "avx2");
rows!(avx512, "avx2,avx512f,avx512bw,avx512vl,avx512vnni");

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
