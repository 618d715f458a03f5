//! Speed of delta nets and of latent attention by themselves, in the shapes of models that people run. Ignored: it measures.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stdout, reason = "what was measured")]

mod common;

use std::time::Instant;

use common::*;
use lemma_cuda::ops::{
    self, Attention, DeltaHeads, DeltaNet, Heads, Masses, Parts, RawDelta, SsmConv, Tier,
};
use lemma_cuda::{Gpu, PAGE};

/// Microseconds of a launch, the mean of a hundred in a graph.
fn time(gpu: &Gpu, launch: impl Fn()) -> f64 {
    launch();
    let graph = gpu
        .record(|| {
            (0..100).for_each(|_| launch());
            Ok(())
        })
        .expect("graph");
    graph.replay().expect("replay");
    gpu.synchronize().expect("launches");
    let start = Instant::now();
    graph.replay().expect("replay");
    gpu.synchronize().expect("launches");
    start.elapsed().as_secs_f64() * 1e4
}

/// A layer of Qwen3.5-4B and of Qwen3.5-0.8B: 32 and 16 value heads of 128.
#[test]
#[ignore = "it measures"]
fn delta_nets() {
    let Some(gpu) = gpus().pop() else {
        return;
    };
    let mut rng = Rng::new(1);
    for n_head_v in [32, 16] {
        let h = DeltaHeads {
            n_head_k: 16,
            n_head_v,
            head_dim: 128,
            side_by_side: false,
        };
        let (rows, width) = (n_head_v * 128, (32 + n_head_v) * 128);
        let state = upload(&gpu, &rng.normals(rows * 128));
        let past = upload(&gpu, &rng.normals(3 * width));
        let w = upload(&gpu, &rng.normals(4 * width));
        let pos = upload_u32(&gpu, &[5]);
        for n in [1, 512] {
            let qkv: Vec<f32> = rng.normals(n * width).iter().map(|x| x * 0.05).collect();
            let qkv = upload(&gpu, &qkv);
            let gates: Vec<f32> = (0..n * n_head_v).map(|_| 0.9).collect();
            let gates = [&gates, &gates].map(|g| upload(&gpu, g));
            let params = upload(&gpu, &vec![-0.5; n_head_v]);
            let out = poisoned(&gpu, n * width);
            let raw = RawDelta {
                eps: 1e-6,
                a: params.view(),
                dt: params.view(),
            };
            let call = DeltaNet {
                out: out.view(),
                qkv: qkv.view(),
                alpha: gates[0].view(),
                beta: gates[1].view(),
                state: state.view(),
                pos: pos.view(),
                raw: (n == 1).then_some(raw),
            };
            let rule = time(&gpu, || {
                ops::gated_delta_net(&gpu, &call, h, n).expect("gated_delta_net");
            });
            let call = SsmConv {
                out: out.view(),
                x: qkv.view(),
                w: w.view(),
                past: past.view(),
                pos: pos.view(),
            };
            let conv = time(&gpu, || {
                ops::ssm_conv(&gpu, &call, n, width, 4).expect("ssm_conv");
            });
            let bytes = (2 * rows * 128 * 4) as f64;
            println!(
                "delta net, {n_head_v} heads, {n} tokens: the rule {rule:.1} µs ({:.2} TB/s of state), the convolution {conv:.1} µs",
                bytes / rule / 1e6
            );
        }
    }
}

/// A layer of DeepSeek-V2-Lite and of DeepSeek-V3: 16 and 128 heads over keys of 576.
#[test]
#[ignore = "it measures"]
fn latent_attention() {
    let Some(gpu) = gpus().pop() else {
        return;
    };
    let mut rng = Rng::new(2);
    let (d, dim_v) = (576, 512);
    for (n_head, n_pages) in [(16, 16), (16, 256), (16, 2048), (128, 256), (128, 2048)] {
        let h = Heads {
            n_head,
            n_head_kv: 1,
            head_dim: d,
        };
        let bytes = n_pages * PAGE * d * 2;
        let keys = gpu.buffer_of(&vec![0x2c; bytes]).expect("keys");
        let none = keys.view().slice(0, 0);
        let table: Vec<u32> = (0..n_pages as u32)
            .flat_map(|p| [p, p * PAGE as u32])
            .collect();
        let table = upload_u32(&gpu, &table);
        for n in [1, 512] {
            if n > n_pages * PAGE || n * n_head * n_pages > 1 << 25 {
                continue;
            }
            let q = upload(&gpu, &rng.normals(n * n_head * d));
            let state = upload_u32(&gpu, &[n_pages as u32, (n_pages * PAGE - n) as u32]);
            let out = poisoned(&gpu, n * n_head * dim_v);
            let call = Attention {
                q: q.view(),
                tiers: Tier::f16(keys.view(), none).alone(),
                pages: table.view(),
                n_pages: state.view().slice(0, 4),
                pos: state.view().slice(4, 4),
                scale: 0.05,
                window: None,
                cap: None,
                sinks: None,
            };
            let splits = ops::latent_splits(&gpu, n_head, n_pages);
            let sums = poisoned(&gpu, n_head * splits * dim_v);
            let ml = poisoned(&gpu, n_head * splits * 2);
            let page_ml = poisoned(&gpu, n_head * n_pages * 2);
            let w = poisoned(&gpu, n_pages);
            let parts = Parts {
                sums: sums.view(),
                ml: ml.view(),
                page_ml: page_ml.view(),
                splits,
            };
            let masses = Some(Masses {
                w: w.view(),
                mean: false,
            });
            let us = time(&gpu, || match n {
                1 => {
                    let out = out.view();
                    ops::attention_latent_decode(&gpu, out, None, masses, h, dim_v, &call, &parts)
                        .expect("attention");
                }
                _ => {
                    ops::attention_latent(&gpu, out.view(), h, dim_v, &call, n).expect("attention")
                }
            });
            let products = (2 * n * n_head * n_pages * PAGE * (d + dim_v)) as f64;
            println!(
                "latent attention, {n_head} heads, {n_pages} pages, {n} tokens: {us:.1} µs ({:.2} TB/s of keys read once, {:.1} TFLOP/s)",
                bytes as f64 / us / 1e6,
                products / us / 1e6
            );
        }
    }
}
