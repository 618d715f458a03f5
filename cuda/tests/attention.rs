//! Attention over pages, and the masses it leaves.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::pool::{POOLS, Pool, Rules, fits};
use common::*;
use lemma_cuda::ops::{self, Attention, Heads, Masses, Parts, Quant};
use lemma_cuda::{Gpu, PAGE, View};
use lemma_quant::pages::KvType;

/// Shapes of heads: query heads, key and value heads, width.
fn heads(all: &[(usize, usize, usize)]) -> impl Iterator<Item = Heads> {
    all.iter().map(|&(n_head, n_head_kv, head_dim)| Heads {
        n_head,
        n_head_kv,
        head_dim,
    })
}

/// Pools that heads of a shape can be stored in.
fn pools(h: Heads) -> impl Iterator<Item = &'static [[KvType; 2]]> {
    POOLS.into_iter().filter(move |types| fits(types, h))
}

/// Windows, bounds of scores and sinks, apart and together. Sinks are such that they take from nearly nothing to nearly all.
fn rules(rng: &mut Rng, h: Heads, scale: f32) -> Vec<Rules> {
    let sinks: Vec<f32> = rng.normals(h.n_head).iter().map(|s| s * 3.0).collect();
    let rules = |window, cap, sinks: &[f32]| Rules {
        scale,
        window,
        cap,
        sinks: sinks.to_vec(),
    };
    vec![
        rules(Some(1), None, &[]),
        rules(Some(7), None, &sinks),
        rules(Some(16), Some(2.0), &[]),
        rules(Some(50), None, &sinks),
        rules(None, Some(1.5), &[]),
        rules(None, Some(3.0), &sinks),
        rules(None, None, &sinks),
        rules(Some(u32::MAX), None, &[]),
    ]
}

/// A call, in device memory that is kept beside it.
fn call(
    pool: &Pool,
    q: View,
    table: View,
    state: View,
    rules: &Rules,
    sinks: Option<View>,
) -> Attention {
    Attention {
        q,
        tiers: pool.tiers,
        pages: table,
        n_pages: state.slice(0, 4),
        pos: state.slice(4, 4),
        scale: rules.scale,
        window: rules.window,
        cap: rules.cap,
        sinks,
    }
}

/// One token over `n_pages` pages, shared by `splits` blocks, beside the reference.
fn decode(
    gpu: &Gpu,
    rng: &mut Rng,
    h: Heads,
    types: &[[KvType; 2]],
    (n_pages, splits, mean): (usize, usize, bool),
    rules: &Rules,
) {
    let what = format!("{gpu:?} {h:?} {types:?} {n_pages} pages {splits} splits {rules:?}");
    let rows = 1 + rng.below(PAGE);
    let mut pool = Pool::new(gpu, rng, h, types, n_pages, rows);
    if rng.below(2) == 0 {
        pool.close_up(n_pages);
    }
    let pos = pool.pages[n_pages - 1].2 + rows as u32 - 1;
    let max_pages = n_pages + 2;
    let mut table = pool.table();
    table.resize(max_pages * 2, u32::MAX);
    let n = h.n_head * h.head_dim;
    let q: Vec<f32> = rng.normals(n).iter().map(|v| v * 2.0).collect();
    let (qb, tb) = (upload(gpu, &q), upload_u32(gpu, &table));
    let state = upload_u32(gpu, &[n_pages as u32, pos]);
    let sinks = (!rules.sinks.is_empty()).then(|| upload(gpu, &rules.sinks));
    let sinks = sinks.as_ref().map(|s| s.view());
    let call = call(&pool, qb.view(), tb.view(), state.view(), rules, sinks);
    let (out, w) = (poisoned(gpu, n), poisoned(gpu, max_pages));
    let sums = poisoned(gpu, n * splits);
    let (ml, page_ml) = (
        poisoned(gpu, h.n_head * splits * 2),
        poisoned(gpu, h.n_head * max_pages * 2),
    );
    let (q8, ds) = (poisoned(gpu, n / 4 + 1), poisoned(gpu, n / 16 + 2));
    let parts = Parts {
        sums: sums.view(),
        ml: ml.view(),
        page_ml: page_ml.view(),
        splits,
    };
    let quant = h.head_dim.is_multiple_of(32).then(|| Quant {
        q: q8.view(),
        ds: ds.view(),
    });
    let masses = Some(Masses { w: w.view(), mean });
    ops::attention_decode(gpu, out.view(), quant, masses, h, &call, &parts).expect("attention");
    let (want, mass) = pool.reference(h, &q, pos, rules);
    let e = nmse(&read(gpu, out.view()), &want);
    // Tensor cores, which take heads of up to 128 elements, round the weights of the values to f16.
    let limit = if h.head_dim <= 128 && h.head_dim.is_multiple_of(8) {
        1e-7
    } else {
        1e-9
    };
    assert!(e < limit, "{what}: {e:e}");
    let want_w: Vec<f64> = (0..n_pages)
        .map(|p| {
            let per_head = mass.iter().map(|m| m[p]);
            if mean {
                per_head.sum::<f64>() / h.n_head as f64
            } else {
                per_head.fold(0.0, f64::max)
            }
        })
        .collect();
    let got = read(gpu, w.view());
    let e = nmse(&got[..n_pages], &want_w);
    assert!(e < 1e-9, "{what} masses: {e:e}");
    assert!(
        got[n_pages..].iter().all(|v| v.is_nan()),
        "only live pages are weighed"
    );
    if quant.is_some() {
        let q8 = gpu.read(q8.view().slice(0, n)).expect("read");
        let ds = read(gpu, ds.view().slice(0, n / 4));
        let back: Vec<f32> = q8
            .iter()
            .enumerate()
            .map(|(i, v)| f32::from(*v as i8) * ds[i / 32 * 2])
            .collect();
        assert!(nmse(&back, &want) < 2e-4, "{what}");
    }
}

/// The last `n` tokens of `n_pages` pages, of which those that hold the batch are consecutive, beside the reference.
fn batch(
    gpu: &Gpu,
    rng: &mut Rng,
    h: Heads,
    types: &[[KvType; 2]],
    (n_pages, n): (usize, usize),
    rules: &Rules,
) {
    let rows = if n_pages == 1 { 9 } else { 1 + rng.below(PAGE) };
    let mut pool = Pool::new(gpu, rng, h, types, n_pages, rows);
    let with_holes = n.div_ceil(PAGE) + 1;
    pool.close_up(if rng.below(2) == 0 {
        with_holes
    } else {
        n_pages
    });
    let last = pool.pages[n_pages - 1].2 + rows as u32 - 1;
    let pos = last + 1 - n as u32;
    let width = h.n_head * h.head_dim;
    let q = rng.normals(n * width);
    let (qb, tb, state) = (
        upload(gpu, &q),
        upload_u32(gpu, &pool.table()),
        upload_u32(gpu, &[n_pages as u32, pos]),
    );
    let sinks = (!rules.sinks.is_empty()).then(|| upload(gpu, &rules.sinks));
    let sinks = sinks.as_ref().map(|s| s.view());
    let call = call(&pool, qb.view(), tb.view(), state.view(), rules, sinks);
    let out = poisoned(gpu, q.len());
    ops::attention(gpu, out.view(), h, &call, n).expect("attention");
    let want: Vec<f64> = (0..n)
        .flat_map(|t| {
            pool.reference(h, &q[t * width..][..width], pos + t as u32, rules)
                .0
        })
        .collect();
    let e = nmse(&read(gpu, out.view()), &want);
    // Tensor cores round the weights of the values to f16, and of wide heads what is stored in other types.
    let limit = if h.head_dim > 128 { 4e-7 } else { 1e-7 };
    assert!(
        e < limit,
        "{gpu:?} {h:?} {types:?} {n_pages} pages {n} tokens {rules:?}: {e:e}"
    );
}

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
        let sizes = [
            (1, 1, false),
            (3, 2, true),
            (7, 7, false),
            (19, 4, true),
            (2, 5, false),
        ];
        for h in heads(&shapes) {
            let rules = Rules::scaled(1.0 / (h.head_dim as f32).sqrt());
            for (types, size) in pools(h).flat_map(|t| sizes.map(|s| (t, s))) {
                decode(&gpu, &mut rng, h, types, size, &rules);
            }
        }
    }
}

#[test]
fn batches_see_what_lies_before_them() {
    for gpu in gpus() {
        let mut rng = Rng::new(22);
        let shapes = [
            (4, 2, 64),
            (7, 1, 128),
            (3, 3, 26),
            (8, 2, 160),
            (6, 2, 96),
            (12, 3, 256),
            (5, 1, 200),
        ];
        let sizes = [(1usize, 5usize), (3, 20), (6, 1), (5, 17)];
        for h in heads(&shapes) {
            for (types, size) in pools(h).flat_map(|t| sizes.map(|s| (t, s))) {
                batch(&gpu, &mut rng, h, types, size, &Rules::scaled(0.2));
            }
        }
    }
}

#[test]
fn decode_with_windows_caps_and_sinks() {
    for gpu in gpus() {
        let mut rng = Rng::new(23);
        let shapes = [(8, 1, 64), (12, 2, 128), (2, 2, 256), (6, 3, 10)];
        let sizes = [(1, 1, false), (7, 3, true), (19, 6, false)];
        for h in heads(&shapes) {
            for rules in rules(&mut rng, h, 1.0 / (h.head_dim as f32).sqrt()) {
                for (types, size) in pools(h).take(3).zip(sizes.into_iter().cycle().skip(1)) {
                    decode(&gpu, &mut rng, h, types, size, &rules);
                }
                for size in sizes {
                    decode(&gpu, &mut rng, h, POOLS[0], size, &rules);
                }
            }
        }
    }
}

#[test]
fn batches_with_windows_caps_and_sinks() {
    for gpu in gpus() {
        let mut rng = Rng::new(24);
        // All but the fourth go to tensor cores: 64 and 128 wide, and another width; the last through shared memory.
        let shapes = [(8, 1, 64), (7, 1, 128), (6, 2, 96), (3, 3, 26), (2, 2, 256)];
        let sizes = [(1, 5), (9, 40), (6, 1)];
        for h in heads(&shapes) {
            for rules in rules(&mut rng, h, 0.2) {
                for size in sizes {
                    batch(&gpu, &mut rng, h, POOLS[0], size, &rules);
                }
                // Pages of other types, most of them in lower tiers.
                for types in pools(h).skip(1).take(2) {
                    batch(&gpu, &mut rng, h, types, (8, 19), &rules);
                }
            }
        }
    }
}
