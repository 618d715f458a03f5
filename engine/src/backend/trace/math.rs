//! What the verbs of the reference are made of.

use lemma_quant::pages::{KvType, TILE};

use crate::backend::{Activation, Moe};
use crate::kv::PAGE;

/// `a · b`, summed in f64.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums side by side: they need not wait for each other.
    let mut sums = [0.0f64; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += f64::from(a[i]) * f64::from(b[i]);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += f64::from(*a) * f64::from(*b);
    }
    sums.iter().sum::<f64>() as f32
}

/// In place over all of `x`.
pub(super) fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    for v in x.iter_mut() {
        *v /= sum;
    }
}

/// `row / rms(row) * w`
pub(super) fn norm(row: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    row.iter()
        .zip(w)
        .map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32)
        .collect()
}

/// [`norm`] with what comes behind the weights, if anything, added.
pub(super) fn affine(row: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let (w, adds) = w.split_at(row.len());
    let mut out = norm(row, w, eps);
    out.iter_mut().zip(adds).for_each(|(x, y)| *x += y);
    out
}

/// `1 / (1 + e^-x)`
pub(super) fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(x)).exp())
}

/// `x * sigmoid(x)`
pub(super) fn silu(x: f32) -> f32 {
    let x = f64::from(x);
    (x / (1.0 + (-x).exp())) as f32
}

/// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
pub(super) fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    (0.5 * x * (1.0 + inner.tanh())) as f32
}

/// `cap * tanh(x / cap)`, or `x` as it is without a cap.
pub(super) fn softcap(x: f64, cap: Option<f32>) -> f64 {
    cap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
}

/// [`Act::SwigluOai`](crate::backend::Act::SwigluOai)
pub(super) fn swiglu_oai(gate: f32, up: f32) -> f32 {
    let (g, u) = (f64::from(gate.min(7.0)), f64::from(up.clamp(-7.0, 7.0)));
    (g / (1.0 + (-1.702 * g).exp()) * (u + 1.0)) as f32
}

/// The experts that a token is sent to, the best first: those of the best groups, by their weights and what is added to choose; and by how
/// much the last of them is ahead of the next, or the last group of the next if that is closer.
pub(super) fn best_experts<W>(
    moe: &Moe<W>,
    probs: &[f64],
    bias: &Option<Vec<f32>>,
) -> (Vec<usize>, f64) {
    let rank = |e: usize| probs[e] + bias.as_ref().map_or(0.0, |b| f64::from(b[e]));
    let best = |of: std::ops::Range<usize>| {
        let mut order: Vec<usize> = of.collect();
        order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
        order
    };
    let size = moe.n_expert / moe.n_group;
    let worth = |group: usize| -> f64 {
        let order = best(group * size..(group + 1) * size);
        order.iter().take(2).map(|&e| rank(e)).sum()
    };
    let ahead = |worth: &dyn Fn(usize) -> f64, order: &[usize], n: usize| match order.get(n) {
        Some(&next) => worth(order[n - 1]) - worth(next),
        None => f64::INFINITY,
    };
    let mut groups: Vec<usize> = (0..moe.n_group).collect();
    groups.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)).then(a.cmp(&b)));
    let group_ahead = ahead(&worth, &groups, moe.n_group_used);
    groups.truncate(moe.n_group_used);
    let mut order = best(0..moe.n_expert);
    order.retain(|e| groups.contains(&(e / size)));
    let expert_ahead = ahead(&rank, &order, moe.n_expert_used);
    order.truncate(moe.n_expert_used);
    (order, expert_ahead.min(group_ahead))
}

/// What a type leaves of some rows of a page; formats of whole pages have [`PAGE`] of them.
pub(super) fn store(ty: KvType, rows: &mut [Vec<f32>]) {
    let dim = rows[0].len();
    let mut page = vec![
        0;
        ty.page_size(dim)
            .expect("checked when the pool was planned")
    ];
    let mut tile = [[0.0; TILE]; PAGE];
    for i in 0..dim / TILE {
        let at = i * TILE..(i + 1) * TILE;
        for (tile, row) in tile.iter_mut().zip(rows.iter()) {
            tile.copy_from_slice(&row[at.clone()]);
        }
        ty.write_tile(&tile, &mut page, i);
        ty.read_tile(&page, i, &mut tile);
        for (tile, row) in tile.iter().zip(rows.iter_mut()) {
            row[at.clone()].copy_from_slice(tile);
        }
    }
}

/// [`Activation`] of one number.
pub(super) fn activation(x: f32, by: Activation) -> f32 {
    let y = match by {
        Activation::Gelu => return gelu(x),
        Activation::ReluSqr => f64::from(x).max(0.0).powi(2),
        Activation::Xielu {
            alpha_n,
            alpha_p,
            beta,
            eps,
        } => {
            let [x, alpha_n, alpha_p, beta, eps] = [x, alpha_n, alpha_p, beta, eps].map(f64::from);
            if x > 0.0 {
                alpha_p * x * x + beta * x
            } else {
                alpha_n * (x.min(eps).exp_m1() - x) + beta * x
            }
        }
    };
    y as f32
}
