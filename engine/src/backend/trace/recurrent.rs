//! Layers with a recurrent state, in plain loops.

use super::TracePass;
use super::math::silu;
use crate::arch::{HParams, StateShape};
use crate::backend::Buf;

/// The states of a sequence, and a copy of them to go back to.
pub(super) struct States {
    now: Vec<State>,
    saved: Vec<State>,
}

/// What a layer keeps.
#[derive(Clone)]
struct State {
    /// Inputs of the convolution before the current one, the oldest first: `[d_conv - 1, width]`.
    past: Vec<Vec<f32>>,
    /// Delta net: `[n_head_v, value, key]`. State space: `[n_head, head_dim, d_state]`.
    s: Vec<f32>,
}

impl States {
    pub(super) fn new(hp: &HParams) -> Self {
        let new = |s: StateShape| State {
            past: vec![vec![0.0; s.width]; s.d_conv - 1],
            s: vec![0.0; s.n],
        };
        let layers = hp.state().map(|s| vec![new(s); hp.n_layer_state()]);
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
    /// [`Backend::ssm_conv`](crate::backend::Backend::ssm_conv)
    pub(super) fn conv(&mut self, x: Buf, w: &[f32], il: usize) {
        let width = self.widths.get(x);
        let past = &mut self.states.now[self.hp.layer_of_state(il)].past;
        for row in self.bufs[x as usize].chunks_exact_mut(width) {
            convolve(row, w, past);
            row.iter_mut().for_each(|x| *x = silu(*x));
        }
    }

    /// [`Backend::short_conv`](crate::backend::Backend::short_conv)
    pub(super) fn gated_conv(&mut self, x: Buf, bc: [Buf; 2], w: &[f32], il: usize) {
        let width = self.widths.get(x);
        let [b, c] = bc.map(|b| self.bufs[b as usize].clone());
        let past = &mut self.states.now[self.hp.layer_of_state(il)].past;
        let times = |row: &mut [f32], gate: &[f32]| {
            let all = row.iter_mut().zip(gate);
            all.for_each(|(x, g)| *x *= g);
        };
        for (t, row) in self.bufs[x as usize].chunks_exact_mut(width).enumerate() {
            let gate = t * width..(t + 1) * width;
            times(row, &b[gate.clone()]);
            convolve(row, w, past);
            times(row, &c[gate]);
        }
    }

    /// [`Backend::ssm_scan`](crate::backend::Backend::ssm_scan)
    pub(super) fn scan(&mut self, out: Buf, [xbc, dt]: [Buf; 2], w: [Vec<f32>; 3], il: usize) {
        let i = self.hp.layer_of_state(il);
        let Some(d) = self.hp.ssm else {
            unreachable!("the model has state spaces");
        };
        let ([a, dt_bias, skip], n) = (w, d.d_state);
        let mut all = Vec::with_capacity(self.n() * d.n_inner());
        let mut state = std::mem::take(&mut self.states.now[i].s);
        for t in 0..self.n() {
            let (x, bc) = self.row(xbc, t).split_at(d.n_inner());
            let (b, c) = bc.split_at(d.n_group * n);
            for h in 0..d.n_head {
                let dt = f64::from(self.row(dt, t)[h]) + f64::from(dt_bias[h]);
                let dt = if dt > 40.0 { dt } else { dt.exp().ln_1p() };
                let keeps = (dt * f64::from(a[h])).exp();
                let group = h / (d.n_head / d.n_group) * n;
                let (b, c) = (&b[group..group + n], &c[group..group + n]);
                for r in h * d.head_dim..(h + 1) * d.head_dim {
                    let x = f64::from(x[r]);
                    let mut read = x * f64::from(skip[h]);
                    for ((s, b), c) in state[r * n..(r + 1) * n].iter_mut().zip(b).zip(c) {
                        let next = keeps * f64::from(*s) + dt * x * f64::from(*b);
                        read += next * f64::from(*c);
                        *s = next as f32;
                    }
                    all.push(read as f32);
                }
            }
        }
        self.states.now[i].s = state;
        self.bufs[out as usize] = all;
    }

    /// [`Backend::selective_scan`](crate::backend::Backend::selective_scan)
    pub(super) fn selective(&mut self, out: Buf, x: [Buf; 4], w: [Vec<f32>; 2], il: usize) {
        let i = self.hp.layer_of_state(il);
        let ([a, d], mut all) = (w, Vec::new());
        let (n, mut state) = (d.len(), std::mem::take(&mut self.states.now[i].s));
        for t in 0..self.n() {
            let [x, dt, b, c] = x.map(|buf| self.row(buf, t));
            for ch in 0..n {
                let (x, dt) = (f64::from(x[ch]), f64::from(dt[ch]));
                let dt = if dt > 40.0 { dt } else { dt.exp().ln_1p() };
                let mut read = x * f64::from(d[ch]);
                for (j, (b, c)) in b.iter().zip(c).enumerate() {
                    let s = &mut state[ch * (a.len() / n) + j];
                    let keeps = (dt * f64::from(a[j * n + ch])).exp();
                    let next = keeps * f64::from(*s) + dt * x * f64::from(*b);
                    read += next * f64::from(*c);
                    *s = next as f32;
                }
                all.push(read as f32);
            }
        }
        self.states.now[i].s = state;
        self.bufs[out as usize] = all;
    }

    /// [`Backend::gated_delta_net`](crate::backend::Backend::gated_delta_net)
    pub(super) fn delta_rule(&mut self, out: Buf, qkv: Buf, [alpha, beta]: [Buf; 2], il: usize) {
        let (Some(d), i) = (self.hp.delta, self.hp.layer_of_state(il)) else {
            unreachable!("the model has delta nets");
        };
        let dim = d.head_dim;
        let scale = 1.0 / (dim as f64).sqrt();
        let mut all = Vec::with_capacity(self.n() * d.n_v());
        let mut state = std::mem::take(&mut self.states.now[i].s);
        for t in 0..self.n() {
            let (q, rest) = self.row(qkv, t).split_at(d.n_head_k * dim);
            let (k, v) = rest.split_at(d.n_head_k * dim);
            for h in 0..d.n_head_v {
                let alpha = self.row(alpha, t);
                let alpha = |j: usize| f64::from(alpha[if d.apart { h * dim + j } else { h }]);
                let beta = f64::from(self.row(beta, t)[h]);
                let of = d.head_k(h) * dim..(d.head_k(h) + 1) * dim;
                let (q, k) = (&q[of.clone()], &k[of]);
                for r in h * dim..(h + 1) * dim {
                    let s = &mut state[r * dim..(r + 1) * dim];
                    let dot = |s: &[f32], x: &[f32]| -> f64 {
                        let products = s.iter().zip(x);
                        products.map(|(s, x)| f64::from(*s) * f64::from(*x)).sum()
                    };
                    let kept = |(j, (s, k)): (usize, (&f32, &f32))| {
                        alpha(j) * f64::from(*s) * f64::from(*k)
                    };
                    let said: f64 = s.iter().zip(k).enumerate().map(kept).sum();
                    let change = beta * (f64::from(v[r]) - said);
                    for (j, (s, k)) in s.iter_mut().zip(k).enumerate() {
                        *s = (alpha(j) * f64::from(*s) + change * f64::from(*k)) as f32;
                    }
                    all.push((dot(s, q) * scale) as f32);
                }
            }
        }
        self.states.now[i].s = state;
        self.bufs[out as usize] = all;
    }
}

/// The causal convolution of a row with those of before, in place: `w` is `[d_conv, width]`, and behind it may be what is added.
fn convolve(row: &mut [f32], w: &[f32], past: &mut Vec<Vec<f32>>) {
    let width = row.len();
    past.push(row.to_vec());
    let bias = w.chunks_exact(width).nth(past.len());
    for (c, x) in row.iter_mut().enumerate() {
        let products = past.iter().zip(w.chunks_exact(width));
        let sum: f64 = products
            .map(|(x, w)| f64::from(x[c]) * f64::from(w[c]))
            .sum();
        *x = (sum + bias.map_or(0.0, |b| f64::from(b[c]))) as f32;
    }
    past.remove(0);
}
