//! Speed of a decode step on made-up weights, without a model file: shapes of models that people run. Ignored: it measures.
//!
//! `LEMMA_STEP_PAGES` are the live pages of a layer (`1 64 256`). With more than 16 all of a table is measured in lower tiers too, but for its last
//! page.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stdout, reason = "what was measured")]

mod common;

use std::time::Instant;

use common::*;
use lemma_cuda::ops::{
    Attention, Glu, Heads, MAX_TIERS, Mode, Pairs, RopeStore, Store, Tier, page_bytes, slot_of,
};
use lemma_cuda::step::{Attend, Builder, Clocks, First, Inputs, Norms, Products, Program, Shape};
use lemma_cuda::{Buffer, Gpu, Source, Uploader, View, Weight};
use lemma_quant::GgmlType::{self, F16, Q4_K, Q6_K, Q8_0};
use lemma_quant::pages::KvType;

struct Model {
    name: &'static str,
    n_embd: usize,
    n_ff: usize,
    heads: Heads,
    n_layer: usize,
    n_vocab: usize,
    /// The type of most matrices, and that of some values, some down projections and the output.
    types: [GgmlType; 2],
}

const MODELS: [Model; 3] = [
    Model {
        name: "8 B Q4_K_M",
        n_embd: 4096,
        n_ff: 14336,
        heads: Heads {
            n_head: 32,
            n_head_kv: 8,
            head_dim: 128,
        },
        n_layer: 32,
        n_vocab: 128_256,
        types: [Q4_K, Q6_K],
    },
    Model {
        name: "1.5 B Q4_K_M",
        n_embd: 1536,
        n_ff: 8960,
        heads: Heads {
            n_head: 12,
            n_head_kv: 2,
            head_dim: 128,
        },
        n_layer: 28,
        n_vocab: 151_936,
        types: [Q4_K, Q6_K],
    },
    Model {
        name: "1 B F16",
        n_embd: 2048,
        n_ff: 8192,
        heads: Heads {
            n_head: 32,
            n_head_kv: 8,
            head_dim: 64,
        },
        n_layer: 16,
        n_vocab: 128_256,
        types: [F16, F16],
    },
];
/// Layers with weights of their own; the others take them again.
const LAYERS: usize = 8;
const MAX_PAGES: usize = 2048;

struct Layer {
    norm: Buffer,
    q: Weight,
    k: Weight,
    v: Weight,
    o: Weight,
    gate: Weight,
    up: Weight,
    down: Weight,
}

/// A matrix of a few random rows, over and over.
fn matrix(gpu: &Gpu, up: &mut Uploader, ty: GgmlType, n_in: usize, n_row: usize) -> Weight {
    let mut rng = Rng::new(n_in as u64 + n_row as u64);
    let quantize = ty.traits().quantize_row.expect("a quantizer");
    let row = ty.row_size(n_in).expect("whole blocks");
    let mut some = vec![0; row * 8];
    for b in some.chunks_exact_mut(row) {
        let x: Vec<f32> = rng.normals(n_in).iter().map(|x| x * 0.03).collect();
        quantize(&x, b);
    }
    let data: Vec<u8> = some.repeat(n_row.div_ceil(8))[..row * n_row].to_vec();
    let source = Source {
        ty,
        n_in,
        n_row,
        data: &data,
    };
    let w = up.upload(source).expect("upload");
    gpu.synchronize().expect("upload");
    w
}

struct Weights {
    layers: Vec<Layer>,
    embd: Weight,
    output: Weight,
    /// Bytes that a step reads.
    bytes: usize,
}

struct Bench {
    program: Program,
    logits: Buffer,
    _keep: Vec<Buffer>,
}

fn weights(gpu: &Gpu, m: &Model) -> Weights {
    let mut up = Uploader::new(gpu).expect("uploader");
    let (e, d, h) = (m.n_embd, m.heads.head_dim, m.heads);
    let [ty, better] = m.types;
    let layers: Vec<Layer> = (0..LAYERS.min(m.n_layer))
        .map(|i| {
            let some = if i % 2 == 0 { better } else { ty };
            let mut w = |ty, n_in, n_row| matrix(gpu, &mut up, ty, n_in, n_row);
            Layer {
                norm: upload(gpu, &vec![1.0; e]),
                q: w(ty, e, h.n_head * d),
                k: w(ty, e, h.n_head_kv * d),
                v: w(some, e, h.n_head_kv * d),
                o: w(ty, h.n_head * d, e),
                gate: w(ty, e, m.n_ff),
                up: w(ty, e, m.n_ff),
                down: w(some, m.n_ff, e),
            }
        })
        .collect();
    let embd = matrix(gpu, &mut up, ty, e, 1024);
    let output = matrix(gpu, &mut up, better, e, m.n_vocab);
    let of = |w: &Weight| w.view().bytes();
    let layer = |l: &Layer| {
        let all = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down];
        all.map(of).iter().sum::<usize>()
    };
    let all = (0..m.n_layer).map(|il| layer(&layers[il % layers.len()]));
    Weights {
        bytes: of(&output) + all.sum::<usize>(),
        layers,
        embd,
        output,
    }
}

/// A step over `pages` pages a layer; all but the last are in a lower tier of these types if there is one.
fn bench(gpu: &Gpu, m: &Model, w: &Weights, pages: usize, lower: Option<[KvType; 2]>) -> Bench {
    let mut rng = Rng::new(7);
    let (e, d, h) = (m.n_embd, m.heads.head_dim, m.heads);
    let layers = &w.layers;
    let f = |n: usize| gpu.alloc(n * 4).expect("memory");
    let (x, q, k, v) = (
        f(e),
        f(h.n_head * d),
        f(h.n_head_kv * d),
        f(h.n_head_kv * d),
    );
    let (att, gate, logits) = (f(h.n_head * d), f(m.n_ff), f(m.n_vocab));
    let mass = f(m.n_layer * MAX_PAGES);
    let (angles, last) = (rng.normals(d), (pages * 16 - 3) as u32);
    let rope = upload(gpu, &angles);
    let pos = upload_u32(gpu, &[last]);
    let places = upload_u32(gpu, &[last]);
    let n_pages = upload_u32(gpu, &vec![pages as u32; m.n_layer]);
    let table: Vec<u32> = (0..pages as u32)
        .flat_map(|p| {
            let low = lower.is_some() && p as usize + 1 < pages;
            [slot_of(u8::from(low), p), p * 16]
        })
        .collect();
    let table = upload_u32(gpu, &table);
    let f16 = [KvType::from(F16); 2];
    let tiers: Vec<[KvType; 2]> = std::iter::once(f16).chain(lower).collect();
    let pools: Vec<Buffer> = (0..m.n_layer)
        .flat_map(|_| tiers.iter().flatten())
        .map(|ty| {
            let page = page_bytes(*ty, h).expect("a type of the pool");
            gpu.alloc(pages * page).expect("pool")
        })
        .collect();
    let shape = Shape {
        heads: h,
        n_layer: m.n_layer,
        max_pages: MAX_PAGES,
        pairs: Pairs::Halves(d / 2),
        n_rope: 1,
        mean: false,
        scale: 0.1,
    };
    let mut b = Builder::new(gpu, shape);
    b.embed(x.view(), &w.embd, 1.0);
    for il in 0..m.n_layer {
        let l = &layers[il % layers.len()];
        let norm = Some((l.norm.view(), 1e-5));
        let products =
            |b: &mut Builder, parts: &[(&Weight, Option<View>, View)], src: &Buffer, norm, mode| {
                b.products(&Products {
                    parts,
                    src: src.view(),
                    first: First::Nothing,
                    norm,
                    mode,
                });
            };
        let qkv = [
            (&l.q, None, q.view()),
            (&l.k, None, k.view()),
            (&l.v, None, v.view()),
        ];
        products(&mut b, &qkv, &x, norm, Mode::Store);
        let mut all = [None; MAX_TIERS];
        let kv = pools[2 * tiers.len() * il..].chunks_exact(2);
        for ((to, kv), [ty_k, ty_v]) in all.iter_mut().zip(kv).zip(&tiers) {
            *to = Some(Tier {
                k: kv[0].view(),
                v: kv[1].view(),
                ty_k: *ty_k,
                ty_v: *ty_v,
            });
        }
        let first = all[0].expect("a first tier");
        let store = Store {
            k: first.k,
            v: first.v,
            places: places.view(),
        };
        let call = RopeStore {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            q_norm: None,
            k_norm: None,
            rope: Some([rope.view(); 2]),
            pairs: Pairs::Halves(d / 2),
            store: Some(store),
        };
        let attention = Attention {
            q: q.view(),
            tiers: all,
            pages: table.view(),
            n_pages: n_pages.view().slice(il * 4, 4),
            pos: pos.view(),
            scale: 0.1,
            window: None,
            cap: None,
            sinks: None,
        };
        let at = Attend {
            il,
            rope: 0,
            norms: Norms::Heads,
            weighed: true,
        };
        b.attend(at, att.view(), &call, &attention);
        products(&mut b, &[(&l.o, None, x.view())], &att, None, Mode::Add);
        let ffn = [(&l.gate, None, gate.view()), (&l.up, None, gate.view())];
        products(&mut b, &ffn, &x, norm, Mode::Gated(Glu::Swiglu));
        products(&mut b, &[(&l.down, None, x.view())], &gate, None, Mode::Add);
    }
    b.weigh(mass.view());
    b.products(&Products {
        parts: &[(&w.output, None, logits.view())],
        src: x.view(),
        first: First::Nothing,
        norm: Some((layers[0].norm.view(), 1e-5)),
        mode: Mode::Store,
    });
    b.best();
    let mut program = b.finish().expect("driver").expect("a step of one launch");
    let inputs = Inputs {
        pos: last,
        token: Some(5),
        n_pages: &vec![pages as u32; m.n_layer],
        places: &vec![last; m.n_layer],
        rope: &angles,
    };
    program.run(&inputs).expect("step");
    let mut keep = vec![
        x, q, k, v, att, gate, mass, rope, pos, places, n_pages, table,
    ];
    keep.extend(pools);
    Bench {
        program,
        logits,
        _keep: keep,
    }
}

#[test]
#[ignore = "measures"]
fn steps() {
    let found = lemma_cuda::devices();
    let Some(info) = found.list.first() else {
        println!("skipped: {}", found.reason.unwrap_or_default());
        return;
    };
    let gpu = Gpu::open(info.ordinal).expect("a device");
    let pages = std::env::var("LEMMA_STEP_PAGES")
        .ok()
        .filter(|v| !v.is_empty());
    let pages = pages.unwrap_or_else(|| "1 64 256".to_owned());
    for m in &MODELS {
        let w = weights(&gpu, m);
        let counts = pages.split_whitespace().map(|p| p.parse().expect("pages"));
        let counts: Vec<usize> = counts.collect();
        let kinds = [
            ("f16", None),
            ("q8_0", Some([KvType::from(Q8_0); 2])),
            ("k4/v2", Some([KvType::K4, KvType::V2])),
        ];
        let all = counts
            .iter()
            .flat_map(|n| kinds.iter().map(move |k| (*n, k)));
        for (pages, (kind, lower)) in all.filter(|(n, k)| *n > 16 || k.1.is_none()) {
            let mut b = bench(&gpu, m, &w, pages, *lower);
            let mut times = Vec::new();
            for _ in 0..9 {
                gpu.synchronize().expect("step");
                let start = Instant::now();
                for _ in 0..20 {
                    b.program.repeat().expect("step");
                }
                gpu.synchronize().expect("step");
                times.push(start.elapsed().as_secs_f64() / 20.0);
            }
            times.sort_by(f64::total_cmp);
            let logits = read(&gpu, b.logits.view());
            let sum: f64 = logits.iter().map(|x| f64::from(x.abs())).sum();
            println!(
                "{} {pages} pages {kind}: {:.1} us a step (best {:.1}), {:.0} steps/s, {:.2} TB/s, logits {sum:.4}",
                m.name,
                times[4] * 1e6,
                times[0] * 1e6,
                1.0 / times[4],
                w.bytes as f64 / times[4] / 1e12
            );
            let clocks = b.program.trace().expect("trace");
            let per = (clocks.len() - 4) / m.n_layer;
            let mut line = String::from("  clocks");
            for k in 0..per {
                let of = |f: fn(&Clocks) -> f64| {
                    let all = (1..m.n_layer).map(|il| f(&clocks[1 + il * per + k]));
                    all.sum::<f64>() / (m.n_layer - 1) as f64
                };
                let (wait, least) = (of(|c| c.wait), of(|c| c.least));
                line += &format!(" {wait:.0} (least {least:.0}) + {:.0},", of(|c| c.work));
            }
            println!("{line}");
        }
    }
}
