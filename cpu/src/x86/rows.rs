//! A few rows with one token.
//!
//! With one token every weight is used once, so the speed is that of the memory. Four rows at a time share the
//! loads of activations and the folding of lanes; which four that are says `runs`. Blocks of 32 values are here one at a time, for
//! those that `twos` and `fours` leave.

use super::dots::{Avx2, Avx512, AvxVnni, Dots};
use super::patterns::{self, rows::Rows as LookedUp};
use super::runs::Runs;
use super::ternary;
use super::{Form, Rows, RowsFn};
use crate::activations::{X32, X256};
use crate::kernels::run;
use lemma_quant::GgmlType;
use std::arch::x86_64::*;

/// What is special to a format of 256 values.
///
/// # Safety
/// `SIZE` is the size of a block, and functions read nothing outside of it.
pub(super) unsafe trait Rows256 {
    /// Bytes of a block.
    const SIZE: usize;
    /// Whether there are minimums.
    const MINS: bool;

    /// Lanes that sum to `sum of scale * q * x`, and to `sum of minimum * sum of x`.
    ///
    /// # Safety
    /// `w` is valid for a block, and the instruction set is available.
    unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i);

    /// The scales `d` and (where there are minimums) `dmin` of four blocks.
    ///
    /// # Safety
    /// As for `dot`.
    unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128);
}

/// What is special to a format of 32 values.
///
/// # Safety
/// `SIZE` is the size of a block, and functions read nothing outside of it.
pub(super) unsafe trait Rows32 {
    /// Bytes of a block.
    const SIZE: usize;
    /// What has been added to the quants to make them unsigned.
    const OFFSET: i32;
    /// Whether quants are signed, and nothing has been added.
    const SIGNED: bool;
    /// Whether there are minimums.
    const MINS: bool;

    /// The quants of a block.
    ///
    /// # Safety
    /// `w` is valid for a block, and the instruction set is available.
    unsafe fn block(w: *const u8) -> __m256i;

    /// The scales `d` and (where there are minimums) `m` of four blocks.
    ///
    /// # Safety
    /// As for `block`.
    unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128);
}

/// What has been added to the quants that are multiplied.
pub(super) const fn offset<F: Rows32, P: Dots>() -> i32 {
    if F::SIGNED { P::OFFSET } else { F::OFFSET }
}

/// Keeps the compiler from working on several rows at once, for which there are not enough registers.
#[inline]
#[target_feature(enable = "avx2")]
fn one_by_one(sum: &mut __m256i) {
    // SAFETY: no instruction.
    unsafe {
        std::arch::asm!(
            "/* {0} */",
            inout(ymm_reg) * sum,
            options(nostack, preserves_flags)
        )
    };
}

/// What needs to be compiled for every instruction set.
macro_rules! drivers {
    ($isa:ident, $features:literal, $dots:ty) => {
        pub(super) mod $isa {
            use super::super::util::{sum_half_lanes, sum_lanes};
            use super::*;

            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn rows_256<F: Rows256>(job: &Rows<'_>, out: &mut [f32]) {
                // SAFETY: by the caller.
                unsafe {
                    let x: &[X256] = std::slice::from_raw_parts(job.x.cast(), job.n_blocks);
                    let mut runs = Runs::new(job, out.len());
                    for i in 0..run(out.len()) {
                        let mut at = i * job.row_size;
                        let mut acc = _mm_setzero_ps();
                        for x in x {
                            acc = block_256::<F>(runs.at(at, F::SIZE), x, acc);
                            at += F::SIZE;
                        }
                        runs.store(i, acc, out);
                    }
                }
            }

            /// Adds the products of a block of each row to `acc`.
            ///
            /// # Safety
            /// Pointers are valid for a block.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn block_256<F: Rows256>(
                w: [*const u8; 4],
                x: &X256,
                mut acc: __m128,
            ) -> __m128 {
                // SAFETY: by the caller.
                unsafe {
                    let row = |r: usize| {
                        let (mut sum, mins) = F::dot::<$dots>(w[r], x);
                        one_by_one(&mut sum);
                        (sum, mins)
                    };
                    // Written out: as a loop it goes through memory.
                    let (a, b, c, d) = (row(0), row(1), row(2), row(3));
                    let (sums, min_sums) = ([a.0, b.0, c.0, d.0], [a.1, b.1, c.1, d.1]);
                    let (d, dmin) = F::scales(w);
                    let dx = _mm_set1_ps(x.d);
                    let sum = _mm_cvtepi32_ps(sum_lanes(sums));
                    acc = _mm_fmadd_ps(sum, _mm_mul_ps(d, dx), acc);
                    if F::MINS {
                        let sum = _mm_cvtepi32_ps(sum_half_lanes(min_sums));
                        acc = _mm_fnmadd_ps(sum, _mm_mul_ps(dmin, dx), acc);
                    }
                    acc
                }
            }

            /// Adds the products of a block of each row to `acc`.
            ///
            /// # Safety
            /// Pointers are valid for a block.
            #[inline]
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn block_32<F: Rows32>(
                w: [*const u8; 4],
                x: &X32,
                acc: __m128,
            ) -> __m128 {
                // SAFETY: by the caller.
                unsafe {
                    let q = _mm256_loadu_si256(x.q.as_ptr().cast());
                    let sums = w.map(|w| {
                        let w = F::block(w);
                        if F::SIGNED {
                            <$dots>::signed(w, q)
                        } else {
                            <$dots>::bytes(_mm256_setzero_si256(), w, q)
                        }
                    });
                    let (d, m) = F::scales(w);
                    let sum = sum_lanes(sums);
                    let sum = _mm_sub_epi32(sum, _mm_set1_epi32(offset::<F, $dots>() * x.sum));
                    let d = _mm_mul_ps(d, _mm_set1_ps(x.d));
                    let acc = _mm_fmadd_ps(_mm_cvtepi32_ps(sum), d, acc);
                    if F::MINS {
                        _mm_fmadd_ps(m, _mm_set1_ps(x.s), acc)
                    } else {
                        acc
                    }
                }
            }

            /// Formats of patterns.
            pub(in super::super) fn patterns(ty: GgmlType) -> Option<(Form, RowsFn)> {
                Some((
                    Form::X256,
                    match ty {
                        GgmlType::IQ2_XXS => rows_256::<LookedUp<patterns::IQ2XXS>>,
                        GgmlType::IQ2_XS => rows_256::<LookedUp<patterns::IQ2XS>>,
                        GgmlType::IQ2_S => rows_256::<LookedUp<patterns::IQ2S>>,
                        GgmlType::IQ3_XXS => rows_256::<LookedUp<patterns::IQ3XXS>>,
                        GgmlType::IQ3_S => rows_256::<LookedUp<patterns::IQ3S>>,
                        GgmlType::IQ1_S => rows_256::<LookedUp<patterns::IQ1S>>,
                        GgmlType::IQ1_M => rows_256::<LookedUp<patterns::IQ1M>>,
                        GgmlType::TQ1_0 => rows_256::<LookedUp<ternary::TQ1_0>>,
                        GgmlType::TQ2_0 => rows_256::<LookedUp<ternary::TQ2_0>>,
                        _ => return None,
                    },
                ))
            }
        }
    };
}

drivers!(avx2, "avx2,fma,f16c", Avx2);
drivers!(avx_vnni, "avx2,fma,f16c,avxvnni", AvxVnni);
drivers!(
    avx512,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    Avx512
);
