//! Attention over pages, and the masses it leaves.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::pages::{F16, Q4_0, Q8_0, Stored, stored};
use common::*;
use lemma_cuda::ops::{self, Attention, Heads, Masses, Parts, Quant, Tier, Tiers};
use lemma_cuda::{Buffer, Gpu, PAGE};
use lemma_quant::pages::KvType::{self, K3, V2};

/// Pools: types of keys and values of each tier.
const POOLS: [&[[KvType; 2]]; 6] = [
    &[[F16; 2]],
    &[[F16; 2], [Q8_0; 2], [K3, V2]],
    &[[F16; 2], [Q8_0, Q4_0], [Q4_0; 2]],
    &[[Q8_0; 2]],
    &[[Q4_0; 2], [K3, V2]],
    &[[F16, Q8_0], [K3, Q8_0], [K3, V2]],
];

/// Whether heads of this shape can be stored so: all but f16 wants whole blocks.
fn fits(types: &[[KvType; 2]], h: Heads) -> bool {
    types == POOLS[0] || h.head_dim.is_multiple_of(32)
}

/// A pool with random keys and values, some pages of it live.
struct Pool {
    /// Keys and values of each tier.
    parts: Vec<[Stored; 2]>,
    /// Tier, slot and first position, in position order.
    pages: Vec<(u8, u32, u32)>,
    _buffers: Vec<[Buffer; 2]>,
    tiers: Tiers,
}

impl Pool {
    /// `n` live pages in shuffled slots of any tiers, the last in the first; holes in the positions between them; nothing written behind the
    /// last position.
    fn new(
        gpu: &Gpu,
        rng: &mut Rng,
        h: Heads,
        types: &[[KvType; 2]],
        n: usize,
        last_rows: usize,
    ) -> Self {
        let (slots, width) = (n + 3, h.n_head_kv * h.head_dim);
        let mut part = |ty: KvType| {
            let mut values = rng.normals(slots * PAGE * width);
            // Some channels are larger than others, and some much smaller.
            for (i, v) in values.iter_mut().enumerate() {
                *v *= [1.0, 1.0, 2.0, 1.0, 1e-5][i % h.head_dim % 5];
            }
            stored(ty, h, values)
        };
        let mut parts: Vec<_> = types.iter().map(|types| types.map(&mut part)).collect();
        let mut free = vec![(0..slots as u32).collect::<Vec<_>>(); types.len()];
        let mut first = 0;
        let pages: Vec<_> = (0..n)
            .map(|i| {
                let tier = if i + 1 < n { rng.below(types.len()) } else { 0 };
                let slots = &mut free[tier];
                let slot = slots.swap_remove(rng.below(slots.len()));
                if i > 0 {
                    first += PAGE as u32 * (1 + rng.below(3) as u32);
                }
                (tier as u8, slot, first)
            })
            .collect();
        let last = pages[n - 1].1 as usize;
        for (part, ty) in parts[0].iter_mut().zip(types[0]) {
            part.poison(ty, h, last, last_rows);
        }
        let bytes = |part: &Stored| gpu.buffer_of(&part.bytes).expect("upload");
        let buffers: Vec<_> = parts.iter().map(|p| p.each_ref().map(bytes)).collect();
        let mut tiers = [None; ops::MAX_TIERS];
        for ((tier, [k, v]), [ty_k, ty_v]) in tiers.iter_mut().zip(&buffers).zip(types) {
            *tier = Some(Tier {
                k: k.view(),
                v: v.view(),
                ty_k: *ty_k,
                ty_v: *ty_v,
            });
        }
        Self {
            parts,
            pages,
            _buffers: buffers,
            tiers,
        }
    }

    /// As kernels read it.
    fn table(&self) -> Vec<u32> {
        let entry = |&(tier, slot, first): &(u8, u32, u32)| [ops::slot_of(tier, slot), first];
        self.pages.iter().flat_map(entry).collect()
    }

    /// Output of one token at `pos`, and masses `[n_head][pages]`.
    fn reference(&self, h: Heads, q: &[f32], pos: u32, scale: f32) -> (Vec<f64>, Vec<Vec<f64>>) {
        let (d, group) = (h.head_dim, h.n_head / h.n_head_kv);
        let (mut out, mut masses) = (Vec::new(), Vec::new());
        for head in 0..h.n_head {
            let q = &q[head * d..][..d];
            let mut seen = Vec::new();
            for (i, &(tier, slot, first)) in self.pages.iter().enumerate() {
                let [k, v] = &self.parts[usize::from(tier)];
                for row in 0..PAGE {
                    if first + row as u32 <= pos {
                        let at = ((slot as usize * PAGE + row) * h.n_head_kv + head / group) * d;
                        let dot: f64 = q
                            .iter()
                            .zip(&k.values[at..][..d])
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum();
                        seen.push((i, &v.values[at..][..d], dot * f64::from(scale)));
                    }
                }
            }
            let max = seen.iter().map(|s| s.2).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = seen.iter().map(|s| (s.2 - max).exp()).sum();
            let mut o = vec![0.0; d];
            let mut mass = vec![0.0; self.pages.len()];
            for (i, v, s) in seen {
                let p = (s - max).exp() / sum;
                mass[i] += p;
                for (o, v) in o.iter_mut().zip(v) {
                    *o += p * f64::from(*v);
                }
            }
            out.extend(o);
            masses.push(mass);
        }
        (out, masses)
    }
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
