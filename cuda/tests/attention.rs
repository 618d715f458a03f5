//! Attention over pages, and the masses it leaves.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::pool::{POOLS, Pool, fits};
use common::*;
use lemma_cuda::PAGE;
use lemma_cuda::ops::{self, Attention, Heads, Masses, Parts, Quant};

#[test]
fn decode_attends_and_weighs_pages() {
    for gpu in gpus() {
        let mut rng = Rng::new(21);
        let shapes = [
            (4, 4, 64),
            (12, 2, 128),
            (9, 1, 32),
            (8, 2, 128),
            (32, 2, 64),
            (6, 3, 10),
            (2, 2, 256),
            (5, 5, 80),
        ];
        for (n_head, n_head_kv, head_dim) in shapes {
            let h = Heads {
                n_head,
                n_head_kv,
                head_dim,
            };
            let sizes = [
                (1, 1, false),
                (3, 2, true),
                (7, 7, false),
                (19, 4, true),
                (2, 5, false),
            ];
            let pools = POOLS.iter().filter(|types| fits(types, h));
            for (types, (n_pages, splits, mean)) in pools.flat_map(|t| sizes.map(|s| (t, s))) {
                let rows = 1 + rng.below(PAGE);
                let pool = Pool::new(&gpu, &mut rng, h, types, n_pages, rows);
                let pos = pool.pages[n_pages - 1].2 + rows as u32 - 1;
                let max_pages = n_pages + 2;
                let mut table = pool.table();
                table.resize(max_pages * 2, u32::MAX);
                let q: Vec<f32> = rng
                    .normals(n_head * head_dim)
                    .iter()
                    .map(|v| v * 2.0)
                    .collect();
                let (qb, tb) = (upload(&gpu, &q), upload_u32(&gpu, &table));
                let state = upload_u32(&gpu, &[n_pages as u32, pos]);
                let scale = 1.0 / (head_dim as f32).sqrt();
                let call = Attention {
                    q: qb.view(),
                    tiers: pool.tiers,
                    pages: tb.view(),
                    n_pages: state.view().slice(0, 4),
                    pos: state.view().slice(4, 4),
                    scale,
                };
                let n = n_head * head_dim;
                let (out, w) = (poisoned(&gpu, n), poisoned(&gpu, max_pages));
                let sums = poisoned(&gpu, n * splits);
                let (ml, page_ml) = (
                    poisoned(&gpu, n_head * splits * 2),
                    poisoned(&gpu, n_head * max_pages * 2),
                );
                let (q8, ds) = (poisoned(&gpu, n / 4 + 1), poisoned(&gpu, n / 16 + 2));
                let parts = Parts {
                    sums: sums.view(),
                    ml: ml.view(),
                    page_ml: page_ml.view(),
                    splits,
                };
                let quant = head_dim.is_multiple_of(32).then(|| Quant {
                    q: q8.view(),
                    ds: ds.view(),
                });
                let masses = Some(Masses { w: w.view(), mean });
                ops::attention_decode(&gpu, out.view(), quant, masses, h, &call, &parts)
                    .expect("attention");
                let (want, mass) = pool.reference(h, &q, pos, scale);
                let e = nmse(&read(&gpu, out.view()), &want);
                assert!(
                    e < 1e-9,
                    "{gpu:?} {h:?} {types:?} {n_pages} pages {splits} splits: {e:e}"
                );
                let want_w: Vec<f64> = (0..n_pages)
                    .map(|p| {
                        let per_head = mass.iter().map(|m| m[p]);
                        if mean {
                            per_head.sum::<f64>() / n_head as f64
                        } else {
                            per_head.fold(0.0, f64::max)
                        }
                    })
                    .collect();
                let got = read(&gpu, w.view());
                let e = nmse(&got[..n_pages], &want_w);
                assert!(
                    e < 1e-9,
                    "{gpu:?} {h:?} {types:?} {n_pages} pages masses: {e:e}"
                );
                assert!(
                    got[n_pages..].iter().all(|v| v.is_nan()),
                    "only live pages are weighed"
                );
                if quant.is_some() {
                    let q8 = gpu.read(q8.view().slice(0, n)).expect("read");
                    let ds = read(&gpu, ds.view().slice(0, n / 4));
                    let back: Vec<f32> = q8
                        .iter()
                        .enumerate()
                        .map(|(i, v)| f32::from(*v as i8) * ds[i / 32 * 2])
                        .collect();
                    assert!(nmse(&back, &want) < 2e-4, "{gpu:?} {h:?}");
                }
            }
        }
    }
}

#[test]
fn batches_see_what_lies_before_them() {
    for gpu in gpus() {
        let mut rng = Rng::new(22);
        for (n_head, n_head_kv, head_dim) in
            [(4, 2, 64), (7, 1, 128), (3, 3, 26), (8, 2, 160), (6, 2, 96)]
        {
            let h = Heads {
                n_head,
                n_head_kv,
                head_dim,
            };
            // The batch is the last n tokens; its pages are consecutive.
            let sizes = [(1usize, 5usize), (3, 20), (6, 1), (5, 17)];
            let pools = POOLS.iter().filter(|types| fits(types, h));
            for (types, (n_pages, n)) in pools.flat_map(|t| sizes.map(|s| (t, s))) {
                let rows = if n_pages == 1 { 9 } else { 1 + rng.below(PAGE) };
                let mut pool = Pool::new(&gpu, &mut rng, h, types, n_pages, rows);
                let start = 100 * PAGE as u32;
                let tail = n.div_ceil(PAGE) + 1;
                for i in n_pages.saturating_sub(tail)..n_pages {
                    pool.pages[i].2 = start + (i * PAGE) as u32;
                }
                let last = pool.pages[n_pages - 1].2 + rows as u32 - 1;
                let pos = last + 1 - n as u32;
                let table = pool.table();
                let q = rng.normals(n * n_head * head_dim);
                let (qb, tb, state) = (
                    upload(&gpu, &q),
                    upload_u32(&gpu, &table),
                    upload_u32(&gpu, &[n_pages as u32, pos]),
                );
                let call = Attention {
                    q: qb.view(),
                    tiers: pool.tiers,
                    pages: tb.view(),
                    n_pages: state.view().slice(0, 4),
                    pos: state.view().slice(4, 4),
                    scale: 0.2,
                };
                let out = poisoned(&gpu, q.len());
                ops::attention(&gpu, out.view(), h, &call, n).expect("attention");
                let width = n_head * head_dim;
                let want: Vec<f64> = (0..n)
                    .flat_map(|t| {
                        pool.reference(h, &q[t * width..][..width], pos + t as u32, 0.2)
                            .0
                    })
                    .collect();
                let e = nmse(&read(&gpu, out.view()), &want);
                // Tensor cores round the weights of the values to f16.
                assert!(
                    e < 1e-7,
                    "{gpu:?} {h:?} {types:?} {n_pages} pages {n} tokens: {e:e}"
                );
            }
        }
    }
}
