//! Products of weights and activations.

use super::{Limits, Pass, id};
use crate::tensor::row_size;
use crate::{MulMat, Shared, lanes};
use lemma_quant::GgmlType;

/// The forms of activations that quantized weights are multiplied with.
const X_TYPES: [GgmlType; 3] = [GgmlType::Q8_0, GgmlType::Q8_1, GgmlType::Q8_K];

/// Activations in the forms that kernels take, and a row of weights for each worker.
pub(crate) struct Scratch {
    /// Activations in each of the `X_TYPES`: `[n_tokens, n_in]`.
    x_quantized: [Shared<u8>; 3],
    /// A decoded row of weights for each worker: `[nth, max_width]`.
    row: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits, nth: usize) -> Self {
        let n = limits.max_tokens * Self::width(limits);
        Self {
            x_quantized: X_TYPES.map(|ty| Shared::zeroed(row_size(ty, n))),
            row: Shared::zeroed(nth * Self::width(limits)),
        }
    }

    pub(crate) fn size(limits: &Limits, nth: usize) -> usize {
        let n = limits.max_tokens * Self::width(limits);
        X_TYPES.iter().map(|ty| row_size(*ty, n)).sum::<usize>()
            + nth * Self::width(limits) * size_of::<f32>()
    }

    fn width(limits: &Limits) -> usize {
        limits.max_width.next_multiple_of(256)
    }
}

/// The form of activations that a type of weights is multiplied with; `None` for plain f32.
fn x_form(ty: GgmlType) -> Option<usize> {
    let traits = ty.traits();
    traits.vec_dot?;
    X_TYPES.iter().position(|x| *x == traits.vec_dot_type)
}

impl Pass<'_> {
    /// `out = x w^T (+ bias)` for several matrices with the same input `x`, `[n_tokens, n_in]`.
    ///
    /// Activations are quantized once for each form that the types of the weights ask for. No `out` may be `x`, nor
    /// another product's `out`.
    pub fn mul_mats(&self, mats: &[MulMat<'_>], x: &Shared<f32>, n_tokens: usize) {
        self.check("mul_mats", &[id(x), n_tokens, mats.len()]);
        let Some(first) = mats.first() else { return };
        let n_in = first.w.n_in;
        assert!(n_tokens <= self.limits.max_tokens && n_in <= Scratch::width(self.limits));
        for (i, mat) in mats.iter().enumerate() {
            assert!(
                mat.w.n_in == n_in && !mat.out.is(x),
                "products of one input"
            );
            assert!(
                mats[..i].iter().all(|m| !m.out.is(mat.out)),
                "products have their own outputs"
            );
            assert!(mat.bias.is_none_or(|b| b.len() == mat.w.n_out));
        }
        let mut quantized = false;
        for form in 0..X_TYPES.len() {
            if mats.iter().any(|m| x_form(m.w.ty) == Some(form)) {
                self.quantize(form, x, n_tokens, n_in);
                quantized = true;
            }
        }
        if quantized {
            self.barrier();
        }
        for mat in mats {
            for row in self.w.range(mat.w.n_out, 1) {
                self.mul_row(mat, x, row, n_tokens);
            }
        }
        self.barrier();
    }

    /// One product; see [`Pass::mul_mats`].
    pub fn mul_mat(&self, mat: MulMat<'_>, x: &Shared<f32>, n_tokens: usize) {
        self.mul_mats(&[mat], x, n_tokens);
    }

    /// This worker's share of the activations, to form number `form`.
    fn quantize(&self, form: usize, x: &Shared<f32>, n_tokens: usize, n_in: usize) {
        let traits = X_TYPES[form].traits();
        let quantize_row = traits.quantize_row.expect("activations can be quantized");
        let (values, bytes) = (traits.block_size, traits.type_size);
        let to = &self.scratch.matmul.x_quantized[form];
        for i in self.w.range(n_tokens * n_in / values, 1) {
            // SAFETY: `x` is only read, the block is this worker's.
            unsafe {
                quantize_row(
                    x.slice(i * values..(i + 1) * values),
                    to.slice_mut(i * bytes..(i + 1) * bytes),
                );
            }
        }
    }

    /// One row of weights with all tokens.
    fn mul_row(&self, mat: &MulMat<'_>, x: &Shared<f32>, row: usize, n_tokens: usize) {
        let (n_in, n_out) = (mat.w.n_in, mat.w.n_out);
        let bytes = mat.w.row(row);
        let traits = mat.w.ty.traits();
        let bias = mat.bias.map_or(0.0, |b| b[row]);
        let store = |t: usize, value: f32| {
            let at = t * n_out + row;
            // SAFETY: column `row` of `out` is this worker's.
            let out = unsafe { &mut mat.out.slice_mut(at..at + 1)[0] };
            *out = if mat.out_add {
                *out + (value + bias)
            } else {
                value + bias
            };
        };
        if let (Some(form), Some(vec_dot)) = (x_form(mat.w.ty), traits.vec_dot) {
            let size = row_size(X_TYPES[form], n_in);
            let quantized = &self.scratch.matmul.x_quantized[form];
            for t in 0..n_tokens {
                // SAFETY: written before the last barrier.
                let x = unsafe { quantized.slice(t * size..(t + 1) * size) };
                store(t, vec_dot(n_in, bytes, x));
            }
        } else {
            let start = self.ith() * Scratch::width(self.limits);
            // SAFETY: every worker has its own row.
            let decoded = unsafe { self.scratch.matmul.row.slice_mut(start..start + n_in) };
            (traits.dequantize_row)(bytes, decoded);
            for t in 0..n_tokens {
                // SAFETY: `x` is only read.
                let x = unsafe { x.slice(t * n_in..(t + 1) * n_in) };
                store(t, lanes::dot(self.isa, decoded, x));
            }
        }
    }
}
