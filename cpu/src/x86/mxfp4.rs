//! `mxfp4`: nibbles that stand for small floating-point numbers, with a power of two as scale.

use super::bytes::Bytes;
use super::unpack::{To, Unpack, nibbles};
use super::util::*;
use std::arch::x86_64::*;

use lemma_quant::num::e8m0_half_to_f32;

/// E2M1 numbers, doubled.
pub(super) const TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The values that nibbles stand for, plus 16.
#[inline]
#[target_feature(enable = "avx2")]
fn table() -> __m128i {
    // SAFETY: the table has 16 bytes.
    unsafe { _mm_loadu_si128(UNSIGNED.as_ptr().cast()) }
}

pub(super) mod rows {
    use super::super::rows::Rows32;
    use super::*;

    pub(in super::super) struct MXFP4;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for MXFP4 {
        const SIZE: usize = 17;
        const OFFSET: i32 = 16;
        const SIGNED: bool = false;
        const MINS: bool = false;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe {
                let table = _mm256_broadcastsi128_si256(table());
                _mm256_shuffle_epi8(table, nibbles_32(w.add(1)))
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe {
                let d = w.map(|w| e8m0_half_to_f32(*w));
                (_mm_set_ps(d[3], d[2], d[1], d[0]), _mm_setzero_ps())
            }
        }
    }
}

mod twos {
    use super::super::dots::Dots;
    use super::super::rows::Rows32;
    use super::super::twos::{Two32, nibbles_of_two};
    use super::rows::MXFP4;
    use super::*;

    // SAFETY: offsets are within two blocks: 34 bytes.
    unsafe impl Two32 for MXFP4 {
        const MAX: i32 = 28;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe {
                let table = _mm256_broadcastsi128_si256(table());
                nibbles_of_two(w.add(1), Self::SIZE).map(|q| _mm256_shuffle_epi8(table, q))
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn both_scales(w: [*const u8; 4]) -> (__m256, __m256) {
            // SAFETY: by the caller.
            unsafe {
                let block = |r: usize, at: usize| _mm_loadu_si128(w[r].add(at).cast());
                let two = |a, b, at| _mm_unpacklo_epi8(block(a, at), block(b, at));
                let four = |at| _mm_unpacklo_epi16(two(0, 1, at), two(2, 3, at));
                // As `e8m0_half_to_f32`: from 2 on, what is shifted by two is the smaller one.
                let e = _mm256_cvtepu8_epi32(_mm_unpacklo_epi32(four(0), four(Self::SIZE)));
                let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
                let small = _mm256_min_epi32(e, _mm256_set1_epi32(2));
                let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), small);
                let d = _mm256_max_epi32(normal, small);
                (_mm256_castsi256_ps(d), _mm256_setzero_ps())
            }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Four32, dwords};
    use super::super::rows::Rows32;
    use super::rows::MXFP4;
    use super::*;

    // SAFETY: offsets are within four blocks: 68 bytes.
    unsafe impl Four32 for MXFP4 {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe {
                let table = _mm512_broadcast_i32x4(table());
                nibbles_512(w.add(1), Self::SIZE).map(|q| _mm512_shuffle_epi8(table, q))
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller.
            unsafe {
                // Byte i of what is picked for block i; then as `e8m0_half_to_f32`.
                let v = dwords(w, 0, [0, 4, 8, 12]);
                let byte = _mm512_set_epi32(24, 24, 24, 24, 16, 16, 16, 16, 8, 8, 8, 8, 0, 0, 0, 0);
                let e = _mm512_and_si512(_mm512_srlv_epi32(v, byte), _mm512_set1_epi32(0xff));
                let one = _mm512_set1_epi32(1);
                let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, one));
                let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), e);
                let is_small = _mm512_cmple_epu32_mask(e, one);
                let d = _mm512_mask_mov_epi32(normal, is_small, small);
                (_mm512_castsi512_ps(d), _mm512_setzero_ps())
            }
        }
    }
}

/// [`TABLE`] plus 16: unsigned.
const UNSIGNED: [i8; 16] = {
    let mut table = TABLE;
    let mut i = 0;
    while i < 16 {
        table[i] += 16;
        i += 1;
    }
    table
};

/// For batches.
pub(super) struct MXFP4;

// SAFETY: offsets are within the block.
unsafe impl Unpack for MXFP4 {
    const SIZE: usize = 17;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            // As `e8m0_half_to_f32`.
            let e = B::and(to.four(0), B::splat(0xff));
            let normal = B::shl(B::sub(e, B::splat(1)), 23);
            let (is_0, is_1) = (B::is(e, 0), B::is(e, 1));
            let small = B::or(
                B::and(is_0, B::splat(0x0020_0000)),
                B::and(is_1, B::splat(0x0040_0000)),
            );
            // With `e` 0, all upper bits of `normal` are set.
            let upper = B::splat(0xff80_0000);
            to.d_bits(B::or(B::xor(normal, B::and(is_0, upper)), small));
            for (c, v) in to.sixteen(1).into_iter().enumerate() {
                let [low, high] = nibbles::<B>(v);
                to.quants(c, B::look_up(UNSIGNED, low));
                to.quants(4 + c, B::look_up(UNSIGNED, high));
            }
        }
    }
}
