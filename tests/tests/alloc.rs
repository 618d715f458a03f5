//! A decode step allocates nothing: a counting allocator watches every thread.
//!
//! One test in a file of its own, since the counter sees the whole process.

#![allow(
    clippy::print_stdout,
    reason = "figures for whoever runs it with --nocapture"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lemma_engine::kv::policy::{self, POLICIES};
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
use lemma_engine::sampling::{Sampler, SamplerParams};
use lemma_engine::session::Session;

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the system's.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Steps that are watched.
const STEPS: usize = 300;

#[test]
fn a_decode_step_allocates_nothing() {
    for name in [
        "llama-q-q4_k_m",
        "llama-moe",
        "qwen2-gqa-tied",
        "qwen3-tied",
        "gpt-oss",
        "gemma2",
        "gemma3",
        "deepseek2-v3",
        "qwen35",
        "qwen3next",
        "glm4moe",
        "mistral3",
        "cohere2",
    ] {
        // Every policy, and every option that has a path of its own in a step.
        let options = [
            "raas:budget_scope=layer",
            "raas:scope=head,page=32,demote=none",
            "raas:score=bound,page=8",
            "lrfu:guard=0.2,redundancy=0.5,dense_layers=1",
            "raas:demote=q8_0+q4_0",
            "raas:demote=q8_0+k4/v2",
            "lag:demote=q4_0,redundancy=0.5,scope=head",
        ];
        for spec in POLICIES.iter().map(|p| p.name).chain(options) {
            // Blocks of 32 must divide a head.
            if spec.contains("demote=q") && !["llama-q-q4_k_m", "qwen3-tied"].contains(&name) {
                continue;
            }
            // Its only layer with pages would keep all of them.
            if spec.contains("dense_layers") && ["qwen35", "qwen3next"].contains(&name) {
                continue;
            }
            let policy = policy::find(spec.split(':').next().unwrap()).unwrap();
            for n_threads in [1, 2] {
                let mut o = LoadOptions {
                    backend: BackendKind::Cpu,
                    n_threads: Some(n_threads),
                    ..LoadOptions::default()
                };
                o.kv.apply(spec).unwrap();
                // Lower tiers hold more tokens than the budget says.
                let tiers = spec.starts_with("raas") || spec.contains("demote");
                let whole = spec.contains("demote=none");
                let tokens = if tiers && !whole { 64 } else { 128 };
                o.kv.budget = KvBudget::Tokens(tokens);
                let path = lemma_tests::data()
                    .join("arch")
                    .join(format!("{name}.gguf"));
                let model = Arc::new(Model::load(&path, &o).unwrap());
                let n_vocab = model.hparams().n_vocab;
                // The thread that completes the merge table allocates until it has ended.
                model.tokenizer().ready().unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
                let mut session = Session::new(model, &o).unwrap();
                let mut sampler =
                    Sampler::new(SamplerParams::default(), n_vocab, |_| Vec::new()).unwrap();
                session
                    .prefill(&[1, 2, 3, 4, 5], 5, &mut |_, _| ControlFlow::Continue(()))
                    .unwrap();
                // The first steps may still fill what is filled once (the workers' queues).
                let mut step = |session: &mut Session| {
                    let id = sampler.sample(session.logits()).unwrap().id;
                    sampler.accept(id);
                    session.decode(id).unwrap();
                };
                for _ in 0..20 {
                    step(&mut session);
                }
                let (count, bytes) = (COUNT.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
                for _ in 0..STEPS {
                    step(&mut session);
                }
                let count = COUNT.load(Ordering::Relaxed) - count;
                let bytes = BYTES.load(Ordering::Relaxed) - bytes;
                println!(
                    "{name} {spec} {n_threads}: {count} allocations, {bytes} bytes in {STEPS} steps"
                );
                assert!(policy.whole_context || session.kv().recycled > 0);
                // Waking the team is one boxed job of rayon's, and now and then a block of its queue, fewer where the crew was
                // made smaller because other programs want the cores; the engine itself allocates nothing.
                let rayon = if n_threads == 1 { 0 } else { STEPS + 10 };
                assert!(
                    count <= rayon,
                    "{name} under {spec} with {n_threads} threads: {count}"
                );
            }
        }
    }
}
