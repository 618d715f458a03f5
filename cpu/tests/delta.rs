//! Gated delta nets: every instruction set against plain loops in f64, for any number of workers and any batches.

mod common;
use common::*;
use lemma_cpu::{DeltaShape, Isa, Limits, RecurrentState, Shared};

/// Layers, and tokens that their convolutions see.
const SHAPES: [(DeltaShape, usize); 5] = [
    (
        DeltaShape {
            n_head_k: 3,
            n_head_v: 3,
            dim: 32,
            side_by_side: false,
            apart: true,
        },
        3,
    ),
    (
        DeltaShape {
            n_head_k: 2,
            n_head_v: 4,
            dim: 32,
            side_by_side: false,
            apart: false,
        },
        4,
    ),
    (
        DeltaShape {
            n_head_k: 1,
            n_head_v: 3,
            dim: 16,
            side_by_side: false,
            apart: false,
        },
        2,
    ),
    (
        DeltaShape {
            n_head_k: 2,
            n_head_v: 2,
            dim: 128,
            side_by_side: false,
            apart: false,
        },
        8,
    ),
    (
        DeltaShape {
            n_head_k: 2,
            n_head_v: 6,
            dim: 16,
            side_by_side: true,
            apart: false,
        },
        3,
    ),
];

/// Tokens of a sequence.
const N: usize = 23;

/// A layer's inputs.
struct Inputs {
    x: Vec<f32>,
    w: Vec<f32>,
    alpha: Vec<f32>,
    beta: Vec<f32>,
    a: Vec<f32>,
    dt: Vec<f32>,
}

/// Numbers that say what is kept.
fn n_alpha(s: DeltaShape) -> usize {
    s.n_head_v * if s.apart { s.dim } else { 1 }
}

fn inputs((s, d_conv): (DeltaShape, usize), random: &mut Random) -> Inputs {
    let (width, n_alpha) = ((2 * s.n_head_k + s.n_head_v) * s.dim, n_alpha(s));
    Inputs {
        x: random.vec(N * width),
        w: random.vec(d_conv * width),
        // Some where the softplus is as good as its argument.
        alpha: (random.vec(N * n_alpha).iter())
            .map(|x| if *x > 1.2 { 30.0 * x } else { *x })
            .collect(),
        beta: random.vec(N * s.n_head_v),
        a: (random.vec(n_alpha).iter()).map(|x| -x.abs()).collect(),
        dt: random.vec(n_alpha),
    }
}

/// Runs the sequence in batches of `sizes` in turn; what the layer gives for each token, `[N, n_head_v, dim]`. A state that holds
/// something else before shows whether the first batch begins anew.
fn run(
    isa: Isa,
    nth: usize,
    (s, d_conv): (DeltaShape, usize),
    i: &Inputs,
    sizes: &[usize],
) -> Vec<f32> {
    let width = (2 * s.n_head_k + s.n_head_v) * s.dim;
    let state_of = || RecurrentState::new(width, d_conv, s.n_head_v * s.dim * s.dim);
    let mut state = state_of();
    let mut ops = ops(isa, nth, Limits::default());
    let mut all = Vec::new();
    for round in 0..2 {
        all.clear();
        let mut done = 0;
        for size in sizes.iter().cycle() {
            let n = *size.min(&(N - done));
            if n == 0 {
                break;
            }
            let part =
                |x: &[f32], each: usize| Shared::from_slice(&x[done * each..(done + n) * each]);
            let (x, alpha, beta) = (
                part(&i.x, width),
                part(&i.alpha, n_alpha(s)),
                part(&i.beta, s.n_head_v),
            );
            let mut out = Shared::zeroed(n * s.n_head_v * s.dim);
            let fresh = done == 0;
            ops.run(|p| {
                p.ssm_conv(&x, &i.w, &state, n, fresh);
                p.l2_norm_first(&x, (2 * s.n_head_k, s.dim), 1e-3, width, n);
                p.delta_gates(&alpha, (&beta, s.n_head_v), &i.a, &i.dt, n);
                p.gated_delta_net(&out, &x, [&alpha, &beta], (s, &state), n, fresh);
            });
            all.extend_from_slice(out.as_mut_slice());
            done += n;
            if round == 1 && done == N / 2 {
                // A copy goes on where the state was.
                let mut copy = state_of();
                copy.copy_from(&mut state);
                state = copy;
            }
        }
    }
    all
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The same as the papers write it.
fn reference((s, d_conv): (DeltaShape, usize), i: &Inputs) -> Vec<f64> {
    let dim = s.dim;
    let width = (2 * s.n_head_k + s.n_head_v) * dim;
    let mut states = vec![vec![vec![0.0; dim]; dim]; s.n_head_v];
    let mut out = Vec::new();
    for t in 0..N {
        let conv = |c: usize| -> f64 {
            let tap = |j: usize| {
                let before = d_conv - 1 - j;
                let x = if t < before {
                    0.0
                } else {
                    i.x[(t - before) * width + c]
                };
                f64::from(x) * f64::from(i.w[j * width + c])
            };
            let sum: f64 = (0..d_conv).map(tap).sum();
            sum * sigmoid(sum)
        };
        let x: Vec<f64> = (0..width).map(conv).collect();
        let unit = |head: usize| -> Vec<f64> {
            let x = &x[head * dim..(head + 1) * dim];
            let size = (x.iter().map(|x| x * x).sum::<f64>() + 1e-3).sqrt();
            x.iter().map(|x| x / size).collect()
        };
        for (h, state) in states.iter_mut().enumerate() {
            let at = t * s.n_head_v + h;
            let head_k = match s.side_by_side {
                true => h / (s.n_head_v / s.n_head_k),
                false => h % s.n_head_k,
            };
            let (q, k) = (unit(head_k), unit(s.n_head_k + head_k));
            let v = &x[(2 * s.n_head_k + h) * dim..][..dim];
            let alpha = |j: usize| {
                let each = n_alpha(s) / s.n_head_v;
                let j = h * each + j % each;
                let x = f64::from(i.alpha[t * n_alpha(s) + j]) + f64::from(i.dt[j]);
                (f64::from(i.a[j]) * x.exp().ln_1p()).exp()
            };
            let beta = sigmoid(i.beta[at].into());
            for (row, v) in state.iter_mut().zip(v) {
                let columns = row.iter_mut().enumerate();
                columns.for_each(|(j, s)| *s *= alpha(j));
                let said: f64 = row.iter().zip(&k).map(|(s, k)| s * k).sum();
                for (s, k) in row.iter_mut().zip(&k) {
                    *s += beta * (v - said) * k;
                }
                let read: f64 = row.iter().zip(&q).map(|(s, q)| s * q).sum();
                out.push(read / (dim as f64).sqrt());
            }
        }
    }
    out
}

#[test]
fn every_set_meets_the_reference_in_any_batches() {
    let mut random = Random(71);
    for s in SHAPES {
        let i = inputs(s, &mut random);
        let want = reference(s, &i);
        for isa in Isa::available() {
            let whole = run(isa, 1, s, &i, &[N]);
            let error = nmse(&whole, &want);
            assert!(error < 1e-11, "{isa} {s:?}: {error:e}");
            for (nth, sizes) in [(1, &[1][..]), (2, &[N]), (3, &[1, 2, 7]), (5, &[11, 1])] {
                let other = run(isa, nth, s, &i, sizes);
                assert!(other == whole, "{isa} {s:?}: {nth} workers, {sizes:?}");
            }
        }
    }
}

#[test]
fn gates_and_halves_of_heads() {
    let mut random = Random(72);
    let (n, width) = (5, 48);
    let x = random.vec(n * width);
    for n_gate in [48, 3, 1] {
        let gate = random.vec(n * n_gate);
        let want: Vec<f64> = (x.iter().enumerate())
            .map(|(i, x)| f64::from(*x) * sigmoid(gate[i / (width / n_gate)].into()))
            .collect();
        for isa in Isa::available() {
            for nth in [1, 3] {
                let (mut x, gate) = (Shared::from_slice(&x), Shared::from_slice(&gate));
                let mut ops = ops(isa, nth, Limits::default());
                ops.run(|p| p.sigmoid_mul(&x, &gate, n, width, n_gate));
                let error = nmse(x.as_mut_slice(), &want);
                assert!(error < 1e-13, "{isa}, {n_gate} gates: {error:e}");
            }
        }
    }
    let dim = 12;
    let mut parts = [(); 2].map(|()| Shared::zeroed(n * width / 2));
    let both = Shared::from_slice(&x);
    ops(Isa::Scalar, 2, Limits::default()).run(|p| {
        p.split_heads(&parts[0], &parts[1], &both, n * 2, dim);
    });
    for (part, got) in parts.iter_mut().enumerate() {
        let want = x.chunks_exact(dim).skip(part).step_by(2).flatten();
        assert!(got.as_mut_slice().iter().eq(want));
    }
}
