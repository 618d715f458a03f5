//! Products of experts: mat-vecs of columns, and columns sorted by expert on tensor cores.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::weights::{Q8, matrix, put, reference};
use common::*;
use lemma_cuda::ops::{self, Columns, Experts, Grouped, Half, MatVec, Mode};
use lemma_quant::GgmlType;

#[test]
fn experts_are_chosen_by_column() {
    for gpu in gpus() {
        let mut rng = Rng::new(5);
        let (n_in, n_out, n_expert) = (256, 9, 5);
        for ty in [GgmlType::Q5_K, GgmlType::MXFP4] {
            let made = [0; 2].map(|_| matrix(&mut rng, ty, n_in, n_out * n_expert));
            let w = [0, 1].map(|i| put(&gpu, ty, &made[i].0, n_in, n_out * n_expert));
            // A bias for each row of each expert.
            let bias = [0; 2].map(|_| rng.normals(n_out * n_expert));
            let bb = bias.each_ref().map(|b| upload(&gpu, b));
            let x: Vec<f32> = rng.normals(n_in * 3).iter().map(|v| v * 0.2).collect();
            let xb = upload(&gpu, &x);
            let q8 = Q8::of(&gpu, &xb, n_in * 3).expect("whole blocks");
            let x = q8.values(&gpu);
            let ids = [4, 0, 2, 2, 1, 3];
            let n = ids.len() * n_out;
            let idb = upload_u32(&gpu, &ids);
            for biased in [false, true] {
                let y = [0, 1].map(|i| {
                    let mut y = Vec::new();
                    for (c, &id) in ids.iter().enumerate() {
                        let at = id as usize * n_out;
                        let rows = &made[i].1[at * n_in..][..n_out * n_in];
                        let bias = biased.then(|| &bias[i][at..][..n_out]);
                        y.extend(reference(&x[c / 2 * n_in..][..n_in], rows, bias, n_in));
                    }
                    y
                });
                let outs = [0; 2].map(|_| poisoned(&gpu, n));
                let part = |i: usize| (&w[i], biased.then(|| bb[i].view()), outs[i].view());
                let run = |mode| {
                    let m = MatVec {
                        parts: &[part(0), part(1)],
                        x: xb.view(),
                        quant: Some(q8.quant()),
                        columns: ids.len(),
                        per_input: 2,
                        experts: Some(Experts {
                            ids: idb.view(),
                            n: n_expert,
                        }),
                        mode,
                    };
                    ops::mat_vec(&gpu, &m).expect("mat_vec");
                };
                run(Mode::Store);
                for (out, y) in outs.iter().zip(&y) {
                    let e = nmse(&read(&gpu, out.view()), y);
                    assert!(e < 1e-10, "{gpu:?} {ty:?} biased {biased}: {e:e}");
                }
                for kind in GLUS {
                    run(Mode::Gated(kind));
                    let pairs = y[0].iter().zip(&y[1]);
                    let want: Vec<f64> = pairs.map(|(g, u)| gated(kind, *g, *u)).collect();
                    let e = nmse(&read(&gpu, outs[0].view()), &want);
                    assert!(e < 1e-10, "{gpu:?} {ty:?} {kind:?} biased {biased}: {e:e}");
                }
            }
        }
    }
}

/// Which expert each column is for: all of one, none of some, more than a tile of others.
fn choices(rng: &mut Rng, columns: usize, n_expert: usize) -> Vec<Vec<u32>> {
    let any = (0..columns).map(|_| rng.below(n_expert) as u32).collect();
    let two = (0..columns).map(|c| if c % 5 == 0 { 0 } else { n_expert as u32 - 1 });
    vec![any, two.collect(), vec![n_expert as u32 / 2; columns]]
}

#[test]
fn columns_are_sorted_by_expert() {
    for gpu in gpus() {
        let mut rng = Rng::new(8);
        let slow = is_slow(&gpu);
        let shapes = [
            // Type, columns, columns of an input, experts, elements, rows of an expert.
            (GgmlType::MXFP4, 37, 4, 5, 96, 9),
            (GgmlType::Q4_K, 150, 3, 3, 256, 131),
            (GgmlType::F32, 8, 1, 20, 50, 3),
            (GgmlType::MXFP4, 300, 2, 7, 2880, 520),
        ];
        for (ty, columns, per_input, n_expert, n_in, n_out) in shapes {
            if slow && n_in > 1000 {
                continue;
            }
            let half = Half::new(&gpu, 33, n_in).expect("half");
            let grouped = Grouped::new(&gpu, columns, n_expert, n_in).expect("grouped");
            let made = [0; 2].map(|_| matrix(&mut rng, ty, n_in, n_out * n_expert));
            let w = [0, 1].map(|i| put(&gpu, ty, &made[i].0, n_in, n_out * n_expert));
            let bias = rng.normals(n_out * n_expert);
            let bb = upload(&gpu, &bias);
            // As many inputs as for columns that share none.
            let x = rng.normals(n_in * columns);
            let xb = upload(&gpu, &x);
            for ids in choices(&mut rng, columns, n_expert) {
                let idb = upload_u32(&gpu, &ids);
                grouped.sort(&gpu, idb.view(), columns).expect("sort");
                let outs = [0; 2].map(|_| poisoned(&gpu, columns * n_out));
                let parts = [
                    (&w[0], Some(bb.view()), outs[0].view()),
                    (&w[1], None, outs[1].view()),
                ];
                let given = Columns::Given(per_input);
                let run = |parts: &[_], x, from, to| {
                    let done = grouped.mul_mats(&gpu, &half, parts, x, columns, from, to);
                    done.expect("products");
                };
                run(&parts, xb.view(), given, Columns::Given(1));
                let product = |i: usize, e: u32, x: &[f32], biased: bool| {
                    let at = e as usize * n_out;
                    let rows = &made[i].1[at * n_in..][..n_out * n_in];
                    reference(x, rows, biased.then(|| &bias[at..][..n_out]), n_in)
                };
                for (i, out) in outs.iter().enumerate() {
                    let all = ids.iter().enumerate();
                    let want: Vec<f64> = all
                        .flat_map(|(c, &e)| {
                            product(i, e, &x[c / per_input * n_in..][..n_in], i == 0)
                        })
                        .collect();
                    let e = nmse(&read(&gpu, out.view()), &want);
                    assert!(e < 1e-5, "{gpu:?} {ty:?} {columns} columns: {e:e}");
                }
                // To sorted order, and from there back to the order that was given: each column through its expert twice.
                let square = matrix(&mut rng, GgmlType::F32, n_out, n_out * n_expert);
                let ws = put(&gpu, GgmlType::F32, &square.0, n_out, n_out * n_expert);
                let (sorted, back) = (
                    poisoned(&gpu, columns * n_out),
                    poisoned(&gpu, columns * n_out),
                );
                let first = [(&w[0], Some(bb.view()), sorted.view())];
                run(&first, xb.view(), given, Columns::Sorted);
                let second = [(&ws, None, back.view())];
                run(&second, sorted.view(), Columns::Sorted, Columns::Given(1));
                let hidden = read(&gpu, outs[0].view());
                let all = ids.iter().zip(hidden.chunks_exact(n_out));
                let want: Vec<f64> = all
                    .flat_map(|(&e, x)| {
                        let rows = &square.1[e as usize * n_out * n_out..][..n_out * n_out];
                        reference(x, rows, None, n_out)
                    })
                    .collect();
                let e = nmse(&read(&gpu, back.view()), &want);
                assert!(e < 1e-5, "{gpu:?} {ty:?} {columns} columns, twice: {e:e}");
            }
        }
    }
}
