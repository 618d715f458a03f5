//! Small things that kernels share.

use std::arch::x86_64::*;

/// Sums of the lanes of four vectors.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum_lanes(v: [__m256i; 4]) -> __m128i {
    let ab = _mm256_hadd_epi32(v[0], v[1]);
    let cd = _mm256_hadd_epi32(v[2], v[3]);
    let abcd = _mm256_hadd_epi32(ab, cd);
    _mm_add_epi32(
        _mm256_castsi256_si128(abcd),
        _mm256_extracti128_si256::<1>(abcd),
    )
}

/// Sums of the lanes of four half vectors.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum_half_lanes(v: [__m128i; 4]) -> __m128i {
    _mm_hadd_epi32(_mm_hadd_epi32(v[0], v[1]), _mm_hadd_epi32(v[2], v[3]))
}

/// 16 bytes of nibbles: the low ones, then the high ones.
///
/// # Safety
/// `p` is valid for 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn nibbles_32(p: *const u8) -> __m256i {
    // SAFETY: by the caller.
    let packed = unsafe { _mm_loadu_si128(p.cast()) };
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Four times 16 bytes of nibbles, `stride` bytes apart: all low ones, then the high ones.
///
/// # Safety
/// `p` is valid for them.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn nibbles_512(p: *const u8, stride: usize) -> [__m512i; 2] {
    // SAFETY: by the caller.
    let packed = unsafe { super::fours::sixteen_of([0, 1, 2, 3].map(|i| p.add(i * stride))) };
    let mask = _mm512_set1_epi8(15);
    [
        _mm512_and_si512(packed, mask),
        _mm512_and_si512(_mm512_srli_epi32::<4>(packed), mask),
    ]
}

/// 32 bits to 32 bytes of 0 or -1.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn bits_to_bytes(bits: u32) -> __m256i {
    let spread = _mm256_set_epi64x(
        0x0303_0303_0303_0303,
        0x0202_0202_0202_0202,
        0x0101_0101_0101_0101,
        0,
    );
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), spread);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit)
}

/// Scales and minimums of `q4_K` and `q5_K`, eight bytes each. `w` is the beginning of a block.
///
/// With whole numbers, because vector units are what there is least of.
///
/// # Safety
/// `w` is valid for 16 bytes.
#[inline(always)]
pub(super) unsafe fn k_scales(w: *const u8) -> (u64, u64) {
    // SAFETY: by the caller.
    let [a, b, c] = [4, 8, 12].map(|i| unsafe { u64::from(u32::from_le_bytes(bytes(w.add(i)))) });
    let upper = |x: u64| x >> 2 & 0x3030_3030;
    let join =
        |first: u64, second: u64| first & 0x3f3f_3f3f | (second & 0x0f0f_0f0f | upper(first)) << 32;
    (join(a, c), join(b, c >> 4))
}

/// Reads four half-precision numbers.
///
/// # Safety
/// The pointers are valid for two bytes each.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn f16x4(p: [*const u8; 4]) -> __m128 {
    // SAFETY: by the caller.
    from_halves(p.map(|p| unsafe { p.cast::<u16>().read_unaligned() }))
}

/// Four half-precision numbers.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn from_halves(bits: [u16; 4]) -> __m128 {
    let h = bits.map(u64::from);
    let bits = h[0] | h[1] << 16 | h[2] << 32 | h[3] << 48;
    _mm_cvtph_ps(_mm_cvtsi64_si128(bits as i64))
}

/// Reads `N` bytes.
///
/// # Safety
/// `p` is valid for them.
#[inline(always)]
pub(super) unsafe fn bytes<const N: usize>(p: *const u8) -> [u8; N] {
    // SAFETY: by the caller.
    unsafe { p.cast::<[u8; N]>().read_unaligned() }
}
