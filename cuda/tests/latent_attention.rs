//! Latent attention: products of heads, rotation, attention over keys that begin with their values.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::pages::{F16, Q4_0, Q8_0};
use common::pool::Pool;
use common::weights::{matrix, put};
use common::*;
use lemma_cuda::ops::{self, Attention, Heads, Masses, MulMatHeads, Pairs, Parts, Quant};
use lemma_cuda::{Gpu, PAGE};
use lemma_quant::GgmlType;
use lemma_quant::pages::KvType::{self, K4, V2};

#[test]
fn heads_have_matrices_of_their_own() {
    for gpu in gpus() {
        let mut rng = Rng::new(41);
        for (ty, n_head, n_in, n_out, left) in [
            (GgmlType::F32, 3, 12, 24, 12),
            (GgmlType::F32, 4, 15, 7, 3),
            (GgmlType::F16, 5, 32, 33, 0),
            (GgmlType::BF16, 2, 100, 20, 6),
            (GgmlType::Q8_0, 4, 128, 70, 64),
            (GgmlType::Q4_0, 3, 96, 40, 0),
            (GgmlType::Q4_K, 2, 512, 48, 0),
            (GgmlType::Q6_K, 2, 256, 65, 16),
        ] {
            for n in [1, 3, 70] {
                let what = format!("{gpu:?} {ty:?} {n_head} x {n_out} x {n_in}, {n} tokens");
                let (data, values) = matrix(&mut rng, ty, n_in, n_head * n_out);
                let w = put(&gpu, ty, &data, n_in, n_head * n_out);
                let (width, out_width) = (n_in + left, n_out + left);
                let x = rng.normals(n * n_head * width);
                let (xb, out) = (upload(&gpu, &x), poisoned(&gpu, n * n_head * out_width));
                let blocks = n_in.is_multiple_of(32);
                let room = n_head * n_in;
                let (q, ds) = (poisoned(&gpu, room / 4), poisoned(&gpu, room / 16 + 1));
                let quant = blocks.then(|| Quant {
                    q: q.view(),
                    ds: ds.view(),
                });
                let call = MulMatHeads {
                    w: &w,
                    n_head,
                    x: xb.view(),
                    width,
                    out: out.view(),
                    quant,
                    fresh: false,
                };
                ops::mul_mat_heads(&gpu, &call, n).expect("mul_mat_heads");
                let mut want = Vec::new();
                for (i, head) in x.chunks_exact(width).enumerate() {
                    let rows = values[i % n_head * n_out * n_in..].chunks_exact(n_in);
                    want.extend(rows.take(n_out).map(|row| {
                        let products = row.iter().zip(head);
                        products
                            .map(|(w, x)| f64::from(*w) * f64::from(*x))
                            .sum::<f64>()
                    }));
                    want.extend(head[n_in..].iter().map(|x| f64::from(*x)));
                }
                let got = read(&gpu, out.view());
                for (got, x) in got.chunks_exact(out_width).zip(x.chunks_exact(width)) {
                    assert_eq!(got[n_out..], x[n_in..], "{what}: what is left");
                }
                // Batches round to f16, one token to eight bits where the weights have few.
                let limit = match (n, w.wants_q8()) {
                    (1, true) => 2e-4,
                    (1, false) => 1e-11,
                    _ => 1e-6,
                };
                let e = nmse(&got, &want);
                assert!(e < limit, "{what}: {e:e}");
            }
        }
    }
}

#[test]
fn ends_are_rotated_and_keys_stored() {
    for gpu in gpus() {
        let mut rng = Rng::new(42);
        for (n_head, d, n_rot, pairs, stored) in [
            (4, 40, 8, Pairs::Neighbours, true),
            (3, 36, 12, Pairs::Neighbours, false),
            (16, 576, 64, Pairs::Neighbours, true),
            (5, 96, 32, Pairs::Halves(16), true),
            (1, 6, 2, Pairs::Halves(1), false),
            (2, 16, 16, Pairs::Neighbours, true),
        ] {
            let h = Heads {
                n_head,
                n_head_kv: 1,
                head_dim: d,
            };
            let n = 3;
            let (q, k) = (rng.normals(n * n_head * d), rng.normals(n * d));
            // Queries may grow.
            let turns = [1.0, 1.5].map(|grown| {
                let mut turn = || {
                    let a = rng.normal() * 3.0;
                    [a.cos() * grown, a.sin() * grown]
                };
                (0..n * d / 2).flat_map(|_| turn()).collect::<Vec<f32>>()
            });
            let bufs = [&q, &k, &turns[1], &turns[0]].map(|x| upload(&gpu, x));
            let places = [2 * PAGE as u32 + 5, 7, PAGE as u32];
            let pb = upload_u32(&gpu, &places);
            let pool = gpu.alloc(3 * PAGE * d * 2).expect("pool");
            let call = ops::RotateEnds {
                q: bufs[0].view(),
                k: bufs[1].view(),
                rope: Some([bufs[2].view(), bufs[3].view()]),
                n_rot,
                pairs,
                store: stored.then(|| [pool.view(), pb.view()]),
            };
            ops::rotate_ends(&gpu, h, &call, n).expect("rotate_ends");
            let expect = |x: &[f32], heads: usize, rope: &[f32]| -> Vec<f64> {
                let mut out: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                for (i, head) in out.chunks_exact_mut(d).enumerate() {
                    let rope = &rope[i / heads * d..][..n_rot];
                    let end = &mut head[d - n_rot..];
                    for (j, turn) in rope.chunks_exact(2).enumerate() {
                        let (a, b) = match pairs {
                            Pairs::Neighbours => (2 * j, 2 * j + 1),
                            Pairs::Halves(half) => (j, j + half),
                        };
                        let (c, s) = (f64::from(turn[0]), f64::from(turn[1]));
                        (end[a], end[b]) = (end[a] * c - end[b] * s, end[a] * s + end[b] * c);
                    }
                }
                out
            };
            let e = nmse(&read(&gpu, bufs[0].view()), &expect(&q, n_head, &turns[1]));
            assert!(e < 1e-12, "{gpu:?} {d} q: {e:e}");
            let want = expect(&k, 1, &turns[0]);
            if !stored {
                let e = nmse(&read(&gpu, bufs[1].view()), &want);
                assert!(e < 1e-12, "{gpu:?} {d} k: {e:e}");
                continue;
            }
            let bytes = gpu.read(pool.view()).expect("read");
            let half = |b: &[u8]| half::f16::from_le_bytes([b[0], b[1]]).to_f32();
            let halves: Vec<f32> = bytes.chunks_exact(2).map(half).collect();
            let at = |p: &u32| halves[*p as usize * d..][..d].to_vec();
            let got: Vec<f32> = places.iter().flat_map(at).collect();
            let e = nmse(&got, &want);
            assert!(e < 1e-6, "{gpu:?} {d} pool: {e:e}");
            let zeros = halves.iter().filter(|x| **x == 0.0).count();
            assert_eq!(zeros, halves.len() - got.len(), "only places are written");
        }
    }
}

/// Types of keys in each tier; values are of no account.
const POOLS: [&[[KvType; 2]]; 4] = [
    &[[F16; 2]],
    &[[F16; 2], [Q8_0; 2], [K4, V2]],
    &[[Q8_0; 2]],
    &[[Q4_0; 2], [K4, V2]],
];

/// Query heads, width of keys and of values.
const SHAPES: [(usize, usize, usize); 7] = [
    (4, 40, 32),
    (3, 36, 24),
    (1, 6, 4),
    (16, 96, 64),
    (20, 192, 160),
    (5, 320, 256),
    (16, 576, 512),
];

/// The whole of what a token at `pos` gets, and masses `[n_head][pages]`.
fn reference(
    pool: &Pool,
    (n_head, d, dim_v): (usize, usize, usize),
    q: &[f32],
    pos: u32,
    scale: f32,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let (mut out, mut masses) = (Vec::new(), Vec::new());
    for q in q.chunks_exact(d).take(n_head) {
        let mut seen = Vec::new();
        for (i, &(tier, slot, first)) in pool.pages.iter().enumerate() {
            let keys = &pool.parts[usize::from(tier)][0].values;
            for row in (0..PAGE).filter(|row| first + *row as u32 <= pos) {
                let key = &keys[(slot as usize * PAGE + row) * d..][..d];
                let products = q.iter().zip(key);
                let dot: f64 = products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                seen.push((i, key, dot * f64::from(scale)));
            }
        }
        let top = seen.iter().map(|s| s.2).fold(f64::NEG_INFINITY, f64::max);
        let all: f64 = seen.iter().map(|s| (s.2 - top).exp()).sum();
        let (mut sum, mut mass) = (vec![0.0; dim_v], vec![0.0; pool.pages.len()]);
        for (i, key, score) in seen {
            let share = (score - top).exp() / all;
            mass[i] += share;
            for (sum, x) in sum.iter_mut().zip(key) {
                *sum += share * f64::from(*x);
            }
        }
        out.extend(sum);
        masses.push(mass);
    }
    (out, masses)
}

/// The last `n` tokens of a pool, as a batch or, alone, by several blocks that leave masses.
fn attend(
    gpu: &Gpu,
    rng: &mut Rng,
    shape: (usize, usize, usize),
    types: &[[KvType; 2]],
    (n, n_pages, splits): (usize, usize, usize),
) {
    let what = format!("{gpu:?} {shape:?} {types:?} {n} tokens {n_pages} pages {splits} splits");
    let (n_head, d, dim_v) = shape;
    let h = Heads {
        n_head,
        n_head_kv: 1,
        head_dim: d,
    };
    let rows = if n_pages == 1 { 9 } else { 1 + rng.below(PAGE) };
    let mut pool = Pool::new(gpu, rng, h, types, n_pages, rows);
    if n > 1 || rng.below(2) == 0 {
        pool.close_up(n.div_ceil(PAGE) + 1);
    }
    let last = pool.pages[n_pages - 1].2 + rows as u32 - 1;
    let pos = last + 1 - n as u32;
    let max_pages = n_pages + 2;
    let mut table = pool.table();
    table.resize(max_pages * 2, u32::MAX);
    let q: Vec<f32> = rng
        .normals(n * n_head * d)
        .iter()
        .map(|v| v * 2.0)
        .collect();
    let (qb, tb) = (upload(gpu, &q), upload_u32(gpu, &table));
    let state = upload_u32(gpu, &[n_pages as u32, pos]);
    let scale = 1.0 / (d as f32).sqrt();
    let call = Attention {
        q: qb.view(),
        tiers: pool.tiers,
        pages: tb.view(),
        n_pages: state.view().slice(0, 4),
        pos: state.view().slice(4, 4),
        scale,
        window: None,
        cap: None,
        sinks: None,
    };
    let n_out = n * n_head * dim_v;
    let out = poisoned(gpu, n_out);
    if n > 1 {
        ops::attention_latent(gpu, out.view(), h, dim_v, &call, n).expect("attention");
        let want: Vec<f64> = (q.chunks_exact(n_head * d).enumerate())
            .flat_map(|(t, q)| reference(&pool, shape, q, pos + t as u32, scale).0)
            .collect();
        let e = nmse(&read(gpu, out.view()), &want);
        assert!(e < 2e-6, "{what}: {e:e}");
        return;
    }
    let w = poisoned(gpu, max_pages);
    let sums = poisoned(gpu, n_head * splits * dim_v);
    let ml = poisoned(gpu, n_head * splits * 2);
    let page_ml = poisoned(gpu, n_head * max_pages * 2);
    let (q8, ds) = (poisoned(gpu, n_out / 4 + 1), poisoned(gpu, n_out / 16 + 2));
    let quant = dim_v.is_multiple_of(32).then(|| Quant {
        q: q8.view(),
        ds: ds.view(),
    });
    let parts = Parts {
        sums: sums.view(),
        ml: ml.view(),
        page_ml: page_ml.view(),
        splits,
    };
    let mean = rng.below(2) == 0;
    let masses = Some(Masses { w: w.view(), mean });
    ops::attention_latent_decode(gpu, out.view(), quant, masses, h, dim_v, &call, &parts)
        .expect("attention");
    let (want, mass) = reference(&pool, shape, &q, pos, scale);
    let e = nmse(&read(gpu, out.view()), &want);
    assert!(e < 2e-6, "{what}: {e:e}");
    let want_w: Vec<f64> = (0..n_pages)
        .map(|p| {
            let heads = mass.iter().map(|m| m[p]);
            match mean {
                true => heads.sum::<f64>() / n_head as f64,
                false => heads.fold(0.0, f64::max),
            }
        })
        .collect();
    let got = read(gpu, w.view());
    let e = nmse(&got[..n_pages], &want_w);
    assert!(e < 2e-6, "{what}, masses: {e:e}");
    let rest = &got[n_pages..];
    assert!(
        rest.iter().all(|w| w.is_nan()),
        "only live pages are weighed"
    );
}

fn fits(types: &[[KvType; 2]], d: usize) -> bool {
    types == POOLS[0] || d.is_multiple_of(32)
}

#[test]
fn one_token_and_the_masses_of_its_pages() {
    for gpu in gpus() {
        let mut rng = Rng::new(43);
        for shape in SHAPES {
            for types in POOLS.into_iter().filter(|types| fits(types, shape.1)) {
                for (n_pages, splits) in [(1, 1), (3, 1), (4, 3), (9, 2), (18, 5)] {
                    attend(&gpu, &mut rng, shape, types, (1, n_pages, splits));
                }
            }
        }
    }
}

#[test]
fn batches_of_tokens() {
    for gpu in gpus() {
        let mut rng = Rng::new(44);
        for shape in SHAPES {
            for types in POOLS.into_iter().filter(|types| fits(types, shape.1)) {
                for (n, n_pages) in [(2, 1), (3, 2), (7, 6), (33, 4), (40, 9)] {
                    if n > 16 && is_slow(&gpu) && shape.1 > 100 {
                        continue;
                    }
                    attend(&gpu, &mut rng, shape, types, (n, n_pages, 1));
                }
            }
        }
    }
}
