//! Weights: upload, dequantization, products, for every format.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::weights::{Q8, matrix, put, reference};
use common::*;
use lemma_cuda::ops::{self, Glu, MatVec, Mode};
use lemma_cuda::step::{Builder, First, Inputs, Products, Shape};
use lemma_cuda::{Gpu, has_kernels};
use lemma_quant::GgmlType;

/// Every format with kernels, and one without.
fn formats() -> Vec<GgmlType> {
    let mut all: Vec<_> = GgmlType::ALL
        .iter()
        .copied()
        .filter(|t| has_kernels(*t))
        .collect();
    assert_eq!(all.len(), 16);
    all.push(GgmlType::TQ1_0);
    all
}

/// Widths that a format can have, odd ones where it can.
fn widths(ty: GgmlType) -> Vec<usize> {
    match ty.block_size() {
        1 => vec![1, 7, 37, 200, 1031],
        32 => vec![32, 96, 544, 2080],
        _ => vec![256, 768, 2304],
    }
}

#[test]
fn rows_are_dequantized_exactly() {
    for gpu in gpus() {
        let mut rng = Rng::new(1);
        for ty in formats() {
            for n_in in widths(ty) {
                let n_row = 5;
                let (data, values) = matrix(&mut rng, ty, n_in, n_row);
                let w = put(&gpu, ty, &data, n_in, n_row);
                let order = [4, 0, 2, 2, 1, 3];
                let tokens = upload_u32(&gpu, &order);
                let out = poisoned(&gpu, order.len() * n_in);
                ops::embed(&gpu, out.view(), &w, tokens.view(), order.len()).expect("embed");
                let got = read(&gpu, out.view());
                let want: Vec<f64> = order
                    .iter()
                    .flat_map(|&t| &values[t as usize * n_in..][..n_in])
                    .map(|v| f64::from(*v))
                    .collect();
                let e = nmse(&got, &want);
                // Formats without kernels are rounded to f16 at upload.
                let limit = if has_kernels(ty) { 1e-12 } else { 1e-6 };
                assert!(e < limit, "{gpu:?} {} {n_in}: {e:e}", ty.name());
            }
        }
    }
}

#[test]
fn mat_vec_of_every_format() {
    for gpu in gpus() {
        let mut rng = Rng::new(2);
        for ty in formats() {
            for n_in in widths(ty) {
                for n_out in [1, 2, 17] {
                    let (data, values) = matrix(&mut rng, ty, n_in, n_out);
                    let w = put(&gpu, ty, &data, n_in, n_out);
                    let (x, bias) = (rng.normals(n_in), rng.normals(n_out));
                    let (xb, bb) = (upload(&gpu, &x), upload(&gpu, &bias));
                    let q8 = Q8::of(&gpu, &xb, n_in);
                    let before = rng.normals(n_out);
                    for mode in [Mode::Store, Mode::Add] {
                        let out = if mode == Mode::Add {
                            upload(&gpu, &before)
                        } else {
                            poisoned(&gpu, n_out)
                        };
                        let parts = [(&w, Some(bb.view()), out.view())];
                        let m = MatVec {
                            parts: &parts,
                            x: xb.view(),
                            quant: q8.as_ref().map(Q8::quant),
                            columns: 1,
                            per_input: 1,
                            experts: None,
                            mode,
                        };
                        ops::mat_vec(&gpu, &m).expect("mat_vec");
                        let seen = q8
                            .as_ref()
                            .filter(|_| w.wants_q8())
                            .map_or_else(|| x.clone(), |q| q.values(&gpu));
                        let mut want = reference(&seen, &values, Some(&bias), n_in);
                        if mode == Mode::Add {
                            want.iter_mut()
                                .zip(&before)
                                .for_each(|(w, b)| *w += f64::from(*b));
                        }
                        let e = nmse(&read(&gpu, out.view()), &want);
                        let limit = if has_kernels(ty) { 1e-9 } else { 1e-4 };
                        assert!(
                            e < limit,
                            "{gpu:?} {} {n_in} x {n_out} {mode:?}: {e:e}",
                            ty.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn mat_vecs_with_one_input_share_a_launch() {
    for gpu in gpus() {
        let mut rng = Rng::new(3);
        let n_in = 512;
        for types in [
            [GgmlType::Q4_K, GgmlType::Q4_K, GgmlType::Q6_K],
            [GgmlType::Q8_0, GgmlType::F16, GgmlType::Q5_0],
        ] {
            let rows = [33, 8, 7];
            let x = rng.normals(n_in);
            let xb = upload(&gpu, &x);
            let q8 = Q8::of(&gpu, &xb, n_in).expect("whole blocks");
            let made: Vec<_> = types
                .iter()
                .zip(rows)
                .map(|(&ty, n)| (matrix(&mut rng, ty, n_in, n), ty, n))
                .collect();
            let weights: Vec<_> = made
                .iter()
                .map(|((data, _), ty, n)| put(&gpu, *ty, data, n_in, *n))
                .collect();
            let outs: Vec<_> = rows.iter().map(|&n| poisoned(&gpu, n)).collect();
            let parts: Vec<_> = weights
                .iter()
                .zip(&outs)
                .map(|(w, o)| (w, None, o.view()))
                .collect();
            let m = MatVec {
                parts: &parts,
                x: xb.view(),
                quant: Some(q8.quant()),
                columns: 1,
                per_input: 1,
                experts: None,
                mode: Mode::Store,
            };
            ops::mat_vec(&gpu, &m).expect("mat_vec");
            for (((_, values), ty, _), out) in made.iter().zip(&outs) {
                let e = nmse(&read(&gpu, out.view()), &reference(&x, values, None, n_in));
                assert!(e < 5e-3, "{gpu:?} {}: {e:e}", ty.name());
            }
        }
    }
}

#[test]
fn gate_and_up_in_one_launch() {
    for gpu in gpus() {
        let mut rng = Rng::new(4);
        let (n_in, n_ff) = (256, 45);
        let types = [GgmlType::Q4_K, GgmlType::Q8_0, GgmlType::BF16];
        for (ty, kind) in types.iter().flat_map(|&ty| GLUS.map(|kind| (ty, kind))) {
            let ((gd, gv), (ud, uv)) = (
                matrix(&mut rng, ty, n_in, n_ff),
                matrix(&mut rng, ty, n_in, n_ff),
            );
            let (g, u) = (
                put(&gpu, ty, &gd, n_in, n_ff),
                put(&gpu, ty, &ud, n_in, n_ff),
            );
            let (x, bias) = (
                rng.normals(n_in)
                    .iter()
                    .map(|v| v * 0.1)
                    .collect::<Vec<_>>(),
                rng.normals(n_ff),
            );
            let (xb, bb, out) = (upload(&gpu, &x), upload(&gpu, &bias), poisoned(&gpu, n_ff));
            let q8 = Q8::of(&gpu, &xb, n_in).expect("whole blocks");
            let parts = [(&g, None, out.view()), (&u, Some(bb.view()), out.view())];
            let m = MatVec {
                parts: &parts,
                x: xb.view(),
                quant: Some(q8.quant()),
                columns: 1,
                per_input: 1,
                experts: None,
                mode: Mode::Gated(kind),
            };
            ops::mat_vec(&gpu, &m).expect("mat_vec");
            let (gate, up) = (
                reference(&x, &gv, None, n_in),
                reference(&x, &uv, Some(&bias), n_in),
            );
            let pairs = gate.iter().zip(up);
            let want: Vec<f64> = pairs.map(|(g, u)| gated(kind, *g, u)).collect();
            let e = nmse(&read(&gpu, out.view()), &want);
            assert!(e < 5e-4, "{gpu:?} {} {kind:?}: {e:e}", ty.name());
        }
    }
}

#[test]
fn batches_on_tensor_cores() {
    for gpu in gpus() {
        let mut rng = Rng::new(6);
        for ty in formats() {
            let big: &[(usize, usize)] = if is_slow(&gpu) { &[] } else { &[(200, 900)] };
            let shapes = [(1, 3), (5, 70), (33, 64), (65, 129)];
            let shapes = if is_slow(&gpu) && ty != GgmlType::Q4_K && ty != GgmlType::F16 {
                &shapes[1..2]
            } else {
                &shapes[..]
            };
            for &(n, n_out) in shapes.iter().chain(big) {
                let n_in = widths(ty)[1];
                let (data, values) = matrix(&mut rng, ty, n_in, n_out);
                let w = put(&gpu, ty, &data, n_in, n_out);
                let (x, bias, before) = (
                    rng.normals(n * n_in),
                    rng.normals(n_out),
                    rng.normals(n * n_out),
                );
                let (xb, bb) = (upload(&gpu, &x), upload(&gpu, &bias));
                for add in [false, true] {
                    let out = if add {
                        upload(&gpu, &before)
                    } else {
                        poisoned(&gpu, n * n_out)
                    };
                    ops::mul_mat(&gpu, out.view(), &w, Some(bb.view()), xb.view(), n, add)
                        .expect("mul_mat");
                    let mut want = reference(&x, &values, Some(&bias), n_in);
                    if add {
                        want.iter_mut()
                            .zip(&before)
                            .for_each(|(w, b)| *w += f64::from(*b));
                    }
                    let e = nmse(&read(&gpu, out.view()), &want);
                    assert!(
                        e < 1e-5,
                        "{gpu:?} {} {n} x {n_in} x {n_out} add {add}: {e:e}",
                        ty.name()
                    );
                }
            }
        }
    }
}

/// A step of nothing but products; the heads are not used.
fn run_step(gpu: &Gpu, all: &[Products<'_>]) {
    let shape = Shape {
        heads: ops::Heads {
            n_head: 1,
            n_head_kv: 1,
            head_dim: 16,
        },
        n_layer: 1,
        max_pages: 1,
        pairs: ops::Pairs::Neighbours,
        n_rope: 1,
        mean: false,
        scale: 1.0,
    };
    let mut builder = Builder::new(gpu, shape);
    for p in all {
        builder.products(p);
    }
    let mut program = builder.finish().unwrap().unwrap();
    let inputs = Inputs {
        pos: 0,
        token: Some(0),
        n_pages: &[1],
        places: &[0],
        rope: &[0.0; 16],
    };
    // Twice: what a launch leaves behind must not disturb the next.
    for _ in 0..2 {
        program.run(&inputs).unwrap();
    }
}

/// What eight bits make of activations, in blocks of 32.
fn rounded(x: &[f32]) -> Vec<f32> {
    let block = |b: &[f32]| {
        let amax = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let (d, inv) = (amax / 127.0, if amax > 0.0 { 127.0 / amax } else { 0.0 });
        b.iter()
            .map(|v| d * (v * inv).round_ties_even())
            .collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(block).collect()
}

#[test]
fn products_of_a_step() {
    for gpu in gpus() {
        let mut rng = Rng::new(23);
        for ty in formats() {
            let block = ty.block_size().max(8);
            // One block of a chunk; chunks that end early; so many rows that warps take them in pairs, the last alone.
            let many = if is_slow(&gpu) { 149 } else { 17_001 };
            let shapes = [
                (block.max(32), 3),
                (2048 + 3 * block.max(32), 37),
                (256, many),
            ];
            for (n_in, n_out) in shapes {
                let q8 = has_kernels(ty)
                    && ![GgmlType::F32, GgmlType::F16, GgmlType::BF16].contains(&ty);
                // A quotient that is a hair off may round to the neighbour.
                let limit = if q8 { 1e-6 } else { 1e-9 };
                let seen = |x: Vec<f32>| if q8 { rounded(&x) } else { x };
                let [(a, va), (b, vb)] = [0; 2].map(|_| matrix(&mut rng, ty, n_in, n_out));
                let (wa, wb) = (
                    put(&gpu, ty, &a, n_in, n_out),
                    put(&gpu, ty, &b, n_in, n_out),
                );
                let (x, norm, bias) = (rng.normals(n_in), rng.normals(n_in), rng.normals(n_out));
                let rms =
                    (x.iter().map(|v| f64::from(v * v)).sum::<f64>() / n_in as f64 + 1e-5).sqrt();
                let weighted = seen(x.iter().zip(&norm).map(|(x, w)| x * w).collect());
                let normed: Vec<f32> = weighted
                    .iter()
                    .map(|x| (f64::from(*x) / rms) as f32)
                    .collect();
                let ya = reference(&normed, &va, Some(&bias), n_in);
                let yb = reference(&normed, &vb, None, n_in);
                let (dx, dn, db) = (upload(&gpu, &x), upload(&gpu, &norm), upload(&gpu, &bias));
                let outs = [0; 3].map(|_| poisoned(&gpu, n_out));
                let with = Some((dn.view(), 1e-5));
                let both = [
                    (&wa, Some(db.view()), outs[0].view()),
                    (&wb, None, outs[1].view()),
                ];
                run_step(
                    &gpu,
                    &[Products {
                        parts: &both,
                        src: dx.view(),
                        first: First::Nothing,
                        norm: with,
                        mode: Mode::Store,
                    }],
                );
                for (out, want) in outs.iter().zip([&ya, &yb]) {
                    let e = nmse(&read(&gpu, out.view()), want);
                    assert!(e < limit, "{ty:?} {n_in} x {n_out}: {e:.1e}");
                }
                let both = [
                    (&wa, Some(db.view()), outs[2].view()),
                    (&wb, None, outs[2].view()),
                ];
                run_step(
                    &gpu,
                    &[Products {
                        parts: &both,
                        src: dx.view(),
                        first: First::Nothing,
                        norm: with,
                        mode: Mode::Gated(Glu::Swiglu),
                    }],
                );
                let want: Vec<f64> = ya
                    .iter()
                    .zip(&yb)
                    .map(|(g, u)| gated(Glu::Swiglu, *g, *u))
                    .collect();
                let e = nmse(&read(&gpu, outs[2].view()), &want);
                assert!(e < 4.0 * limit, "{ty:?} {n_in} x {n_out} gated: {e:.1e}");
                // Added to what is there, twice, without a norm; behind a phase that it waits for.
                let old = rng.normals(n_out);
                let acc = upload(&gpu, &old);
                let plain = reference(&seen(x.clone()), &va, Some(&bias), n_in);
                let parts = [(&wa, Some(db.view()), acc.view())];
                let add = Products {
                    parts: &parts,
                    src: dx.view(),
                    first: First::Nothing,
                    norm: None,
                    mode: Mode::Add,
                };
                run_step(&gpu, &[add, add]);
                let want: Vec<f64> = plain
                    .iter()
                    .zip(&old)
                    .map(|(y, o)| f64::from(*o) + 4.0 * y)
                    .collect();
                let e = nmse(&read(&gpu, acc.view()), &want);
                assert!(e < limit, "{ty:?} {n_in} x {n_out} added: {e:.1e}");
            }
        }
    }
}

#[test]
fn batches_through_f16() {
    for gpu in gpus() {
        let mut rng = Rng::new(17);
        for ty in formats() {
            let block = ty.block_size().max(8);
            // Odd numbers of tokens and rows; widths that are no multiple of a step; small batches, whose weights are unpacked on the fly, and others.
            let shapes = [
                (35, 3 * block, 7),
                (67, 2 * block, 5),
                (129, block, 3),
                (2, 2048 + block, 260),
                (64, 3 * block, 129),
                (130, block * 64usize.div_ceil(block), 140),
            ];
            for (n, n_in, n_out) in shapes.into_iter().take(if is_slow(&gpu) { 3 } else { 6 }) {
                let half = ops::Half::new(&gpu, n, n_in).unwrap();
                let (data, values) = matrix(&mut rng, ty, n_in, n_out);
                let w = put(&gpu, ty, &data, n_in, n_out);
                let (x, bias, old) = (
                    rng.normals(n * n_in),
                    rng.normals(n_out),
                    rng.normals(n * n_out),
                );
                let (dx, db) = (upload(&gpu, &x), upload(&gpu, &bias));
                let want = reference(&x, &values, Some(&bias), n_in);
                for add in [false, true] {
                    let out = upload(&gpu, &old);
                    half.mul_mats(
                        &gpu,
                        &[(&w, Some(db.view()), out.view())],
                        dx.view(),
                        n,
                        add,
                    )
                    .unwrap();
                    let got = read(&gpu, out.view());
                    let want: Vec<f64> = want
                        .iter()
                        .zip(&old)
                        .map(|(w, o)| w + if add { f64::from(*o) } else { 0.0 })
                        .collect();
                    let e = nmse(&got, &want);
                    assert!(e < 1e-5, "{ty:?} {n} x {n_in} x {n_out} add {add}: {e:.1e}");
                }
            }
        }
    }
}

#[test]
fn large_tiles() {
    for gpu in gpus() {
        let mut rng = Rng::new(7);
        // Enough tiles of 128 for the kernel with large tiles to be chosen, with ragged edges.
        let (n, n_in) = (131, 256);
        let n_out = 128 * (gpu.info().n_sm as usize).div_ceil(2) - 5;
        let (data, values) = matrix(&mut rng, GgmlType::Q6_K, n_in, n_out);
        let w = put(&gpu, GgmlType::Q6_K, &data, n_in, n_out);
        let x = rng.normals(n * n_in);
        let (xb, out) = (upload(&gpu, &x), poisoned(&gpu, n * n_out));
        ops::mul_mat(&gpu, out.view(), &w, None, xb.view(), n, false).expect("mul_mat");
        let e = nmse(&read(&gpu, out.view()), &reference(&x, &values, None, n_in));
        assert!(e < 1e-5, "{gpu:?}: {e:e}");
    }
}
