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

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::rows::Rows256;
    use super::*;

    pub(in super::super) struct Q4K;

    // SAFETY: offsets are within the 144 bytes.
    unsafe impl Rows256 for Q4K {
        const SIZE: usize = SIZE;
        const MINS: bool = true;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let (scales, mins) = scales_and_mins(w, x);
                let mut sum = [_mm256_setzero_si256(); 2];
                let mask = _mm256_set1_epi8(15);
                for g in 0..4 {
                    let q = _mm256_loadu_si256(w.add(QS + 32 * g).cast());
                    let low = _mm256_and_si256(q, mask);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(q), mask);
                    let x_low = _mm256_load_si256(x.q.as_ptr().add(64 * g).cast());
                    let x_high = _mm256_load_si256(x.q.as_ptr().add(64 * g + 32).cast());
                    let low = _mm256_maddubs_epi16(low, x_low);
                    let high = _mm256_maddubs_epi16(high, x_high);
                    sum[0] = P::words(sum[0], low, scale(scales, 2 * g));
                    sum[1] = P::words(sum[1], high, scale(scales, 2 * g + 1));
                }
                (_mm256_add_epi32(sum[0], sum[1]), mins)
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
    use super::super::fours::{
        Dots, Four256, firsts_of_quarters, sixteen_of, spread_quarters, sums_of_quarters,
        sums_of_rows,
    };
    use super::*;

    pub(in super::super) struct Q4K;

    // SAFETY: offsets are within the 144 bytes.
    unsafe impl Four256 for Q4K {
        const SIZE: usize = SIZE;

        #[inline]
        #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots {
            // SAFETY: by the caller.
            unsafe {
                dots(w, x, |w| {
                    let mask = _mm512_set1_epi8(15);
                    [0, 1].map(|g| {
                        let q = _mm512_loadu_si512(w.add(QS + 64 * g).cast());
                        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(q), mask);
                        [_mm512_and_si512(q, mask), high]
                    })
                })
            }
        }
    }

    /// Blocks with scales and minimums as here, `quants` being 64 low and 64 high ones of each half of a block.
    ///
    /// # Safety
    /// Pointers are valid for 16 bytes and for what `quants` reads.
    #[inline]
    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(in super::super) unsafe fn dots(
        w: [*const u8; 4],
        x: &X256,
        quants: impl Fn(*const u8) -> [[__m512i; 2]; 2],
    ) -> Dots {
        // SAFETY: by the caller; offsets into `x` end at 256.
        unsafe {
            let header = sixteen_of(w);
            let six = scales_and_mins(header);
            let scales = spread_quarters(six);
            let row = |r: usize| {
                let [[a, b], [c, d]] = quants(w[r]);
                let product = |j: usize, q: __m512i| {
                    let x = _mm512_load_si512(x.swapped.as_ptr().add(64 * j).cast());
                    let scale = _mm512_shuffle_epi8(scales[r], pick(j / 2 * 4 + j % 2));
                    (_mm512_maddubs_epi16(q, x), scale)
                };
                let two = |(a, b), (c, d)| _mm512_dpwssd_epi32(_mm512_madd_epi16(a, b), c, d);
                _mm512_add_epi32(
                    two(product(0, a), product(1, b)),
                    two(product(2, c), product(3, d)),
                )
            };
            // Written out: as a loop it goes through memory.
            let sums = [row(0), row(1), row(2), row(3)];
            // The last eight bytes of each quarter.
            let eight = _mm_set_epi64x(
                0x800f_800e_800d_800c_u64 as i64,
                0x800b_800a_8009_8008_u64 as i64,
            );
            let mins = _mm512_shuffle_epi8(six, _mm512_broadcast_i32x4(eight));
            let of_x = _mm512_broadcast_i32x4(_mm_loadu_si128(x.sum32.as_ptr().cast()));
            let min_sums = sums_of_quarters(_mm512_madd_epi16(mins, of_x));
            // The first two halves of each quarter.
            let (d, dmin) = pairs(firsts_of_quarters(header));
            Dots {
                sums: sums_of_rows(sums),
                d,
                mins: Some((min_sums, dmin)),
            }
        }
    }

    /// Eight scales of each row, then eight minimums, from the first 16 bytes of blocks. See `k_scales`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scales_and_mins(header: __m512i) -> __m512i {
        let four = |a, b, c, d| _mm512_broadcast_i32x4(_mm_set_epi32(d, c, b, a));
        // Dwords are: d and dmin, a, b, c.
        let ab = _mm512_shuffle_epi32::<0b10_10_01_01>(header);
        let ab = _mm512_srlv_epi32(ab, four(0, 2, 0, 2));
        let ab = _mm512_and_si512(ab, four(0x3f3f_3f3f, 0x3030_3030, 0x3f3f_3f3f, 0x3030_3030));
        let c = _mm512_shuffle_epi32::<0b11_11_11_11>(header);
        let c = _mm512_srlv_epi32(c, four(0, 0, 0, 4));
        let c = _mm512_and_si512(c, four(0, 0x0f0f_0f0f, 0, 0x0f0f_0f0f));
        _mm512_or_si512(ab, c)
    }

    /// Picks byte `j` as a 16-bit number for the lower half, and byte `j + 2` for the upper one.
    #[inline]
    #[target_feature(enable = "avx2,avx512f")]
    fn pick(j: usize) -> __m512i {
        let half = |j: usize| _mm256_set1_epi16((0x8000 + j) as i16);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(j)), half(j + 2))
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
    pairs(_mm_set_epi32(h[3], h[2], h[1], h[0]))
}

/// Four pairs of half-precision numbers: the first of each, and the second.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn pairs(h: __m128i) -> (__m128, __m128) {
    let pairs = _mm256_cvtph_ps(h);
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
