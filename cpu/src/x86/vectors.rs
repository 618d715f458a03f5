//! Vectors of f32.

use crate::simd::Simd;
use std::arch::x86_64::*;

/// Eight lanes.
pub(crate) struct Avx2;

/// Sixteen lanes.
pub(crate) struct Avx512;

/// `e^x` by the steps of `lanes::exp`, for `x` between -87.4 and 0.
macro_rules! exp {
    ($x:expr, $set:ident, $fma:ident, $mul:ident, $add:ident, $sub:ident, $scale:expr) => {{
        let x = $x;
        let shift = $set(12_582_912.0);
        let t = $fma(x, $set(std::f32::consts::LOG2_E), shift);
        let n = $sub(t, shift);
        let r = $fma(n, $set(-0.693_359_4), x);
        let r = $fma(n, $set(2.121_944_4e-4), r);
        let p = $fma($set(1.987_569_2e-4), r, $set(1.398_199_9e-3));
        let p = $fma(p, r, $set(8.333_452e-3));
        let p = $fma(p, r, $set(4.166_579_6e-2));
        let p = $fma(p, r, $set(1.666_666_5e-1));
        let p = $fma(p, r, $set(0.5));
        let p = $add($fma(p, $mul(r, r), r), $set(1.0));
        $scale(p, t)
    }};
}

// SAFETY: the functions are what they are called.
unsafe impl Simd for Avx2 {
    const N: usize = 8;
    type V = __m256;
    type U = __m256i;
    type Fours = __m256;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn splat(a: f32) -> __m256 {
        _mm256_set1_ps(a)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: by the caller.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: by the caller.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        // SAFETY: by the caller.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        // SAFETY: by the caller.
        let v = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(p.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_u32(p: *const u32) -> __m256i {
        // SAFETY: by the caller.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn code<const BITS: u32>(v: __m256i, shift: u32) -> __m256 {
        let v = _mm256_srl_epi32(v, _mm_cvtsi32_si128(shift.cast_signed()));
        if BITS > 3 {
            return _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32((1 << BITS) - 1)));
        }
        // A table of 8 numbers is asked with the lowest bits alone, so nothing has to be masked or converted.
        let numbers: [f32; 8] = std::array::from_fn(|i| (i & ((1 << BITS) - 1)) as f32);
        // SAFETY: the table has as many numbers.
        unsafe { _mm256_permutevar8x32_ps(_mm256_loadu_ps(numbers.as_ptr()), v) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        _mm256_max_ps(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sum(v: __m256) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn largest(v: __m256) -> f32 {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fours(v: [__m256; 4]) -> __m256 {
        // Each step adds lanes of two vectors and keeps both sums apart. Lane 4 i + t is part of the sum of vector t.
        // There are more units that blend than units that shuffle.
        let [a, b] = [[v[0], v[1]], [v[2], v[3]]].map(|[x, y]| {
            _mm256_add_ps(
                _mm256_blend_ps::<0b1100_1100>(x, y),
                _mm256_shuffle_ps::<0b01_00_11_10>(x, y),
            )
        });
        _mm256_add_ps(
            _mm256_shuffle_ps::<0b10_00_10_00>(a, b),
            _mm256_shuffle_ps::<0b11_01_11_01>(a, b),
        )
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn sums(fours: [__m256; 4], to: &mut [f32; 16]) {
        for half in 0..2 {
            let (x, y) = (fours[2 * half], fours[2 * half + 1]);
            let low = _mm256_permute2f128_ps::<0x20>(x, y);
            let high = _mm256_permute2f128_ps::<0x31>(x, y);
            // SAFETY: eight of sixteen values.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr().add(8 * half), _mm256_add_ps(low, high));
            }
        }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // To the second level, which measured better than the first: what is in use stays there.
        // SAFETY: a prefetch cannot fault, and every processor of this architecture has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn exp(x: __m256) -> __m256 {
        let lowest = _mm256_set1_ps(-87.3);
        let keep = _mm256_cmp_ps::<_CMP_GE_OQ>(x, lowest);
        let scale = |p, t| {
            // n sits in the low bits of t; 2^n times p is n added to the exponent of p.
            let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n))
        };
        let y = exp!(
            _mm256_max_ps(x, lowest),
            _mm256_set1_ps,
            _mm256_fmadd_ps,
            _mm256_mul_ps,
            _mm256_add_ps,
            _mm256_sub_ps,
            scale
        );
        _mm256_and_ps(y, keep)
    }
}

// SAFETY: the functions are what they are called.
unsafe impl Simd for Avx512 {
    const N: usize = 16;
    type V = __m512;
    type U = __m512i;
    type Fours = __m512;

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn splat(a: f32) -> __m512 {
        _mm512_set1_ps(a)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: by the caller.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: by the caller.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        // SAFETY: by the caller.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        // SAFETY: by the caller.
        let v = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(p.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load_u32(p: *const u32) -> __m512i {
        // SAFETY: by the caller.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn code<const BITS: u32>(v: __m512i, shift: u32) -> __m512 {
        // A table of 16 numbers is asked with the lowest bits alone, so nothing has to be masked or converted.
        let numbers: [f32; 16] = std::array::from_fn(|i| (i & ((1 << BITS) - 1)) as f32);
        let v = _mm512_srl_epi32(v, _mm_cvtsi32_si128(shift.cast_signed()));
        // SAFETY: the table has as many numbers.
        unsafe { _mm512_permutexvar_ps(v, _mm512_loadu_ps(numbers.as_ptr())) }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn sum(v: __m512) -> f32 {
        let (a, b) = (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm256_add_ps(a, b);
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn largest(v: __m512) -> f32 {
        let (a, b) = (_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm256_max_ps(a, b);
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn fours(v: [__m512; 4]) -> __m512 {
        // Each step adds lanes of two vectors and keeps both sums apart. Lane 4 i + t is part of the sum of vector t.
        // There are more units that blend than units that shuffle.
        let [a, b] = [[v[0], v[1]], [v[2], v[3]]].map(|[x, y]| {
            _mm512_add_ps(
                _mm512_mask_blend_ps(0xcccc, x, y),
                _mm512_shuffle_ps::<0b01_00_11_10>(x, y),
            )
        });
        _mm512_add_ps(
            _mm512_shuffle_ps::<0b10_00_10_00>(a, b),
            _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
        )
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn sums(fours: [__m512; 4], to: &mut [f32; 16]) {
        let [a, b] = [[fours[0], fours[1]], [fours[2], fours[3]]].map(|[x, y]| {
            _mm512_add_ps(
                _mm512_mask_blend_ps(0xff00, x, y),
                _mm512_shuffle_f32x4::<0b01_00_11_10>(x, y),
            )
        });
        let all = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
        );
        // SAFETY: sixteen values.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), all) };
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // To the second level, which measured better than the first: what is in use stays there.
        // SAFETY: a prefetch cannot fault, and every processor of this architecture has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn exp(x: __m512) -> __m512 {
        let lowest = _mm512_set1_ps(-87.3);
        let keep = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, lowest);
        let scale = |p, t| {
            // n sits in the low bits of t; 2^n times p is n added to the exponent of p.
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n))
        };
        let y = exp!(
            _mm512_max_ps(x, lowest),
            _mm512_set1_ps,
            _mm512_fmadd_ps,
            _mm512_mul_ps,
            _mm512_add_ps,
            _mm512_sub_ps,
            scale
        );
        _mm512_maskz_mov_ps(keep, y)
    }
}
