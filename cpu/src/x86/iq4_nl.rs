//! `iq4_nl`: nibbles that stand for the values of a table, with a scale.

use super::bytes::Bytes;
use super::unpack::{To, Unpack, nibbles};
use super::util::*;
use std::arch::x86_64::*;

const TABLE: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// The values that nibbles stand for, in both halves.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn table() -> __m256i {
    // SAFETY: the table has 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(TABLE.as_ptr().cast()) })
}

pub(super) mod rows {
    use super::super::rows::Rows32;
    use super::*;

    pub(in super::super) struct IQ4NL;

    // SAFETY: offsets are within the block.
    unsafe impl Rows32 for IQ4NL {
        const SIZE: usize = 18;
        const OFFSET: i32 = 0;
        const SIGNED: bool = true;
        const MINS: bool = false;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn block(w: *const u8) -> __m256i {
            // SAFETY: by the caller.
            unsafe { _mm256_shuffle_epi8(table(), nibbles_32(w.add(2))) }
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
    use super::super::twos::{Two32, nibbles_of_two};
    use super::rows::IQ4NL;
    use super::*;

    // SAFETY: offsets are within two blocks: 36 bytes.
    unsafe impl Two32 for IQ4NL {
        const MAX: i32 = 127;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2] {
            // SAFETY: by the caller.
            unsafe {
                let table = _mm256_xor_si256(table(), _mm256_set1_epi8(P::OFFSET as i8));
                nibbles_of_two(w.add(2), Self::SIZE).map(|q| _mm256_shuffle_epi8(table, q))
            }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::Four32;
    use super::super::q4_0::rows::Q4_0;
    use super::super::rows::Rows32;
    use super::rows::IQ4NL;
    use super::*;

    // SAFETY: offsets are within four blocks: 72 bytes.
    unsafe impl Four32 for IQ4NL {
        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn quants(w: *const u8) -> [__m512i; 2] {
            // SAFETY: by the caller.
            unsafe {
                let table = _mm_add_epi8(_mm256_castsi256_si128(table()), _mm_set1_epi8(-128));
                let table = _mm512_broadcast_i32x4(table);
                nibbles_512(w.add(2), Self::SIZE).map(|q| _mm512_shuffle_epi8(table, q))
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512) {
            // SAFETY: by the caller; blocks are laid out alike.
            unsafe { Q4_0::all_scales(w) }
        }
    }
}

/// [`TABLE`] plus 128: unsigned.
pub(super) const UNSIGNED: [i8; 16] = {
    let mut table = TABLE;
    let mut i = 0;
    while i < 16 {
        table[i] = table[i].wrapping_add(-128);
        i += 1;
    }
    table
};

/// For batches.
pub(super) struct IQ4NL;

// SAFETY: offsets are within the block.
unsafe impl Unpack for IQ4NL {
    const SIZE: usize = 18;
    const LEN: usize = 32;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d(to.four(0));
            for (c, v) in to.sixteen(2).into_iter().enumerate() {
                let [low, high] = nibbles::<B>(v);
                to.quants(c, B::look_up(UNSIGNED, low));
                to.quants(4 + c, B::look_up(UNSIGNED, high));
            }
        }
    }
}
