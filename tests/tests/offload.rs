//! Models that are divided between the CPU and a CUDA device, and the emulator where it was built, against the reference backend.
#![cfg(any(feature = "cuda", feature = "cuda-emulate"))]
#![allow(clippy::print_stdout, reason = "what was compared")]

use lemma_cuda::Gpu;
use lemma_engine::arch::HParams;
use lemma_engine::backend::cpu::CpuRunner;
use lemma_engine::backend::cuda::{CudaRunner, Split};
use lemma_engine::backend::offload::OffloadRunner;
use lemma_engine::backend::trace::TraceRunner;
use lemma_engine::backend::{Outputs, Runner};
use lemma_engine::gguf::GgufFile;
use lemma_engine::kv::{Cache, Layout, policy};
use lemma_engine::options::LoadOptions;
use lemma_tests::cuda::{gpus, is_slow};
use lemma_tests::{data, made, nmse};

/// A runner with its books.
struct Side {
    runner: Box<dyn Runner>,
    cache: Cache,
}

impl Side {
    fn run(&mut self, tokens: &[u32], outputs: Outputs) -> Vec<f32> {
        self.cache.begin(tokens.len(), false).unwrap();
        self.runner.run(tokens, &mut self.cache, outputs).unwrap();
        self.runner.logits().to_vec()
    }

    /// What went or moved in the last step: layer, first position, tier.
    fn gone(&self) -> Vec<(usize, u32, Option<u8>)> {
        let deleted = self.cache.recycled().iter();
        let deleted = deleted.map(|r| (r.il, r.page.first_pos, None));
        let moved = self.cache.demoted().iter();
        let moved = moved.map(|d| (d.il, d.page.first_pos, Some(d.tier)));
        deleted.chain(moved).collect()
    }
}

/// A model with its layers of delta nets, or one of the fixtures.
fn open(model: &str) -> GgufFile {
    match model {
        "delta" => made::delta_net("qwen35", [1, 2, 32], 6, &[]),
        _ => GgufFile::open(&data().join(format!("arch/{model}.gguf"))).unwrap(),
    }
}

/// The reference, and a model of which a part is on a device.
fn sides(
    gpu: &Gpu,
    file: &GgufFile,
    spec: &str,
    n_slots: usize,
    split: Split,
) -> (HParams, Side, Side) {
    let hp = HParams::read(file).unwrap();
    let mut o = LoadOptions {
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    o.kv.apply(spec).unwrap();
    o.kv.recent = 2;
    let policy = policy::find(&o.kv.policy).unwrap();
    let layout = Layout {
        head_dim: hp.head_dim,
        ..Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, n_slots, 2048)
    };
    let side = |runner| {
        let mut cache = Cache::with_layout(&o.kv, policy, layout.clone());
        cache.watch();
        Side { runner, cache }
    };
    let trace = TraceRunner::new(file, &hp, &layout).unwrap();
    let back = CudaRunner::part(gpu, file, &hp, &o, &layout, 64, split).unwrap();
    let divided: Box<dyn Runner> = match split.first {
        0 => Box::new(back),
        first => {
            let front = CpuRunner::part(file, &hp, &o, &layout, 64, 0..first).unwrap();
            Box::new(OffloadRunner::new(front, back, split.layers(&hp)))
        }
    };
    let (want, got) = (side(Box::new(trace)), side(divided));
    (hp, want, got)
}

/// The layers from `first` on.
fn from(first: usize) -> Split {
    Split { first, experts: 0 }
}

fn tokens(range: std::ops::Range<usize>, n_vocab: usize) -> Vec<u32> {
    let token = |i: usize| ((i * 7919 + i * i * 31 + 13) % n_vocab) as u32;
    range.map(token).collect()
}

/// Embeddings that are the output's too, embeddings that are scaled, experts, states and latent keys, cut at every layer.
#[test]
fn a_divided_model_is_the_whole_one() {
    for gpu in gpus() {
        for name in [
            "llama-gqa-tied",
            "gemma2",
            "gpt-oss-f32experts",
            "deepseek2-v3",
            "delta",
        ] {
            let file = open(name);
            let n_layer = HParams::read(&file).unwrap().n_layer;
            for first in 1..n_layer {
                compare(&gpu, name, &file, from(first));
            }
        }
    }
}

/// Experts with biases, in groups, beside a shared one, with a router apart; those of some layers, of all, and of layers that are not on the device anyway.
#[test]
fn experts_that_the_cpu_runs() {
    for gpu in gpus() {
        for name in [
            "gpt-oss-f32experts",
            "glm4moe",
            "deepseek2-v3",
            "smallthinker",
            "nemotron_h_moe",
        ] {
            let file = open(name);
            let n_layer = HParams::read(&file).unwrap().n_layer;
            for (first, experts) in [(0, n_layer - 1), (0, n_layer), (1, n_layer)] {
                compare(&gpu, name, &file, Split { first, experts });
            }
        }
    }
}

/// A prompt and steps of a divided model beside the reference.
fn compare(gpu: &Gpu, name: &str, file: &GgufFile, split: Split) {
    let n = 20;
    // A device adds up in another order than the emulator, and where experts all but tie a token is sent to another.
    let limit = match file.tensors().any(|t| t.name.contains("_exps.")) && !is_slow(gpu) {
        true => 1e-1,
        false => 1e-4,
    };
    let (hp, mut want, mut got) = sides(gpu, file, "full", n + 6, split);
    let prompt = tokens(0..n, hp.n_vocab);
    let batch = [&mut want, &mut got].map(|s| s.run(&prompt, Outputs::All));
    let mut worst = nmse(&batch[1], &batch[0]);
    // The second step is recorded, the others repeat it.
    for at in n..n + 5 {
        let one = tokens(at..at + 1, hp.n_vocab);
        let step = [&mut want, &mut got].map(|s| s.run(&one, Outputs::Last));
        worst = worst.max(nmse(&step[1], &step[0]));
        for il in 0..hp.n_layer_kv() {
            let of =
                |s: &Side| -> Vec<f32> { s.cache.layer(il).pages.iter().map(|p| p.w).collect() };
            let masses = nmse(&of(&got), &of(&want));
            assert!(
                masses < limit,
                "{name}, {split:?}, layer {il}: {masses:.1e}"
            );
        }
    }
    println!("{name}, {split:?} of {} layers: {worst:.1e}", hp.n_layer);
    assert!(worst < limit, "{name}, {split:?}: {worst:.1e}");
}

/// All layers share one pool: a slot that a layer on one side gives up may go to one on the other, and pages move in it.
#[test]
fn slots_go_from_side_to_side() {
    for gpu in gpus() {
        for (model, spec) in [
            ("qwen3-tied", "raas"),
            ("qwen3-tied", "raas:demote=q8_0:0.15+k4/v2:0.75"),
            ("qwen3-tied", "h2o:demote=q8_0+q4_0,budget_scope=layer"),
            ("delta", "raas:demote=q8_0:0.15+k4/v2:0.75"),
        ] {
            let file = open(model);
            let n_layer = HParams::read(&file).unwrap().n_layer;
            let first = n_layer / 2;
            let n_slots = if is_slow(&gpu) { 4 } else { 8 };
            let (hp, mut want, mut got) = sides(&gpu, &file, spec, n_slots, from(first));
            let (mut at, mut gone, mut sides_of) = (0, 0, [false; 2]);
            while at < if is_slow(&gpu) { 150 } else { 400 } {
                let n = match at {
                    0 => 41,
                    110 => 7,
                    _ => 1,
                };
                let some = tokens(at..at + n, hp.n_vocab);
                at += n;
                let [w, g] = [&mut want, &mut got].map(|s| s.run(&some, Outputs::Last));
                let these = want.gone();
                // From a tie that was rounded the other way on, the two hold different pages.
                if these != got.gone() {
                    break;
                }
                gone += these.len();
                let cut = hp.layers_of_pool(&(0..first)).end;
                these
                    .iter()
                    .for_each(|p| sides_of[usize::from(p.0 >= cut)] = true);
                let e = nmse(&g, &w);
                assert!(e < 3e-2, "{model} {spec}, position {at}: {e:.1e}");
            }
            println!("{model} {spec}: {gone} pages up to {at}");
            assert!(gone > 10 && sides_of == [true; 2], "{model} {spec}: {gone}");
        }
    }
}

#[test]
fn states_of_both_sides_come_back_and_pools_grow() {
    for gpu in gpus() {
        let file = open("delta");
        let (hp, _, mut got) = sides(&gpu, &file, "full", 4, from(3));
        got.run(&tokens(0..20, hp.n_vocab), Outputs::Last);
        got.runner.save_state();
        let steps = |side: &mut Side| -> Vec<Vec<f32>> {
            let ids = tokens(20..25, hp.n_vocab);
            let step = |&id: &u32| side.run(&[id], Outputs::Last);
            ids.iter().map(step).collect()
        };
        let before = steps(&mut got);
        assert!(got.cache.rewind(20));
        got.runner.restore_state();
        got.cache.grow(9);
        got.runner.grow(got.cache.layout()).unwrap();
        // A larger pool may be divided among blocks otherwise.
        for (after, before) in steps(&mut got).iter().zip(&before) {
            let e = nmse(after, before);
            assert!(e < 1e-9, "{e:.1e}");
        }
    }
}

/// The larger the pool, the less fits, from all down to nothing; of mixtures the experts leave first.
#[test]
fn as_much_as_fits() {
    for name in ["qwen3-tied", "glm4moe"] {
        let hp = HParams::read(&open(name)).unwrap();
        let (n, experts) = (hp.n_layer, if hp.n_expert > 0 { hp.n_layer } else { 0 });
        // A layer takes 10, of which its experts are 8.
        let takes = |s: Split| {
            let experts = s.experts.saturating_sub(s.first).min(n - s.first);
            10 * (n - s.first) - 8 * experts
        };
        let o = LoadOptions::default();
        let fitting = |o: &LoadOptions, room| Split::that_fits(&hp, o, |s| takes(s) <= room);
        let all: Vec<Split> = (1..=10 * n).map(|room| fitting(&o, room)).collect();
        // Where nothing fits, all is asked for, and refused.
        assert_eq!(
            (all[0], all[10 * n - 1]),
            (Split::default(), Split::default())
        );
        for (split, room) in all.iter().zip(1..) {
            assert!(takes(*split) <= room || *split == Split::default());
            // Nothing that would fit is left out.
            let more = match (split.first, split.experts) {
                (0, 0) => continue,
                (0, experts) => Split {
                    first: 0,
                    experts: experts - 1,
                },
                (first, e) => {
                    assert_eq!(e, experts, "experts leave first");
                    Split {
                        first: first - 1,
                        experts,
                    }
                }
            };
            assert!(takes(more) > room, "{split:?} in {room}");
        }
        assert!(all.iter().any(|s| s.first > 0));
        assert_eq!(
            all.iter().any(|s| s.first == 0 && s.experts > 0),
            experts > 0
        );
        // What is asked for is not looked at again.
        let asked = LoadOptions {
            gpu_layers: Some(1),
            cpu_experts: Some(0),
            ..o
        };
        assert_eq!(fitting(&asked, 1), from(n - 1));
    }
    // What is counted falls with every layer, and with the experts of every layer, by what their tensors take.
    for gpu in gpus() {
        for name in ["qwen3-tied", "glm4moe", "llama-q-q2_k"] {
            let file = open(name);
            let hp = HParams::read(&file).unwrap();
            let o = LoadOptions::default();
            let layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, 4, 512);
            let need = |split| CudaRunner::need(&gpu, &file, &hp, &o, &layout, 64, split).unwrap();
            let bytes = |of: &dyn Fn(&str) -> bool| -> u64 {
                let tensors = file.tensors().filter(|t| of(&t.name));
                tensors.map(|t| t.n_bytes() as u64).sum()
            };
            for il in 0..hp.n_layer - 1 {
                let layer = bytes(&|n| n.starts_with(&format!("blk.{il}.")));
                assert!(need(from(il)) >= need(from(il + 1)) + layer, "{name} {il}");
                let of = |experts| need(Split { first: 0, experts });
                let experts =
                    bytes(&|n| n.starts_with(&format!("blk.{il}.")) && n.contains("_exps."));
                assert!(of(il) >= of(il + 1) + experts, "{name} {il}");
                assert_eq!(of(il) == of(il + 1), experts == 0, "{name} {il}");
            }
            // On a device it is no less than what is taken.
            let before = gpu.memory().unwrap().0;
            let runner = CudaRunner::new(&gpu, &file, &hp, &o, &layout, 64).unwrap();
            let taken = before.saturating_sub(gpu.memory().unwrap().0) as u64;
            drop(runner);
            println!("{name}: {taken} of {} bytes", need(Split::default()));
            assert!(taken <= need(Split::default()), "{name}: {taken}");
        }
    }
    for gpu in gpus().into_iter().filter(is_slow) {
        let file = open("qwen3-tied");
        let hp = HParams::read(&file).unwrap();
        let o = LoadOptions::default();
        let fits = |n_slots: usize| {
            let layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, n_slots, 1 << 30);
            CudaRunner::what_fits(&gpu, &file, &hp, &o, &layout, 64).unwrap()
        };
        assert_eq!(fits(1), Split::default());
        let e = CudaRunner::part(
            &gpu,
            &file,
            &hp,
            &o,
            &Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, 1 << 26, 1 << 30),
            64,
            fits(1 << 26),
        );
        let said = e.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            said.contains("a KV pool of") && !said.contains('\n'),
            "{said}"
        );
    }
}
