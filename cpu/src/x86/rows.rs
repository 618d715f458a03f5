//! A few rows with one token.
//!
//! With one token every weight is used once, so the speed is that of the memory. Four rows at a time share the
//! loads of activations and the folding of lanes. The next ones are prefetched in the order in which they lie in
//! memory, whatever the order in which four rows are read: left to itself, the processor sees four streams that end
//! again soon, and gets half of the speed.

use super::ahead::{Reach, prefetch};
use super::dots::{Avx2, Avx512, AvxVnni, Dots};
use super::{Form, Rows, RowsFn};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::activations::{X32, X256};
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

/// Reads ahead, in the order of memory.
struct Ahead {
    at: *const u8,
    end: *const u8,
    next: *const u8,
    near: bool,
}

impl Ahead {
    fn new(job: &Rows<'_>) -> Self {
        let end = job.w.as_ptr_range().end;
        let Reach { near, rows, .. } = Reach::get();
        let start = job.w.as_ptr().wrapping_add((4 * job.row_size).max(rows));
        if start < end {
            Self {
                at: start,
                end,
                next: job.next.at,
                near,
            }
        } else {
            Self {
                at: job.next.at,
                end: std::ptr::null(),
                next: job.next.at,
                near,
            }
        }
    }

    /// Begins to read `n` bytes more.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn read(&mut self, n: usize) {
        if self.at.is_null() {
            return;
        }
        prefetch(self.near, self.at, n);
        self.at = self.at.wrapping_add(n);
        if self.at >= self.end && !self.end.is_null() {
            self.at = self.next;
            self.end = std::ptr::null();
        }
    }
}

/// What needs to be compiled for every instruction set. Behind them: what only sets without AVX-512 use.
macro_rules! drivers {
    ($isa:ident, $features:literal, $dots:ty $(, $more:ident)?) => {
        pub(super) mod $isa {
            use super::super::util::{sum_half_lanes, sum_lanes};
            use super::*;

            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn rows_256<F: Rows256>(job: &Rows<'_>, out: &mut [f32]) {
                // SAFETY: by the caller.
                unsafe {
                    let x = std::slice::from_raw_parts(job.x.cast(), job.n_blocks);
                    let mut ahead = Ahead::new(job);
                    for (i, out) in out.chunks_mut(4).enumerate() {
                        let w = job.w.as_ptr().add(4 * i * job.row_size);
                        let sums = match out.len() {
                            4 => some_rows_256::<F, 4>(w, job.row_size, x, &mut ahead),
                            3 => some_rows_256::<F, 3>(w, job.row_size, x, &mut ahead),
                            2 => some_rows_256::<F, 2>(w, job.row_size, x, &mut ahead),
                            _ => some_rows_256::<F, 1>(w, job.row_size, x, &mut ahead),
                        };
                        out.copy_from_slice(&sums[..out.len()]);
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn some_rows_256<F: Rows256, const R: usize>(
                w: *const u8,
                row_size: usize,
                x: &[X256],
                ahead: &mut Ahead,
            ) -> [f32; 4] {
                let mut acc = _mm_setzero_ps();
                let mut at = w;
                for x in x {
                    ahead.read(R * F::SIZE);
                    let mut sums = [_mm256_setzero_si256(); 4];
                    let mut min_sums = [_mm_setzero_si128(); 4];
                    let mut blocks = [at; 4];
                    for r in 0..R {
                        // SAFETY: the block of row r, by the caller.
                        unsafe {
                            blocks[r] = at.add(r * row_size);
                            (sums[r], min_sums[r]) = F::dot::<$dots>(blocks[r], x);
                            one_by_one(&mut sums[r]);
                        }
                    }
                    // SAFETY: the blocks from above.
                    let (d, dmin) = unsafe { F::scales(blocks) };
                    let dx = _mm_set1_ps(x.d);
                    let sum = _mm_cvtepi32_ps(sum_lanes(sums));
                    acc = _mm_fmadd_ps(sum, _mm_mul_ps(d, dx), acc);
                    if F::MINS {
                        let sum = _mm_cvtepi32_ps(sum_half_lanes(min_sums));
                        acc = _mm_fnmadd_ps(sum, _mm_mul_ps(dmin, dx), acc);
                    }
                    at = at.wrapping_add(F::SIZE);
                }
                let mut out = [0.0; 4];
                // SAFETY: four values.
                unsafe { _mm_storeu_ps(out.as_mut_ptr(), acc) };
                out
            }

            /// Adds the products of a block of `R` rows to `acc`.
            ///
            /// # Safety
            /// Pointers are valid for a block.
            #[inline]
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn block_32<F: Rows32, const R: usize>(
                w: [*const u8; 4],
                x: &X32,
                acc: __m128,
            ) -> __m128 {
                // SAFETY: by the caller.
                unsafe {
                    let q = _mm256_loadu_si256(x.q.as_ptr().cast());
                    let mut sums = [_mm256_setzero_si256(); 4];
                    for r in 0..R {
                        let w = F::block(w[r]);
                        sums[r] = if F::SIGNED {
                            <$dots>::signed(w, q)
                        } else {
                            <$dots>::bytes(sums[r], w, q)
                        };
                    }
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

            $($more!($features);)?
        }
    };
}

/// Rows of blocks of 32, and what there is for a type.
macro_rules! without_avx512 {
    ($features:literal) => {
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
                _ => return None,
            })
        }

        #[target_feature(enable = $features)]
        unsafe fn rows_32<F: Rows32>(job: &Rows<'_>, out: &mut [f32]) {
            // SAFETY: by the caller.
            unsafe {
                let x = std::slice::from_raw_parts(job.x.cast(), job.n_blocks);
                let mut ahead = Ahead::new(job);
                for (i, out) in out.chunks_mut(4).enumerate() {
                    let w = job.w.as_ptr().add(4 * i * job.row_size);
                    let sums = match out.len() {
                        4 => some_rows_32::<F, 4>(w, job.row_size, x, &mut ahead),
                        3 => some_rows_32::<F, 3>(w, job.row_size, x, &mut ahead),
                        2 => some_rows_32::<F, 2>(w, job.row_size, x, &mut ahead),
                        _ => some_rows_32::<F, 1>(w, job.row_size, x, &mut ahead),
                    };
                    out.copy_from_slice(&sums[..out.len()]);
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn some_rows_32<F: Rows32, const R: usize>(
            first: *const u8,
            row_size: usize,
            x: &[X32],
            ahead: &mut Ahead,
        ) -> [f32; 4] {
            let mut acc = _mm_setzero_ps();
            // Rows that are missing repeat the first one.
            let mut w =
                std::array::from_fn(|r| first.wrapping_add(if r < R { r * row_size } else { 0 }));
            for (b, x) in x.iter().enumerate() {
                // Blocks are small: not for each of them.
                if b % 4 == 0 {
                    ahead.read(4 * R * F::SIZE);
                }
                // SAFETY: blocks of the rows, by the caller.
                acc = unsafe { block_32::<F, R>(w, x, acc) };
                w = w.map(|w| w.wrapping_add(F::SIZE));
            }
            let mut out = [0.0; 4];
            // SAFETY: four values.
            unsafe { _mm_storeu_ps(out.as_mut_ptr(), acc) };
            out
        }
    };
}

drivers!(avx2, "avx2,fma,f16c", Avx2, without_avx512);
drivers!(avx_vnni, "avx2,fma,f16c,avxvnni", AvxVnni, without_avx512);
drivers!(
    avx512,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    Avx512
);
