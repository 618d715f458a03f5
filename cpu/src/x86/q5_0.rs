//! `q5_0` and `q5_1`: `q4_0` and `q4_1` with a fifth bit.

use super::bytes::Bytes;
use super::twos::{nibbles_of_two, sixteen_of_two};
use super::unpack::{To, Unpack, nibbles};
use super::util::*;
use std::arch::x86_64::*;

/// Fifth bits, then nibbles.
///
/// # Safety
/// `p` is valid for 20 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn quants(p: *const u8) -> __m256i {
    // SAFETY: by the caller.
    unsafe {
        let fifth = bits_to_bytes(u32::from_le_bytes(bytes(p)));
        _mm256_or_si256(
            nibbles_32(p.add(4)),
            _mm256_and_si256(fifth, _mm256_set1_epi8(16)),
        )
    }
}

pub(super) mod rows {
    use super::super::rows::Rows32;
    use super::*;

    pub(in super::super) struct Q5_0;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for Q5_0 {
        const SIZE: usize = 22;
        const OFFSET: i32 = 16;
        const SIGNED: bool = false;
        const MINS: bool = false;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe { quants(w.add(2)) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (f16x4(w), _mm_setzero_ps()) }
        }
    }

    pub(in super::super) struct Q5_1;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for Q5_1 {
        const SIZE: usize = 24;
        const OFFSET: i32 = 0;
        const SIGNED: bool = false;
        const MINS: bool = true;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe { quants(w.add(4)) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { super::super::q4_k::scale_pairs(w) }
        }
    }
}

/// Fifth bits, then nibbles, of two blocks of so many bytes.
///
/// # Safety
/// `p` is valid for 20 bytes of each.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn quants_of_two(p: *const u8, size: usize) -> [__m256i; 2] {
    // SAFETY: by the caller.
    let ([low, high], bits) = unsafe { (nibbles_of_two(p.add(4), size), sixteen_of_two(p, size)) };
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    // Byte `i` of the bits is for the first eight quants, the next one for the others.
    let with_fifth = |q, i: i64| {
        let eight = i * 0x0101_0101_0101_0101;
        let pick = _mm256_set_epi64x(
            eight + 0x0101_0101_0101_0101,
            eight,
            eight + 0x0101_0101_0101_0101,
            eight,
        );
        let bits = _mm256_and_si256(_mm256_shuffle_epi8(bits, pick), bit);
        let fifth = _mm256_and_si256(_mm256_cmpeq_epi8(bits, bit), _mm256_set1_epi8(16));
        _mm256_or_si256(q, fifth)
    };
    [with_fifth(low, 0), with_fifth(high, 2)]
}

mod twos {
    use super::super::dots::Dots;
    use super::super::rows::Rows32;
    use super::super::twos::Two32;
    use super::rows::{Q5_0, Q5_1};
    use super::*;

    // SAFETY: offsets are within two blocks: 44 bytes.
    unsafe impl Two32 for Q5_0 {
        const MAX: i32 = 31;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe { quants_of_two(w.add(2), Self::SIZE) }
        }
    }

    // SAFETY: offsets are within two blocks: 48 bytes.
    unsafe impl Two32 for Q5_1 {
        const MAX: i32 = 31;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe { quants_of_two(w.add(4), Self::SIZE) }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Four32, dwords, halves, second_upper};
    use super::super::rows::Rows32;
    use super::rows::{Q5_0, Q5_1};
    use super::*;

    // SAFETY: offsets are within four blocks: 88 bytes.
    unsafe impl Four32 for Q5_0 {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe { quants_512(w.add(2), Self::SIZE) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller.
            unsafe {
                let v = second_upper(dwords(w, 24, [0, 5, 11, 26]));
                (halves(v), _mm512_setzero_ps())
            }
        }
    }

    // SAFETY: offsets are within four blocks: 96 bytes.
    unsafe impl Four32 for Q5_1 {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe { quants_512(w.add(4), Self::SIZE) }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller.
            unsafe {
                let v = dwords(w, 32, [0, 6, 12, 26]);
                (halves(v), halves(_mm512_srli_epi32::<16>(v)))
            }
        }
    }

    /// Four times fifth bits and nibbles, `stride` bytes apart: the first 16 of each, then the others.
    ///
    /// # Safety
    /// `p` is valid for four times 20 bytes.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
    unsafe fn quants_512(p: *const u8, stride: usize) -> [__m512i; 2] {
        // SAFETY: by the caller.
        unsafe {
            let mut fifth = [0; 2];
            for i in 0..4 {
                let bits = u64::from(u32::from_le_bytes(bytes(p.add(i * stride))));
                fifth[0] |= (bits & 0xffff) << (16 * i);
                fifth[1] |= (bits >> 16) << (16 * i);
            }
            let [low, high] = nibbles_512(p.add(4), stride);
            let sixteen = _mm512_set1_epi8(16);
            [
                _mm512_mask_add_epi8(low, fifth[0], low, sixteen),
                _mm512_mask_add_epi8(high, fifth[1], high, sixteen),
            ]
        }
    }
}

/// Unpacks fifth bits at `at` and nibbles behind them.
///
/// # Safety
/// They are within the block; the instruction set of `B` is available.
#[inline(always)]
unsafe fn unpack<B: Bytes>(to: &To<'_, B>, at: usize) {
    // SAFETY: by the caller.
    unsafe {
        let fifth = to.four(at);
        for (c, v) in to.sixteen(at + 4).into_iter().enumerate() {
            for (half, v) in nibbles::<B>(v).into_iter().enumerate() {
                // Byte i of a lane is for bit i of half a byte.
                let i = 4 * half + c;
                let mut pick = [0; 16];
                for (b, pick) in pick.iter_mut().enumerate() {
                    *pick = (b / 4 * 4 + i / 2) as i8;
                }
                let bits = B::has(B::pick(fifth, pick), 0x0804_0201 << (4 * (i % 2)));
                to.quants(i, B::or(v, B::and(bits, B::splat(0x1010_1010))));
            }
        }
    }
}

/// For batches.
pub(super) struct Q5_0;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q5_0 {
    const SIZE: usize = 22;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d(to.four(0));
            unpack(to, 2);
        }
    }
}

/// For batches.
pub(super) struct Q5_1;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q5_1 {
    const SIZE: usize = 24;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d_and_m(to.four(0));
            unpack(to, 4);
        }
    }
}
