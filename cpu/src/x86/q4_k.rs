//! `q4_K`: 4 bits, with 6-bit scales and minimums for every 32 values.

use super::bytes::Bytes;
use super::unpack::{To, Unpack, byte, nibbles, two_bytes};
use super::util::k_scales;
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 144;
/// Where the quants begin.
const QS: usize = 16;

pub(super) mod avx2 {
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct Q4K;

    // SAFETY: offsets are within the 144 bytes.
    unsafe impl Rows256 for Q4K {
        const SIZE: usize = SIZE;
        const MINS: bool = true;

        #[inline]
        #[target_feature(enable = "avx2")]
        unsafe fn dot(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let (scales, mins) = scales_and_mins(w, x);
                let mut sum = _mm256_setzero_si256();
                let mask = _mm256_set1_epi8(15);
                for g in 0..4 {
                    let q = _mm256_loadu_si256(w.add(QS + 32 * g).cast());
                    let low = _mm256_and_si256(q, mask);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), mask);
                    let x_low = _mm256_load_si256(x.q.as_ptr().add(64 * g).cast());
                    let x_high = _mm256_load_si256(x.q.as_ptr().add(64 * g + 32).cast());
                    let low = _mm256_maddubs_epi16(low, x_low);
                    let high = _mm256_maddubs_epi16(high, x_high);
                    let low = _mm256_madd_epi16(low, scale(scales, 2 * g));
                    let high = _mm256_madd_epi16(high, scale(scales, 2 * g + 1));
                    sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
                }
                (sum, mins)
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { scale_pairs(w) }
        }
    }

    /// Scale `j` of eight 16-bit ones, in all lanes.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(in super::super) fn scale(scales: __m128i, j: usize) -> __m256i {
        let pick = _mm256_set1_epi16((0x0100 + 0x0202 * j) as i16);
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(scales), pick)
    }
}

pub(super) mod avx512 {
    use super::super::rows::Rows256;
    use super::super::util::fold_512;
    use super::*;

    pub(in super::super) struct Q4K;

    // SAFETY: offsets are within the 144 bytes.
    unsafe impl Rows256 for Q4K {
        const SIZE: usize = SIZE;
        const MINS: bool = true;

        #[inline]
        #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn dot(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let (scales, mins) = scales_and_mins(w, x);
                let scales = _mm512_broadcast_i32x4(scales);
                let mut sum = [_mm512_setzero_si512(); 2];
                let mask = _mm512_set1_epi8(15);
                for g in 0..2 {
                    let q = _mm512_loadu_si512(w.add(QS + 64 * g).cast());
                    let low = _mm512_and_si512(q, mask);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), mask);
                    let x_low = _mm512_load_si512(x.swapped.as_ptr().add(128 * g).cast());
                    let x_high = _mm512_load_si512(x.swapped.as_ptr().add(128 * g + 64).cast());
                    let low = _mm512_maddubs_epi16(low, x_low);
                    let high = _mm512_maddubs_epi16(high, x_high);
                    let (s_low, s_high) = (pick(4 * g, 4 * g + 2), pick(4 * g + 1, 4 * g + 3));
                    sum[0] = _mm512_dpwssd_epi32(sum[0], low, _mm512_shuffle_epi8(scales, s_low));
                    sum[1] = _mm512_dpwssd_epi32(sum[1], high, _mm512_shuffle_epi8(scales, s_high));
                }
                (fold_512(_mm512_add_epi32(sum[0], sum[1])), mins)
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { scale_pairs(w) }
        }
    }

    /// Picks 16-bit scale `a` for the lower half and `b` for the upper one.
    #[inline]
    #[target_feature(enable = "avx2,avx512f")]
    pub(in super::super) fn pick(a: usize, b: usize) -> __m512i {
        let half = |j: usize| _mm256_set1_epi16((0x0100 + 0x0202 * j) as i16);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(a)), half(b))
    }
}

/// The 16-bit scales, and lanes that sum to the products of minimums and sums of activations.
///
/// # Safety
/// `w` is valid for 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn scales_and_mins(w: *const u8, x: &X256) -> (__m128i, __m128i) {
    // SAFETY: by the caller, and `sum32` has 16 bytes.
    unsafe {
        let (scales, mins) = k_scales(w);
        let [scales, mins] = [scales, mins].map(|v| _mm_cvtepu8_epi16(_mm_cvtsi64_si128(v as i64)));
        let sums = _mm_loadu_si128(x.sum32.as_ptr().cast());
        (scales, _mm_madd_epi16(mins, sums))
    }
}

/// `d` and `dmin` at the beginning of four blocks.
///
/// # Safety
/// Pointers are valid for four bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn scale_pairs(w: [*const u8; 4]) -> (__m128, __m128) {
    // SAFETY: by the caller.
    let h = w.map(|p| unsafe { p.cast::<i32>().read_unaligned() });
    let pairs = _mm256_cvtph_ps(_mm_set_epi32(h[3], h[2], h[1], h[0]));
    let (low, high) = (
        _mm256_castps256_ps128(pairs),
        _mm256_extractf128_ps::<1>(pairs),
    );
    (
        _mm_shuffle_ps::<0b10_00_10_00>(low, high),
        _mm_shuffle_ps::<0b11_01_11_01>(low, high),
    )
}

/// Scales and minimums, which `q5_K` has as well.
///
/// # Safety
/// The instruction set of `B` is available, and the block is one of those.
#[inline(always)]
pub(super) unsafe fn header<B: Bytes>(to: &To<'_, B>) {
    // SAFETY: by the caller.
    unsafe {
        // See `k_scales`.
        let [d, a, b, c] = to.sixteen(0);
        to.d_and_m(d);
        let (six, four, two) = (
            B::splat(0x3f3f_3f3f),
            B::splat(0x0f0f_0f0f),
            B::splat(0x3030_3030),
        );
        let scales = [
            B::and(a, six),
            B::or(B::and(c, four), B::and(B::shr(a, 2), two)),
        ];
        let mins = [
            B::and(b, six),
            B::or(B::and(B::shr(c, 4), four), B::and(B::shr(b, 2), two)),
        ];
        for part in 0..2 {
            for i in 0..4 {
                to.scale(4 * part + i, byte::<B>(scales[part], i));
            }
            for i in 0..2 {
                to.mins(2 * part + i, two_bytes::<B>(mins[part], i));
            }
        }
    }
}

/// For batches.
pub(super) struct Q4K;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q4K {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            header(to);
            for part in 0..8 {
                for (c, v) in to.sixteen(QS + 16 * part).into_iter().enumerate() {
                    let [low, high] = nibbles::<B>(v);
                    let first = 16 * (part / 2) + 4 * (part % 2);
                    to.quants(first + c, low);
                    to.quants(first + 8 + c, high);
                }
            }
        }
    }
}
