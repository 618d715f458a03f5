//! Gated delta nets: layers whose memory of all earlier tokens is a matrix for each value head.
//!
//! A token first makes the matrix forget, then corrects what it says about the token's key (Gated DeltaNet, arXiv 2412.06464):
//!
//! ```text
//! S = alpha S;  S += beta (v - S k) kᵀ;  out = S q / sqrt(dim)
//! ```
//!
//! In Kimi Delta Attention (arXiv 2510.26692) each column of `S` is multiplied with an `alpha` of its own.
//!
//! Rows of `S`, one for each element of a value, do not need each other, so workers divide them, and each goes through the tokens of a
//! batch in their order while its rows stay in the cache. Sums run over the elements of a key in one order, so that it makes no difference
//! how tokens are divided into batches. There is no form for chunks of tokens: its products would be rounded otherwise than those
//! of single steps.

use super::{Pass, RecurrentState, id};
use crate::Shared;
use crate::lanes::{self, LANES};
use crate::simd::{Simd, for_isa};

/// What a layer looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of queries and keys.
    pub n_head_k: usize,
    /// Heads of values.
    pub n_head_v: usize,
    /// Elements of a query, a key and a value: a multiple of 16.
    pub dim: usize,
    /// Whether value heads of a key head lie side by side; otherwise value head `h` goes with key head `h % n_head_k`.
    pub side_by_side: bool,
    /// Whether each element of a key is forgotten in its own measure.
    pub apart: bool,
}

impl DeltaShape {
    /// The key head of value head `h`.
    fn head_k(&self, h: usize) -> usize {
        match self.side_by_side {
            true => h / (self.n_head_v / self.n_head_k),
            false => h % self.n_head_k,
        }
    }

    /// Queries, keys and values of a token: those of all heads, one after the other.
    fn width(&self) -> usize {
        (2 * self.n_head_k + self.n_head_v) * self.dim
    }

    /// Rows of matrices are kept in groups of [`LANES`].
    fn n_groups(&self) -> usize {
        self.n_head_v * self.dim / LANES
    }
}

impl Pass<'_> {
    /// `x / sqrt(|x|^2 + eps)`, in place for each of the `n_head` heads of `dim` numbers that rows of `stride` begin with.
    pub fn l2_norm_first(
        &self,
        x: &Shared<f32>,
        (n_head, dim): (usize, usize),
        eps: f32,
        stride: usize,
        n_rows: usize,
    ) {
        self.check("l2_norm_first", &[id(x), n_head, dim, stride, n_rows]);
        assert!(n_head * dim <= stride);
        for i in self.w.range(n_rows * n_head, 1) {
            let from = i / n_head * stride + i % n_head * dim;
            // SAFETY: head i is this worker's.
            lanes::l2_norm(self.isa, unsafe { x.slice_mut(from..from + dim) }, eps);
        }
        self.barrier();
    }

    /// `alpha = exp(a * softplus(alpha + dt))` and `beta = sigmoid(beta)`, in place. `alpha`: `[n_tokens, n]`, `a`, `dt`: `[n]`; `beta`:
    /// `[n_tokens, n_beta]`.
    pub fn delta_gates(
        &self,
        alpha: &Shared<f32>,
        (beta, n_beta): (&Shared<f32>, usize),
        a: &[f32],
        dt: &[f32],
        n_tokens: usize,
    ) {
        self.check("delta_gates", &[id(alpha), id(beta), n_tokens]);
        assert!(!alpha.is(beta) && a.len() == dt.len());
        let n = a.len();
        for i in self.w.range(n_tokens * n, 1) {
            // SAFETY: element i is this worker's.
            let alpha = unsafe { alpha.slice_mut(i..i + 1) };
            let x = alpha[0] + dt[i % n];
            // For large numbers the logarithm is the number.
            let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
            alpha[0] = (a[i % n] * softplus).exp();
        }
        for i in self.w.range(n_tokens * n_beta, 1) {
            // SAFETY: element i is this worker's.
            let beta = unsafe { beta.slice_mut(i..i + 1) };
            beta[0] = 1.0 / (1.0 + (-beta[0]).exp());
        }
        self.barrier();
    }

    /// The gated delta rule, token by token. `qkv`: queries and keys of length one, and values, `[n_tokens, width]`; `gates`: `alpha`,
    /// `[n_tokens, n_head_v]` or, apart, `[n_tokens, n_head_v, dim]`, and `beta`, `[n_tokens, n_head_v]`; `out`: `[n_tokens, n_head_v, dim]`, a buffer of its own. The state's numbers are the matrices, column
    /// after column within a group of 16 rows: `[n_head_v, dim / 16, dim, 16]`. A `fresh` state is zero.
    pub fn gated_delta_net(
        &self,
        out: &Shared<f32>,
        qkv: &Shared<f32>,
        gates: [&Shared<f32>; 2],
        (shape, state): (DeltaShape, &RecurrentState),
        n_tokens: usize,
        fresh: bool,
    ) {
        self.check("gated_delta_net", &[id(out), id(&state.s), n_tokens]);
        let DeltaShape {
            n_head_k,
            n_head_v,
            dim,
            apart,
            ..
        } = shape;
        let n_alpha = if apart { dim } else { 1 };
        assert!(!out.is(qkv) && gates.iter().all(|g| !out.is(g)));
        assert!(dim.is_multiple_of(LANES) && state.s.len() == n_head_v * dim * dim);
        assert!(n_head_k > 0 && n_head_v.is_multiple_of(n_head_k));
        let n = n_head_v * dim;
        assert!(out.len() >= n_tokens * n);
        // SAFETY: these are only read.
        let (qkv, [alpha, beta]) = unsafe {
            (
                qkv.slice(0..n_tokens * shape.width()),
                [
                    gates[0].slice(0..n_tokens * n_head_v * n_alpha),
                    gates[1].slice(0..n_tokens * n_head_v),
                ],
            )
        };
        for i in self.w.range(shape.n_groups(), 1) {
            let head = i * LANES / dim;
            let head_k = shape.head_k(head);
            // SAFETY: this group of rows is this worker's.
            let s = unsafe { state.s.slice_mut(i * dim * LANES..(i + 1) * dim * LANES) };
            if fresh {
                s.fill(0.0);
            }
            for t in 0..n_tokens {
                let qkv = &qkv[t * shape.width()..][..shape.width()];
                let k = n_head_k * dim;
                let of = head_k * dim..(head_k + 1) * dim;
                let at = t * n + i * LANES;
                let mut row = Token {
                    s,
                    q: &qkv[of.clone()],
                    k: &qkv[k..][of],
                    v: &qkv[2 * k + i * LANES..][..LANES],
                    alpha: &alpha[(t * n_head_v + head) * n_alpha..][..n_alpha],
                    beta: beta[t * n_head_v + head],
                    // SAFETY: what these rows give is this worker's.
                    out: unsafe { out.slice_mut(at..at + LANES) },
                };
                // SAFETY: the set is available: `Ops::new` has checked.
                unsafe {
                    match apart {
                        true => delta_rule_apart(self.isa, &mut row),
                        false => delta_rule(self.isa, &mut row),
                    }
                }
            }
        }
        self.barrier();
    }
}

/// A token and [`LANES`] rows of a state.
struct Token<'a> {
    /// `[dim, 16]`
    s: &'a mut [f32],
    /// `[dim]`
    q: &'a [f32],
    /// `[dim]`
    k: &'a [f32],
    /// `[16]`
    v: &'a [f32],
    /// `[1]`, or `[dim]`
    alpha: &'a [f32],
    beta: f32,
    /// `[16]`
    out: &'a mut [f32],
}

for_isa! {
    /// One token of the rule.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn delta_rule<S>(t: &mut Token<'_>) delta_rule_s;
}

#[inline(always)]
unsafe fn delta_rule_s<S: Simd>(t: &mut Token<'_>) {
    let dim = t.k.len();
    assert!(dim.is_multiple_of(4) && t.q.len() == dim && t.s.len() == dim * LANES);
    assert!(t.v.len() == LANES && t.out.len() == LANES);
    let scale = 1.0 / (dim as f32).sqrt();
    // SAFETY: lengths are asserted above, lanes divide 16; the instruction set is available.
    unsafe {
        for lane in (0..LANES).step_by(S::N) {
            let s = t.s.as_mut_ptr().add(lane);
            // Four sums side by side need not wait for each other.
            let mut sums = [S::splat(0.0); 4];
            for j in (0..dim).step_by(4) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let column = S::load(s.add((j + i) * LANES));
                    *sum = S::fma(column, S::splat(*t.k.get_unchecked(j + i)), *sum);
                }
            }
            let said = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            let v = S::load(t.v.as_ptr().add(lane));
            let wrong = S::fma(said, S::splat(-t.alpha[0]), v);
            let change = S::mul(wrong, S::splat(t.beta));
            let alpha = S::splat(t.alpha[0]);
            let mut sums = [S::splat(0.0); 4];
            for j in (0..dim).step_by(4) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = s.add((j + i) * LANES);
                    let kept = S::mul(S::load(at), alpha);
                    let column = S::fma(change, S::splat(*t.k.get_unchecked(j + i)), kept);
                    S::store(at, column);
                    *sum = S::fma(column, S::splat(*t.q.get_unchecked(j + i)), *sum);
                }
            }
            let read = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            S::store(t.out.as_mut_ptr().add(lane), S::mul(read, S::splat(scale)));
        }
    }
}

for_isa! {
    /// One token of the rule in which every element of a key is forgotten in its own measure.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn delta_rule_apart<S>(t: &mut Token<'_>) delta_rule_apart_s;
}

#[inline(always)]
unsafe fn delta_rule_apart_s<S: Simd>(t: &mut Token<'_>) {
    let dim = t.k.len();
    assert!(dim.is_multiple_of(4) && t.q.len() == dim && t.s.len() == dim * LANES);
    assert!(t.v.len() == LANES && t.out.len() == LANES && t.alpha.len() == dim);
    let scale = 1.0 / (dim as f32).sqrt();
    // SAFETY: lengths are asserted above, lanes divide 16; the instruction set is available.
    unsafe {
        for lane in (0..LANES).step_by(S::N) {
            let s = t.s.as_mut_ptr().add(lane);
            // Four sums side by side need not wait for each other.
            let mut sums = [S::splat(0.0); 4];
            for j in (0..dim).step_by(4) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = s.add((j + i) * LANES);
                    let kept = S::mul(S::load(at), S::splat(*t.alpha.get_unchecked(j + i)));
                    S::store(at, kept);
                    *sum = S::fma(kept, S::splat(*t.k.get_unchecked(j + i)), *sum);
                }
            }
            let said = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            let v = S::load(t.v.as_ptr().add(lane));
            let wrong = S::fma(said, S::splat(-1.0), v);
            let change = S::mul(wrong, S::splat(t.beta));
            let mut sums = [S::splat(0.0); 4];
            for j in (0..dim).step_by(4) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = s.add((j + i) * LANES);
                    let column = S::fma(change, S::splat(*t.k.get_unchecked(j + i)), S::load(at));
                    S::store(at, column);
                    *sum = S::fma(column, S::splat(*t.q.get_unchecked(j + i)), *sum);
                }
            }
            let read = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            S::store(t.out.as_mut_ptr().add(lane), S::mul(read, S::splat(scale)));
        }
    }
}
