//! A few rows with one token whose blocks have 32 values, on instruction sets without AVX-512: two blocks at a time.
//!
//! Such a block is over after one or two products, so what counts is how many instructions it takes beside them. With a
//! block in each half of a vector, nothing crosses halves until sums are in order, and packed quants are taken apart for
//! two blocks at once; where quants are small, sums of neighbours stay in 16 bits until those of four rows are together.
//! Sums are those of `rows`, bit for bit.

use super::dots::{Avx2, AvxVnni, Dots};
use super::rows::{self, Rows32, offset};
use super::runs::Runs;
use super::{Form, Rows, RowsFn};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::activations::{X32, X32x4};
use crate::kernels::run;
use lemma_quant::GgmlType;
use std::arch::x86_64::*;

/// What is special to a format.
///
/// # Safety
/// Functions read nothing outside of two blocks.
pub(super) unsafe trait Two32: Rows32 {
    /// The largest quant there is; of signed ones the largest without its sign.
    const MAX: i32;

    /// Quants (plus [`offset`]) of two blocks of a row, one in each half: the first 16, then the others.
    ///
    /// # Safety
    /// `w` is valid for two blocks, and the instruction set is available.
    unsafe fn quants<P: Dots>(w: *const u8) -> [__m256i; 2];

    /// The scales `d` and (where there are minimums) `m` of two blocks of four rows: `[block][row]`. Most blocks begin with them.
    ///
    /// # Safety
    /// Pointers are valid for two blocks, and the instruction set is available.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn both_scales(w: [*const u8; 4]) -> (__m256, __m256) {
        // SAFETY: by the caller; blocks have more than 16 bytes.
        unsafe {
            match Self::MINS {
                true => pairs_of_two(w, Self::SIZE),
                false => (halves_of_two(w, Self::SIZE), _mm256_setzero_ps()),
            }
        }
    }
}

/// The largest activation.
const MAX_X: i32 = 127;

/// Whether sums of so many products fit 16 bits.
const fn fits<F: Two32>(n: i32) -> bool {
    n * F::MAX * MAX_X <= i16::MAX as i32
}

/// Sums of products.
///
/// # Safety
/// The function asks for the instruction set.
unsafe trait Sums: Dots {
    /// Those of two blocks of four rows: `[block][row]`. Activations lie as quants do.
    ///
    /// # Safety
    /// Pointers are valid for two blocks, and the instruction set is available.
    unsafe fn sums<F: Two32>(w: [*const u8; 4], x: [__m256i; 2]) -> __m256i;
}

// SAFETY: the function is what it is called.
unsafe impl Sums for Avx2 {
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sums<F: Two32>(w: [*const u8; 4], x: [__m256i; 2]) -> __m256i {
        // SAFETY: by the caller.
        let quants = |r: usize| unsafe { F::quants::<Self>(w[r]) };
        let [low, high] = x;
        let one = _mm256_set1_epi16(1);
        if F::SIGNED {
            // Magnitudes of activations serve all rows. Those of quants are needed where one of them is -128, which has no
            // opposite.
            let (u_low, u_high) = (_mm256_abs_epi8(low), _mm256_abs_epi8(high));
            let dwords = |q, x, u| {
                let words = if F::MAX < 128 {
                    _mm256_maddubs_epi16(u, _mm256_sign_epi8(q, x))
                } else {
                    _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q))
                };
                _mm256_madd_epi16(words, one)
            };
            let row = |r: usize| {
                let [a, b] = quants(r);
                _mm256_add_epi32(dwords(a, low, u_low), dwords(b, high, u_high))
            };
            // Written out, here and below: as a loop it goes through memory.
            return rows_of_dwords([row(0), row(1), row(2), row(3)]);
        }
        const {
            assert!(F::SIGNED || fits::<F>(8), "two rows share vectors of words");
        }
        let row = |r: usize| {
            let [a, b] = quants(r);
            _mm256_add_epi16(_mm256_maddubs_epi16(a, low), _mm256_maddubs_epi16(b, high))
        };
        let two = |a, b| _mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (a, b) = (two(row(0), row(1)), two(row(2), row(3)));
        if fits::<F>(16) {
            let (low, high) = (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
            _mm256_madd_epi16(_mm256_add_epi16(low, high), one)
        } else {
            let (a, b) = (_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
            _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
        }
    }
}

// SAFETY: the function is what it is called.
unsafe impl Sums for AvxVnni {
    #[inline]
    #[target_feature(enable = "avx2,avxvnni")]
    unsafe fn sums<F: Two32>(w: [*const u8; 4], x: [__m256i; 2]) -> __m256i {
        // SAFETY: by the caller.
        let row = |r: usize| unsafe {
            let [a, b] = F::quants::<Self>(w[r]);
            Self::bytes(Self::bytes(_mm256_setzero_si256(), a, x[0]), b, x[1])
        };
        rows_of_dwords([row(0), row(1), row(2), row(3)])
    }
}

/// Sums of the 32-bit lanes of each half: of row `r`, in lane `r` of that half.
#[inline]
#[target_feature(enable = "avx2")]
fn rows_of_dwords(v: [__m256i; 4]) -> __m256i {
    let two = |a, b| _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (a, b) = (two(v[0], v[1]), two(v[2], v[3]));
    _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b))
}

/// 16 bytes of each of two blocks of so many bytes.
///
/// # Safety
/// `p` is valid for them.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn sixteen_of_two(p: *const u8, size: usize) -> __m256i {
    // SAFETY: by the caller.
    let block = |at: usize| unsafe { _mm_loadu_si128(p.add(at).cast()) };
    _mm256_set_m128i(block(size), block(0))
}

/// 16 bytes of nibbles of each of two blocks of so many bytes: the low ones, then the high ones.
///
/// # Safety
/// `p` is valid for them.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn nibbles_of_two(p: *const u8, size: usize) -> [__m256i; 2] {
    // SAFETY: by the caller.
    let packed = unsafe { sixteen_of_two(p, size) };
    let mask = _mm256_set1_epi8(15);
    [
        _mm256_and_si256(packed, mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask),
    ]
}

/// The 16-bit numbers that blocks of four rows begin with, then those that follow them.
///
/// # Safety
/// Pointers are valid for 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn first_words(w: [*const u8; 4]) -> __m128i {
    // SAFETY: by the caller.
    let block = |r: usize| unsafe { _mm_loadu_si128(w[r].cast()) };
    let two = |a, b| _mm_unpacklo_epi16(block(a), block(b));
    _mm_unpacklo_epi32(two(0, 1), two(2, 3))
}

/// The half-precision numbers that two blocks of four rows begin with: `[block][row]`.
///
/// # Safety
/// Pointers are valid for 16 bytes of each block.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves_of_two(w: [*const u8; 4], size: usize) -> __m256 {
    // SAFETY: by the caller.
    let (a, b) = unsafe { (first_words(w), first_words(w.map(|w| w.add(size)))) };
    _mm256_cvtph_ps(_mm_unpacklo_epi64(a, b))
}

/// The pairs of half-precision numbers that two blocks of four rows begin with, `[block][row]`: the first of each, and the second.
///
/// # Safety
/// Pointers are valid for 16 bytes of each block.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn pairs_of_two(w: [*const u8; 4], size: usize) -> (__m256, __m256) {
    // SAFETY: by the caller.
    let (a, b) = unsafe { (first_words(w), first_words(w.map(|w| w.add(size)))) };
    (
        _mm256_cvtph_ps(_mm_unpacklo_epi64(a, b)),
        _mm256_cvtph_ps(_mm_unpackhi_epi64(a, b)),
    )
}

/// Two numbers, one in each half.
#[inline]
#[target_feature(enable = "avx2")]
fn spread(a: f32, b: f32) -> __m256 {
    _mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a))
}

/// What needs to be compiled for every instruction set.
macro_rules! drivers {
    ($isa:ident, $features:literal, $dots:ty) => {
        pub(super) mod $isa {
            use super::rows::$isa::{block_32, patterns, rows_256};
            use super::*;

            pub(in super::super) fn kernel(ty: GgmlType) -> Option<(Form, RowsFn)> {
                Some(match ty {
                    GgmlType::Q4_0 => (Form::X32, rows_32::<q4_0::rows::Q4_0> as _),
                    GgmlType::Q4_1 => (Form::X32, rows_32::<q4_0::rows::Q4_1> as _),
                    GgmlType::Q5_0 => (Form::X32, rows_32::<q5_0::rows::Q5_0> as _),
                    GgmlType::Q5_1 => (Form::X32, rows_32::<q5_0::rows::Q5_1> as _),
                    GgmlType::Q8_0 => (Form::X32, rows_32::<q8_0::rows::Q8_0> as _),
                    GgmlType::IQ4_NL => (Form::X32, rows_32::<iq4_nl::rows::IQ4NL> as _),
                    GgmlType::MXFP4 => (Form::X32, rows_32::<mxfp4::rows::MXFP4> as _),
                    GgmlType::Q2_K => (Form::X256, rows_256::<q2_k::rows::Q2K> as _),
                    GgmlType::Q3_K => (Form::X256, rows_256::<q3_k::rows::Q3K> as _),
                    GgmlType::Q4_K => (Form::X256, rows_256::<q4_k::rows::Q4K> as _),
                    GgmlType::Q5_K => (Form::X256, rows_256::<q5_k::rows::Q5K> as _),
                    GgmlType::Q6_K => (Form::X256, rows_256::<q6_k::rows::Q6K> as _),
                    GgmlType::IQ4_XS => (Form::X256, rows_256::<iq4_xs::rows::IQ4XS> as _),
                    _ => return patterns(ty),
                })
            }

            #[target_feature(enable = $features)]
            unsafe fn rows_32<F: Two32>(job: &Rows<'_>, out: &mut [f32]) {
                // SAFETY: by the caller.
                unsafe {
                    let n = job.n_blocks / 4;
                    let x: &[X32x4] = std::slice::from_raw_parts(job.x.cast(), n);
                    let rest: &[X32] = std::slice::from_raw_parts(
                        job.x.cast::<X32>().add(4 * n),
                        job.n_blocks % 4,
                    );
                    let mut runs = Runs::new(job, out.len());
                    for i in 0..run(out.len()) {
                        let mut at = i * job.row_size;
                        let mut acc = _mm_setzero_ps();
                        for x in x {
                            let w = runs.at(at, 4 * F::SIZE);
                            acc = two_blocks::<F>(w, x, 0, acc);
                            acc = two_blocks::<F>(w.map(|w| w.add(2 * F::SIZE)), x, 2, acc);
                            at += 4 * F::SIZE;
                        }
                        for x in rest {
                            acc = block_32::<F>(runs.at(at, F::SIZE), x, acc);
                            at += F::SIZE;
                        }
                        runs.store(i, acc, out);
                    }
                }
            }

            /// Adds the products of two blocks of each row to `acc`, one after the other; activations are those from `i` on.
            ///
            /// # Safety
            /// Pointers are valid for two blocks; `i` is 0 or 2.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn two_blocks<F: Two32>(
                w: [*const u8; 4],
                x: &X32x4,
                i: usize,
                acc: __m128,
            ) -> __m128 {
                // SAFETY: by the caller; both halves are aligned and have 64 bytes.
                unsafe {
                    let half = |x: &[[i8; 16]; 4]| _mm256_load_si256(x.as_ptr().add(i).cast());
                    let q = [half(&x.low), half(&x.high)];
                    let mut sums = <$dots>::sums::<F>(w, q);
                    if offset::<F, $dots>() != 0 {
                        let of_x = spread(
                            f32::from_bits(x.sum[i] as u32),
                            f32::from_bits(x.sum[i + 1] as u32),
                        );
                        let offset = _mm256_set1_epi32(offset::<F, $dots>());
                        let offset = _mm256_mullo_epi32(_mm256_castps_si256(of_x), offset);
                        sums = _mm256_sub_epi32(sums, offset);
                    }
                    let sums = _mm256_cvtepi32_ps(sums);
                    let (d, m) = F::both_scales(w);
                    let d = _mm256_mul_ps(d, spread(x.d[i], x.d[i + 1]));
                    let add = |acc, sums, d, m, s| {
                        let acc = _mm_fmadd_ps(sums, d, acc);
                        if F::MINS {
                            _mm_fmadd_ps(m, _mm_set1_ps(s), acc)
                        } else {
                            acc
                        }
                    };
                    let low = |v| _mm256_castps256_ps128(v);
                    let high = |v| _mm256_extractf128_ps::<1>(v);
                    let acc = add(acc, low(sums), low(d), low(m), x.s[i]);
                    add(acc, high(sums), high(d), high(m), x.s[i + 1])
                }
            }
        }
    };
}

drivers!(avx2, "avx2,fma,f16c", Avx2);
drivers!(avx_vnni, "avx2,fma,f16c,avxvnni", AvxVnni);
