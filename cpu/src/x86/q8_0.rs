//! `q8_0`: bytes with a scale.

use super::bytes::Bytes;
use super::unpack::{To, Unpack};
use super::util::*;
use std::arch::x86_64::*;

pub(super) mod rows {
    use super::super::rows::Rows32;
    use super::*;

    pub(in super::super) struct Q8_0;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for Q8_0 {
        const SIZE: usize = 34;
        const OFFSET: i32 = 0;
        const SIGNED: bool = true;
        const MINS: bool = false;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe { _mm256_loadu_si256(w.add(2).cast()) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (f16x4(w), _mm_setzero_ps()) }
        }
    }
}

mod twos {
    use super::super::dots::Dots;
    use super::super::rows::Rows32;
    use super::super::twos::{Two32, sixteen_of_two};
    use super::rows::Q8_0;
    use super::*;

    // SAFETY: offsets are within two blocks: 68 bytes.
    unsafe impl Two32 for Q8_0 {
        const MAX: i32 = 128;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe {
                let sign = _mm256_set1_epi8(P::OFFSET as i8);
                [2, 18].map(|at| _mm256_xor_si256(sixteen_of_two(w.add(at), Self::SIZE), sign))
            }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Four32, dwords, halves, second_upper, sixteen_of};
    use super::super::rows::Rows32;
    use super::rows::Q8_0;
    use super::*;

    // SAFETY: offsets are within four blocks: 136 bytes.
    unsafe impl Four32 for Q8_0 {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe {
                let blocks = |at: usize| [0, 1, 2, 3].map(|i| w.add(at + i * Self::SIZE));
                let (first, last) = (sixteen_of(blocks(2)), sixteen_of(blocks(18)));
                let sign = _mm512_set1_epi8(-128);
                [_mm512_xor_si512(first, sign), _mm512_xor_si512(last, sign)]
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller.
            unsafe {
                let v = second_upper(dwords(w, 68, [0, 8, 16, 24]));
                (halves(v), _mm512_setzero_ps())
            }
        }
    }
}

/// For batches.
pub(super) struct Q8_0;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q8_0 {
    const SIZE: usize = 34;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d(to.four(0));
            for part in 0..2 {
                for (c, v) in to.sixteen(2 + 16 * part).into_iter().enumerate() {
                    to.quants(4 * part + c, B::xor(v, B::splat(0x8080_8080)));
                }
            }
        }
    }
}
