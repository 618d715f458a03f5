//! Norms, quantization, rotation, gates.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::*;
use lemma_cuda::PAGE;
use lemma_cuda::ops::{self, Activation, Glu, Heads, Pairs, Quant, RopeStore, Store};

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

fn norm(x: &[f64], w: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter()
        .zip(w)
        .map(|(v, w)| v * scale * f64::from(*w))
        .collect()
}

/// Values that quantized activations stand for, after checking the sums beside them.
fn dequantized(q: &[u8], ds: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for (q, ds) in q.chunks_exact(32).zip(ds.chunks_exact(2)) {
        let sum: i32 = q.iter().map(|v| i32::from(*v as i8)).sum();
        assert!(
            (ds[1] - ds[0] * sum as f32).abs() <= 1e-5 * ds[0].abs() * 32.0 * 127.0,
            "{} for {sum}",
            ds[1]
        );
        out.extend(q.iter().map(|v| f32::from(*v as i8) * ds[0]));
    }
    out
}

#[test]
fn rms_norm_and_its_quantized_twin() {
    for gpu in gpus() {
        let mut rng = Rng::new(11);
        for (n, width, biased) in [
            (1, 32, false),
            (3, 96, true),
            (2, 1536, false),
            (1, 8192, true),
            (4, 1, true),
            (2, 50, false),
            (1, 333, true),
        ] {
            let (x, w) = (rng.normals(n * width), rng.normals(width));
            // What is added stands behind the weights.
            let bias = rng.normals(if biased { width } else { 0 });
            let (xb, wb, out) = (
                upload(&gpu, &x),
                upload(&gpu, &[w.clone(), bias.clone()].concat()),
                poisoned(&gpu, n * width),
            );
            let quantized = width % 32 == 0;
            let (q, ds) = (
                poisoned(&gpu, n * width / 4 + 1),
                poisoned(&gpu, n * width / 16 + 1),
            );
            let quant = quantized.then(|| Quant {
                q: q.view(),
                ds: ds.view(),
            });
            ops::rms_norm(
                &gpu,
                out.view(),
                xb.view(),
                wb.view(),
                quant,
                n,
                width,
                1e-5,
            )
            .expect("rms_norm");
            let mut want: Vec<f64> = x
                .chunks_exact(width)
                .flat_map(|r| norm(&f64s(r), &w, 1e-5))
                .collect();
            for (i, v) in want.iter_mut().enumerate().filter(|_| biased) {
                *v += f64::from(bias[i % width]);
            }
            let e = nmse(&read(&gpu, out.view()), &want);
            assert!(e < 1e-10, "{gpu:?} {n} x {width}: {e:e}");
            if quantized {
                let q = gpu.read(q.view().slice(0, n * width)).expect("read");
                let back = dequantized(&q, &read(&gpu, ds.view().slice(0, n * width / 4)));
                let e = nmse(&back, &want);
                assert!(e < 1e-4, "{gpu:?} {n} x {width} quantized: {e:e}");
            }
        }
    }
}

#[test]
fn quantization_keeps_zeros_and_extremes() {
    for gpu in gpus() {
        let mut x = vec![0.0; 96];
        x[40] = -3.0;
        x[41] = 3.0;
        x[70] = 1e-30;
        let (xb, q, ds) = (upload(&gpu, &x), poisoned(&gpu, 24), poisoned(&gpu, 6));
        ops::quantize(
            &gpu,
            Quant {
                q: q.view(),
                ds: ds.view(),
            },
            xb.view(),
            96,
        )
        .expect("quantize");
        let back = dequantized(&gpu.read(q.view()).expect("read"), &read(&gpu, ds.view()));
        assert!(back[..32].iter().all(|v| *v == 0.0), "{back:?}");
        assert!((back[40] + 3.0).abs() < 1e-6 && (back[41] - 3.0).abs() < 1e-6);
    }
}

#[test]
fn sums_are_scaled() {
    for gpu in gpus() {
        let mut rng = Rng::new(11);
        let n = 700;
        let (x, y) = (rng.normals(n), rng.normals(n));
        for (factor, added) in [(0.25, true), (-3.0, false), (1.0, true)] {
            let (xb, yb) = (upload(&gpu, &x), upload(&gpu, &y));
            let view = added.then(|| yb.view());
            ops::add_scaled(&gpu, xb.view(), factor, view, n).expect("add_scaled");
            let want = x.iter().zip(&y).map(|(x, y)| {
                f64::from(*x) * f64::from(factor) + if added { f64::from(*y) } else { 0.0 }
            });
            let e = nmse(&read(&gpu, xb.view()), &want.collect::<Vec<_>>());
            assert!(e < 1e-12, "{gpu:?}: {e:e}");
        }
    }
}

#[test]
fn gates_of_every_kind() {
    for gpu in gpus() {
        let mut rng = Rng::new(12);
        let n = 1000;
        // As far out as bounds are, and where nothing is left of a gate.
        let mut ten = || {
            let mut x: Vec<f32> = rng.normals(n).iter().map(|v| v * 10.0).collect();
            x.extend([0.0, -0.0, 7.0, -7.0, 300.0, -300.0, 1e-4]);
            x
        };
        let (g, u) = (ten(), ten());
        for kind in GLUS {
            let (gb, ub) = (upload(&gpu, &g), upload(&gpu, &u));
            ops::glu(&gpu, kind, gb.view(), ub.view(), g.len()).expect("glu");
            let pairs = g.iter().zip(&u);
            let want: Vec<f64> = pairs
                .map(|(g, u)| gated(kind, f64::from(*g), f64::from(*u)))
                .collect();
            let e = nmse(&read(&gpu, gb.view()), &want);
            assert!(e < 1e-10, "{gpu:?} {kind:?}: {e:e}");
        }
    }
}

#[test]
fn logits_are_bounded() {
    for gpu in gpus() {
        let mut rng = Rng::new(15);
        let mut x: Vec<f32> = rng.normals(700).iter().map(|v| v * 20.0).collect();
        x.extend([0.0, 1e4, -1e4, 1e-3]);
        for cap in [30.0, 6.0] {
            let xb = upload(&gpu, &x);
            ops::soft_cap(&gpu, xb.view(), cap, x.len()).expect("soft_cap");
            let cap = f64::from(cap);
            let want = x.iter().map(|x| cap * (f64::from(*x) / cap).tanh());
            let e = nmse(&read(&gpu, xb.view()), &want.collect::<Vec<_>>());
            assert!(e < 1e-12, "{gpu:?}: {e:e}");
        }
    }
}

#[test]
fn gates_and_means() {
    for gpu in gpus() {
        let mut rng = Rng::new(17);
        for (n, width, n_gate) in [(1, 7, 1), (3, 96, 96), (2, 60, 4), (1, 5000, 1)] {
            let (x, gate) = (rng.normals(n * width), rng.normals(n * n_gate));
            let (xb, gb) = (upload(&gpu, &x), upload(&gpu, &gate));
            ops::sigmoid_mul(&gpu, xb.view(), gb.view(), n, [width, n_gate]).expect("sigmoid_mul");
            let each = width / n_gate;
            let want = x.iter().enumerate().map(|(i, x)| {
                let g = f64::from(gate[i / each]);
                f64::from(*x) / (1.0 + (-g).exp())
            });
            let e = nmse(&read(&gpu, xb.view()), &want.collect::<Vec<_>>());
            assert!(e < 1e-12, "{gpu:?}: {e:e}");
            let x: Vec<f32> = x.iter().map(|x| x + 3.0).collect();
            let xb = upload(&gpu, &x);
            ops::center(&gpu, xb.view(), n, width).expect("center");
            let want = x.chunks_exact(width).flat_map(|row| {
                let mean = f64s(row).iter().sum::<f64>() / width as f64;
                row.iter().map(move |x| f64::from(*x) - mean)
            });
            let e = nmse(&read(&gpu, xb.view()), &want.collect::<Vec<_>>());
            assert!(e < 1e-11, "{gpu:?}: {e:e}");
        }
    }
}

#[test]
fn rows_are_normed_as_far_as_weights_go() {
    for gpu in gpus() {
        let mut rng = Rng::new(18);
        for (n, width, stride) in [(1, 24, 36), (3, 512, 576), (2, 7, 7), (5, 33, 2000)] {
            let (x, w) = (rng.normals(n * stride), rng.normals(width));
            let (xb, wb) = (upload(&gpu, &x), upload(&gpu, &w));
            ops::rms_norm_first(&gpu, xb.view(), wb.view(), n, stride, 1e-5).expect("rms_norm");
            let want: Vec<f64> = (x.chunks_exact(stride))
                .flat_map(|row| {
                    let first = norm(&f64s(&row[..width]), &w, 1e-5);
                    first.into_iter().chain(f64s(&row[width..]))
                })
                .collect();
            let e = nmse(&read(&gpu, xb.view()), &want);
            assert!(e < 1e-11, "{gpu:?} {n} x {width} of {stride}: {e:e}");
        }
    }
}

#[test]
fn blocks_without_gates() {
    for gpu in gpus() {
        let mut rng = Rng::new(19);
        let mut x: Vec<f32> = rng.normals(700).iter().map(|v| v * 5.0).collect();
        x.extend([0.0, -0.0, 1e-6, -1e-6, -100.0, 100.0]);
        let (alpha_n, alpha_p, beta, eps) = (0.8f32, 0.6f32, 0.5f32, -1e-2f32);
        let xielu = Activation::Xielu {
            alpha_n,
            alpha_p,
            beta,
            eps,
        };
        for by in [Activation::ReluSqr, xielu, Activation::Gelu] {
            let xb = upload(&gpu, &x);
            ops::activate(&gpu, xb.view(), by, x.len()).expect("activate");
            let [n, p, b, eps] = [alpha_n, alpha_p, beta, eps].map(f64::from);
            let want = x.iter().map(|x| match (by, f64::from(*x)) {
                (Activation::ReluSqr, x) => x.max(0.0).powi(2),
                (Activation::Gelu, x) => gated(Glu::Geglu, x, 1.0),
                (_, x) if x > 0.0 => p * x * x + b * x,
                (_, x) => n * (x.min(eps).exp_m1() - x) + b * x,
            });
            let want: Vec<f64> = want.collect();
            let got = read(&gpu, xb.view());
            let e = nmse(&got, &want);
            assert!(e < 1e-12, "{gpu:?} {by:?}: {e:e}");
            // Those near zero count for themselves.
            for ((got, want), x) in got.iter().zip(&want).zip(&x) {
                let size = want.abs() + f64::from(x.abs());
                assert!((f64::from(*got) - want).abs() <= 1e-5 * size, "{by:?} {x}");
            }
        }
    }
}

/// Rotates a head in place, as far as there are pairs.
fn rotate(x: &mut [f64], rope: &[f32], pairs: Pairs) {
    let n = match pairs {
        Pairs::Neighbours => x.len() / 2,
        Pairs::Halves(n) => n,
    };
    for i in 0..n {
        let (a, b) = match pairs {
            Pairs::Neighbours => (2 * i, 2 * i + 1),
            Pairs::Halves(n) => (i, i + n),
        };
        let (c, s) = (f64::from(rope[2 * i]), f64::from(rope[2 * i + 1]));
        (x[a], x[b]) = (x[a] * c - x[b] * s, x[a] * s + x[b] * c);
    }
}

#[test]
fn heads_are_normed_rotated_and_stored() {
    for gpu in gpus() {
        let mut rng = Rng::new(13);
        for (d, pairs, normed, stored) in [
            (64, Pairs::Halves(32), true, true),
            (128, Pairs::Neighbours, false, true),
            (6, Pairs::Halves(3), true, true),
            (250, Pairs::Neighbours, true, true),
            (32, Pairs::Halves(16), true, false),
            (96, Pairs::Halves(36), false, true),
            (80, Pairs::Halves(1), true, true),
        ] {
            let (n, h) = (
                3,
                Heads {
                    n_head: 6,
                    n_head_kv: 2,
                    head_dim: d,
                },
            );
            let (q, k, v) = (
                rng.normals(n * 6 * d),
                rng.normals(n * 2 * d),
                rng.normals(n * 2 * d),
            );
            // What does not rotate is turned by nothing.
            let rotates = |i: usize| match pairs {
                Pairs::Neighbours => true,
                Pairs::Halves(n) => i < n,
            };
            let rope: Vec<f32> = (0..n * d / 2)
                .flat_map(|i| {
                    let turns = rotates(i % (d / 2));
                    let a = if turns { rng.normal() * 3.0 } else { 0.0 };
                    [a.cos(), a.sin()]
                })
                .collect();
            // Queries may grow.
            let grown =
                |(i, x): (usize, &f32)| x * if rotates(i / 2 % (d / 2)) { 1.5 } else { 1.0 };
            let rope_q: Vec<f32> = rope.iter().enumerate().map(grown).collect();
            let rqb = upload(&gpu, &rope_q);
            let (qw, kw) = (rng.normals(d), rng.normals(d));
            let places = [2 * PAGE as u32 + 5, 7, PAGE as u32];
            let slots = 3;
            let (qb, kb, vb) = (upload(&gpu, &q), upload(&gpu, &k), upload(&gpu, &v));
            let (rb, qwb, kwb, pb) = (
                upload(&gpu, &rope),
                upload(&gpu, &qw),
                upload(&gpu, &kw),
                upload_u32(&gpu, &places),
            );
            let (pk, pv) = (
                gpu.alloc(slots * PAGE * 2 * d * 2).expect("pool"),
                gpu.alloc(slots * PAGE * 2 * d * 2).expect("pool"),
            );
            let call = RopeStore {
                q: qb.view(),
                k: kb.view(),
                v: vb.view(),
                q_norm: normed.then(|| (qwb.view(), 1e-6)),
                k_norm: normed.then(|| (kwb.view(), 1e-5)),
                rope: Some([rqb.view(), rb.view()]),
                pairs,
                store: stored.then(|| Store {
                    k: pk.view(),
                    v: pv.view(),
                    places: pb.view(),
                }),
            };
            ops::rope_store(&gpu, h, &call, n).expect("rope_store");
            let expect = |x: &[f32], heads: usize, w: &[f32], eps: f32, rope: &[f32]| -> Vec<f64> {
                let mut out = Vec::new();
                for (i, head) in x.chunks_exact(d).enumerate() {
                    let mut y = if normed {
                        norm(&f64s(head), w, eps)
                    } else {
                        f64s(head)
                    };
                    rotate(&mut y, &rope[i / heads * d..][..d], pairs);
                    out.extend(y);
                }
                out
            };
            let e = nmse(&read(&gpu, qb.view()), &expect(&q, 6, &qw, 1e-6, &rope_q));
            assert!(e < 1e-10, "{gpu:?} {d} q: {e:e}");
            let want_k = expect(&k, 2, &kw, 1e-5, &rope);
            if !stored {
                assert!(nmse(&read(&gpu, kb.view()), &want_k) < 1e-10);
                continue;
            }
            for (pool, want) in [(&pk, want_k), (&pv, f64s(&v))] {
                let halves: Vec<f32> = gpu
                    .read(pool.view())
                    .expect("read")
                    .chunks_exact(2)
                    .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())
                    .collect();
                let got: Vec<f32> = places
                    .iter()
                    .flat_map(|&p| halves[p as usize * 2 * d..][..2 * d].to_vec())
                    .collect();
                let e = nmse(&got, &want);
                assert!(e < 1e-6, "{gpu:?} {d} pool: {e:e}");
                let others = halves.len() - got.len();
                assert_eq!(
                    halves.iter().filter(|v| **v == 0.0).count(),
                    others,
                    "only the places are written"
                );
            }
        }
    }
}
