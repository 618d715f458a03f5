//! Quantization of activations.

use crate::activations::{X32, X256};
use lemma_quant::F16;
use std::arch::x86_64::*;

/// The largest and the smallest value of lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn fold(max: __m256, min: __m256) -> (f32, f32) {
    let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
    let min = _mm_min_ps(_mm256_castps256_ps128(min), _mm256_extractf128_ps::<1>(min));
    let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    let min = _mm_min_ps(min, _mm_movehl_ps(min, min));
    let max = _mm_max_ss(max, _mm_shuffle_ps::<1>(max, max));
    let min = _mm_min_ss(min, _mm_shuffle_ps::<1>(min, min));
    (_mm_cvtss_f32(max), _mm_cvtss_f32(min))
}

/// 32 integers that fit bytes, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn pack(v: [__m256i; 4]) -> __m256i {
    let low = _mm256_packs_epi32(v[0], v[1]);
    let high = _mm256_packs_epi32(v[2], v[3]);
    // Packing works within halves; this puts the pieces in order.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order)
}

/// Sums of eight neighbouring bytes, in the four 64-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_8(q: __m256i) -> __m256i {
    let unsigned = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
    let sums = _mm256_sad_epu8(unsigned, _mm256_setzero_si256());
    _mm256_sub_epi64(sums, _mm256_set1_epi64x(8 * 128))
}

/// See `activations::quantize_32`.
#[target_feature(enable = "avx2")]
pub(crate) fn quantize_32(x: &[f32; 32], y: &mut X32) {
    // SAFETY: 32 values in four vectors.
    let x = [0, 8, 16, 24].map(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(i)) });
    let (mut max, mut min) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for x in x {
        // Of a NaN and a number, the second operand is the result.
        max = _mm256_max_ps(x, max);
        min = _mm256_min_ps(x, min);
    }
    let (max, min) = fold(max, min);
    let d = (if -min > max { -min } else { max }) / 127.0;
    let id = _mm256_set1_ps(if d == 0.0 { 0.0 } else { 1.0 / d });
    let sign = _mm256_set1_ps(-0.0);
    let half = _mm256_set1_ps(0.499_999_97);
    let (lowest, highest) = (_mm256_set1_ps(-127.0), _mm256_set1_ps(127.0));
    let q = pack(x.map(|x| {
        let v = _mm256_mul_ps(x, id);
        let v = _mm256_add_ps(v, _mm256_or_ps(_mm256_and_ps(v, sign), half));
        _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(v, lowest), highest))
    }));
    // SAFETY: 32 bytes.
    unsafe { _mm256_storeu_si256(y.q.as_mut_ptr().cast(), q) };
    let sums = sums_of_8(q);
    let sums = _mm_add_epi64(
        _mm256_castsi256_si128(sums),
        _mm256_extracti128_si256::<1>(sums),
    );
    y.sum = (_mm_extract_epi64::<0>(sums) + _mm_extract_epi64::<1>(sums)) as i32;
    y.minus_sum = -128 * y.sum;
    y.d = F16::from_f32(d).to_f32();
    y.s = F16::from_f32(y.sum as f32 * d).to_f32();
}

/// See `activations::quantize_256`.
#[target_feature(enable = "avx2")]
pub(crate) fn quantize_256(x: &[f32; 256], y: &mut X256) {
    let zero = _mm256_setzero_ps();
    let (mut max, mut min) = ([zero; 2], [zero; 2]);
    for i in 0..16 {
        for j in 0..2 {
            // SAFETY: 256 values in 32 vectors.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(16 * i + 8 * j)) };
            max[j] = _mm256_max_ps(x, max[j]);
            min[j] = _mm256_min_ps(x, min[j]);
        }
    }
    let (max, min) = fold(_mm256_max_ps(max[0], max[1]), _mm256_min_ps(min[0], min[1]));
    let extreme = crate::activations::extreme(x, max, min);
    if extreme == 0.0 {
        *y = X256::ZERO;
        return;
    }
    let iscale = -127.0 / extreme;
    y.d = 1.0 / iscale;
    let iscale = _mm256_set1_ps(iscale);
    let (lowest, highest) = (_mm256_set1_ps(-128.0), _mm256_set1_ps(127.0));
    for i in 0..8 {
        let v = [0, 8, 16, 24].map(|j| {
            // SAFETY: 256 values in 32 vectors.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr().add(32 * i + j)) };
            let v = _mm256_max_ps(_mm256_mul_ps(x, iscale), lowest);
            _mm256_cvtps_epi32(_mm256_min_ps(v, highest))
        });
        let q = pack(v);
        // SAFETY: 256 bytes in eight vectors.
        unsafe { _mm256_storeu_si256(y.q.as_mut_ptr().add(32 * i).cast(), q) };
        let sums = sums_of_8(q);
        let sums = _mm256_add_epi64(sums, _mm256_srli_si256::<8>(sums));
        y.sum16[2 * i] = _mm256_extract_epi16::<0>(sums) as i16;
        y.sum16[2 * i + 1] = _mm256_extract_epi16::<8>(sums) as i16;
        y.sum32[i] = y.sum16[2 * i] + y.sum16[2 * i + 1];
    }
}
