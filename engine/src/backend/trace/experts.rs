//! Mixtures of experts, in plain loops.

use super::math::{activation, best_experts, dot, gelu, silu, softmax, swiglu_oai};
use super::{TracePass, TraceWeight};
use crate::backend::{Act, Activation, Buf, Gating, Moe};

impl TracePass {
    /// `acc += experts(x)`, by the products of the router in `route` if they are there already.
    pub(super) fn experts(&mut self, acc: Buf, x: Buf, route: Option<Buf>, moe: &Moe<TraceWeight>) {
        let n_ff = moe.n_ff;
        let bias = moe.bias.as_ref();
        let [router, gates, ups, downs] = match bias {
            Some(b) => [&b.gate_inp, &b.gate_exps, &b.up_exps, &b.down_exps].map(|w| w.vector()),
            None => Default::default(),
        };
        let choice = moe.exp_probs_b.as_ref().map(TraceWeight::vector);
        // The product of a row, with what is added to it.
        let product = |w: &TraceWeight, bias: &[f32], r: usize, x: &[f32]| {
            dot(&w.row(r), x) + bias.get(r).copied().unwrap_or(0.0)
        };
        for t in 0..self.n() {
            let xn = self.row(x, t).to_vec();
            let mut probs: Vec<f64> = match route {
                Some(b) => self.row(b, t).iter().map(|p| f64::from(*p)).collect(),
                None => (0..moe.n_expert)
                    .map(|e| f64::from(product(&moe.gate_inp, &router, e, &xn)))
                    .collect(),
            };
            match moe.gating {
                Gating::Softmax => softmax(&mut probs),
                Gating::Sigmoid => probs
                    .iter_mut()
                    .for_each(|p| *p = 1.0 / (1.0 + (-*p).exp())),
            }
            let (order, ahead) = best_experts(moe, &probs, &choice);
            self.closest_choice = self.closest_choice.min(ahead);
            let sum: f64 = if moe.norm_topk {
                // What a half-precision number can just hold: all sigmoids may be as good as zero.
                let sum: f64 = order.iter().map(|&e| probs[e]).sum();
                sum.max(2.0f64.powi(-14))
            } else {
                1.0
            };
            let sum = sum / f64::from(moe.weights_scale);
            let scales = moe.down_exps_s.as_ref().map(TraceWeight::vector);
            let width = xn.len();
            let mut y = vec![0.0f64; width];
            for e in order {
                let weight = probs[e] / sum * scales.as_ref().map_or(1.0, |s| f64::from(s[e]));
                let (xn, weight): (Vec<f32>, f64) = match moe.weighs_input {
                    true => (xn.iter().map(|x| x * weight as f32).collect(), 1.0),
                    false => (xn.clone(), weight),
                };
                let hidden: Vec<f32> = (e * n_ff..(e + 1) * n_ff)
                    .map(|r| {
                        let [r, r_up] = match moe.gates_and_ups {
                            true => [r + e * n_ff, r + (e + 1) * n_ff],
                            false => [r, r],
                        };
                        let gate = moe.gate_exps.as_ref();
                        let gate = gate.map_or(0.0, |w| product(w, &gates, r, &xn));
                        let up = product(&moe.up_exps, &ups, r_up, &xn);
                        match moe.act {
                            Act::Geglu => gelu(gate) * up,
                            Act::Swiglu => {
                                let most = moe.clamp.unwrap_or(f32::INFINITY);
                                silu(gate).min(most) * up.clamp(-most, most)
                            }
                            Act::SwigluOai => swiglu_oai(gate, up),
                            Act::ReluSqr => activation(up, Activation::ReluSqr),
                            Act::Reglu => gate.max(0.0) * up,
                        }
                    })
                    .collect();
                for (o, y) in y.iter_mut().enumerate() {
                    let down = product(&moe.down_exps, &downs, e * width + o, &hidden);
                    *y += weight * f64::from(down);
                }
            }
            let acc = &mut self.bufs[acc as usize][t * width..][..width];
            for (a, y) in acc.iter_mut().zip(y) {
                *a += y as f32;
            }
        }
    }
}
