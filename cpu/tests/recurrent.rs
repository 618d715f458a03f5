//! State spaces and gated short convolutions: every instruction set against plain loops in f64, for any number of workers and any batches.

mod common;
use common::*;
use lemma_cpu::{Isa, Limits, RecurrentState, Scan, ScanShape, Shared};

/// Tokens of a sequence.
const N: usize = 21;

/// Runs a sequence in batches of `sizes` in turn: `step` gets the inputs of a batch, `[n, widths[i]]` each, and leaves what it gives in the
/// first. A state that holds something else before shows whether the first batch begins anew.
fn run(
    isa: Isa,
    nth: usize,
    inputs: &[(&[f32], usize)],
    sizes: &[usize],
    mut state: RecurrentState,
    new: impl Fn() -> RecurrentState,
    step: impl Fn(&lemma_cpu::Pass<'_>, &[Shared<f32>], &RecurrentState, usize, bool) + Sync,
) -> Vec<f32> {
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
            let part = |(x, each): &(&[f32], usize)| {
                Shared::from_slice(&x[done * each..(done + n) * each])
            };
            let mut bufs: Vec<Shared<f32>> = inputs.iter().map(part).collect();
            ops.run(|p| step(p, &bufs, &state, n, done == 0));
            all.extend_from_slice(bufs[0].as_mut_slice());
            done += n;
            if round == 1 && done >= N / 2 {
                // A copy goes on where the state was.
                let mut copy = new();
                copy.copy_from(&mut state);
                state = copy;
            }
        }
    }
    all
}

/// All sets, any workers and batches.
fn everywhere(want: &[f64], run: impl Fn(Isa, usize, &[usize]) -> Vec<f32>) {
    for isa in Isa::available() {
        let whole = run(isa, 1, &[N]);
        let error = nmse(&whole, want);
        assert!(error < 1e-11, "{isa}: {error:e}");
        for (nth, sizes) in [(1, &[1][..]), (2, &[N]), (3, &[1, 2, 7]), (5, &[11, 1])] {
            let other = run(isa, nth, sizes);
            assert!(other == whole, "{isa}: {nth} workers, {sizes:?}");
        }
    }
}

/// A channel's causal convolution at token `t`, the oldest token's weight first.
fn convolve(t: usize, d_conv: usize, x: impl Fn(usize) -> f64, w: impl Fn(usize) -> f64) -> f64 {
    let tap = |j: usize| match t + j >= d_conv - 1 {
        true => x(t + j + 1 - d_conv) * w(j),
        false => 0.0,
    };
    (0..d_conv).map(tap).sum()
}

#[test]
fn state_spaces() {
    let mut random = Random(73);
    for (n_head, head_dim, n_group, d_state, d_conv) in [
        (4, 16, 2, 16, 4),
        (3, 32, 1, 8, 2),
        (6, 48, 3, 24, 3),
        (2, 80, 2, 128, 8),
    ] {
        let shape = ScanShape {
            n_head,
            head_dim,
            n_group,
            d_state,
        };
        let inner = n_head * head_dim;
        let width = inner + 2 * n_group * d_state;
        let w = random.vec((d_conv + 1) * width);
        let xbc = random.vec(N * width);
        // Some where the softplus is as good as its argument.
        let dt: Vec<f32> = (random.vec(N * n_head).iter())
            .map(|x| if *x > 1.8 { 12.0 * x } else { *x })
            .collect();
        let a: Vec<f32> = (random.vec(n_head).iter()).map(|x| -x.abs()).collect();
        let [bias, d] = [(); 2].map(|()| random.vec(n_head));
        let nothing = vec![0.0; N * inner];

        let mut want = Vec::new();
        let mut states = vec![vec![0.0; d_state]; inner];
        for t in 0..N {
            let conv = |c: usize| -> f64 {
                let x = |t: usize| f64::from(xbc[t * width + c]);
                let w = |j: usize| f64::from(w[j * width + c]);
                let sum = convolve(t, d_conv, x, w) + w(d_conv);
                sum / (1.0 + (-sum).exp())
            };
            let x: Vec<f64> = (0..width).map(conv).collect();
            for (r, state) in states.iter_mut().enumerate() {
                let h = r / head_dim;
                let of = inner + h / (n_head / n_group) * d_state;
                let (b, c) = (&x[of..], &x[of + n_group * d_state..]);
                let dt = (f64::from(dt[t * n_head + h]) + f64::from(bias[h]))
                    .exp()
                    .ln_1p();
                let mut read = f64::from(d[h]) * x[r];
                for (i, s) in state.iter_mut().enumerate() {
                    *s = (f64::from(a[h]) * dt).exp() * *s + dt * x[r] * b[i];
                    read += *s * c[i];
                }
                want.push(read);
            }
        }
        let scan = Scan {
            a: &a,
            dt: &bias,
            d: &d,
            shape,
        };
        let new = || RecurrentState::new(width, d_conv, inner * d_state);
        everywhere(&want, |isa, nth, sizes| {
            let inputs = [(&nothing[..], inner), (&xbc, width), (&dt, n_head)];
            run(isa, nth, &inputs, sizes, new(), new, |p, b, s, n, fresh| {
                p.ssm_conv(&b[1], &w, s, n, fresh);
                p.ssm_scan(&b[0], [&b[1], &b[2]], &scan, s, n, fresh);
            })
        });
    }
}

#[test]
fn short_convolutions() {
    let mut random = Random(74);
    for (width, d_conv) in [(16, 3), (48, 2), (80, 8)] {
        let w = random.vec(d_conv * width);
        let [x, b, c] = [(); 3].map(|()| random.vec(N * width));
        let product = |t: usize, ch: usize| {
            let at = t * width + ch;
            let gated = |t: usize| f64::from(x[t * width + ch]) * f64::from(b[t * width + ch]);
            f64::from(c[at]) * convolve(t, d_conv, gated, |j| f64::from(w[j * width + ch]))
        };
        let want: Vec<f64> = (0..N * width)
            .map(|i| product(i / width, i % width))
            .collect();
        let new = || RecurrentState::new(width, d_conv, 0);
        everywhere(&want, |isa, nth, sizes| {
            let inputs = [(&x[..], width), (&b, width), (&c, width)];
            run(
                isa,
                nth,
                &inputs,
                sizes,
                new(),
                new,
                |p, bufs, s, n, fresh| {
                    p.short_conv(&bufs[0], [&bufs[1], &bufs[2]], &w, s, n, fresh);
                },
            )
        });
    }
}

#[test]
fn norms_of_groups() {
    let mut random = Random(75);
    let (n, n_group, dim) = (5, 3, 20);
    let (x, w) = (random.vec(n * n_group * dim), random.vec(n_group * dim));
    let mut want = Vec::new();
    for (i, part) in x.chunks_exact(dim).enumerate() {
        let mean = part.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
        let w = &w[i % n_group * dim..][..dim];
        let normed = |(x, w): (&f32, &f32)| f64::from(*x) / (mean + 1e-3).sqrt() * f64::from(*w);
        want.extend(part.iter().zip(w).map(normed));
    }
    for isa in Isa::available() {
        for nth in [1, 3] {
            let mut x = Shared::from_slice(&x);
            ops(isa, nth, Limits::default()).run(|p| p.rms_norm_groups(&x, &w, n_group, 1e-3, n));
            let error = nmse(x.as_mut_slice(), &want);
            assert!(error < 1e-13, "{isa}: {error:e}");
        }
    }
}
