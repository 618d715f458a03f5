//! Speed of the CUDA backend on synthetic models, beside what the memory can stream. Ignored: it wants a device and minutes.
//!
//! `LEMMA_BENCH_MODELS` names the models, `shape:type` each (`r1-distill-qwen-1.5b:q4_k_m llama-3.1-8b:q4_k_m`; `gpt-oss-20b:mxfp4` is 12 GB
//! and only measured if asked for).
#![cfg(feature = "cuda")]
#![allow(clippy::print_stdout, reason = "what was measured")]

use std::path::PathBuf;
use std::time::Instant;

use lemma_cuda::Gpu;
use lemma_cuda::step::Clocks;
use lemma_engine::arch::HParams;
use lemma_engine::backend::cuda::CudaRunner;
use lemma_engine::backend::{Outputs, Runner};
use lemma_engine::gguf::GgufFile;
use lemma_engine::kv::{Cache, Layout, policy};
use lemma_engine::options::LoadOptions;
use lemma_engine::sampling::{Choice, Sampler, SamplerParams};
use lemma_engine::synth;

const MODELS: &str = "r1-distill-qwen-1.5b:q4_k_m llama-3.1-8b:q4_k_m";
/// Slots of the pool: 4,096 tokens.
const SLOTS: usize = 256;

fn models() -> Vec<String> {
    let names = std::env::var("LEMMA_BENCH_MODELS")
        .ok()
        .filter(|v| !v.is_empty());
    let names = names.unwrap_or_else(|| MODELS.to_owned());
    names.split_whitespace().map(str::to_owned).collect()
}

/// The file of a model, written if it is not there.
fn file_of(model: &str) -> PathBuf {
    let (shape, ftype) = model.split_once(':').expect("shape:type");
    let path = std::env::temp_dir().join(format!("lemma-bench-{shape}-{ftype}.gguf"));
    if !path.exists() {
        let start = Instant::now();
        synth::write_file(shape, ftype, 1, &path, &mut |_, _| {}).unwrap();
        println!("{model} written in {:.0} s", start.elapsed().as_secs_f64());
    }
    path
}

#[test]
#[ignore = "writes gigabytes"]
fn write_models() {
    for model in models() {
        file_of(&model);
    }
}

/// A model with its books.
struct Bench {
    runner: CudaRunner,
    cache: Cache,
    n_vocab: usize,
}

impl Bench {
    fn run(&mut self, tokens: &[u32], outputs: Outputs) {
        self.cache.begin(tokens.len(), false).unwrap();
        self.runner.run(tokens, &mut self.cache, outputs).unwrap();
    }

    /// Tokens per second of `n` steps, after a few that are not timed; without `ahead` the device is not told how tokens are chosen.
    fn decode(&mut self, n: u32, params: &SamplerParams, ahead: bool) -> f64 {
        let mut sampler = Sampler::new(params.clone(), self.n_vocab, |_| Vec::new()).unwrap();
        let (mut id, mut start) = (3, Instant::now());
        for i in 0..8 + n {
            if i == 8 {
                start = Instant::now();
            }
            let choice = match ahead {
                true => sampler.choice(),
                false => Choice::Open,
            };
            self.runner.follow(choice);
            self.run(&[id], Outputs::Last);
            let runner = &mut self.runner;
            id = match choice {
                Choice::Best => runner.best().unwrap(),
                Choice::Draw(d) => sampler.sample_top(|l| runner.top(d.top_k, l)).unwrap().id,
                Choice::Open => sampler.sample(runner.logits()).unwrap().id,
            };
        }
        let took = start.elapsed().as_secs_f64();
        self.runner.follow(Choice::Open);
        f64::from(n) / took
    }
}

/// What a pool of the same bytes costs whose pages go through tiers, once all of them are full.
fn tiers(gpu: &Gpu, file: &GgufFile, hp: &HParams, params: &SamplerParams) -> String {
    let mut o = LoadOptions::default();
    let spec = "raas:demote=k4/v2:0.95,budget_scope=model";
    o.kv.apply(spec).unwrap();
    let mut layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, SLOTS, SLOTS * 16 * 8);
    layout.head_dim = hp.head_dim;
    let runner = CudaRunner::new(gpu, file, hp, &o, &layout, 512).unwrap();
    let mut bench = Bench {
        runner,
        cache: Cache::with_layout(&o.kv, policy::find("raas").unwrap(), layout),
        n_vocab: hp.n_vocab,
    };
    let start = Instant::now();
    while bench.cache.tables().iter().all(|t| t.recycled == 0) {
        let n = bench.cache.batch().min(512);
        let prompt: Vec<u32> = (0..n as u32)
            .map(|i| (i * 7919 + 13) % hp.n_vocab as u32)
            .collect();
        bench.run(&prompt, Outputs::Last);
    }
    bench.runner.logits();
    let (pos, took) = (bench.cache.pos(), start.elapsed().as_secs_f64());
    bench.decode(300, params, true);
    let full = bench.decode(256, params, true);
    let bare = 1.0 / bench.runner.time_steps(128).unwrap();
    phases(&mut bench.runner, hp.n_layer);
    let held = bench.cache.tables().iter().map(|t| t.pages.len());
    format!(
        "  tiers: filled with {pos} tokens at {:.0} tok/s, {} held, decode {full:.0} tok/s, alone {bare:.0}",
        f64::from(pos) / took,
        held.sum::<usize>() * 16 / hp.n_layer_kv()
    )
}

/// Where a step's time goes: clocks of each phase of a layer, until its input is there and working behind that.
fn phases(runner: &mut CudaRunner, n_layer: usize) {
    let Some(clocks) = runner.trace_step().unwrap() else {
        return;
    };
    let names = ["qkv", "attend", "o", "gate+up", "down"];
    let mut line = String::from("  clocks");
    for (k, name) in names.iter().enumerate() {
        let of = |f: fn(&Clocks) -> f64| {
            let all = (1..n_layer).map(|il| f(&clocks[1 + il * 5 + k]));
            all.sum::<f64>() / (n_layer - 1) as f64
        };
        line += &format!(" {name} {:.0}+{:.0}", of(|c| c.wait), of(|c| c.work));
    }
    for c in &clocks[1 + n_layer * 5..] {
        line += &format!(", then {:.0}+{:.0}", c.wait, c.work);
    }
    println!("{line}");
}

#[test]
#[ignore = "measures"]
fn speed() {
    let found = lemma_cuda::devices();
    let Some(info) = found.list.first() else {
        println!("skipped: {}", found.reason.unwrap_or_default());
        return;
    };
    let gpu = Gpu::open(info.ordinal).unwrap();
    let read = lemma_cuda::ceiling(&gpu).unwrap().read;
    let mut table = vec![format!("{info}: reads {:.2} TB/s", read / 1e12)];
    for model in models() {
        let path = file_of(&model);
        let file = GgufFile::open(&path).unwrap();
        let hp = HParams::read(&file).unwrap();
        let o = LoadOptions::default();
        let start = Instant::now();
        let layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, SLOTS, SLOTS * 16);
        let runner = CudaRunner::new(&gpu, &file, &hp, &o, &layout, 512).unwrap();
        let load = start.elapsed().as_secs_f64();
        let cache = Cache::with_layout(&o.kv, policy::find("raas").unwrap(), layout);
        let mut bench = Bench {
            runner,
            cache,
            n_vocab: hp.n_vocab,
        };
        let greedy = SamplerParams {
            temp: 0.0,
            ..SamplerParams::default()
        };
        let default = SamplerParams {
            seed: Some(1),
            ..SamplerParams::default()
        };
        let prompt: Vec<u32> = (0..512)
            .map(|i| (i * 7919 + 13) % hp.n_vocab as u32)
            .collect();
        // Prefill: the first loads the kernels.
        bench.run(&prompt, Outputs::Last);
        assert!(
            bench.runner.logits().iter().all(|l| l.is_finite()),
            "logits that are no numbers"
        );
        let mut prefill = f64::INFINITY;
        for _ in 0..3 {
            bench.cache.clear();
            let start = Instant::now();
            bench.run(&prompt, Outputs::Last);
            prefill = prefill.min(start.elapsed().as_secs_f64());
        }
        // Decode from an empty context; then with the pool full and recycling.
        bench.cache.clear();
        let empty = bench.decode(256, &greedy, true);
        let bare_empty = 1.0 / bench.runner.time_steps(128).unwrap();
        phases(&mut bench.runner, hp.n_layer);
        let [sampled, by_host] = [true, false].map(|ahead| {
            bench.cache.clear();
            bench.decode(256, &default, ahead)
        });
        while bench.cache.pos() < SLOTS as u32 * 16 - 512 {
            bench.run(&prompt, Outputs::None);
        }
        bench.decode(300, &greedy, true);
        let full = bench.decode(256, &greedy, true);
        let recycled = bench.cache.layer(0).recycled;
        let bare = 1.0 / bench.runner.time_steps(128).unwrap();
        phases(&mut bench.runner, hp.n_layer);
        // The embedding matrix is read only where it is the output too, and of experts those that a token is sent to.
        let embd = file.tensor("token_embd.weight").map_or(0, |t| t.n_bytes());
        let unread = if file.tensor("output.weight").is_some() {
            embd
        } else {
            0
        };
        let experts = file.tensors().filter(|t| t.name.contains("_exps."));
        let experts: u64 = experts.map(|t| t.n_bytes() as u64).sum();
        let idle = experts * (hp.n_expert - hp.n_expert_used) as u64 / hp.n_expert.max(1) as u64;
        let bytes = (file.n_tensor_bytes() - unread as u64 - idle) as f64;
        table.push(format!(
            "{model}: loaded {load:.1} s, prefill 512 {:.0} tok/s\n  decode empty {empty:.0} tok/s \
             ({:.0} % of the ceiling {:.0}), alone {bare_empty:.0}, sampled {sampled:.0} (by the host {by_host:.0}), full pool {full:.0} tok/s ({recycled} recycled), alone {bare:.0} tok/s",
            512.0 / prefill,
            100.0 * empty * bytes / read,
            read / bytes,
        ));
        println!("{}", table.last().unwrap());
        drop(bench);
        if hp.head_dim.is_multiple_of(32) {
            table.push(tiers(&gpu, &file, &hp, &greedy));
            println!("{}", table.last().unwrap());
        }
    }
    println!("\n=== speed ===\n{}", table.join("\n"));
}
