//! `iq4_xs`: nibbles that stand for the values of a table, with 6-bit scales for every 32 values.

use super::gemm::{Tile, Unpack};
use super::iq4_nl::table;
use super::util::*;
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 136;
/// Where the nibbles begin.
const QS: usize = 8;

/// The signed scales.
///
/// # Safety
/// `w` is valid for 8 bytes.
#[inline(always)]
unsafe fn sub_scales(w: *const u8) -> [i16; 8] {
    // SAFETY: by the caller.
    let (high, low) = unsafe {
        (
            u16::from_le_bytes(bytes(w.add(2))),
            u32::from_le_bytes(bytes(w.add(4))),
        )
    };
    std::array::from_fn(|j| {
        let (low, high) = (low >> (4 * j) & 15, u32::from(high >> (2 * j) & 3));
        (low | high << 4) as i16 - 32
    })
}

macro_rules! rows {
    ($isa:ident, $features:literal, $dot4:ident) => {
        pub(super) mod $isa {
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
                        let mut sum = _mm256_setzero_si256();
                        for (j, s) in sub_scales(w).into_iter().enumerate() {
                            let v = _mm256_shuffle_epi8(table(), nibbles_32(w.add(QS + 16 * j)));
                            let x = _mm256_load_si256(x.q.as_ptr().add(32 * j).cast());
                            let s = _mm256_set1_epi32(i32::from(s));
                            let p = _mm256_mullo_epi32($dot4(v, x), s);
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
rows!(avx2, "avx2", dot4_signed_avx2);
rows!(
    avx512,
    "avx2,avx512f,avx512bw,avx512vl,avx512vnni",
    dot4_signed_avx512
);

/// For batches.
pub(super) struct IQ4XS;

// SAFETY: offsets are within the 136 bytes.
unsafe impl Unpack for IQ4XS {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn unpack(w: *const u8, q: *mut u8, tile: &mut Tile, r: usize, _: usize) {
        // SAFETY: by the caller.
        unsafe {
            for (j, s) in sub_scales(w).into_iter().enumerate() {
                let v = _mm256_shuffle_epi8(table(), nibbles_32(w.add(QS + 16 * j)));
                let v = _mm256_xor_si256(v, _mm256_set1_epi8(-128));
                _mm256_store_si256(q.add(32 * j).cast(), v);
                tile.scales[j][r] = i32::from(s);
            }
            tile.d[0][r] = f16(w);
        }
    }
}
