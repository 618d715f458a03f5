//! Vectors of whole numbers.

use super::bytes::turned;
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

/// Bytes 0 and 2 of lanes as 16-bit numbers, and bytes 1 and 3.
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned(v: __m256i) -> [__m256i; 2] {
    let low = _mm256_and_si256(v, _mm256_set1_epi16(255));
    [low, _mm256_srli_epi16::<8>(v)]
}

/// The same with their signs.
#[inline]
#[target_feature(enable = "avx2")]
fn signed(v: __m256i) -> [__m256i; 2] {
    let low = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v));
    [low, _mm256_srai_epi16::<8>(v)]
}

/// Sixteen products, rounded.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn rounded(x: *const f32, y: *const f32) -> [__m256i; 2] {
    let mut v = [_mm256_setzero_si256(); 2];
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: by the caller.
        let (x, y) = unsafe { (_mm256_loadu_ps(x.add(8 * i)), _mm256_loadu_ps(y.add(8 * i))) };
        *v = _mm256_castps_si256(_mm256_fmadd_ps(x, y, _mm256_set1_ps(ROUND)));
    }
    v
}

/// The lowest bytes of lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn low_bytes([a, b]: [__m256i; 2]) -> __m128i {
    let low = _mm256_set1_epi32(255);
    let v = _mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    let v = _mm256_permute4x64_epi64::<0b11_01_10_00>(v);
    _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
}

/// Sixteen bytes of each of four places.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn four(p: [*const u8; 4]) -> __m512i {
    // SAFETY: by the caller.
    let [a, b, c, d] = p.map(|p| unsafe { _mm_loadu_si128(p.cast()) });
    let v = _mm512_castsi128_si512(a);
    let v = _mm512_mask_broadcast_i32x4(v, 0xf0, b);
    let v = _mm512_mask_broadcast_i32x4(v, 0xf00, c);
    _mm512_mask_broadcast_i32x4(v, 0xf000, d)
}

#[inline]
#[target_feature(enable = "avx2")]
fn block(bytes: &[i8; 16]) -> __m128i {
    // SAFETY: sixteen bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

// SAFETY: the functions are what they are called.
unsafe impl<D: Dots> Words for Words256<D> {
    const N: usize = 8;
    const PLANES: bool = D::OFFSET != 0;
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
    unsafe fn store(p: *mut u8, v: __m256i) {
        // SAFETY: by the caller.
        unsafe { _mm256_storeu_si256(p.cast(), v) };
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn columns(p: *const u8, row: usize) -> [__m256i; 4] {
        let mut z = [_mm256_setzero_si256(); 4];
        for (i, z) in z.iter_mut().enumerate() {
            // SAFETY: by the caller.
            unsafe {
                let a = _mm_loadu_si128(p.add(i * row).cast());
                let b = _mm_loadu_si128(p.add((4 + i) * row).cast());
                *z = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
            }
        }
        turned!(
            z,
            _mm256_unpacklo_epi32,
            _mm256_unpackhi_epi32,
            _mm256_unpacklo_epi64,
            _mm256_unpackhi_epi64
        )
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn rows([a, b, c, d]: [*const u8; 4]) -> __m256i {
        // SAFETY: by the caller.
        let [a, b, c, d] = unsafe {
            [
                _mm_loadl_epi64(a.cast()),
                _mm_loadl_epi64(b.cast()),
                _mm_loadl_epi64(c.cast()),
                _mm_loadl_epi64(d.cast()),
            ]
        };
        let (ab, cd) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
        let (low, high) = (_mm_unpacklo_epi16(ab, cd), _mm_unpackhi_epi16(ab, cd));
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
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
    unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
        _mm256_xor_si256(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add8(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi8(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(a, b)
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
    #[inline(always)]
    unsafe fn dot_words(sums: [__m256i; 2], u: __m256i, x: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: by the caller.
        unsafe {
            if Self::PLANES {
                return [D::bytes(sums[0], u, x[0]), D::bytes(sums[1], u, x[1])];
            }
            let [even, odd] = unsigned(u);
            [D::words(sums[0], even, x[0]), D::words(sums[1], odd, x[1])]
        }
    }
    #[inline(always)]
    unsafe fn join([a, b]: [__m256i; 2]) -> __m256i {
        // SAFETY: by the caller.
        unsafe {
            let a = if Self::PLANES { Self::shl::<8>(a) } else { a };
            Self::add(a, b)
        }
    }
    #[inline(always)]
    unsafe fn dot_signed(sums: [__m256i; 2], x: [__m256i; 2], s: __m256i) -> [__m256i; 2] {
        // SAFETY: by the caller.
        unsafe {
            if Self::PLANES {
                return [D::bytes(sums[0], x[0], s), D::bytes(sums[1], x[1], s)];
            }
            let [even, odd] = signed(s);
            [D::words(sums[0], even, x[0]), D::words(sums[1], odd, x[1])]
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes(sum: __m256i, u: __m256i, s: __m256i) -> __m256i {
        // SAFETY: by the caller.
        unsafe { D::bytes(sum, u, s) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn round_bytes(x: *const f32, y: *const f32, to: &mut [u32; 4]) {
        // SAFETY: by the caller; sixteen bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), low_bytes(rounded(x, y))) };
    }
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn round_words(x: *const f32, y: *const f32, to: &mut [[u32; 2]; 4]) {
        // SAFETY: by the caller.
        let [a, b] = unsafe { rounded(x, y) };
        let to = to.as_mut_ptr().cast::<__m128i>();
        if Self::PLANES {
            let upper = [a, b].map(|v| _mm256_srli_epi32::<8>(v));
            let (upper, lower) = (low_bytes(upper), low_bytes([a, b]));
            // SAFETY: twice sixteen bytes.
            unsafe {
                _mm_storeu_si128(to, _mm_unpacklo_epi32(upper, lower));
                _mm_storeu_si128(to.add(1), _mm_unpackhi_epi32(upper, lower));
            }
            return;
        }
        for (i, v) in [a, b].into_iter().enumerate() {
            let second = _mm256_slli_epi32::<16>(_mm256_shuffle_epi32::<0b11_10_11_10>(v));
            let pairs = _mm256_blend_epi16::<0b1010_1010>(v, second);
            let pairs = _mm256_permute4x64_epi64::<0b10_00>(pairs);
            // SAFETY: twice sixteen bytes.
            unsafe { _mm_storeu_si128(to.add(i), _mm256_castsi256_si128(pairs)) };
        }
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
    unsafe fn add_products(to: *mut f32, v: __m256i, d: *const f32, a: f32) {
        // SAFETY: by the caller.
        unsafe {
            let old = _mm256_loadu_ps(to);
            let d = _mm256_mul_ps(_mm256_loadu_ps(d), _mm256_set1_ps(a));
            _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), d, old));
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
    const PLANES: bool = true;
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
    unsafe fn store(p: *mut u8, v: __m512i) {
        // SAFETY: by the caller.
        unsafe { _mm512_storeu_si512(p.cast(), v) };
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn columns(p: *const u8, row: usize) -> [__m512i; 4] {
        let mut z = [_mm512_setzero_si512(); 4];
        for (i, z) in z.iter_mut().enumerate() {
            // SAFETY: by the caller.
            *z = unsafe { four([0, 4, 8, 12].map(|t| p.add((t + i) * row))) };
        }
        turned!(
            z,
            _mm512_unpacklo_epi32,
            _mm512_unpackhi_epi32,
            _mm512_unpacklo_epi64,
            _mm512_unpackhi_epi64
        )
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn rows(p: [*const u8; 4]) -> __m512i {
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        // SAFETY: by the caller.
        let mut v = unsafe { four(p) };
        // Without it the compiler takes reading and moving apart and puts them together anew, in twice as many instructions.
        // SAFETY: the instruction reads and writes registers alone.
        unsafe {
            asm!("vpermd {0}, {1}, {0}", inout(zmm_reg) v, in(zmm_reg) order, options(pure, nomem, nostack, preserves_flags));
            Self::turn(v)
        }
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
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        _mm512_xor_si512(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn add8(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi8(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_words(sums: [__m512i; 2], u: __m512i, x: [__m512i; 2]) -> [__m512i; 2] {
        [
            _mm512_dpbusd_epi32(sums[0], u, x[0]),
            _mm512_dpbusd_epi32(sums[1], u, x[1]),
        ]
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn join([a, b]: [__m512i; 2]) -> __m512i {
        _mm512_add_epi32(_mm512_slli_epi32::<8>(a), b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_signed(sums: [__m512i; 2], x: [__m512i; 2], s: __m512i) -> [__m512i; 2] {
        [
            _mm512_dpbusd_epi32(sums[0], x[0], s),
            _mm512_dpbusd_epi32(sums[1], x[1], s),
        ]
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn dot_bytes(sum: __m512i, u: __m512i, s: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(sum, u, s)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn round_bytes(x: *const f32, y: *const f32, to: &mut [u32; 4]) {
        // SAFETY: by the caller.
        let (x, y) = unsafe { (_mm512_loadu_ps(x), _mm512_loadu_ps(y)) };
        let v = _mm512_castps_si512(_mm512_fmadd_ps(x, y, _mm512_set1_ps(ROUND)));
        // SAFETY: sixteen bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v)) };
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn round_words(x: *const f32, y: *const f32, to: &mut [[u32; 2]; 4]) {
        // SAFETY: by the caller.
        let (x, y) = unsafe { (_mm512_loadu_ps(x), _mm512_loadu_ps(y)) };
        let v = _mm512_castps_si512(_mm512_fmadd_ps(x, y, _mm512_set1_ps(ROUND)));
        let upper = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(v));
        let lower = _mm512_cvtepi32_epi8(v);
        let to = to.as_mut_ptr().cast::<__m128i>();
        // SAFETY: twice sixteen bytes.
        unsafe {
            _mm_storeu_si128(to, _mm_unpacklo_epi32(upper, lower));
            _mm_storeu_si128(to.add(1), _mm_unpackhi_epi32(upper, lower));
        }
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
    unsafe fn add_products(to: *mut f32, v: __m512i, d: *const f32, a: f32) {
        // SAFETY: by the caller.
        unsafe {
            let old = _mm512_loadu_ps(to);
            let d = _mm512_mul_ps(_mm512_loadu_ps(d), _mm512_set1_ps(a));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), d, old));
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
