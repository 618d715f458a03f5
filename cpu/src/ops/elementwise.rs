//! Operations on rows and elements: embedding, norms, rotary positions, activation functions.

use super::{Pass, id};
use crate::lanes::{self, LANES};
use crate::{Mat, Shared};
use std::ops::Range;

/// Which values of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeMode {
    /// Neighbours: 2i and 2i + 1.
    Norm,
    /// Halves of the rotated part: i and i + n_rot / 2.
    NeoX,
}

/// What a feed-forward block without a gate makes of each element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(x, 0)²`
    ReluSqr,
    /// [`Pass::gelu`]
    Gelu,
    /// `alpha_p x² + beta x` where x is positive, elsewhere `alpha_n (exp(min(x, eps)) - 1 - x) + beta x`.
    #[allow(missing_docs)]
    Xielu {
        alpha_n: f32,
        alpha_p: f32,
        beta: f32,
        eps: f32,
    },
}

impl Pass<'_> {
    /// `out[t] = row tokens[t] of w`, decoded. `out`: `[tokens.len(), w.n_in]`.
    pub fn embed(&self, out: &Shared<f32>, w: Mat<'_>, tokens: &[u32]) {
        self.check("embed", &[id(out), w.data.as_ptr() as usize, tokens.len()]);
        let dequantize_row = w.ty.traits().dequantize_row;
        for t in self.w.range(tokens.len(), 1) {
            // SAFETY: row t is this worker's.
            let out = unsafe { out.slice_mut(t * w.n_in..(t + 1) * w.n_in) };
            dequantize_row(w.row(tokens[t] as usize), out);
        }
        self.barrier();
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `weight.len()`. `out` may be `x`.
    ///
    /// With `n_rows = n_tokens * n_head` and a weight of `head_dim`, this is the norm per head.
    pub fn rms_norm(
        &self,
        out: &Shared<f32>,
        x: &Shared<f32>,
        weight: &[f32],
        eps: f32,
        n_rows: usize,
    ) {
        self.check(
            "rms_norm",
            &[id(out), id(x), weight.as_ptr() as usize, n_rows],
        );
        let width = weight.len();
        for i in self.w.range(n_rows, 1) {
            let row = self.start_from(out, x, i * width..(i + 1) * width);
            lanes::rms_norm(self.isa, row, weight, eps);
        }
        self.barrier();
    }

    /// `x -= mean(x)` in place for each row of `width`.
    pub fn center(&self, x: &Shared<f32>, width: usize, n_rows: usize) {
        self.check("center", &[id(x), width, n_rows]);
        for i in self.w.range(n_rows, 1) {
            // SAFETY: row i is this worker's.
            let row = unsafe { x.slice_mut(i * width..(i + 1) * width) };
            lanes::center(self.isa, row);
        }
        self.barrier();
    }

    /// Each row of `width` numbers times a factor of its own.
    pub fn scale_rows(&self, x: &Shared<f32>, factors: &[f32], width: usize) {
        self.check("scale_rows", &[id(x), width, factors.len()]);
        for i in self.w.range(factors.len(), 1) {
            // SAFETY: row i is this worker's.
            let row = unsafe { x.slice_mut(i * width..(i + 1) * width) };
            lanes::scale(self.isa, row, factors[i]);
        }
        self.barrier();
    }

    /// Part `i` of the `n` parts of `width` numbers that each of `n_rows` rows of `out` has becomes `x`, `[n_rows, width]`, another buffer.
    pub fn place(
        &self,
        out: &Shared<f32>,
        x: &Shared<f32>,
        [i, n]: [usize; 2],
        width: usize,
        n_rows: usize,
    ) {
        self.check("place", &[id(out), id(x), i, n, width, n_rows]);
        assert!(!out.is(x) && i < n);
        for t in self.w.range(n_rows, 1) {
            let to = (t * n + i) * width;
            // SAFETY: `x` is only read, part i of row t is this worker's.
            unsafe {
                out.slice_mut(to..to + width)
                    .copy_from_slice(x.slice(t * width..(t + 1) * width));
            }
        }
        self.barrier();
    }

    /// Part `i` of the `n` parts of `width` numbers that each of `n_rows` rows of `x` has: `out` is `[n_rows, width]`, another buffer.
    pub fn part(
        &self,
        out: &Shared<f32>,
        x: &Shared<f32>,
        [i, n]: [usize; 2],
        width: usize,
        n_rows: usize,
    ) {
        self.check("part", &[id(out), id(x), i, n, width, n_rows]);
        assert!(!out.is(x) && i < n);
        for t in self.w.range(n_rows, 1) {
            let from = (t * n + i) * width;
            // SAFETY: `x` is only read, row t of `out` is this worker's.
            unsafe {
                out.slice_mut(t * width..(t + 1) * width)
                    .copy_from_slice(x.slice(from..from + width));
            }
        }
        self.barrier();
    }

    /// [`Pass::rms_norm`] in place for what rows of `stride` begin with: the first `weight.len()` numbers of each.
    pub fn rms_norm_first(
        &self,
        x: &Shared<f32>,
        weight: &[f32],
        eps: f32,
        stride: usize,
        n_rows: usize,
    ) {
        self.check("rms_norm_first", &[id(x), stride, n_rows]);
        assert!(weight.len() <= stride);
        for i in self.w.range(n_rows, 1) {
            // SAFETY: row i is this worker's.
            let row = unsafe { x.slice_mut(i * stride..i * stride + weight.len()) };
            lanes::rms_norm(self.isa, row, weight, eps);
        }
        self.barrier();
    }

    /// [`Pass::rms_norm`] in place over each of `n_group` parts of rows of `weight.len()` numbers.
    pub fn rms_norm_groups(
        &self,
        x: &Shared<f32>,
        weight: &[f32],
        n_group: usize,
        eps: f32,
        n_rows: usize,
    ) {
        self.check("rms_norm_groups", &[id(x), n_group, n_rows]);
        assert!(n_group > 0 && weight.len().is_multiple_of(n_group));
        let width = weight.len() / n_group;
        for i in self.w.range(n_rows * n_group, 1) {
            // SAFETY: part i is this worker's.
            let part = unsafe { x.slice_mut(i * width..(i + 1) * width) };
            let of = i % n_group * width;
            lanes::rms_norm(self.isa, part, &weight[of..of + width], eps);
        }
        self.barrier();
    }

    /// Rotates `n_rot` values of each head, from value `first` on, by its token's position, in place. `x`:
    /// `[n_tokens, n_head, head_dim]`; `table`: cosine and sine of every angle, `[n_tokens, n_rot / 2, 2]`.
    #[allow(clippy::too_many_arguments, reason = "shapes")]
    pub fn rope(
        &self,
        x: &Shared<f32>,
        n_tokens: usize,
        n_head: usize,
        head_dim: usize,
        first: usize,
        n_rot: usize,
        table: &[f32],
        mode: RopeMode,
    ) {
        self.check("rope", &[id(x), n_tokens, n_head, head_dim, first, n_rot]);
        assert!(n_rot.is_multiple_of(2) && first + n_rot <= head_dim);
        assert!(table.len() >= n_tokens * n_rot);
        for i in self.w.range(n_tokens * n_head, 1) {
            let t = i / n_head;
            let from = i * head_dim + first;
            // SAFETY: head i is this worker's.
            let head = unsafe { x.slice_mut(from..from + n_rot) };
            let angles = table[t * n_rot..(t + 1) * n_rot].as_chunks::<2>().0;
            match mode {
                RopeMode::Norm => {
                    for (pair, [cos, sin]) in head.as_chunks_mut::<2>().0.iter_mut().zip(angles) {
                        let [a, b] = *pair;
                        *pair = [a * cos - b * sin, a * sin + b * cos];
                    }
                }
                RopeMode::NeoX => {
                    let (first, second) = head.split_at_mut(n_rot / 2);
                    for ((a, b), [cos, sin]) in first.iter_mut().zip(second).zip(angles) {
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                }
            }
        }
        self.barrier();
    }

    /// `out = silu(gate) * up` for `n` elements. `out` may be `gate`.
    pub fn swiglu(&self, out: &Shared<f32>, gate: &Shared<f32>, up: &Shared<f32>, n: usize) {
        self.check("swiglu", &[id(out), id(gate), id(up), n]);
        assert!(!out.is(up), "swiglu: the output is not the second factor");
        let range = self.w.range(n, LANES);
        // SAFETY: `up` is only read.
        let up = unsafe { up.slice(range.clone()) };
        lanes::swiglu(self.isa, self.start_from(out, gate, range), up);
        self.barrier();
    }

    /// `gate = min(silu(gate), clamp) * up`, `up` within `clamp` of zero, for `n` elements; different buffers.
    pub fn swiglu_clamped(&self, gate: &Shared<f32>, up: &Shared<f32>, clamp: f32, n: usize) {
        self.check("swiglu_clamped", &[id(gate), id(up), n]);
        assert!(!gate.is(up), "swiglu_clamped: two buffers");
        let range = self.w.range(n, LANES);
        // SAFETY: `up` is only read, the range is this worker's.
        let (gate, up) = unsafe { (gate.slice_mut(range.clone()), up.slice(range)) };
        lanes::swiglu_clamped(self.isa, gate, up, clamp);
        self.barrier();
    }

    /// `x *= sigmoid(gate)` for `n` rows of `width` numbers in `x`. In `gate` a row has `n_gate` numbers, each for as many of `x` that lie
    /// side by side; different buffers.
    pub fn sigmoid_mul(
        &self,
        x: &Shared<f32>,
        gate: &Shared<f32>,
        n: usize,
        width: usize,
        n_gate: usize,
    ) {
        self.check("sigmoid_mul", &[id(x), id(gate), n, width, n_gate]);
        assert!(!x.is(gate) && n_gate > 0 && width.is_multiple_of(n_gate));
        let each = width / n_gate;
        let wide = each > 1;
        for i in self.w.range(if wide { n * n_gate } else { n }, 1) {
            // SAFETY: `gate` is only read, row i, or what element i gates, is this worker's.
            let (x, gate) = unsafe {
                let (of, by) = if wide { (each, 1) } else { (width, width) };
                (
                    x.slice_mut(i * of..(i + 1) * of),
                    gate.slice(i * by..(i + 1) * by),
                )
            };
            match (gate, wide) {
                (&[g], true) => lanes::scale(self.isa, x, 1.0 / (1.0 + (-g).exp())),
                _ => lanes::sigmoid_mul(self.isa, x, gate),
            }
        }
        self.barrier();
    }

    /// Takes apart what heads of `x` have side by side: the first half of each goes to `a`, the second to `b`. `x`: `[n_heads, 2, dim]`;
    /// `a`, `b`: `[n_heads, dim]`, buffers of their own.
    pub fn split_heads(
        &self,
        a: &Shared<f32>,
        b: &Shared<f32>,
        x: &Shared<f32>,
        n_heads: usize,
        dim: usize,
    ) {
        self.check("split_heads", &[id(a), id(b), id(x), n_heads, dim]);
        assert!(!a.is(x) && !b.is(x) && !a.is(b));
        for i in self.w.range(n_heads, 1) {
            // SAFETY: `x` is only read, head i of the others is this worker's.
            unsafe {
                let (first, second) = x.slice(2 * i * dim..2 * (i + 1) * dim).split_at(dim);
                a.slice_mut(i * dim..(i + 1) * dim).copy_from_slice(first);
                b.slice_mut(i * dim..(i + 1) * dim).copy_from_slice(second);
            }
        }
        self.barrier();
    }

    /// `out = g * sigmoid(1.702 g) * (u + 1)` for `n` elements, where `g` is the gate, 7 at most, and `u` is `up`, within 7 of zero.
    /// `out` may be `gate`.
    pub fn swiglu_oai(&self, out: &Shared<f32>, gate: &Shared<f32>, up: &Shared<f32>, n: usize) {
        self.check("swiglu_oai", &[id(out), id(gate), id(up), n]);
        assert!(
            !out.is(up),
            "swiglu_oai: the output is not the second factor"
        );
        let range = self.w.range(n, LANES);
        // SAFETY: `up` is only read.
        let up = unsafe { up.slice(range.clone()) };
        lanes::swiglu_oai(self.isa, self.start_from(out, gate, range), up);
        self.barrier();
    }

    /// `out = gelu(gate) * up` for `n` elements, gelu by the tanh formula. `out` may be `gate`.
    pub fn geglu(&self, out: &Shared<f32>, gate: &Shared<f32>, up: &Shared<f32>, n: usize) {
        self.check("geglu", &[id(out), id(gate), id(up), n]);
        assert!(!out.is(up), "geglu: the output is not the second factor");
        let range = self.w.range(n, LANES);
        // SAFETY: `up` is only read.
        let up = unsafe { up.slice(range.clone()) };
        lanes::geglu(self.isa, self.start_from(out, gate, range), up);
        self.barrier();
    }

    /// `gate = max(gate, 0) * up` for `n` elements; different buffers.
    pub fn reglu(&self, gate: &Shared<f32>, up: &Shared<f32>, n: usize) {
        self.check("reglu", &[id(gate), id(up), n]);
        assert!(!gate.is(up), "reglu: the output is not the second factor");
        let range = self.w.range(n, LANES);
        // SAFETY: `up` is only read, the range is this worker's.
        let (gate, up) = unsafe { (gate.slice_mut(range.clone()), up.slice(range)) };
        lanes::reglu(self.isa, gate, up);
        self.barrier();
    }

    /// `out = gelu(x)` for `n` elements, by the tanh formula. `out` may be `x`.
    pub fn gelu(&self, out: &Shared<f32>, x: &Shared<f32>, n: usize) {
        self.check("gelu", &[id(out), id(x), n]);
        lanes::gelu(self.isa, self.start_from(out, x, self.w.range(n, LANES)));
        self.barrier();
    }

    /// Each of `n` elements by itself, in place.
    pub fn activate(&self, x: &Shared<f32>, by: Activation, n: usize) {
        self.check("activate", &[id(x), n]);
        // SAFETY: the range is this worker's.
        let x = unsafe { x.slice_mut(self.w.range(n, LANES)) };
        match by {
            Activation::ReluSqr => lanes::relu_sqr(self.isa, x),
            Activation::Gelu => lanes::gelu(self.isa, x),
            Activation::Xielu {
                alpha_n,
                alpha_p,
                beta,
                eps,
            } => lanes::xielu(self.isa, x, [alpha_n, alpha_p, beta, eps]),
        }
        self.barrier();
    }

    /// `x += y` for `n` elements; different buffers.
    pub fn add(&self, x: &Shared<f32>, y: &Shared<f32>, n: usize) {
        self.check("add", &[id(x), id(y), n]);
        assert!(!x.is(y), "add: different buffers");
        let range = self.w.range(n, LANES);
        // SAFETY: `y` is only read, the range of `x` is this worker's.
        unsafe { lanes::add(self.isa, x.slice_mut(range.clone()), y.slice(range)) };
        self.barrier();
    }

    /// `x[t] += bias` for each of `n_rows` rows of `bias.len()`.
    pub fn add_bias(&self, x: &Shared<f32>, bias: &[f32], n_rows: usize) {
        self.check("add_bias", &[id(x), bias.as_ptr() as usize, n_rows]);
        for i in self.w.range(n_rows, 1) {
            // SAFETY: row i is this worker's.
            let row = unsafe { x.slice_mut(i * bias.len()..(i + 1) * bias.len()) };
            lanes::add(self.isa, row, bias);
        }
        self.barrier();
    }

    /// `x *= a` for `n` elements.
    pub fn scale(&self, x: &Shared<f32>, a: f32, n: usize) {
        self.check("scale", &[id(x), a.to_bits() as usize, n]);
        // SAFETY: the range is this worker's.
        lanes::scale(self.isa, unsafe { x.slice_mut(self.w.range(n, LANES)) }, a);
        self.barrier();
    }

    /// `x = min(max(x, -most), most)` for `n` elements; `most` is not negative.
    pub fn clamp(&self, x: &Shared<f32>, most: f32, n: usize) {
        self.check("clamp", &[id(x), most.to_bits() as usize, n]);
        // SAFETY: the range is this worker's.
        let x = unsafe { x.slice_mut(self.w.range(n, LANES)) };
        lanes::clamp(self.isa, x, most);
        self.barrier();
    }

    /// `x = cap * tanh(x / cap)` for `n` elements.
    pub fn softcap(&self, x: &Shared<f32>, cap: f32, n: usize) {
        self.check("softcap", &[id(x), cap.to_bits() as usize, n]);
        // SAFETY: the range is this worker's.
        lanes::softcap(
            self.isa,
            unsafe { x.slice_mut(self.w.range(n, LANES)) },
            cap,
        );
        self.barrier();
    }

    /// `out[i] = x[rows[i]]` for rows of `width`; different buffers. Takes the last token of a batch to the output
    /// head, say.
    pub fn copy_rows(&self, out: &Shared<f32>, x: &Shared<f32>, rows: &[u32], width: usize) {
        self.check("copy_rows", &[id(out), id(x), rows.len(), width]);
        assert!(!out.is(x), "copy_rows: different buffers");
        for i in self.w.range(rows.len(), 1) {
            let row = rows[i] as usize;
            // SAFETY: `x` is only read, row i of `out` is this worker's.
            unsafe {
                let x = x.slice(row * width..(row + 1) * width);
                out.slice_mut(i * width..(i + 1) * width).copy_from_slice(x);
            }
        }
        self.barrier();
    }

    /// The index of the largest of the first `n` elements, the first of equals; the same on every worker.
    pub fn argmax(&self, x: &Shared<f32>, n: usize) -> usize {
        self.check("argmax", &[id(x), n]);
        // SAFETY: only read, until the barrier.
        let x = unsafe { x.slice(0..n) };
        let mut best = 0;
        for i in 1..n {
            if x[i] > x[best] {
                best = i;
            }
        }
        self.barrier();
        best
    }

    /// This worker's `range` of `out`, beginning with what `x` has there. Both may be the same buffer.
    #[allow(clippy::mut_from_ref, reason = "see Shared::slice_mut")]
    fn start_from<'s>(
        &self,
        out: &'s Shared<f32>,
        x: &Shared<f32>,
        range: Range<usize>,
    ) -> &'s mut [f32] {
        // SAFETY: callers pass a range that is this worker's until the next barrier; `x` is read only where it is
        // another buffer.
        unsafe {
            let to = out.slice_mut(range.clone());
            if !out.is(x) {
                to.copy_from_slice(x.slice(range));
            }
            to
        }
    }
}
