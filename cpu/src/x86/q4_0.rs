//! `q4_0` and `q4_1`: nibbles with a scale, and with a scale and a minimum.

use super::bytes::Bytes;
use super::unpack::{To, Unpack, nibbles};
use super::util::*;
use std::arch::x86_64::*;

pub(super) mod rows {
    use super::super::rows::Rows32;
    use super::*;

    pub(in super::super) struct Q4_0;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for Q4_0 {
        const SIZE: usize = 18;
        const OFFSET: i32 = 8;
        const SIGNED: bool = false;
        const MINS: bool = false;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe { nibbles_32(w.add(2)) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (f16x4(w), _mm_setzero_ps()) }
        }
    }

    pub(in super::super) struct Q4_1;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for Q4_1 {
        const SIZE: usize = 20;
        const OFFSET: i32 = 0;
        const SIGNED: bool = false;
        const MINS: bool = true;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe { nibbles_32(w.add(4)) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { super::super::q4_k::scale_pairs(w) }
        }
    }
}

mod twos {
    use super::super::dots::Dots;
    use super::super::rows::Rows32;
    use super::super::twos::{Two32, nibbles_of_two};
    use super::rows::{Q4_0, Q4_1};
    use super::*;

    // SAFETY: offsets are within two blocks: 36 bytes.
    unsafe impl Two32 for Q4_0 {
        const MAX: i32 = 15;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe { nibbles_of_two(w.add(2), Self::SIZE) }
        }
    }

    // SAFETY: offsets are within two blocks: 40 bytes.
    unsafe impl Two32 for Q4_1 {
        const MAX: i32 = 15;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe { nibbles_of_two(w.add(4), Self::SIZE) }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Four32, dwords, halves, second_upper};
    use super::super::rows::Rows32;
    use super::rows::{Q4_0, Q4_1};
    use super::*;

    // SAFETY: offsets are within four blocks: 72 bytes.
    unsafe impl Four32 for Q4_0 {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe { nibbles_512(w.add(2), Self::SIZE) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller.
            unsafe {
                let v = second_upper(dwords(w, 0, [0, 4, 9, 13]));
                (halves(v), _mm512_setzero_ps())
            }
        }
    }

    // SAFETY: offsets are within four blocks: 80 bytes.
    unsafe impl Four32 for Q4_1 {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe { nibbles_512(w.add(4), Self::SIZE) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller.
            unsafe {
                let v = dwords(w, 0, [0, 5, 10, 15]);
                (halves(v), halves(_mm512_srli_epi32::<16>(v)))
            }
        }
    }
}

/// For batches.
pub(super) struct Q4_0;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q4_0 {
    const SIZE: usize = 18;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d(to.four(0));
            for (c, v) in to.sixteen(2).into_iter().enumerate() {
                let [low, high] = nibbles::<B>(v);
                to.quants(c, low);
                to.quants(4 + c, high);
            }
        }
    }
}

/// For batches.
pub(super) struct Q4_1;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q4_1 {
    const SIZE: usize = 20;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d_and_m(to.four(0));
            for (c, v) in to.sixteen(4).into_iter().enumerate() {
                let [low, high] = nibbles::<B>(v);
                to.quants(c, low);
                to.quants(4 + c, high);
            }
        }
    }
}
