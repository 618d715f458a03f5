//! Speed of delta nets, state spaces, short convolutions and latent attention by themselves, in the shapes of models that people run. Ignored: it measures.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stdout, reason = "what was measured")]

mod common;

use std::time::Instant;

use common::*;
use lemma_cuda::ops::{
    self, Attention, DeltaHeads, DeltaNet, Heads, Masses, Parts, Quant, RawDelta, ScanHeads,
    SsmConv, SsmScan, Tier,
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

/// A layer of Nemotron Nano 9B v2, of Granite 4.0-H-Tiny and of Falcon-H1-7B. Launches take turns on the states of 24 layers, since those of a
/// model do not stay in the cache, and since a state is read ahead of the launch before.
#[test]
#[ignore = "it measures"]
fn state_spaces() {
    let Some(gpu) = gpus().pop() else {
        return;
    };
    let mut rng = Rng::new(3);
    for (n_head, head_dim, n_group, d_state) in
        [(128, 80, 8, 128), (48, 64, 1, 128), (24, 128, 1, 256)]
    {
        let h = ScanHeads {
            n_head,
            head_dim,
            n_group,
            d_state,
        };
        let inner = n_head * head_dim;
        let width = inner + 2 * n_group * d_state;
        let numbers = rng.normals(inner * d_state);
        let states: Vec<_> = (0..24).map(|_| upload(&gpu, &numbers)).collect();
        let [a, bias, d] = [-1.0, 0.5, 1.0].map(|x| upload(&gpu, &vec![x; n_head]));
        let (past, w) = (
            upload(&gpu, &rng.normals(3 * width)),
            upload(&gpu, &rng.normals(5 * width)),
        );
        let norm = upload(&gpu, &rng.normals(inner));
        let pos = upload_u32(&gpu, &[5]);
        for n in [1, 512] {
            let [x, to] = [0; 2].map(|_| rng.normals(n * width));
            let [x, to] = [x, to].map(|x| upload(&gpu, &x));
            let dt = upload(&gpu, &rng.normals(n * n_head));
            let [out, z] = [0; 2].map(|_| upload(&gpu, &rng.normals(n * inner)));
            let (q, ds) = (
                poisoned(&gpu, n * inner / 4),
                poisoned(&gpu, n * inner / 16),
            );
            let turn = std::cell::Cell::new(0);
            let scan = time(&gpu, || {
                turn.set((turn.get() + 1) % states.len());
                let call = SsmScan {
                    out: out.view(),
                    xbc: x.view(),
                    dt: dt.view(),
                    state: states[turn.get()].view(),
                    pos: pos.view(),
                    a: a.view(),
                    bias: bias.view(),
                    d: d.view(),
                };
                ops::ssm_scan(&gpu, &call, h, n).expect("ssm_scan");
            });
            let call = SsmConv {
                out: to.view(),
                x: x.view(),
                w: w.view(),
                past: past.view(),
                pos: pos.view(),
            };
            let conv = time(&gpu, || {
                ops::ssm_conv(&gpu, &call, n, width, 4).expect("ssm_conv");
            });
            let quant = (n == 1).then(|| Quant {
                q: q.view(),
                ds: ds.view(),
            });
            let norm = time(&gpu, || {
                let (z, up) = (z.view(), Some(out.view()));
                ops::rms_norm_groups(&gpu, z, up, norm.view(), quant, n, n_group, 1e-5)
                    .expect("rms_norm_groups");
            });
            let bytes = (inner * d_state * 4) as f64;
            println!(
                "state space, {n_head} heads of {head_dim} x {d_state}, {n} tokens: the scan {scan:.1} µs ({:.2} TB/s of state read, as much written), the convolution {conv:.1} µs, gate and norm {norm:.1} µs",
                bytes / scan / 1e6
            );
        }
    }
}

/// A layer of LFM2-1.2B.
#[test]
#[ignore = "it measures"]
fn short_convolutions() {
    let Some(gpu) = gpus().pop() else {
        return;
    };
    let mut rng = Rng::new(4);
    let (width, d_conv) = (2048, 3);
    let past = upload(&gpu, &rng.normals(2 * width));
    let w = upload(&gpu, &rng.normals(d_conv * width));
    let pos = upload_u32(&gpu, &[5]);
    for n in [1, 512] {
        let [x, b, c, out] = [0; 4].map(|_| upload(&gpu, &rng.normals(n * width)));
        let call = SsmConv {
            out: out.view(),
            x: x.view(),
            w: w.view(),
            past: past.view(),
            pos: pos.view(),
        };
        let us = time(&gpu, || {
            ops::short_conv(&gpu, &call, [b.view(), c.view()], None, n, width, d_conv)
                .expect("short_conv");
        });
        println!("short convolution, {width} channels, {n} tokens: {us:.1} µs");
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
