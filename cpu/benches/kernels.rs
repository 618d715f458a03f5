//! How fast the kernels are: `cargo bench -p lemma-cpu`.
//!
//! * `ceiling`: reads of memory, nothing else;
//! * `decode/<type>`: a matrix larger than the caches with one token, in bytes of weights per second; to be compared with the
//!   ceiling;
//! * `prefill/<type>`: a matrix with 256 tokens, in operations (two for each weight and token) per second;
//! * `attention/<positions>`: one token with so many cached ones, of a layer of 12 heads in two groups.
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
    Attention, Isa, KvLayer, KvShape, Limits, Mat, MulMat, Ops, PAGE, PageRef, Pass, Shared, Team,
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

fn attention(c: &mut Criterion) {
    let (n_head, n_head_kv, dim) = (12, 2, 128);
    let mut g = c.benchmark_group("attention");
    let both = |ty: GgmlType| [KvType::from(ty); 2];
    for (n, [ty_k, ty_v]) in [
        (256, both(GgmlType::F16)),
        (4096, both(GgmlType::F16)),
        (32_768, both(GgmlType::F16)),
        (4096, both(GgmlType::Q8_0)),
        (4096, both(GgmlType::Q4_0)),
        (4096, [KvType::K4, KvType::V2]),
    ] {
        let shape = KvShape {
            ty_k,
            ty_v,
            values_in_keys: false,
            n_head_kv,
            head_dim_k: dim,
            head_dim_v: dim,
        };
        let n_pages = n / PAGE;
        let layer = KvLayer::new(shape, n_pages);
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
        g.throughput(Throughput::Bytes((n_pages * shape.slot_size()) as u64));
        g.bench_function(format!("{n} {ty_k}/{ty_v}"), |b| {
            b.iter_custom(|times| {
                time(&mut ops, times, |p| {
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
                    p.attention(&out, &q, std::slice::from_ref(&layer), &a);
                })
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(2));
    targets = ceiling, decode, prefill, attention
}
criterion_main!(benches);
