//! The engine forgets what the reference forgets.
//!
//! `reference_kv.py` and `reference_pool.py` in `models/reasoner/recipe` keep every key and value and mask; the engine recycles slots. Both are fed the prompt
//! and the reference reply of one problem, token by token, and every page that goes is compared: when, in which layer, with
//! which time stamp and what mass. The traces in `data/kv` were written with `--trace` and `--gguf` (the weights of the bundled file,
//! arithmetic in f32), so the engine runs its scalar reference here, whose pool is f32 too.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lemma_engine::kv::Recycled;
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
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

impl Trace {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap());
        let head = lines.next().unwrap();
        let number = |v: &Value, key: &str| v[key].as_u64().unwrap_or(0) as u32;
        let ids = |key: &str| {
            let ids = head[key].as_array().unwrap().iter();
            ids.map(|v| v.as_u64().unwrap() as u32).collect()
        };
        Self {
            policy: head["policy"].as_str().unwrap().to_owned(),
            n_slots: number(&head, "pages"),
            page: number(&head, "page"),
            prompt: ids("prompt"),
            reply: ids("reply"),
            evicted: lines
                .map(|v| Eviction {
                    step: number(&v, "step"),
                    layer: number(&v, "layer"),
                    group: number(&v, "head"),
                    page: number(&v, "page"),
                    stamp: number(&v, "stamp"),
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
    let path = lemma_tests::data().join("kv").join(name);
    let trace = Trace::read(&path);
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
