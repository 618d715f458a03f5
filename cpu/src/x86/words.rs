//! Vectors of whole numbers.

use super::dots::{self, Dots};
use crate::words::{ROUND, Words};
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Eight lanes, with products of `D`.
pub(crate) struct Words256<D>(PhantomData<D>);

/// Sixteen lanes.
pub(crate) struct Words512;

/// With the products of AVX2.
pub(crate) type WordsAvx2 = Words256<dots::Avx2>;
/// With those of AVX-VNNI.
pub(crate) type WordsAvxVnni = Words256<dots::AvxVnni>;

/// What a block has of `turn`, and of `round_fours`: bytes 0 and 1 of two of its lanes, in all of them.
const TURN: [i8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
const FOURS: [[i8; 16]; 2] = [
    [0, 1, 8, 9, 0, 1, 8, 9, 0, 1, 8, 9, 0, 1, 8, 9],
    [4, 5, 12, 13, 4, 5, 12, 13, 4, 5, 12, 13, 4, 5, 12, 13],
];

/// The lower halves of lanes that are 8 apart.
const HALVES: [i16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 8 {
        (order[2 * i], order[2 * i + 1]) = (2 * i as i16, 2 * i as i16 + 16);
        i += 1;
    }
    order
};

#[inline]
#[target_feature(enable = "avx2")]
fn block(bytes: &[i8; 16]) -> __m128i {
    // SAFETY: sixteen bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

// SAFETY: the functions are what they are called.
unsafe impl<D: Dots> Words for Words256<D> {
    const N: usize = 8;
    type I = __m256i;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn splat(x: u32) -> __m256i {
        _mm256_set1_epi32(x.cast_signed())
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn load(p: *const u8) -> __m256i {
        // SAFETY: by the caller.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn turn(v: __m256i) -> __m256i {
        _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(block(&TURN)))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn shl<const BITS: u32>(v: __m256i) -> __m256i {
        _mm256_sll_epi32(v, _mm_cvtsi32_si128(BITS.cast_signed()))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn shr<const BITS: u32>(v: __m256i) -> __m256i {
        _mm256_srl_epi32(v, _mm_cvtsi32_si128(BITS.cast_signed()))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        _mm256_and_si256(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add16(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn dot(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: by the caller.
        unsafe { D::words_of_many(sum, a, b) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn round_fours(x: *const f32, y: *const f32) -> [__m256i; 2] {
        // SAFETY: by the caller.
        let (x, y) = unsafe { (_mm256_loadu_ps(x), _mm256_loadu_ps(y)) };
        let v = _mm256_castps_si256(_mm256_fmadd_ps(x, y, _mm256_set1_ps(ROUND)));
        let [a, b] = [block(&FOURS[0]), block(&FOURS[1])];
        [
            _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(a)),
            _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(b)),
        ]
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn round_halves(x: *const f32, y: *const f32, to: &mut [u32; 8]) {
        let mut v = [_mm256_setzero_si256(); 2];
        for (i, v) in v.iter_mut().enumerate() {
            // SAFETY: by the caller.
            let (x, y) = unsafe { (_mm256_loadu_ps(x.add(8 * i)), _mm256_loadu_ps(y.add(8 * i))) };
            *v = _mm256_castps_si256(_mm256_fmadd_ps(x, y, _mm256_set1_ps(ROUND)));
        }
        let v = _mm256_blend_epi16::<0b1010_1010>(v[0], _mm256_slli_epi32::<16>(v[1]));
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) };
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_scaled(to: *mut f32, v: __m256i, a: f32) {
        // SAFETY: by the caller.
        unsafe {
            let old = _mm256_loadu_ps(to);
            let new = _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(a), old);
            _mm256_storeu_ps(to, new);
        }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tokens(sums: [__m256i; 4], scale: f32, add: f32, to: &mut [f32; 16]) {
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let [a, b, c, d] = sums;
        for ([even, odd], to) in [[a, b], [c, d]].into_iter().zip(to.as_chunks_mut::<8>().0) {
            let low = _mm256_permute2x128_si256::<0x20>(even, odd);
            let high = _mm256_permute2x128_si256::<0x31>(even, odd);
            let v = _mm256_permutevar8x32_epi32(_mm256_add_epi32(low, high), order);
            let v = _mm256_cvtepi32_ps(v);
            let v = _mm256_fmadd_ps(v, _mm256_set1_ps(scale), _mm256_set1_ps(add));
            // SAFETY: eight values.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) };
        }
    }
}

// SAFETY: the functions are what they are called.
unsafe impl Words for Words512 {
    const N: usize = 16;
    type I = __m512i;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn splat(x: u32) -> __m512i {
        _mm512_set1_epi32(x.cast_signed())
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(p: *const u8) -> __m512i {
        // SAFETY: by the caller.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn turn(v: __m512i) -> __m512i {
        _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(block(&TURN)))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn shl<const BITS: u32>(v: __m512i) -> __m512i {
        _mm512_slli_epi32::<BITS>(v)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn shr<const BITS: u32>(v: __m512i) -> __m512i {
        _mm512_srli_epi32::<BITS>(v)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn add16(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi16(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        let mut sum = sum;
        // The compiler would make two instructions of it, see `Dots::words_of_many`.
        // SAFETY: the instruction reads and writes registers alone.
        unsafe {
            asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b, options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn round_fours(x: *const f32, y: *const f32) -> [__m512i; 2] {
        // SAFETY: by the caller.
        let (x, y) = unsafe { (_mm512_loadu_ps(x), _mm512_loadu_ps(y)) };
        let v = _mm512_castps_si512(_mm512_fmadd_ps(x, y, _mm512_set1_ps(ROUND)));
        let [a, b] = [block(&FOURS[0]), block(&FOURS[1])];
        [
            _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(a)),
            _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(b)),
        ]
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn round_halves(x: *const f32, y: *const f32, to: &mut [u32; 8]) {
        // SAFETY: by the caller.
        let (x, y) = unsafe { (_mm512_loadu_ps(x), _mm512_loadu_ps(y)) };
        let v = _mm512_castps_si512(_mm512_fmadd_ps(x, y, _mm512_set1_ps(ROUND)));
        // SAFETY: 32 numbers.
        let order = unsafe { _mm512_loadu_si512(HALVES.as_ptr().cast()) };
        let v = _mm512_castsi512_si256(_mm512_permutexvar_epi16(order, v));
        // SAFETY: eight lanes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), v) };
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn add_scaled(to: *mut f32, v: __m512i, a: f32) {
        // SAFETY: by the caller.
        unsafe {
            let old = _mm512_loadu_ps(to);
            let new = _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(a), old);
            _mm512_storeu_ps(to, new);
        }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn tokens(sums: [__m512i; 4], scale: f32, add: f32, to: &mut [f32; 16]) {
        // Each step adds blocks of two vectors and keeps both sums apart.
        let [a, b, c, d] = sums;
        let [a, b] = [[a, b], [c, d]].map(|[x, y]| {
            _mm512_add_epi32(
                _mm512_mask_blend_epi32(0xff00, x, y),
                _mm512_shuffle_i32x4::<0b01_00_11_10>(x, y),
            )
        });
        let all = _mm512_add_epi32(
            _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
        );
        let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        let v = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, all));
        let v = _mm512_fmadd_ps(v, _mm512_set1_ps(scale), _mm512_set1_ps(add));
        // SAFETY: sixteen values.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) };
    }
}
