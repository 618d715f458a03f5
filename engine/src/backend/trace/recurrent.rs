//! Layers with a recurrent state, in plain loops.

use super::TracePass;
use super::math::silu;
use crate::arch::{DeltaNet, HParams, Past};
use crate::backend::Buf;

/// The states of a sequence, and a copy of them to go back to.
pub(super) struct States {
    now: Vec<State>,
    saved: Vec<State>,
}

/// What a layer keeps.
#[derive(Clone)]
struct State {
    /// Inputs of the convolution before the current one, the oldest first: `[d_conv - 1, n_qkv]`.
    past: Vec<Vec<f32>>,
    /// `[n_head_v, value, key]`
    s: Vec<f32>,
}

impl States {
    pub(super) fn new(hp: &HParams) -> Self {
        let new = |d: DeltaNet| State {
            past: vec![vec![0.0; d.n_qkv()]; d.d_conv - 1],
            s: vec![0.0; d.n_v() * d.head_dim],
        };
        let layers = hp.delta.map(|d| vec![new(d); hp.n_layer_state()]);
        let now = layers.unwrap_or_default();
        Self {
            saved: now.clone(),
            now,
        }
    }

    pub(super) fn save(&mut self) {
        self.saved.clone_from(&self.now);
    }

    pub(super) fn restore(&mut self) {
        self.now.clone_from(&self.saved);
    }
}

impl TracePass {
    fn delta(&self, il: usize) -> (DeltaNet, usize) {
        match (self.hp.delta, self.hp.layers[il].past) {
            (Some(d), Past::State(i)) => (d, i),
            _ => unreachable!("the layer has pages"),
        }
    }

    /// [`Backend::ssm_conv`](crate::backend::Backend::ssm_conv)
    pub(super) fn conv(&mut self, x: Buf, w: &[f32], il: usize) {
        let (d, i) = self.delta(il);
        let past = &mut self.states.now[i].past;
        for row in self.bufs[x as usize].chunks_exact_mut(d.n_qkv()) {
            past.push(row.to_vec());
            for (c, x) in row.iter_mut().enumerate() {
                let products = past.iter().zip(w.chunks_exact(d.n_qkv()));
                let sum: f64 = products
                    .map(|(x, w)| f64::from(x[c]) * f64::from(w[c]))
                    .sum();
                *x = silu(sum as f32);
            }
            past.remove(0);
        }
    }

    /// [`Backend::gated_delta_net`](crate::backend::Backend::gated_delta_net)
    pub(super) fn delta_rule(&mut self, out: Buf, qkv: Buf, [alpha, beta]: [Buf; 2], il: usize) {
        let (d, i) = self.delta(il);
        let dim = d.head_dim;
        let scale = 1.0 / (dim as f64).sqrt();
        let mut all = Vec::with_capacity(self.n() * d.n_v());
        let mut state = std::mem::take(&mut self.states.now[i].s);
        for t in 0..self.n() {
            let (q, rest) = self.row(qkv, t).split_at(d.n_head_k * dim);
            let (k, v) = rest.split_at(d.n_head_k * dim);
            for h in 0..d.n_head_v {
                let alpha = f64::from(self.row(alpha, t)[h]);
                let beta = f64::from(self.row(beta, t)[h]);
                let of = d.head_k(h) * dim..(d.head_k(h) + 1) * dim;
                let (q, k) = (&q[of.clone()], &k[of]);
                for r in h * dim..(h + 1) * dim {
                    let s = &mut state[r * dim..(r + 1) * dim];
                    let dot = |s: &[f32], x: &[f32]| -> f64 {
                        let products = s.iter().zip(x);
                        products.map(|(s, x)| f64::from(*s) * f64::from(*x)).sum()
                    };
                    let change = beta * (f64::from(v[r]) - alpha * dot(s, k));
                    for (s, k) in s.iter_mut().zip(k) {
                        *s = (alpha * f64::from(*s) + change * f64::from(*k)) as f32;
                    }
                    all.push((dot(s, q) * scale) as f32);
                }
            }
        }
        self.states.now[i].s = state;
        self.bufs[out as usize] = all;
    }
}
