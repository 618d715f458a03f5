//! `q6_K`: 6 bits, with 8-bit signed scales for every 16 values.

use super::bytes::Bytes;
use super::unpack::{To, Unpack};
use super::util::f16x4;
use crate::activations::X256;
use std::arch::x86_64::*;

/// Bytes of a block.
const SIZE: usize = 210;
/// Where the upper bits begin.
const QH: usize = 128;
/// Where the scales begin.
const SCALES: usize = 192;
/// Where the scale of the scales is.
const D: usize = 208;

/// Quants of values `128 h ..`, plus 32, in four runs of 32.
///
/// # Safety
/// `w` is valid for a block, and `h` is below 2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn quants(w: *const u8, h: usize) -> [__m256i; 4] {
    let (low, upper) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    // SAFETY: by the caller.
    unsafe {
        let a = _mm256_loadu_si256(w.add(64 * h).cast());
        let b = _mm256_loadu_si256(w.add(64 * h + 32).cast());
        let qh = _mm256_loadu_si256(w.add(QH + 32 * h).cast());
        let join = |q, h| _mm256_or_si256(_mm256_and_si256(q, low), _mm256_and_si256(h, upper));
        [
            join(a, _mm256_slli_epi16::<4>(qh)),
            join(b, _mm256_slli_epi16::<2>(qh)),
            join(_mm256_srli_epi16::<4>(a), qh),
            join(_mm256_srli_epi16::<4>(b), _mm256_srli_epi16::<2>(qh)),
        ]
    }
}

/// What the offset of 32 contributes: lanes that sum to `32 * sum of scale * sum of x`.
///
/// # Safety
/// `scales` is valid for 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn offset(scales: __m128i, x: &X256) -> __m256i {
    // SAFETY: `sum16` has 32 bytes.
    let sums = unsafe { _mm256_loadu_si256(x.sum16.as_ptr().cast()) };
    _mm256_slli_epi32::<5>(_mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), sums))
}

/// Picks byte `a` eight times, then byte `a + 1`.
#[inline]
#[target_feature(enable = "avx2")]
fn pick(a: usize) -> __m128i {
    let eight = 0x0101_0101_0101_0101 * a as i64;
    _mm_set_epi64x(eight + 0x0101_0101_0101_0101, eight)
}

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct Q6K;

    // SAFETY: offsets are within the 210 bytes.
    unsafe impl Rows256 for Q6K {
        const SIZE: usize = SIZE;
        const MINS: bool = false;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let scales = _mm_loadu_si128(w.add(SCALES).cast());
                let mut sum = _mm256_sub_epi32(_mm256_setzero_si256(), offset(scales, x));
                for h in 0..2 {
                    for (i, q) in quants(w, h).into_iter().enumerate() {
                        let x = _mm256_load_si256(x.q.as_ptr().add(128 * h + 32 * i).cast());
                        let s = _mm_shuffle_epi8(scales, pick(8 * h + 2 * i));
                        let p = _mm256_maddubs_epi16(q, x);
                        sum = P::words(sum, p, _mm256_cvtepi8_epi16(s));
                    }
                }
                (sum, _mm_setzero_si128())
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (f16x4(w.map(|w| w.add(D))), _mm_setzero_ps()) }
        }
    }
}

pub(super) mod avx512 {
    use super::super::fours::{Dots, Four256, quarter_numbers, sums_of_rows};
    use super::*;

    pub(in super::super) struct Q6K;

    // SAFETY: offsets are within the 210 bytes.
    unsafe impl Four256 for Q6K {
        const SIZE: usize = SIZE;

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let x: [__m512i; 4] =
                    std::array::from_fn(|i| _mm512_load_si512(x.q.as_ptr().add(64 * i).cast()));
                // What the offset of 32 contributes to four products.
                let zero = _mm512_setzero_si512();
                let offset = x.map(|x| {
                    let of_four = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(32), x);
                    _mm512_sub_epi32(zero, of_four)
                });
                let mut sums = [zero; 4];
                for (sum, w) in sums.iter_mut().zip(w) {
                    // A scale in the lower half of each dword.
                    let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(w.add(SCALES).cast()));
                    let scales = _mm512_and_si512(scales, _mm512_set1_epi32(0xffff));
                    for (i, q) in quants(w).into_iter().enumerate() {
                        // Four products fit 16 bits, so the upper half of their sum is its sign and meets zero.
                        let p = _mm512_dpbusd_epi32(offset[i], q, x[i]);
                        let scale = _mm512_permutexvar_epi32(pick(4 * i as i32), scales);
                        *sum = _mm512_dpwssd_epi32(*sum, p, scale);
                    }
                }
                Dots {
                    sums: sums_of_rows(sums),
                    d: f16x4(w.map(|w| w.add(D))),
                    mins: None,
                }
            }
        }
    }

    /// Quants plus 32, in order.
    ///
    /// # Safety
    /// `w` is valid for a block.
    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    unsafe fn quants(w: *const u8) -> [__m512i; 4] {
        let (low, six) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x3f));
        let two = _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0);
        let mut quants = [_mm512_setzero_si512(); 4];
        for h in 0..2 {
            // SAFETY: by the caller.
            let (ql, qh) = unsafe {
                let qh = _mm256_loadu_si256(w.add(QH + 32 * h).cast());
                (
                    _mm512_loadu_si512(w.add(64 * h).cast()),
                    _mm512_broadcast_i64x4(qh),
                )
            };
            // Bits 0..4 of both halves belong to the low nibbles, bits 4..8 to the high ones.
            let qh = _mm512_srlv_epi64(qh, two);
            // Below from the first, above from the second.
            let join = |a, b| {
                let both = _mm512_ternarylogic_epi64::<0xca>(low, a, b);
                _mm512_and_si512(both, six)
            };
            quants[2 * h] = join(ql, _mm512_slli_epi64::<4>(qh));
            quants[2 * h + 1] = join(_mm512_srli_epi64::<4>(ql), qh);
        }
        quants
    }

    /// Picks dwords `j` to `j + 3`, each for a quarter.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pick(j: i32) -> __m512i {
        _mm512_add_epi32(quarter_numbers(), _mm512_set1_epi32(j))
    }
}

/// For batches.
pub(super) struct Q6K;

// SAFETY: offsets are within the block.
unsafe impl Unpack for Q6K {
    const SIZE: usize = SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // SAFETY: by the caller.
        unsafe {
            to.d(B::shr(to.four(D - 2), 16));
            for (part, v) in to.sixteen(SCALES).into_iter().enumerate() {
                for i in 0..2 {
                    let a = B::sar(B::shl(v, 24 - 16 * i), 24);
                    let b = B::sar(B::shl(v, 16 - 16 * i), 24);
                    to.scales_of_two(2 * part + i as usize, a, b, 5);
                }
            }
            let (low, upper) = (B::splat(0x0f0f_0f0f), B::splat(0x3030_3030));
            for h in 0..2 {
                for part in 0..2 {
                    let a = to.sixteen(64 * h + 16 * part);
                    let b = to.sixteen(64 * h + 32 + 16 * part);
                    let qh = to.sixteen(QH + 32 * h + 16 * part);
                    for c in 0..4 {
                        let (a, b, qh) = (a[c], b[c], qh[c]);
                        let runs = [
                            B::or(B::and(a, low), B::and(B::shl(qh, 4), upper)),
                            B::or(B::and(b, low), B::and(B::shl(qh, 2), upper)),
                            B::or(B::and(B::shr(a, 4), low), B::and(qh, upper)),
                            B::or(B::and(B::shr(b, 4), low), B::and(B::shr(qh, 2), upper)),
                        ];
                        for (i, v) in runs.into_iter().enumerate() {
                            to.quants(32 * h + 8 * i + 4 * part + c, v);
                        }
                    }
                }
            }
        }
    }
}
