//! Products in which every head has a matrix of its own.
//!
//! Latent attention keeps one short key for all heads. What would turn it into a head's key and value is multiplied with the head's
//! query and with its result instead (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

use super::{Limits, Pass, id};
use crate::{Experts, MulMat, Shared};

/// Heads that are multiplied together.
const HEADS: usize = 8;

/// Inputs and results of some heads, head after head.
pub(crate) struct Scratch {
    /// `[HEADS, max_tokens, n_in]`
    x: Shared<f32>,
    /// `[HEADS, max_tokens, n_out]`
    y: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits) -> Self {
        let len = Self::len(limits);
        Self {
            x: Shared::zeroed(len),
            y: Shared::zeroed(len),
        }
    }

    pub(crate) fn size(limits: &Limits) -> usize {
        2 * Self::len(limits) * size_of::<f32>()
    }

    fn len(limits: &Limits) -> usize {
        HEADS * limits.max_tokens * limits.head_product
    }
}

impl Pass<'_> {
    /// For every token and head: the matrix of the head times the first `w.n_in` numbers of `x`, and behind the product what is left of
    /// `x`. `w`: a matrix for each of the `n_head` heads; `x`: `[n_tokens, n_head, n_in + rest]`, `out`: `[n_tokens, n_head, n_out + rest]`,
    /// different buffers.
    pub fn mul_mat_heads(
        &self,
        out: &Shared<f32>,
        w: &Experts<'_>,
        x: &Shared<f32>,
        rest: usize,
        n_tokens: usize,
    ) {
        let at = w.data.as_ptr() as usize;
        self.check("mul_mat_heads", &[id(out), id(x), at, rest, n_tokens]);
        let (n_head, n_in, n_out) = (w.n_expert, w.n_in, w.n_out);
        assert!(!out.is(x) && n_in.max(n_out) <= self.limits.head_product);
        let s = &self.scratch.heads;
        let step = self.inputs(n_tokens, n_in).clamp(1, HEADS);
        for first in (0..n_head).step_by(step) {
            let n = (n_head - first).min(step);
            // Token and head that number `i` of the scratch stands for.
            let place = |i: usize| i % n_tokens * n_head + first + i / n_tokens;
            for i in self.w.range(n * n_tokens, 1) {
                let from = place(i) * (n_in + rest);
                // SAFETY: `x` is only read, the row of the scratch is this worker's.
                unsafe {
                    let row = x.slice(from..from + n_in);
                    s.x.slice_mut(i * n_in..(i + 1) * n_in).copy_from_slice(row);
                }
            }
            self.barrier();
            // An array, because nothing is allocated here; what is over is not looked at.
            let mats: [_; HEADS] = std::array::from_fn(|i| MulMat {
                out: &s.y,
                out_add: false,
                w: w.expert(first + i.min(n - 1)),
                bias: None,
            });
            self.products(&mats[..n], &s.x, n_tokens, true);
            for i in self.w.range(n * n_tokens, 1) {
                let (from, to) = (place(i) * (n_in + rest), place(i) * (n_out + rest));
                // SAFETY: `x` and what the products have left are only read, the head of `out` is this worker's.
                unsafe {
                    let out = out.slice_mut(to..to + n_out + rest);
                    let (product, behind) = out.split_at_mut(n_out);
                    product.copy_from_slice(s.y.slice(i * n_out..(i + 1) * n_out));
                    behind.copy_from_slice(x.slice(from + n_in..from + n_in + rest));
                }
            }
            self.barrier();
        }
    }
}
