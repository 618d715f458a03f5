//! The engine forgets what the reference forgets.
//!
//! `reference_kv.py` and `reference_pool.py` in `models/reasoner/recipe` keep every key and value and mask; the engine recycles slots. Both are fed the prompt
//! and the reference reply of one problem, token by token, and every page that goes is compared: when, in which layer, with
//! which time stamp and what mass. The traces in `data/kv` were written with `--trace` and `--gguf` (the weights of the bundled file,
//! arithmetic in f32), so the engine runs its scalar reference here, whose pool is f32 too.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lemma_engine::arch::HParams;
use lemma_engine::backend::trace::TraceRunner;
use lemma_engine::backend::{Outputs, Runner};
use lemma_engine::gguf::GgufFile;
use lemma_engine::kv::{Attend, Cache, Layout, Recycled, policy};
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, KvOptions, LoadOptions};
use lemma_engine::session::Session;
use serde_json::Value;

/// One trace: what was fed and what went.
struct Trace {
    policy: String,
    n_slots: u32,
    page: u32,
    prompt: Vec<u32>,
    reply: Vec<u32>,
    evicted: Vec<Eviction>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Eviction {
    step: u32,
    layer: u32,
    group: u32,
    page: u32,
    stamp: u32,
    w: f32,
}

/// A number of a line of a trace; 0 if it is not there.
fn number(line: &Value, key: &str) -> u32 {
    line[key].as_u64().unwrap_or(0) as u32
}

/// A list of numbers of a line of a trace.
fn numbers(line: &Value, key: &str) -> Vec<u32> {
    let all = line[key].as_array().unwrap().iter();
    all.map(|v| v.as_u64().unwrap() as u32).collect()
}

/// The first line of a trace and the others.
fn lines(name: &str) -> (Value, Vec<Value>) {
    let path = lemma_tests::data().join("kv").join(name);
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|l| serde_json::from_str(l).unwrap());
    (lines.next().unwrap(), lines.collect())
}

impl Trace {
    fn read(name: &str) -> Self {
        let (head, lines) = lines(name);
        Self {
            policy: head["policy"].as_str().unwrap().to_owned(),
            n_slots: number(&head, "pages"),
            page: number(&head, "page"),
            prompt: numbers(&head, "prompt"),
            reply: numbers(&head, "reply"),
            evicted: (lines.iter())
                .map(|v| Eviction {
                    step: number(v, "step"),
                    layer: number(v, "layer"),
                    group: number(v, "head"),
                    page: number(v, "page"),
                    stamp: number(v, "stamp"),
                    w: v["w"].as_f64().unwrap() as f32,
                })
                .collect(),
        }
    }
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/reasoner/reasoner.gguf")
}

/// What the engine recycles when it is fed the tokens of the trace.
fn recycled(trace: &Trace) -> Vec<Eviction> {
    let mut o = LoadOptions {
        backend: BackendKind::Trace,
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    // The reference has h2o by tokens as well.
    let policy = trace.policy.replace(":pages=1", "");
    for (key, value) in [
        ("top_r", "0.5"),
        ("scope", "layer"),
        ("budget_scope", "layer"),
    ] {
        o.kv.set(key, value).unwrap();
    }
    o.kv.apply(&policy).unwrap();
    o.kv.budget = KvBudget::Tokens(trace.n_slots * trace.page);
    o.kv.set("ctk", "f32").unwrap();
    o.kv.set("ctv", "f32").unwrap();
    let model = Arc::new(Model::load(&model(), &o).unwrap());
    let mut session = Session::new(model, &o).unwrap();
    let all = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&all);
    session.on_recycle(Some(Box::new(move |pages: &[Recycled], _: &[u32]| {
        into.lock().unwrap().extend(pages.iter().map(|r| Eviction {
            step: r.step,
            layer: r.il as u32,
            group: r.group as u32,
            page: r.page.first_pos,
            stamp: r.page.stamp,
            w: r.page.w,
        }));
    })));
    let n = trace.prompt.len();
    session
        .prefill(&trace.prompt, n, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
    for &token in &trace.reply {
        session.decode(token).unwrap();
    }
    drop(session);
    Arc::try_unwrap(all).unwrap().into_inner().unwrap()
}

fn compare(name: &str) {
    let trace = Trace::read(name);
    let got = recycled(&trace);
    assert!(trace.evicted.len() > 100, "{name}: too few to tell");
    for (i, (a, b)) in got.iter().zip(&trace.evicted).enumerate() {
        let same = (a.step, a.layer, a.group, a.page, a.stamp)
            == (b.step, b.layer, b.group, b.page, b.stamp)
            && (a.w - b.w).abs() <= 1e-4 * b.w.abs() + 1e-6;
        assert!(same, "{name}, number {i}: {a:?}, the reference has {b:?}");
    }
    assert_eq!(got.len(), trace.evicted.len(), "{name}");
}

/// `quest` forgets nothing; what is compared is which pages each layer attends to in each step, the prompt's aside.
#[test]
fn quest() {
    let (head, lines) = lines("rec-500-256-quest.jsonl");
    let (prompt, reply) = (numbers(&head, "prompt"), numbers(&head, "reply"));
    let file = GgufFile::open(&model()).unwrap();
    let hp = HParams::read(&file).unwrap();
    let kv = KvOptions::default();
    let all = (prompt.len() + reply.len()).div_ceil(number(&head, "page") as usize);
    let mut layout = Layout::new(&kv, hp.n_layer, hp.n_head_kv, all, hp.n_ctx_train as usize);
    layout.bounds = true;
    layout.attend = Some(Attend {
        pages: number(&head, "pages") as usize,
        beside_pinned: false,
    });
    let mut runner = TraceRunner::new(&file, &hp, &layout).unwrap();
    let mut cache = Cache::with_layout(&kv, policy::find("quest").unwrap(), layout);
    let mut run = |tokens: &[u32], pin| {
        cache.begin(tokens.len(), pin).unwrap();
        runner.run(tokens, &mut cache, Outputs::Last).unwrap();
        let attended = |il: usize| {
            let pages = cache.tables()[il].pages.iter().zip(runner.attended(il));
            let chosen = pages.filter(|(p, yes)| !p.pinned && **yes);
            chosen.map(|(p, _)| p.first_pos).collect()
        };
        (0..hp.n_layer)
            .map(attended)
            .collect::<Vec<BTreeSet<u32>>>()
    };
    run(&prompt, true);
    let mut want = vec![BTreeSet::new(); hp.n_layer];
    let mut left = lines.iter().peekable();
    for (step, &token) in (prompt.len() as u32..).zip(&reply) {
        while let Some(line) = left.next_if(|line| number(line, "step") == step) {
            let pages = &mut want[number(line, "layer") as usize];
            pages.extend(numbers(line, "in"));
            for page in numbers(line, "out") {
                assert!(pages.remove(&page), "{line}");
            }
        }
        assert_eq!(run(&[token], false), want, "step {step}");
    }
    assert!(left.next().is_none() && lines.len() > 1000);
}

#[test]
fn raas_by_rank() {
    compare("rec-500-256-raas.jsonl");
}

#[test]
fn raas_by_rank_long() {
    compare("table-1000-512-raas.jsonl");
}

#[test]
fn raas_by_alpha() {
    compare("rec-500-256-raas-alpha.jsonl");
    compare("table-1000-512-raas-alpha.jsonl");
}

#[test]
fn raas_by_bounds() {
    compare("rec-500-256-raas-bound.jsonl");
}

#[test]
fn raas_by_alpha_with_one_budget() {
    compare("rec-500-256-raas-layer-model.jsonl");
    compare("table-1000-512-raas-layer-model.jsonl");
}

#[test]
fn raas_by_alpha_with_a_table_a_head() {
    compare("rec-500-256-raas-head-layer.jsonl");
    compare("rec-500-256-raas-head-model.jsonl");
}

#[test]
fn window() {
    compare("rec-500-256-window.jsonl");
}

#[test]
fn h2o() {
    compare("rec-500-256-h2o.jsonl");
}

#[test]
fn lrfu() {
    compare("rec-500-256-lrfu.jsonl");
    compare("rec-500-256-lrfu-alpha.jsonl");
}

#[test]
fn lag() {
    compare("rec-500-256-lag-alpha.jsonl");
}
