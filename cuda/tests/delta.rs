//! Gated delta nets: norms and gates, the rule.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::*;
use lemma_cuda::ops::{self, DeltaHeads, DeltaNet, Quant, RawDelta};

#[test]
fn heads_are_taken_apart() {
    for gpu in gpus() {
        let mut rng = Rng::new(31);
        for (n_head, d) in [(1, 1), (6, 24), (5, 77), (32, 256)] {
            let x = rng.normals(n_head * 2 * d);
            let (xb, a, b) = (
                upload(&gpu, &x),
                poisoned(&gpu, n_head * d),
                poisoned(&gpu, n_head * d),
            );
            ops::split_heads(&gpu, [a.view(), b.view()], xb.view(), n_head, d).expect("split");
            for (part, got) in [a, b].iter().enumerate() {
                let want: Vec<f32> = (x.chunks_exact(2 * d))
                    .flat_map(|h| h[part * d..][..d].to_vec())
                    .collect();
                assert_eq!(read(&gpu, got.view()), want);
            }
        }
    }
}

#[test]
fn first_heads_are_normed() {
    for gpu in gpus() {
        let mut rng = Rng::new(33);
        for (n, n_head, d, rest) in [(1, 1, 16, 0), (3, 5, 48, 7), (2, 4, 128, 512)] {
            let stride = n_head * d + rest;
            let mut x = rng.normals(n * stride);
            x[..d].fill(0.0);
            let xb = upload(&gpu, &x);
            ops::l2_norm_first(&gpu, xb.view(), n, stride, [n_head, d], 1e-4).expect("l2_norm");
            let mut want = f64s(&x);
            for row in want.chunks_exact_mut(stride) {
                for head in row[..n_head * d].chunks_exact_mut(d) {
                    let size =
                        (head.iter().map(|x| x * x).sum::<f64>() + f64::from(1e-4f32)).sqrt();
                    head.iter_mut().for_each(|x| *x /= size);
                }
            }
            let e = nmse(&read(&gpu, xb.view()), &want);
            assert!(e < 1e-12, "{gpu:?}: {e:e}");
        }
    }
}

#[test]
fn gates_of_what_is_kept_and_corrected() {
    for gpu in gpus() {
        let mut rng = Rng::new(34);
        let (n, n_head) = (5, 12);
        let ten = |rng: &mut Rng| -> Vec<f32> {
            let mut x: Vec<f32> = rng.normals(n * n_head).iter().map(|x| x * 10.0).collect();
            x[..4].copy_from_slice(&[200.0, -200.0, 20.0, 0.0]);
            x
        };
        let (alpha, beta) = (ten(&mut rng), ten(&mut rng));
        let a: Vec<f32> = rng.normals(n_head).iter().map(|x| -x.abs() / 4.0).collect();
        let dt = rng.normals(n_head);
        let bufs = [&alpha, &beta].map(|x| upload(&gpu, x));
        let weights = [&a, &dt].map(|x| upload(&gpu, x));
        let views = [bufs[0].view(), bufs[1].view()];
        let params = [weights[0].view(), weights[1].view()];
        ops::delta_gates(&gpu, views, params, n, n_head).expect("delta_gates");
        let want: Vec<f64> = (alpha.iter().enumerate())
            .map(|(i, x)| {
                let (a, dt) = (f64::from(a[i % n_head]), f64::from(dt[i % n_head]));
                (a * (f64::from(*x) + dt).exp().ln_1p()).exp()
            })
            .collect();
        let e = nmse(&read(&gpu, views[0]), &want);
        assert!(e < 1e-11, "{gpu:?} alpha: {e:e}");
        let want: Vec<f64> = beta.iter().map(|x| sigmoid(f64::from(*x))).collect();
        let e = nmse(&read(&gpu, views[1]), &want);
        assert!(e < 1e-12, "{gpu:?} beta: {e:e}");
    }
}

/// The rule in f64: outputs, and the state behind the tokens.
fn rule(h: DeltaHeads, qkv: &[f32], gates: [&[f32]; 2], s: &mut [f64]) -> Vec<f64> {
    let d = h.head_dim;
    let width = (2 * h.n_head_k + h.n_head_v) * d;
    let mut out = Vec::new();
    for (t, row) in qkv.chunks_exact(width).enumerate() {
        let row = f64s(row);
        for head in 0..h.n_head_v {
            let [alpha, beta] = gates.map(|g| f64::from(g[t * h.n_head_v + head]));
            let of = match h.side_by_side {
                true => head / (h.n_head_v / h.n_head_k),
                false => head % h.n_head_k,
            };
            let (q, k) = (&row[of * d..][..d], &row[(h.n_head_k + of) * d..][..d]);
            for r in 0..d {
                let v = row[(2 * h.n_head_k + head) * d + r];
                let s = &mut s[(head * d + r) * d..][..d];
                s.iter_mut().for_each(|s| *s *= alpha);
                let said: f64 = s.iter().zip(k).map(|(s, k)| s * k).sum();
                for (s, k) in s.iter_mut().zip(k) {
                    *s += beta * (v - said) * k;
                }
                let answer: f64 = s.iter().zip(q).map(|(s, q)| s * q).sum();
                out.push(answer / (d as f64).sqrt());
            }
        }
    }
    out
}

/// In passes of different lengths; one that begins at position 0 knows nothing of the state that lies there.
#[test]
fn states_are_corrected_token_by_token() {
    for gpu in gpus() {
        let mut rng = Rng::new(35);
        let slow = is_slow(&gpu);
        for (n_head_k, n_head_v, d, side_by_side, pos, passes) in [
            (1, 1, 16, false, 0, vec![1, 1, 5]),
            (2, 4, 32, false, 0, vec![7, 1, 1]),
            (2, 4, 48, true, 3, vec![1, 9]),
            (1, 3, 64, true, 0, vec![3, 2]),
            (2, 2, 80, false, 1, vec![4]),
            (2, 6, 128, true, 0, vec![6, 1, 2]),
            (1, 2, 144, false, 2, vec![3, 1]),
            (1, 1, 256, false, 0, vec![2, 1]),
            (16, 32, 128, false, 0, vec![if slow { 1 } else { 300 }, 1]),
        ] {
            let h = DeltaHeads {
                n_head_k,
                n_head_v,
                head_dim: d,
                side_by_side,
            };
            let width = (2 * n_head_k + n_head_v) * d;
            let state = rng.normals(n_head_v * d * d);
            let mut want_state = match pos {
                0 => vec![0.0; state.len()],
                _ => f64s(&state),
            };
            let state = upload(&gpu, &state);
            let mut at = pos;
            for n in passes {
                // Keys of length one, as they are normed.
                let mut qkv = rng.normals(n * width);
                for row in qkv.chunks_exact_mut(width) {
                    for head in row[..2 * n_head_k * d].chunks_exact_mut(d) {
                        let size = head.iter().map(|x| x * x).sum::<f32>().sqrt();
                        head.iter_mut().for_each(|x| *x /= size);
                    }
                }
                let gate = |rng: &mut Rng| -> Vec<f32> {
                    let x = rng.normals(n * n_head_v);
                    x.iter()
                        .map(|x| sigmoid(f64::from(*x) + 1.0) as f32)
                        .collect()
                };
                let (alpha, beta) = (gate(&mut rng), gate(&mut rng));
                let bufs = [&qkv, &alpha, &beta].map(|x| upload(&gpu, x));
                let (out, pos) = (poisoned(&gpu, n * n_head_v * d), upload_u32(&gpu, &[at]));
                let call = DeltaNet {
                    out: out.view(),
                    qkv: bufs[0].view(),
                    alpha: bufs[1].view(),
                    beta: bufs[2].view(),
                    state: state.view(),
                    pos: pos.view(),
                    raw: None,
                };
                ops::gated_delta_net(&gpu, &call, h, n).expect("gated_delta_net");
                let want = rule(h, &qkv, [&alpha, &beta], &mut want_state);
                let e = nmse(&read(&gpu, out.view()), &want);
                assert!(e < 1e-10, "{gpu:?} {h:?} {n} at {at}: {e:e}");
                let e = nmse(&read(&gpu, state.view()), &want_state);
                assert!(e < 1e-11, "{gpu:?} {h:?} {n} at {at}, state: {e:e}");
                at += n as u32;
            }
        }
    }
}

/// One token as products have left it: norms, gates and the rule in one launch give what they give one after the other.
#[test]
fn a_step_norms_and_makes_gates_itself() {
    for gpu in gpus() {
        let mut rng = Rng::new(36);
        for (n_head_k, n_head_v, d, side_by_side) in [
            (1, 1, 16, false),
            (2, 4, 48, true),
            (1, 3, 64, false),
            (2, 6, 128, true),
            (1, 2, 144, false),
            (1, 1, 256, false),
        ] {
            let h = DeltaHeads {
                n_head_k,
                n_head_v,
                head_dim: d,
                side_by_side,
            };
            let (width, rows) = ((2 * n_head_k + n_head_v) * d, n_head_v * d);
            let (qkv, state) = (rng.normals(width), rng.normals(rows * d));
            let gates = [0, 1].map(|_| rng.normals(n_head_v));
            let a: Vec<f32> = rng.normals(n_head_v).iter().map(|x| -x.abs()).collect();
            let params = [a, rng.normals(n_head_v)].map(|x| upload(&gpu, &x));
            let params = params.each_ref().map(|b| b.view());
            let pos = upload_u32(&gpu, &[7]);
            let run = |fused: bool| {
                let qkv = upload(&gpu, &qkv);
                let [alpha, beta] = gates.each_ref().map(|g| upload(&gpu, g));
                let (state, out) = (upload(&gpu, &state), poisoned(&gpu, rows));
                let call = DeltaNet {
                    out: out.view(),
                    qkv: qkv.view(),
                    alpha: alpha.view(),
                    beta: beta.view(),
                    state: state.view(),
                    pos: pos.view(),
                    raw: fused.then_some(RawDelta {
                        eps: 1e-4,
                        a: params[0],
                        dt: params[1],
                    }),
                };
                if !fused {
                    let heads = [2 * n_head_k, d];
                    ops::l2_norm_first(&gpu, call.qkv, 1, width, heads, 1e-4).expect("l2_norm");
                    let views = [call.alpha, call.beta];
                    ops::delta_gates(&gpu, views, params, 1, n_head_v).expect("gates");
                }
                ops::gated_delta_net(&gpu, &call, h, 1).expect("gated_delta_net");
                [out, state].map(|b| read(&gpu, b.view()))
            };
            let (want, got) = (run(false), run(true));
            for (want, got) in want.iter().zip(&got) {
                let e = nmse(got, &f64s(want));
                assert!(e < 1e-11, "{gpu:?} {h:?}: {e:e}");
            }
        }
    }
}

#[test]
fn gates_of_normed_heads() {
    for gpu in gpus() {
        let mut rng = Rng::new(37);
        for (n_head, d, quantized) in [
            (1, 16, false),
            (6, 128, true),
            (5, 80, false),
            (9, 96, true),
        ] {
            let n = n_head * d;
            let (x, gate, w) = (rng.normals(n), rng.normals(n), rng.normals(d));
            let [xb, gb, wb] = [&x, &gate, &w].map(|x| upload(&gpu, x));
            let (q, ds) = (poisoned(&gpu, n / 4), poisoned(&gpu, n / 16 + 1));
            let quant = quantized.then(|| Quant {
                q: q.view(),
                ds: ds.view(),
            });
            ops::gated_norm(&gpu, gb.view(), xb.view(), wb.view(), quant, n_head, 1e-5)
                .expect("gated_norm");
            let mut want = Vec::new();
            for (x, gate) in x.chunks_exact(d).zip(gate.chunks_exact(d)) {
                let x = f64s(x);
                let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                let scale = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
                want.extend((0..d).map(|i| {
                    let g = f64::from(gate[i]);
                    g * sigmoid(g) * x[i] * scale * f64::from(w[i])
                }));
            }
            let e = nmse(&read(&gpu, gb.view()), &want);
            assert!(e < 1e-11, "{gpu:?} {n_head} x {d}: {e:e}");
            if quantized {
                let (q, ds) = (gpu.read(q.view()).expect("read"), read(&gpu, ds.view()));
                let back: Vec<f32> = (q.iter().enumerate())
                    .map(|(i, q)| f32::from(*q as i8) * ds[i / 32 * 2])
                    .collect();
                let e = nmse(&back, &want);
                assert!(e < 2e-4, "{gpu:?} {n_head} x {d}, quantized: {e:e}");
            }
        }
    }
}
