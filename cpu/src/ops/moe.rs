//! A feed-forward layer that is a mixture of experts.

use super::{Limits, Pass, id};
use crate::lanes::{self, LANES};
use crate::{Experts, Mat, MulMat, Shared};

/// How the router's logits become weights of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// Each expert for itself.
    Sigmoid,
}

/// A feed-forward layer of experts: `sum over the best experts of weight * down(silu(gate x) * up x)`.
#[derive(Clone, Copy)]
pub struct MoeFfn<'a> {
    /// `n_embd` to a logit for each expert.
    pub router: Mat<'a>,
    /// `n_embd` to `n_ff`.
    pub gate: Experts<'a>,
    /// `n_embd` to `n_ff`.
    pub up: Experts<'a>,
    /// `n_ff` to `n_embd`.
    pub down: Experts<'a>,
    /// Experts that a token uses.
    pub n_expert_used: usize,
    /// From logits to weights.
    pub gating: Gating,
    /// Added to the weights to choose experts, but not to what they count: `[n_expert]`.
    pub choice_bias: Option<&'a [f32]>,
    /// Whether the weights of the chosen are made to sum to 1.
    pub norm_topk: bool,
    /// Factor of all weights.
    pub weights_scale: f32,
}

/// Experts of each token, and what goes through them.
pub(crate) struct Scratch {
    /// `[max_tokens, n_expert]`
    logits: Shared<f32>,
    /// `[max_tokens, n_expert_used]`
    chosen: Shared<u32>,
    /// `[max_tokens, n_expert_used]`
    weights: Shared<f32>,
    /// Hidden layer of one token and expert: `[n_ff]`.
    gate: Shared<f32>,
    /// `[n_ff]`
    up: Shared<f32>,
    /// A token's input: `[n_embd]`.
    x: Shared<f32>,
    /// An expert's output: `[n_embd]`.
    y: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits) -> Self {
        let [logits, chosen, hidden, width] = Self::lens(limits);
        Self {
            logits: Shared::zeroed(logits),
            chosen: Shared::zeroed(chosen),
            weights: Shared::zeroed(chosen),
            gate: Shared::zeroed(hidden),
            up: Shared::zeroed(hidden),
            x: Shared::zeroed(width),
            y: Shared::zeroed(width),
        }
    }

    pub(crate) fn size(limits: &Limits) -> usize {
        let [logits, chosen, hidden, width] = Self::lens(limits);
        (logits + 2 * chosen + 2 * hidden + 2 * width) * size_of::<f32>()
    }

    fn lens(limits: &Limits) -> [usize; 4] {
        [
            limits.max_tokens * limits.n_expert,
            limits.max_tokens * limits.n_expert_used,
            limits.n_ff_expert,
            limits.n_embd_expert,
        ]
    }
}

impl Pass<'_> {
    /// `out += ffn(x)`, both `[n_tokens, n_embd]`, different buffers.
    pub fn moe_ffn(&self, out: &Shared<f32>, x: &Shared<f32>, f: &MoeFfn<'_>, n_tokens: usize) {
        self.check(
            "moe_ffn",
            &[id(out), id(x), f.gate.data.as_ptr() as usize, n_tokens],
        );
        let s = &self.scratch.moe;
        let (n_embd, n_ff, n_used) = (f.gate.n_in, f.gate.n_out, f.n_expert_used);
        assert!(n_embd <= s.x.len() && n_ff <= s.gate.len() && !out.is(x));
        assert!(n_used <= self.limits.n_expert_used && f.router.n_out <= self.limits.n_expert);
        let product = |out, w| MulMat {
            out,
            out_add: false,
            w,
            bias: None,
        };
        self.mul_mat(product(&s.logits, f.router), x, n_tokens);
        for t in self.w.range(n_tokens, 1) {
            let n_expert = f.router.n_out;
            // SAFETY: a token's rows are this worker's.
            let (logits, chosen, weights) = unsafe {
                (
                    s.logits.slice_mut(t * n_expert..(t + 1) * n_expert),
                    s.chosen.slice_mut(t * n_used..(t + 1) * n_used),
                    s.weights.slice_mut(t * n_used..(t + 1) * n_used),
                )
            };
            choose(logits, chosen, weights, f);
        }
        self.barrier();
        for t in 0..n_tokens {
            self.copy_rows(&s.x, x, &[t as u32], n_embd);
            for at in t * n_used..(t + 1) * n_used {
                // SAFETY: written before the last barrier, and not again in this operation.
                let (e, weight) = unsafe {
                    (
                        s.chosen.slice(at..at + 1)[0],
                        s.weights.slice(at..at + 1)[0],
                    )
                };
                let e = e as usize;
                let hidden = [
                    product(&s.gate, f.gate.expert(e)),
                    product(&s.up, f.up.expert(e)),
                ];
                self.mul_mats(&hidden, &s.x, 1);
                self.swiglu(&s.gate, &s.gate, &s.up, n_ff);
                self.mul_mat(product(&s.y, f.down.expert(e)), &s.gate, 1);
                let range = self.w.range(n_embd, LANES);
                // SAFETY: `y` is only read, the range of `out` is this worker's.
                unsafe {
                    let out = out.slice_mut(t * n_embd + range.start..t * n_embd + range.end);
                    lanes::add_scaled(self.isa, out, s.y.slice(range), weight);
                }
                self.barrier();
            }
        }
    }
}

/// The best experts by `logits`, which become probabilities.
fn choose(logits: &mut [f32], chosen: &mut [u32], weights: &mut [f32], f: &MoeFfn<'_>) {
    match f.gating {
        Gating::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for x in logits.iter_mut() {
                *x = (*x - max).exp();
                sum += *x;
            }
            for x in logits.iter_mut() {
                *x /= sum;
            }
        }
        Gating::Sigmoid => {
            for x in logits.iter_mut() {
                *x = 1.0 / (1.0 + (-*x).exp());
            }
        }
    }
    let rank = |i: usize| logits[i] + f.choice_bias.map_or(0.0, |b| b[i]);
    let mut total = 0.0;
    for j in 0..chosen.len() {
        let mut best = None;
        for i in 0..logits.len() {
            let taken = chosen[..j].contains(&(i as u32));
            if !taken && best.is_none_or(|b| rank(i) > rank(b)) {
                best = Some(i);
            }
        }
        let best = best.expect("no more experts are used than there are");
        chosen[j] = best as u32;
        weights[j] = logits[best];
        total += logits[best];
    }
    for w in weights {
        if f.norm_topk {
            *w /= total;
        }
        *w *= f.weights_scale;
    }
}
