//! Delta nets, state spaces, short convolutions, latent attention, experts of other kinds and decoders that are not Llama's with quantized matrices and in the widths of real models, on CUDA devices and on the emulator where it was
//! built, against the reference backend. The models are made here.
#![cfg(any(feature = "cuda", feature = "cuda-emulate"))]
#![allow(clippy::print_stdout, reason = "what was compared")]

use lemma_cuda::Gpu;
use lemma_engine::arch::HParams;
use lemma_engine::backend::cuda::CudaRunner;
use lemma_engine::backend::trace::TraceRunner;
use lemma_engine::backend::{Outputs, Runner};
use lemma_engine::gguf::{GgmlType, GgufFile};
use lemma_engine::kv::{Cache, Layout, policy};
use lemma_engine::options::LoadOptions;
use lemma_tests::cuda::{gpus, is_slow};
use lemma_tests::{made, nmse};

/// Logits of a text in pieces of these lengths, of the last token of each.
fn logits(runner: &mut dyn Runner, cache: &mut Cache, pieces: &[usize]) -> [Vec<f32>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    let mut at = 0;
    for n in pieces {
        let word = |i: usize| ((i * 7919 + i * i * 31 + 13) % 284) as u32;
        let tokens: Vec<u32> = (at..at + n).map(word).collect();
        at += n;
        cache.begin(*n, false).unwrap();
        runner.run(&tokens, cache, Outputs::Last).unwrap();
        all[usize::from(*n == 1)].extend_from_slice(runner.logits());
    }
    all
}

/// How far the logits of batches and of steps are from those of the reference.
fn errors(gpu: &Gpu, file: &GgufFile, pieces: &[usize]) -> [f64; 2] {
    let hp = HParams::read(file).unwrap();
    let o = LoadOptions::default();
    let policy = policy::find("full").unwrap();
    let n_slots = pieces.iter().sum::<usize>().div_ceil(16);
    let layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, n_slots, 2048);
    let run = |runner: &mut dyn Runner| {
        let mut cache = Cache::with_layout(&o.kv, policy, layout.clone());
        logits(runner, &mut cache, pieces)
    };
    let want = run(&mut TraceRunner::new(file, &hp, &layout).unwrap());
    let got = run(&mut CudaRunner::new(gpu, file, &hp, &o, &layout, 128).unwrap());
    [0, 1].map(|i| nmse(&got[i], &want[i]))
}

const DECODERS: [&str; 11] = [
    "apertus",
    "arcee",
    "cohere2",
    "exaone4",
    "gemma3",
    "glm4",
    "granite",
    "granitemoe",
    "hunyuan-dense",
    "minimax-m2",
    "olmo2",
];
const PIECES: [usize; 9] = [19, 1, 1, 1, 40, 1, 1, 1, 1];

/// Batches round activations to 16 bits; steps with quantized weights round them to eight, and so do experts.
fn check(gpu: &Gpu, file: &GgufFile, what: &str, [most_batch, most_step]: [f64; 2]) {
    let [batch, step] = errors(gpu, file, &PIECES);
    println!(
        "{what}: batches {batch:.1e} steps {step:.1e} ({})",
        gpu.info().name
    );
    assert!(
        batch < most_batch && step < most_step,
        "{what}: {batch:.1e}, {step:.1e}"
    );
}

const TYPES: [(&[GgmlType], [f64; 2]); 3] = [
    (&[], [1e-4, 1e-4]),
    (&[GgmlType::Q8_0], [3e-2, 3e-2]),
    (&[GgmlType::Q4_K, GgmlType::Q4_0], [3e-2, 3e-2]),
];

#[test]
fn delta_nets_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES {
            for (arch, heads) in [
                ("qwen35", [2, 4, 128]),
                ("qwen35moe", [1, 2, 64]),
                ("qwen35", [1, 1, 256]),
            ] {
                if is_slow(&gpu) && heads[2] == 256 && !types.is_empty() {
                    continue;
                }
                let file = made::delta_net(arch, heads, 4, types);
                // A token goes to another expert where a number is rounded the other way.
                let limits = match arch {
                    "qwen35moe" => limits.map(|most| most.max(1e-1)),
                    _ => limits,
                };
                check(&gpu, &file, &format!("{arch} {heads:?} {types:?}"), limits);
            }
        }
    }
}

#[test]
fn latent_attention_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES {
            for (n_head, shape) in [(4, [64, 32, 64]), (16, [512, 64, 0]), (3, [64, 16, 64])] {
                if is_slow(&gpu) && n_head == 16 && types.len() == 1 {
                    continue;
                }
                let file = made::latent(n_head, shape, [2, 1], types);
                check(
                    &gpu,
                    &file,
                    &format!("deepseek2 {n_head} {shape:?} {types:?}"),
                    limits,
                );
            }
        }
    }
}

#[test]
fn state_spaces_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES {
            for shape in [[8, 80, 2, 128], [3, 64, 1, 256], [4, 16, 4, 40]] {
                if is_slow(&gpu) && shape[3] == 256 && !types.is_empty() {
                    continue;
                }
                let file = made::state_space(shape, types);
                check(
                    &gpu,
                    &file,
                    &format!("falcon-h1 {shape:?} {types:?}"),
                    limits,
                );
            }
        }
    }
}

#[test]
fn short_convolutions_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES {
            for d_conv in [3, 8] {
                let file = made::short_conv(d_conv, types);
                check(&gpu, &file, &format!("lfm2 {d_conv} {types:?}"), limits);
            }
        }
    }
}

/// Without gates and apart from the width of the stream, and with routers that read the stream.
#[test]
fn experts_of_other_kinds_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES {
            // A token goes to another expert where a number is rounded the other way.
            let limits = limits.map(|most| if types.is_empty() { most } else { 1e-1 });
            for latent in [64, 128] {
                let file = made::hybrid_experts(latent, types);
                check(
                    &gpu,
                    &file,
                    &format!("nemotron_h_moe {latent} {types:?}"),
                    limits,
                );
            }
            let file = made::routed_experts(types);
            // Quantized routers round what they read to eight bits, so of a batch more tokens do.
            let most = if types.is_empty() { limits[0] } else { 3e-1 };
            let what = format!("smallthinker {types:?}");
            check(&gpu, &file, &what, [most, limits[1]]);
        }
    }
}

#[test]
fn layers_of_different_widths_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES {
            let file = made::layers_of_different_widths(types);
            check(&gpu, &file, &format!("deci {types:?}"), limits);
        }
    }
}

/// Their steps are one launch, which the widths of most test data do not fit.
#[test]
fn decoders_of_any_type() {
    for gpu in gpus() {
        for (types, limits) in TYPES
            .iter()
            .copied()
            .take(if is_slow(&gpu) { 2 } else { 3 })
        {
            for arch in DECODERS {
                let file = made::decoder(arch, types);
                // A token goes to another expert where a number is rounded the other way.
                let limits = match arch {
                    "minimax-m2" | "granitemoe" if !types.is_empty() => [1e-1; 2],
                    _ => limits,
                };
                check(&gpu, &file, &format!("{arch} {types:?}"), limits);
            }
        }
    }
}
