//! A few rows with one token, on AVX-512: what the rows of four have in common is done for all of them at once.
//!
//! Vectors of 512 bits keep two units busy, so what counts is how many instructions a block takes beside those that
//! multiply. Scales of four rows share vectors; so do the sums of lanes, and, where blocks have 32 values, those of
//! four blocks. Sums are those of `rows`, bit for bit.

use super::dots::Avx512;
use super::patterns_512;
use super::rows::{Rows32, avx512, offset};
use super::runs::Runs;
use super::{Form, Rows, RowsFn};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::activations::{X32, X32x4, X256};
use crate::kernels::run;
use lemma_quant::GgmlType;
use std::arch::x86_64::*;

/// What four blocks of 256 values, one of each row, come to.
pub(super) struct Dots {
    /// Sums of `scale * q * x`.
    pub(super) sums: __m128i,
    /// Scales of those.
    pub(super) d: __m128,
    /// Sums of `minimum * sum of x`, and their scales, where there are minimums.
    pub(super) mins: Option<(__m128i, __m128)>,
}

/// What is special to a format of 256 values.
///
/// # Safety
/// `SIZE` is the size of a block, and functions read nothing outside of it.
pub(super) unsafe trait Four256 {
    /// Bytes of a block.
    const SIZE: usize;

    /// Multiplies a block of each row.
    ///
    /// # Safety
    /// Pointers are valid for a block, and the instruction set is available.
    unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots;
}

/// What is special to a format of 32 values.
///
/// # Safety
/// Functions read nothing outside of four blocks.
pub(super) unsafe trait Four32: Rows32 {
    /// Quants (plus [`offset`]) of four blocks of a row: the first 16 of each block, then the others.
    ///
    /// # Safety
    /// `w` is valid for four blocks, and the instruction set is available.
    unsafe fn quants(w: *const u8) -> [__m512i; 2];

    /// The scales `d` and (where there are minimums) `m` of four blocks of four rows: `[block][row]`.
    ///
    /// # Safety
    /// Pointers are valid for four blocks, and the instruction set is available.
    unsafe fn all_scales(w: [*const u8; 4]) -> (__m512, __m512);
}

pub(super) fn kernel(ty: GgmlType) -> Option<(Form, RowsFn)> {
    Some(match ty {
        GgmlType::Q4_0 => (Form::X32, rows_32::<q4_0::rows::Q4_0> as _),
        GgmlType::Q4_1 => (Form::X32, rows_32::<q4_0::rows::Q4_1> as _),
        GgmlType::Q5_0 => (Form::X32, rows_32::<q5_0::rows::Q5_0> as _),
        GgmlType::Q5_1 => (Form::X32, rows_32::<q5_0::rows::Q5_1> as _),
        GgmlType::Q8_0 => (Form::X32, rows_32::<q8_0::rows::Q8_0> as _),
        GgmlType::IQ4_NL => (Form::X32, rows_32::<iq4_nl::rows::IQ4NL> as _),
        GgmlType::MXFP4 => (Form::X32, rows_32::<mxfp4::rows::MXFP4> as _),
        GgmlType::Q2_K => (Form::X256, avx512::rows_256::<q2_k::rows::Q2K> as _),
        GgmlType::Q3_K => (Form::X256, avx512::rows_256::<q3_k::rows::Q3K> as _),
        GgmlType::Q4_K => (Form::X256, rows_256::<q4_k::avx512::Q4K> as _),
        GgmlType::Q5_K => (Form::X256, rows_256::<q5_k::avx512::Q5K> as _),
        GgmlType::Q6_K => (Form::X256, rows_256::<q6_k::avx512::Q6K> as _),
        GgmlType::IQ4_XS => (Form::X256, rows_256::<iq4_xs::avx512::IQ4XS> as _),
        _ => return patterns_512::kernel(ty).or_else(|| avx512::patterns(ty)),
    })
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn rows_256<F: Four256>(job: &Rows<'_>, out: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe { four_rows::<F>(job, out) }
}

/// Multiplies rows of blocks of 256 values, four at a time. To be compiled for what `F` asks for.
///
/// # Safety
/// See [`RowsFn`].
#[inline(always)]
pub(super) unsafe fn four_rows<F: Four256>(job: &Rows<'_>, out: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe {
        let x: &[X256] = std::slice::from_raw_parts(job.x.cast(), job.n_blocks);
        let mut runs = Runs::new(job, out.len());
        for i in 0..run(out.len()) {
            let mut at = i * job.row_size;
            let mut acc = _mm_setzero_ps();
            for x in x {
                let dots = F::dots(runs.at(at, F::SIZE), x);
                let dx = _mm_set1_ps(x.d);
                acc = _mm_fmadd_ps(_mm_cvtepi32_ps(dots.sums), _mm_mul_ps(dots.d, dx), acc);
                if let Some((sums, dmin)) = dots.mins {
                    acc = _mm_fnmadd_ps(_mm_cvtepi32_ps(sums), _mm_mul_ps(dmin, dx), acc);
                }
                at += F::SIZE;
            }
            runs.store(i, acc, out);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn rows_32<F: Four32>(job: &Rows<'_>, out: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe {
        let n = job.n_blocks / 4;
        let x: &[X32x4] = std::slice::from_raw_parts(job.x.cast(), n);
        let rest: &[X32] =
            std::slice::from_raw_parts(job.x.cast::<X32>().add(4 * n), job.n_blocks % 4);
        let mut runs = Runs::new(job, out.len());
        for i in 0..run(out.len()) {
            let mut at = i * job.row_size;
            let mut acc = _mm_setzero_ps();
            for x in x {
                acc = four_blocks::<F>(runs.at(at, 4 * F::SIZE), x, acc);
                at += 4 * F::SIZE;
            }
            for x in rest {
                acc = avx512::block_32::<F>(runs.at(at, F::SIZE), x, acc);
                at += F::SIZE;
            }
            runs.store(i, acc, out);
        }
    }
}

/// Adds the products of four blocks of each row to `acc`, one block after the other.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn four_blocks<F: Four32>(w: [*const u8; 4], x: &X32x4, mut acc: __m128) -> __m128 {
    // SAFETY: by the caller; `x` has 64 bytes of each half, and four numbers of each kind.
    unsafe {
        let halves =
            [&x.low, &x.high].map(|half| _mm512_loadu_si512(half.as_ptr().cast::<__m512i>()));
        let mut sums = [_mm512_setzero_si512(); 4];
        for (sums, w) in sums.iter_mut().zip(w) {
            for (q, x) in F::quants(w).into_iter().zip(halves) {
                *sums = _mm512_dpbusd_epi32(*sums, q, x);
            }
        }
        let mut sums = lanes_of_rows(sums);
        let block = quarter_numbers();
        let spread =
            |p: *const f32| _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_loadu_ps(p)));
        if offset::<F, Avx512>() != 0 {
            let of_x = _mm512_castps_si512(spread(x.sum.as_ptr().cast()));
            let offset = _mm512_mullo_epi32(of_x, _mm512_set1_epi32(offset::<F, Avx512>()));
            sums = _mm512_sub_epi32(sums, offset);
        }
        let (d, m) = F::all_scales(w);
        let d = quarters(_mm512_mul_ps(d, spread(x.d.as_ptr())));
        let (sums, m) = (quarters(_mm512_cvtepi32_ps(sums)), quarters(m));
        for i in 0..4 {
            acc = _mm_fmadd_ps(sums[i], d[i], acc);
            if F::MINS {
                acc = _mm_fmadd_ps(m[i], _mm_set1_ps(x.s[i]), acc);
            }
        }
        acc
    }
}

/// The four parts of a vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(v: __m512) -> [__m128; 4] {
    [
        _mm512_castps512_ps128(v),
        _mm512_extractf32x4_ps::<1>(v),
        _mm512_extractf32x4_ps::<2>(v),
        _mm512_extractf32x4_ps::<3>(v),
    ]
}

/// 16 bytes from each of four places.
///
/// # Safety
/// The places are valid for them.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn sixteen_of(p: [*const u8; 4]) -> __m512i {
    // SAFETY: by the caller.
    let [a, b, c, d] = p.map(|p| unsafe { _mm_loadu_si128(p.cast()) });
    let v = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(v, c), d)
}

/// Sums of 32-bit lanes over every fourth: of row `r`, in lane `r` of each quarter those that were in that quarter.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes_of_rows(v: [__m512i; 4]) -> __m512i {
    let two = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (a, b) = (two(v[0], v[1]), two(v[2], v[3]));
    _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
}

/// Sums of all lanes of four vectors.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn sums_of_rows(v: [__m512i; 4]) -> __m128i {
    let v = lanes_of_rows(v);
    let v = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
    _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
}

/// Sums of the lanes of each quarter.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
pub(super) fn sums_of_quarters(v: __m512i) -> __m128i {
    let v = _mm512_add_epi32(v, _mm512_shuffle_epi32::<0b10_11_00_01>(v));
    let v = _mm512_add_epi32(v, _mm512_shuffle_epi32::<0b01_00_11_10>(v));
    firsts_of_quarters(v)
}

/// The first dword of each quarter.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn firsts_of_quarters(v: __m512i) -> __m128i {
    let first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm512_castsi512_si128(_mm512_permutexvar_epi32(first, v))
}

/// In each dword the number of its quarter.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn quarter_numbers() -> __m512i {
    _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)
}

/// Each quarter of a vector, four times.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn spread_quarters(v: __m512i) -> [__m512i; 4] {
    [
        _mm512_shuffle_i32x4::<0x00>(v, v),
        _mm512_shuffle_i32x4::<0x55>(v, v),
        _mm512_shuffle_i32x4::<0xaa>(v, v),
        _mm512_shuffle_i32x4::<0xff>(v, v),
    ]
}

/// Four dwords of each of four rows, number `at[i]` of the 64 bytes at `w` and of those `second` bytes further, as one array:
/// `[i][row]`.
///
/// # Safety
/// Both are valid for 64 bytes at each row.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn dwords(w: [*const u8; 4], second: usize, at: [i32; 4]) -> __m512i {
    let [a, b, c, d] = at;
    let at = _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a);
    let pick = w.map(|w| {
        // SAFETY: by the caller.
        let load = |at: usize| unsafe { _mm512_loadu_si512(w.add(at).cast()) };
        if second == 0 {
            _mm512_permutexvar_epi32(at, load(0))
        } else {
            _mm512_permutex2var_epi32(load(0), at, load(second))
        }
    });
    // A row stands in all columns, and is taken from its own.
    let v = _mm512_mask_mov_epi32(pick[0], 0x2222, pick[1]);
    let v = _mm512_mask_mov_epi32(v, 0x4444, pick[2]);
    _mm512_mask_mov_epi32(v, 0x8888, pick[3])
}

/// The upper half of every second four dwords, the lower half of the others.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn second_upper(v: __m512i) -> __m512i {
    _mm512_srlv_epi32(
        v,
        _mm512_set_epi32(16, 16, 16, 16, 0, 0, 0, 0, 16, 16, 16, 16, 0, 0, 0, 0),
    )
}

/// Half-precision numbers in the low halves of dwords.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn halves(v: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v))
}
