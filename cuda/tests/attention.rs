//! Attention over pages, and the masses it leaves.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::*;
use half::f16;
use lemma_cuda::ops::{self, Attention, Heads, Masses, Parts, Quant};
use lemma_cuda::{Buffer, Gpu, PAGE};

/// A pool with random keys and values, some pages of it live.
struct Pool {
    k: Vec<f32>,
    v: Vec<f32>,
    /// Slot and first position, in position order.
    pages: Vec<(u32, u32)>,
    kb: Buffer,
    vb: Buffer,
}

fn halves(gpu: &Gpu, x: &mut [f32]) -> Buffer {
    let mut bytes = Vec::new();
    for v in x {
        let h = f16::from_f32(*v);
        *v = h.to_f32();
        bytes.extend(h.to_le_bytes());
    }
    gpu.buffer_of(&bytes).expect("upload")
}

impl Pool {
    /// `n` live pages in shuffled slots; holes in the positions between them; nothing written behind the last position.
    fn new(gpu: &Gpu, rng: &mut Rng, h: Heads, n: usize, last_rows: usize) -> Self {
        let slots = n + 3;
        let width = h.n_head_kv * h.head_dim;
        let mut k = rng.normals(slots * PAGE * width);
        let mut v = rng.normals(slots * PAGE * width);
        let mut free: Vec<u32> = (0..slots as u32).collect();
        let mut first = 0;
        let pages: Vec<(u32, u32)> = (0..n)
            .map(|i| {
                let slot = free.swap_remove(rng.below(free.len()));
                if i > 0 {
                    first += PAGE as u32 * (1 + rng.below(3) as u32);
                }
                (slot, first)
            })
            .collect();
        let last = pages[n - 1].0 as usize * PAGE;
        for x in [&mut k, &mut v] {
            x[(last + last_rows) * width..(last + PAGE) * width].fill(f32::NAN);
        }
        let (kb, vb) = (halves(gpu, &mut k), halves(gpu, &mut v));
        Self {
            k,
            v,
            pages,
            kb,
            vb,
        }
    }

    /// Output of one token at `pos`, and masses `[n_head][pages]`.
    fn reference(&self, h: Heads, q: &[f32], pos: u32, scale: f32) -> (Vec<f64>, Vec<Vec<f64>>) {
        let (d, group) = (h.head_dim, h.n_head / h.n_head_kv);
        let (mut out, mut masses) = (Vec::new(), Vec::new());
        for head in 0..h.n_head {
            let q = &q[head * d..][..d];
            let mut seen = Vec::new();
            for (i, &(slot, first)) in self.pages.iter().enumerate() {
                for row in 0..PAGE {
                    if first + row as u32 <= pos {
                        let at = ((slot as usize * PAGE + row) * h.n_head_kv + head / group) * d;
                        let dot: f64 = q
                            .iter()
                            .zip(&self.k[at..][..d])
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum();
                        seen.push((i, at, dot * f64::from(scale)));
                    }
                }
            }
            let max = seen.iter().map(|s| s.2).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = seen.iter().map(|s| (s.2 - max).exp()).sum();
            let mut o = vec![0.0; d];
            let mut mass = vec![0.0; self.pages.len()];
            for (i, at, s) in seen {
                let p = (s - max).exp() / sum;
                mass[i] += p;
                for (o, v) in o.iter_mut().zip(&self.v[at..][..d]) {
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
            for (n_pages, splits, mean) in [
                (1, 1, false),
                (3, 2, true),
                (7, 7, false),
                (19, 4, true),
                (2, 5, false),
            ] {
                let rows = 1 + rng.below(PAGE);
                let pool = Pool::new(&gpu, &mut rng, h, n_pages, rows);
                let pos = pool.pages[n_pages - 1].1 + rows as u32 - 1;
                let max_pages = n_pages + 2;
                let mut table: Vec<u32> = pool.pages.iter().flat_map(|p| [p.0, p.1]).collect();
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
                    k: pool.kb.view(),
                    v: pool.vb.view(),
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
                    "{gpu:?} {h:?} {n_pages} pages {splits} splits: {e:e}"
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
                assert!(e < 1e-9, "{gpu:?} {h:?} {n_pages} pages masses: {e:e}");
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
        for (n_head, n_head_kv, head_dim) in [(4, 2, 64), (7, 1, 128), (3, 3, 26), (8, 2, 160)] {
            let h = Heads {
                n_head,
                n_head_kv,
                head_dim,
            };
            // The batch is the last n tokens; its pages are consecutive.
            for (n_pages, n) in [(1usize, 5usize), (3, 20), (6, 1), (5, 17)] {
                let rows = if n_pages == 1 { 9 } else { 1 + rng.below(PAGE) };
                let mut pool = Pool::new(&gpu, &mut rng, h, n_pages, rows);
                let start = 100 * PAGE as u32;
                let tail = n.div_ceil(PAGE) + 1;
                for i in n_pages.saturating_sub(tail)..n_pages {
                    pool.pages[i].1 = start + (i * PAGE) as u32;
                }
                let last = pool.pages[n_pages - 1].1 + rows as u32 - 1;
                let pos = last + 1 - n as u32;
                let table: Vec<u32> = pool.pages.iter().flat_map(|p| [p.0, p.1]).collect();
                let q = rng.normals(n * n_head * head_dim);
                let (qb, tb, state) = (
                    upload(&gpu, &q),
                    upload_u32(&gpu, &table),
                    upload_u32(&gpu, &[n_pages as u32, pos]),
                );
                let call = Attention {
                    q: qb.view(),
                    k: pool.kb.view(),
                    v: pool.vb.view(),
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
                assert!(e < 1e-7, "{gpu:?} {h:?} {n_pages} pages {n} tokens: {e:e}");
            }
        }
    }
}
