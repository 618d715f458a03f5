//! How fast the kernels are: `cargo bench -p lemma-cpu`.
//!
//! * `ceiling`: reads of memory, nothing else;
//! * `decode/<type>`: a matrix larger than the caches with one token, in bytes of weights per second; to be compared with the
//!   ceiling;
//! * `prefill/<type>`: a matrix with 256 tokens, in operations (two for each weight and token) per second;
//! * `attention/<positions>`: one token with so many cached ones, of a layer of 12 heads in two groups, always the same;
//! * `attention_from_memory/<positions>`: the same, of one layer after the other, more than caches hold.
//!
//! Behind each product its best time is set beside the roofline: reads of memory, and products over registers alone (of
//! bytes, or of f32 or bf16 where weights are plain numbers).
//!
//! `LEMMA_THREADS` and `LEMMA_ISA` choose workers and instruction set.

#![allow(missing_docs, reason = "criterion's macros make functions without")]
#![allow(clippy::print_stdout, reason = "results")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lemma_cpu::ceiling::{Numbers, peak_gops, read_gbps};
use lemma_cpu::{
    Attention, Isa, KvLayer, KvShape, Limits, Mat, Move, MulMat, Ops, PAGE, PageRef, Pass, Place,
    Shared, Team,
};
use lemma_quant::GgmlType;
use lemma_quant::pages::KvType;
use std::time::{Duration, Instant};

const TYPES: [GgmlType; 26] = [
    GgmlType::Q4_K,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q5_K,
    GgmlType::Q5_0,
    GgmlType::Q4_1,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::IQ4_NL,
    GgmlType::IQ4_XS,
    GgmlType::MXFP4,
    GgmlType::IQ2_XXS,
    GgmlType::IQ2_XS,
    GgmlType::IQ2_S,
    GgmlType::IQ3_XXS,
    GgmlType::IQ3_S,
    GgmlType::IQ1_S,
    GgmlType::IQ1_M,
    GgmlType::TQ1_0,
    GgmlType::TQ2_0,
    GgmlType::NVFP4,
    GgmlType::Q1_0,
    GgmlType::Q2_0,
    GgmlType::F16,
    GgmlType::BF16,
];

fn team() -> Team {
    let threads = std::env::var("LEMMA_THREADS")
        .ok()
        .and_then(|n| n.parse().ok());
    Team::new(threads.unwrap_or_else(lemma_cpu::default_threads))
}

fn isa() -> Isa {
    let isa = std::env::var("LEMMA_ISA")
        .ok()
        .and_then(|name| Isa::from_name(&name));
    isa.unwrap_or_else(Isa::detect)
}

fn ops(limits: Limits) -> Ops {
    Ops::new(team(), isa(), limits)
}

/// The time of `n` operations in one step.
fn time(ops: &mut Ops, n: u64, operation: impl Fn(&Pass<'_>) + Sync) -> Duration {
    let start = Instant::now();
    ops.run(|p| (0..n).for_each(|_| operation(p)));
    start.elapsed()
}

/// Numbers without a pattern that a format could profit from.
fn values(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i as f32 * 0.618_034).fract() - 0.5) * (1.0 + (i % 7) as f32))
        .collect()
}

/// A matrix whose rows repeat after a while.
fn weights(ty: GgmlType, n_in: usize, n_out: usize) -> Vec<u8> {
    let mut some = vec![0; 16 * ty.row_size(n_in).expect("whole blocks")];
    match ty.traits().quantize_row {
        Some(quantize) => quantize(&values(16 * n_in), &mut some),
        // Any bytes are blocks of the others; below 64 no half-precision number is large.
        None => {
            for (i, byte) in some.iter_mut().enumerate() {
                *byte = (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] & 63;
            }
        }
    }
    some.iter()
        .copied()
        .cycle()
        .take(some.len() / 16 * n_out)
        .collect()
}

/// What a product of one token is bound by in GB/s, and of many tokens in GOP/s: of bytes, of f32, of bf16.
struct Roofline {
    read: f64,
    peak: [f64; 3],
}

impl Roofline {
    fn measure() -> Self {
        let (team, isa) = (team(), isa());
        Self {
            read: read_gbps(&team, 256 << 20),
            peak: [Numbers::Bytes, Numbers::Floats, Numbers::Pairs]
                .map(|n| peak_gops(&team, isa, n)),
        }
    }

    /// `amount` (bytes or operations) in the `best` time, beside what is possible.
    fn show(&self, name: &str, ty: GgmlType, n_tokens: usize, amount: f64, best: Duration) {
        let numbers = match ty {
            GgmlType::BF16 => 2,
            GgmlType::F32 | GgmlType::F16 => 1,
            _ => 0,
        };
        let rate = amount / best.as_secs_f64() * 1e-9;
        let (unit, bound) = match n_tokens {
            1 => ("GB/s", self.read),
            _ => ("GOP/s", self.peak[numbers]),
        };
        println!(
            "{name}/{}: {rate:.1} {unit}, {:.0} % of {bound:.1}",
            ty.name(),
            100.0 * rate / bound
        );
    }
}

fn products(c: &mut Criterion, group: &str, n_in: usize, n_out: usize, n_tokens: usize) {
    let roofline = Roofline::measure();
    let mut g = c.benchmark_group(group);
    for ty in TYPES {
        let data = weights(ty, n_in, n_out);
        let w = Mat::new(ty, n_in, n_out, &data);
        let x = Shared::from_slice(&values(n_tokens * n_in));
        let out = Shared::zeroed(n_tokens * n_out);
        let mut ops = ops(Limits {
            max_tokens: n_tokens,
            max_width: n_in,
            ..Limits::default()
        });
        let operations = (2 * n_in * n_out * n_tokens) as u64;
        let (throughput, amount) = match n_tokens {
            1 => (Throughput::Bytes(data.len() as u64), data.len() as f64),
            _ => (Throughput::Elements(operations), operations as f64),
        };
        g.throughput(throughput);
        let mut best = Duration::MAX;
        g.bench_function(ty.name(), |b| {
            b.iter_custom(|n| {
                let product = MulMat {
                    out: &out,
                    out_add: false,
                    w,
                    bias: None,
                };
                let elapsed = time(&mut ops, n, |p| p.mul_mat(product, &x, n_tokens));
                best = best.min(elapsed / u32::try_from(n).unwrap_or(u32::MAX));
                elapsed
            });
        });
        // None if it was not asked for.
        if best < Duration::MAX {
            roofline.show(group, ty, n_tokens, amount, best);
        }
    }
}

fn ceiling(c: &mut Criterion) {
    const BYTES: usize = 256 << 20;
    let team = team();
    let mut g = c.benchmark_group("ceiling");
    g.throughput(Throughput::Bytes(BYTES as u64));
    g.bench_function("read", |b| {
        b.iter_custom(|n| {
            let gbps = read_gbps(&team, BYTES);
            Duration::from_secs_f64(n as f64 * BYTES as f64 / (gbps * 1e9))
        });
    });
}

fn decode(c: &mut Criterion) {
    products(c, "decode", 1536, 120_000, 1);
}

fn prefill(c: &mut Criterion) {
    products(c, "prefill", 1536, 2048, 256);
}

/// Keys and values of so many heads, as wide as this.
const KV_HEADS: (usize, usize) = (2, 128);

/// A layer of full pages, all with the same numbers in them.
fn kv_layer(ops: &mut Ops, types: [KvType; 2], n_pages: usize) -> KvLayer {
    let (n_head_kv, dim) = KV_HEADS;
    let shape = |[ty_k, ty_v]: [KvType; 2]| KvShape {
        ty_k,
        ty_v,
        values_in_keys: false,
        n_head_kv,
        head_dim_k: dim,
        head_dim_v: dim,
    };
    let f32s = [KvType::from(GgmlType::F32); 2];
    let mut pool = [f32s, types].map(shape).map(|s| KvLayer::new(s, n_pages));
    let x = Shared::from_slice(&values(PAGE * n_head_kv * dim));
    let places: Vec<_> = (0..PAGE as u32).map(|row| Place { slot: 0, row }).collect();
    let down = Move {
        from: 0,
        to: 1,
        from_token: 0,
        to_token: 0,
        planes: (0, n_head_kv),
    };
    ops.run(|p| {
        p.kv_store(&pool[0], &x, &x, &places);
        p.kv_move(&pool, &[down], PAGE);
    });
    for slot in 1..n_pages as u32 {
        pool[1].copy_page(0, slot);
    }
    let [_, layer] = pool;
    layer
}

/// One token with `n` cached ones, of as many layers as have `bytes`, one after the other.
fn attend(c: &mut Criterion, group: &str, cases: &[(usize, [KvType; 2])], bytes: usize) {
    let (n_head, (n_head_kv, dim)) = (12, KV_HEADS);
    let mut g = c.benchmark_group(group);
    for &(n, types) in cases {
        let n_pages = n / PAGE;
        let pages: Vec<_> = (0..n_pages as u32)
            .map(|slot| PageRef {
                tier: 0,
                slot,
                row: 0,
                first_pos: slot * PAGE as u32,
                len: PAGE as u32,
            })
            .collect();
        let q = Shared::from_slice(&values(n_head * dim));
        let out = Shared::zeroed(n_head * dim);
        let mass = Shared::zeroed(n_head * n_pages);
        let limits = Limits {
            n_head,
            head_dim: dim,
            max_pages: n_pages,
            ..Limits::default()
        };
        let mut ops = ops(limits);
        let mut layers = Vec::new();
        let mut next = 0;
        let [ty_k, ty_v] = types;
        let size = n_head_kv * (ty_k.page_size(dim).unwrap() + ty_v.page_size(dim).unwrap());
        g.throughput(Throughput::Bytes((n_pages * size) as u64));
        g.bench_function(format!("{n} {ty_k}/{ty_v}"), |b| {
            while layers.is_empty() || layers.len() * n_pages * size < bytes {
                layers.push(kv_layer(&mut ops, types, n_pages));
            }
            b.iter_custom(|times| {
                let first = next;
                next += times as usize;
                let start = Instant::now();
                ops.run(|p| {
                    for i in first..first + times as usize {
                        let a = Attention {
                            n_head,
                            n_head_kv,
                            tables: &[],
                            keep: None,
                            pages: &pages,
                            q_pos: &[n as u32],
                            scale: 0.088,
                            sinks: None,
                            softcap: None,
                            window: None,
                            mass: Some(&mass),
                        };
                        let layer = std::slice::from_ref(&layers[i % layers.len()]);
                        p.attention(&out, &q, layer, &a);
                    }
                });
                start.elapsed()
            });
        });
    }
}

fn rows(ty: GgmlType) -> [KvType; 2] {
    [KvType::from(ty); 2]
}

fn attention(c: &mut Criterion) {
    let cases = [
        (256, rows(GgmlType::F16)),
        (4096, rows(GgmlType::F16)),
        (32_768, rows(GgmlType::F16)),
        (4096, rows(GgmlType::Q8_0)),
        (4096, rows(GgmlType::Q4_0)),
        (4096, [KvType::K4, KvType::V2]),
    ];
    attend(c, "attention", &cases, 0);
}

fn attention_from_memory(c: &mut Criterion) {
    let cases = [
        (4096, rows(GgmlType::F16)),
        (4096, rows(GgmlType::Q8_0)),
        (4096, rows(GgmlType::Q4_0)),
        (4096, [KvType::K4, KvType::V2]),
    ];
    attend(c, "attention_from_memory", &cases, 1 << 30);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(2));
    targets = ceiling, decode, prefill, attention, attention_from_memory
}
criterion_main!(benches);
