//! Pools of other types and of several tiers on CUDA devices, and on the emulator where it was built: what is moved, what is deleted and
//! what comes of it, beside the reference and the CPU.
#![cfg(any(feature = "cuda", feature = "cuda-emulate"))]
#![allow(clippy::print_stdout, reason = "what was compared")]

use lemma_cuda::Gpu;
use lemma_engine::arch::HParams;
use lemma_engine::backend::cpu::CpuRunner;
use lemma_engine::backend::cuda::CudaRunner;
use lemma_engine::backend::trace::TraceRunner;
use lemma_engine::backend::{Outputs, Runner};
use lemma_engine::gguf::GgufFile;
use lemma_engine::kv::{Cache, Layout, policy};
use lemma_engine::options::LoadOptions;
use lemma_engine::sampling::Choice;
use lemma_tests::cuda::{gpus, is_slow};
use lemma_tests::{argmax, data, made, nmse};

/// A runner with its books.
struct Side {
    runner: Box<dyn Runner>,
    cache: Cache,
}

/// A page that has gone: layer, first position, and the tier that it went to if it was not deleted.
type Gone = (usize, u32, Option<u8>);

impl Side {
    fn run(&mut self, tokens: &[u32]) -> (Vec<f32>, Vec<Gone>) {
        self.cache.begin(tokens.len(), false).unwrap();
        self.runner
            .run(tokens, &mut self.cache, Outputs::Last)
            .unwrap();
        let deleted = self.cache.recycled().iter();
        let deleted = deleted.map(|r| (r.il, r.page.first_pos, None));
        let moved = self.cache.demoted().iter();
        let moved = moved.map(|d| (d.il, d.page.first_pos, Some(d.tier)));
        (
            self.runner.logits().to_vec(),
            deleted.chain(moved).collect(),
        )
    }

    fn grow(&mut self, n_slots: usize) {
        if n_slots == 0 {
            return;
        }
        self.cache.grow(n_slots);
        self.runner.grow(self.cache.layout()).unwrap();
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Reference {
    Trace,
    Cpu,
}

/// The model of most tests, and one with windows and sinks whose heads are wide enough for blocks.
const PLAIN: &str = "qwen3-tied";
const WINDOWS: &str = "gpt-oss-f32experts";
/// One with latent attention and without experts, which is made here.
const LATENT: &str = "deepseek2";
/// One with delta nets in two layers of three, likewise.
const DELTA: &str = "qwen35";

/// A reference and a device over one model, each with books of its own.
fn sides(
    gpu: &Gpu,
    (model, spec): (&str, &str),
    n_slots: usize,
    reference: Reference,
) -> (HParams, Side, Side) {
    let file = match model {
        LATENT => made::latent(4, [64, 32, 0], [2, 2], &[]),
        DELTA => made::delta_net(DELTA, [1, 2, 32], 6, &[]),
        _ => GgufFile::open(&data().join(format!("arch/{model}.gguf"))).unwrap(),
    };
    let hp = HParams::read(&file).unwrap();
    let mut o = LoadOptions {
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    o.kv.apply(spec).unwrap();
    o.kv.recent = 2;
    let policy = policy::find(&o.kv.policy).unwrap();
    let layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, n_slots, 2048);
    let layout = Layout {
        head_dim: hp.head_dim,
        ..layout
    };
    let cache = || {
        let mut cache = Cache::with_layout(&o.kv, policy, layout.clone());
        cache.watch();
        cache
    };
    let want: Box<dyn Runner> = match reference {
        Reference::Trace => Box::new(TraceRunner::new(&file, &hp, &layout).unwrap()),
        Reference::Cpu => Box::new(CpuRunner::new(&file, &hp, &o, &layout, 64).unwrap()),
    };
    let got = CudaRunner::new(gpu, &file, &hp, &o, &layout, 64).unwrap();
    let side = |runner, cache| Side { runner, cache };
    let (a, b) = (side(want, cache()), side(Box::new(got), cache()));
    (hp, a, b)
}

fn token(i: usize, n_vocab: usize) -> u32 {
    ((i * 7919 + i * i * 31 + 13) % n_vocab) as u32
}

/// Runs a prompt and steps on both sides, as long as pages go alike; returns how many pages did, and of how many. Where masses all but
/// tie, rounding may tell them apart; from then on the two hold different pages, and nothing is compared.
fn compare(gpu: &Gpu, of: (&str, &str), reference: Reference, limit: f64) -> (usize, usize) {
    let n_slots = if is_slow(gpu) { 4 } else { 8 };
    // On a device many more positions are compared, and what was rounded the other way stays in the pool.
    let limit = if is_slow(gpu) { limit } else { 5.0 * limit };
    let (hp, mut want, mut got) = sides(gpu, of, n_slots, reference);
    let spec = format!("{} {}", of.0, of.1);
    let mut at = 0;
    let mut worst = 0.0f64;
    let mut pages = (0, 0);
    while at < if is_slow(gpu) { 150 } else { 500 } {
        // A prompt that ends inside a page, then steps, a few tokens at once on the way.
        let n = match at {
            0 => 41,
            110 => 7,
            _ => 1,
        };
        let tokens: Vec<u32> = (at..at + n).map(|i| token(i, hp.n_vocab)).collect();
        at += n;
        let ((w, gone), (g, other)) = (want.run(&tokens), got.run(&tokens));
        pages.1 += gone.len();
        pages.0 += gone.iter().zip(&other).filter(|(a, b)| a == b).count();
        if gone != other {
            break;
        }
        let e = nmse(&g, &w);
        worst = worst.max(e);
        assert!(e < limit, "{spec}, position {at}: {e:.1e}");
        for il in 0..if n == 1 { hp.n_layer_kv() } else { 0 } {
            let w = |c: &Cache| c.layer(il).pages.iter().map(|p| p.w).collect::<Vec<_>>();
            let e = nmse(&w(&got.cache), &w(&want.cache));
            assert!(
                e < limit,
                "{spec}, position {at}, masses of layer {il}: {e:.1e}"
            );
        }
    }
    println!(
        "{spec}: {} of {} pages alike up to {at}, {worst:.1e}",
        pages.0, pages.1
    );
    pages
}

/// Pools whose pages move, and how far logits may be from those of the reference: where a number of few bits is rounded the other
/// way, it is another number.
const TIERS: [(&str, f64); 6] = [
    ("raas:demote=q8_0:0.15+k4/v2:0.75", 1e-2),
    ("h2o:demote=q8_0/q4_0+q4_0,aggregate=mean", 1e-3),
    (
        "window:demote=k4/q8_0:0.3+k4/v2:0.3,budget_scope=layer",
        3e-2,
    ),
    ("raas:demote=q8_0+q4_0,budget_scope=layer", 1e-3),
    ("window:demote=k4/v2", 1e-2),
    ("lrfu:demote=q8_0+q4_0+k4/v2", 1e-2),
];

#[test]
fn pages_go_as_they_do_on_the_reference() {
    for gpu in gpus() {
        for (spec, limit) in &TIERS[..if is_slow(&gpu) { 3 } else { TIERS.len() }] {
            let (alike, all) = compare(&gpu, (PLAIN, spec), Reference::Trace, *limit);
            assert!(
                all > 10 && alike * 10 >= all * 9,
                "{spec}: {alike} of {all}"
            );
        }
    }
}

#[test]
fn windows_and_sinks_see_pages_of_any_tier() {
    for gpu in gpus() {
        // As far as the CPU is from the reference on this model, whose experts change where a number is rounded the other way.
        let specs = [
            "raas:demote=q8_0:0.15+k4/v2:0.75",
            "h2o:demote=q8_0/q4_0+q4_0,aggregate=mean",
            "window:demote=k4/v2",
        ];
        for spec in &specs[..if is_slow(&gpu) { 2 } else { specs.len() }] {
            let (alike, all) = compare(&gpu, (WINDOWS, spec), Reference::Trace, 3e-2);
            assert!(all > 5 && alike * 10 >= all * 9, "{spec}: {alike} of {all}");
        }
    }
}

/// Keys that hold the values too go to lower tiers and are stored in other types.
#[test]
fn latent_keys_of_any_tier() {
    for gpu in gpus() {
        let specs = [
            ("raas:demote=q8_0:0.15+k4/v2:0.75", Reference::Trace, 1e-2),
            ("window:ctk=q8_0,demote=q4_0", Reference::Cpu, 3e-2),
            ("h2o:ctk=q4_0,aggregate=mean", Reference::Cpu, 3e-2),
        ];
        for (spec, reference, limit) in specs {
            let (alike, all) = compare(&gpu, (LATENT, spec), reference, limit);
            assert!(all > 5 && alike * 10 >= all * 9, "{spec}: {alike} of {all}");
        }
    }
}

/// The pool knows the layers with pages alone.
#[test]
fn tiers_beside_recurrent_states() {
    for gpu in gpus() {
        for (spec, reference) in [
            ("raas:demote=q8_0:0.15+k4/v2:0.75", Reference::Trace),
            ("window:ctk=q8_0,ctv=q8_0,demote=q4_0", Reference::Cpu),
        ] {
            let (alike, all) = compare(&gpu, (DELTA, spec), reference, 3e-2);
            assert!(all > 5 && alike * 10 >= all * 9, "{spec}: {alike} of {all}");
        }
    }
}

#[test]
fn pools_of_other_types_are_those_of_the_cpu() {
    for gpu in gpus() {
        let specs = [
            ("raas:ctk=q8_0,ctv=q8_0", 1e-3),
            ("window:ctk=q4_0,ctv=q4_0,demote=k4/v2", 3e-2),
            ("raas:ctv=q4_0", 1e-3),
            ("lrfu:ctk=q8_0,ctv=q8_0,demote=q4_0+k4/v2", 1e-2),
        ];
        for (spec, limit) in &specs[..if is_slow(&gpu) { 2 } else { specs.len() }] {
            let (alike, all) = compare(&gpu, (PLAIN, spec), Reference::Cpu, *limit);
            assert!(all > 5 && alike * 10 >= all * 9, "{spec}: {alike} of {all}");
        }
    }
}

#[test]
fn steps_ahead_of_the_host_change_nothing_in_tiers() {
    for gpu in gpus() {
        let spec = "raas:demote=q8_0+k4/v2";
        let (hp, _, mut plain) = sides(&gpu, (PLAIN, spec), 6, Reference::Cpu);
        let (_, _, mut ahead) = sides(&gpu, (PLAIN, spec), 6, Reference::Cpu);
        let prompt: Vec<u32> = (0..40).map(|i| token(i, hp.n_vocab)).collect();
        // Twice: behind a cleared pool nothing is in lower tiers, and what comes is what came before.
        let mut first = Vec::new();
        for round in 0..2 {
            plain.run(&prompt);
            ahead.run(&prompt);
            let (mut id, mut moved) = (1, 0);
            for step in 0..100 {
                let (want, gone) = plain.run(&[id]);
                moved += gone.len();
                ahead.runner.follow(Choice::Best);
                ahead.cache.begin(1, false).unwrap();
                ahead
                    .runner
                    .run(&[id], &mut ahead.cache, Outputs::Last)
                    .unwrap();
                assert_eq!(ahead.runner.best(), Some(argmax(&want)), "step {step}");
                if step % 9 == 0 {
                    assert!(ahead.runner.logits() == want, "step {step}");
                }
                for il in 0..hp.n_layer_kv() {
                    let (a, b) = (plain.cache.layer(il), ahead.cache.layer(il));
                    assert_eq!(a.pages, b.pages, "step {step}");
                }
                match round {
                    0 => first.push(want),
                    _ => assert!(first[step] == want, "step {step} of a cleared pool"),
                }
                // Now and then what comes is not what was computed ahead.
                id = match step % 7 {
                    6 => token(step, hp.n_vocab),
                    _ => argmax(&first[step]),
                };
            }
            assert!(moved > 10, "{moved} pages moved");
            plain.cache.clear();
            ahead.cache.clear();
        }
    }
}

#[test]
fn a_pool_that_grows_keeps_its_tiers() {
    for gpu in gpus() {
        let (hp, mut want, mut got) =
            sides(&gpu, (PLAIN, "raas:demote=q8_0+k4/v2"), 5, Reference::Cpu);
        let mut at = 0;
        for (steps, n_slots) in [(130, 9), (60, 0)] {
            for _ in 0..steps {
                let id = token(at, hp.n_vocab);
                let ((w, gone), (g, other)) = (want.run(&[id]), got.run(&[id]));
                assert_eq!(gone, other, "position {at}");
                let e = nmse(&g, &w);
                assert!(e < 1e-2, "position {at}: {e:.1e}");
                at += 1;
            }
            let lower = |c: &Cache| c.layer(0).pages.iter().filter(|p| p.tier > 0).count();
            assert!(lower(&got.cache) > 0);
            want.grow(n_slots);
            got.grow(n_slots);
        }
    }
}
