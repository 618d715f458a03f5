//! Mixtures of experts: choosing them, mat-vecs of columns, columns sorted by expert on tensor cores, sums.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::weights::{Q8, matrix, put, reference};
use common::*;
use lemma_cuda::ops::{self, Choice, Chosen, Columns, Experts, Grouped, MatVec, Mode};
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
                run(Mode::ReluSqr);
                for (out, y) in outs.iter().zip(&y) {
                    let want: Vec<f64> = y.iter().map(|y| y.max(0.0).powi(2)).collect();
                    let e = nmse(&read(&gpu, out.view()), &want);
                    assert!(e < 1e-10, "{gpu:?} {ty:?} squared, biased {biased}: {e:e}");
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
            (GgmlType::Q6_K, 85, 1, 2, 256, 130),
            (GgmlType::MXFP4, 300, 2, 7, 2880, 520),
        ];
        for (ty, columns, per_input, n_expert, n_in, n_out) in shapes {
            if slow && n_in > 1000 {
                continue;
            }
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
                    let done = grouped.mul_mats(&gpu, parts, x, columns, from, to);
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

#[test]
fn experts_are_chosen_as_by_softmax() {
    for gpu in gpus() {
        let mut rng = Rng::new(14);
        let cases = [
            // Type, tokens, experts, those of a token, whether their weights are made even, elements.
            (GgmlType::F32, 3, 8, 2, true, 50),
            (GgmlType::Q8_0, 2, 60, 4, false, 96),
            (GgmlType::F32, 1, 131, 8, true, 2080),
            (GgmlType::F32, 1, 4, 4, false, 8),
        ];
        for (ty, n, n_expert, n_used, even, n_in) in cases {
            let (mut data, mut values) = matrix(&mut rng, ty, n_in, n_expert);
            let mut bias = rng.normals(n_expert);
            // A tie goes to the lower index.
            let row = data.len() / n_expert;
            data.copy_within(..row, row);
            values.copy_within(..n_in, n_in);
            bias[1] = bias[0];
            let w = put(&gpu, ty, &data, n_in, n_expert);
            let (bb, xb) = (upload(&gpu, &bias), upload(&gpu, &rng.normals(n * n_in)));
            let q8 = Q8::of(&gpu, &xb, n * n_in);
            let x = match &q8 {
                Some(q8) if ty != GgmlType::F32 => q8.values(&gpu),
                _ => read(&gpu, xb.view()),
            };
            let arrived = gpu.alloc(n * 4).expect("counters");
            // Twice: counters are left as they were.
            for biased in [false, true] {
                let (logits, ids, weights) = (
                    poisoned(&gpu, n * n_expert),
                    poisoned(&gpu, n * n_used),
                    poisoned(&gpu, n * n_used),
                );
                let chosen = Chosen {
                    logits: logits.view(),
                    ids: ids.view(),
                    weights: weights.view(),
                    arrived: arrived.view(),
                    n_used,
                    choice: Choice {
                        norm: even,
                        ..Choice::SOFTMAX
                    },
                };
                let router = (&w, biased.then(|| bb.view()));
                let quant = q8.as_ref().map(Q8::quant);
                ops::moe_router(&gpu, router, xb.view(), quant, &chosen, n).expect("moe_router");
                let want = reference(&x, &values, biased.then_some(&bias[..]), n_in);
                let e = nmse(&read(&gpu, logits.view()), &want);
                assert!(e < 1e-10, "{gpu:?} {ty:?}: {e:e}");
                let ids: Vec<usize> = read(&gpu, ids.view())
                    .iter()
                    .map(|v| v.to_bits() as usize)
                    .collect();
                let got = read(&gpu, weights.view());
                for (t, row) in want.chunks_exact(n_expert).enumerate() {
                    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let all: f64 = row.iter().map(|v| (v - max).exp()).sum();
                    let mut order: Vec<usize> = (0..n_expert).collect();
                    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
                    order.truncate(n_used);
                    assert_eq!(ids[t * n_used..][..n_used], order, "{gpu:?}");
                    let mut p: Vec<f64> =
                        order.iter().map(|&e| (row[e] - max).exp() / all).collect();
                    if even {
                        let sum: f64 = p.iter().sum();
                        p.iter_mut().for_each(|v| *v /= sum);
                    }
                    assert!(nmse(&got[t * n_used..][..n_used], &p) < 1e-10, "{gpu:?}");
                }
            }
        }
    }
}

/// Sigmoids, something added where experts are chosen, groups, a factor: as in DeepSeek-V3.
#[test]
fn experts_are_chosen_in_other_ways() {
    for gpu in gpus() {
        let mut rng = Rng::new(15);
        for (n_expert, n_used, n_group, n_group_used, sigmoid, biased, norm, scale) in [
            (12, 3, 1, 1, true, true, true, 2.5),
            (12, 3, 1, 1, true, false, false, 1.0),
            (12, 3, 1, 1, false, true, true, 1.0),
            (32, 4, 8, 3, true, true, true, 1.5),
            (32, 4, 8, 2, false, false, false, 1.5),
            (128, 8, 64, 9, true, true, true, 1.0),
            (9, 2, 3, 1, true, true, false, 0.5),
        ] {
            let (n, n_in) = (3, 40);
            let values = rng.normals(n_in * n_expert);
            let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let w = put(&gpu, GgmlType::F32, &data, n_in, n_expert);
            let (x, bias) = (rng.normals(n * n_in), rng.normals(n_expert));
            let (xb, bb) = (upload(&gpu, &x), upload(&gpu, &bias));
            let [logits, ids, weights] =
                [n_expert, n_used, n_used].map(|width| poisoned(&gpu, n * width));
            let arrived = gpu.alloc(n * 4).expect("counters");
            let chosen = Chosen {
                logits: logits.view(),
                ids: ids.view(),
                weights: weights.view(),
                arrived: arrived.view(),
                n_used,
                choice: Choice {
                    sigmoid,
                    bias: biased.then(|| bb.view()),
                    n_group,
                    n_group_used,
                    norm,
                    scale,
                },
            };
            ops::moe_router(&gpu, (&w, None), xb.view(), None, &chosen, n).expect("moe_router");
            let said = [&ids, &weights].map(|b| read(&gpu, b.view()));
            // The same of products that are there already.
            let again = [0; 2].map(|_| poisoned(&gpu, n * n_used));
            let chosen = Chosen {
                ids: again[0].view(),
                weights: again[1].view(),
                ..chosen
            };
            ops::moe_choose(&gpu, &chosen, n, n_expert).expect("moe_choose");
            let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|v| v.to_bits()).collect() };
            for (said, again) in said.iter().zip(&again) {
                assert_eq!(bits(&read(&gpu, again.view())), bits(said), "{gpu:?}");
            }
            let ids: Vec<usize> = said[0].iter().map(|v| v.to_bits() as usize).collect();
            let got = &said[1];
            let values: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            for t in 0..n {
                let row: Vec<f64> = values
                    .chunks_exact(n_in)
                    .map(|w| {
                        let x = &x[t * n_in..][..n_in];
                        w.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum()
                    })
                    .collect();
                let all: f64 = row.iter().map(|v| v.exp()).sum();
                let p: Vec<f64> = row
                    .iter()
                    .map(|v| match sigmoid {
                        true => 1.0 / (1.0 + (-v).exp()),
                        false => v.exp() / all,
                    })
                    .collect();
                let rank = |e: usize| p[e] + if biased { f64::from(bias[e]) } else { 0.0 };
                let best = |of: Vec<usize>, n: usize, worth: &dyn Fn(usize) -> f64| {
                    let mut of = of;
                    of.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)).then(a.cmp(&b)));
                    of.truncate(n);
                    of
                };
                let size = n_expert / n_group;
                let worth = |g: usize| -> f64 {
                    let two = best((g * size..(g + 1) * size).collect(), 2, &rank);
                    two.iter().map(|&e| rank(e)).sum()
                };
                let open = best((0..n_group).collect(), n_group_used, &worth);
                let left = (0..n_expert).filter(|e| open.contains(&(e / size)));
                let order = best(left.collect(), n_used, &rank);
                assert_eq!(ids[t * n_used..][..n_used], order, "{gpu:?}");
                let sum: f64 = order.iter().map(|&e| p[e]).sum();
                // As in ggml, sums are not smaller than what a half-precision number can just hold.
                let by = if norm { sum.max(6.103_515_6e-5) } else { 1.0 };
                let want: Vec<f64> = order
                    .iter()
                    .map(|&e| p[e] / by * f64::from(scale))
                    .collect();
                let e = nmse(&got[t * n_used..][..n_used], &want);
                assert!(e < 1e-10, "{gpu:?}: {e:e}");
            }
        }
    }
}

/// A file can hold any weights; what is read by number of an expert has to be there all the same.
#[test]
fn logits_that_are_not_numbers_choose_experts_too() {
    for gpu in gpus() {
        let (n_in, n_expert, n_used) = (32, 40, 3);
        let weights = vec![f32::NAN; n_in * n_expert];
        let data: Vec<u8> = weights.iter().flat_map(|v| v.to_le_bytes()).collect();
        let w = put(&gpu, GgmlType::F32, &data, n_in, n_expert);
        let x = upload(&gpu, &vec![1.0; n_in]);
        let [logits, ids, weights] = [n_expert, n_used, n_used].map(|n| poisoned(&gpu, n));
        let arrived = gpu.alloc(4).expect("counters");
        let chosen = Chosen {
            logits: logits.view(),
            ids: ids.view(),
            weights: weights.view(),
            arrived: arrived.view(),
            n_used,
            choice: Choice {
                norm: true,
                ..Choice::SOFTMAX
            },
        };
        ops::moe_router(&gpu, (&w, None), x.view(), None, &chosen, 1).expect("moe_router");
        let ids: Vec<u32> = read(&gpu, ids.view()).iter().map(|v| v.to_bits()).collect();
        let there = |i: usize| (ids[i] as usize) < n_expert && !ids[..i].contains(&ids[i]);
        assert!((0..n_used).all(there), "{gpu:?}: {ids:?}");
    }
}

#[test]
fn what_experts_say_is_weighed_and_added() {
    for gpu in gpus() {
        let mut rng = Rng::new(16);
        for (ty, n, n_used, n_in, n_out) in [
            (GgmlType::MXFP4, 1, 4, 96, 37),
            (GgmlType::Q6_K, 3, 2, 512, 8),
            (GgmlType::F32, 2, 3, 40, 5),
        ] {
            let n_expert = 6;
            let (data, values) = matrix(&mut rng, ty, n_in, n_out * n_expert);
            let w = put(&gpu, ty, &data, n_in, n_out * n_expert);
            let columns = n * n_used;
            let ids: Vec<u32> = (0..columns).map(|_| rng.below(n_expert) as u32).collect();
            let (weights, old) = (rng.normals(columns), rng.normals(n * n_out));
            let bias = rng.normals(n_out * n_expert);
            let xb = upload(&gpu, &rng.normals(columns * n_in));
            let q8 = Q8::of(&gpu, &xb, columns * n_in);
            let x = match &q8 {
                Some(q8) if ty != GgmlType::F32 => q8.values(&gpu),
                _ => read(&gpu, xb.view()),
            };
            let (idb, wb, bb) = (
                upload_u32(&gpu, &ids),
                upload(&gpu, &weights),
                upload(&gpu, &bias),
            );
            for biased in [false, true] {
                let mut said = Vec::new();
                for (c, &id) in ids.iter().enumerate() {
                    let at = id as usize * n_out;
                    let rows = &values[at * n_in..][..n_out * n_in];
                    let bias = biased.then(|| &bias[at..][..n_out]);
                    said.extend(reference(&x[c * n_in..][..n_in], rows, bias, n_in));
                }
                let want = |add: bool| -> Vec<f64> {
                    let from = |v: &f32| if add { f64::from(*v) } else { 0.0 };
                    let mut want: Vec<f64> = old.iter().map(from).collect();
                    for (c, y) in said.chunks_exact(n_out).enumerate() {
                        for (i, y) in y.iter().enumerate() {
                            want[c / n_used * n_out + i] += f64::from(weights[c]) * y;
                        }
                    }
                    want
                };
                // In one launch, and of results that are there.
                let experts = Experts {
                    ids: idb.view(),
                    n: n_expert,
                };
                let down = (&w, biased.then(|| bb.view()));
                let quant = q8.as_ref().map(Q8::quant);
                let (input, shape) = ((xb.view(), quant), (n, n_used));
                let rounded: Vec<f32> = said.iter().map(|v| *v as f32).collect();
                let y = upload(&gpu, &rounded);
                for add in [false, true] {
                    let want = want(add);
                    let room = || match add {
                        true => upload(&gpu, &old),
                        false => poisoned(&gpu, n * n_out),
                    };
                    let (down_to, sum_to) = (room(), room());
                    let to = (down_to.view(), add);
                    ops::moe_down(&gpu, down, input, to, wb.view(), experts, shape)
                        .expect("moe_down");
                    let e = nmse(&read(&gpu, down_to.view()), &want);
                    assert!(e < 1e-10, "{gpu:?} {ty:?}: {e:e}");
                    let to = (sum_to.view(), add);
                    ops::moe_sum(&gpu, to, y.view(), wb.view(), n, n_used, n_out).expect("moe_sum");
                    let e = nmse(&read(&gpu, sum_to.view()), &want);
                    assert!(e < 1e-10, "{gpu:?} {ty:?}: {e:e}");
                }
            }
        }
    }
}
