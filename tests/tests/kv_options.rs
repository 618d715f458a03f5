//! Every option of the pool, alone and in company: the CPU backend takes the decisions of the reference, a decode goes on when the
//! pool is full, memory is what was planned, and a sequence can be rewound, cleared and grown.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use lemma_engine::kv::{Demoted, Recycled};
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
use lemma_engine::session::{Rewind, Session};

/// Those whose pages go through lower tiers, which needs heads of whole blocks.
const DEMOTED: [&str; 12] = [
    "raas:demote=q8_0",
    "raas:demote=q8_0+q4_0,budget_scope=layer",
    "window:demote=q4_0:0.75,scope=head",
    "raas:demote=q8_0,scope=head,budget_scope=layer",
    "h2o:demote=q8_0+q5_1+q4_1,scope=head,budget_scope=layer",
    "lrfu:demote=iq4_nl,page=8,dense_layers=1",
    "raas:demote=q5_0,page=32,guard=0.25",
    "lag:alpha=0.05,demote=q4_0,redundancy=0.6",
    "raas:demote=q8_0+k4/v2",
    "window:demote=k4/v2,scope=head,budget_scope=layer",
    "h2o:demote=q5_0/q4_0+k4/v2,page=32,dense_layers=1",
    "raas:demote=q8_0/v2,page=64,scope=head",
];

const SPECS: [&str; 16] = [
    "raas",
    "raas:budget_scope=layer",
    "raas:scope=head,budget_scope=layer",
    "raas:scope=head",
    "raas:page=8",
    "raas:page=32,scope=head",
    "raas:page=64,budget_scope=layer",
    "raas:dense_layers=1",
    "raas:score=bound,budget_scope=layer",
    "raas:score=bound,scope=head,page=8,aggregate=mean",
    "lrfu:top_r=0.3,lambda=0.8,clock=step",
    "lag:alpha=0.05,budget_scope=layer",
    "h2o:redundancy=0.5",
    "raas:guard=0.25,redundancy=0.6,scope=head,dense_layers=1",
    "quest",
    "quest:page=8,dense_layers=1",
];

fn load(backend: BackendKind, spec: &str, tokens: u32, f32s: bool) -> (LoadOptions, Arc<Model>) {
    let mut o = LoadOptions {
        backend,
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    o.kv.apply(spec).unwrap();
    o.kv.budget = KvBudget::Tokens(tokens);
    if f32s {
        o.kv.set("ctk", "f32").unwrap();
        o.kv.set("ctv", "f32").unwrap();
    }
    let name = if o.kv.demotions().is_empty() {
        "qwen2-gqa-tied.gguf"
    } else {
        "qwen3-tied.gguf"
    };
    let path = lemma_tests::data().join("arch").join(name);
    let model = Arc::new(Model::load(&path, &o).unwrap());
    (o, model)
}

fn token(i: usize, n_vocab: usize) -> u32 {
    ((i * 7919 + i * i * 31 + 13) % n_vocab) as u32
}

/// What is recycled (layer, table, step, page, and the tier that a demoted page goes to), and the logits after each step.
type Run = (Vec<(usize, usize, u32, u32, u8)>, Vec<Vec<f32>>);

fn run(backend: BackendKind, spec: &str) -> Run {
    let (o, model) = load(backend, spec, 320, true);
    let n_vocab = model.hparams().n_vocab;
    let mut s = Session::new(model, &o).unwrap();
    let all = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&all);
    s.on_recycle(Some(Box::new(move |pages: &[Recycled], _: &[u32]| {
        let seen = |r: &Recycled| (r.il, r.group, r.step, r.page.first_pos, 0);
        into.lock().unwrap().extend(pages.iter().map(seen));
    })));
    let into = Arc::clone(&all);
    s.on_demote(Some(Box::new(move |pages: &[Demoted], _: &[u32]| {
        let seen = |d: &Demoted| (d.il, d.group, d.step, d.page.first_pos, d.tier);
        into.lock().unwrap().extend(pages.iter().map(seen));
    })));
    let prompt: Vec<u32> = (0..20).map(|i| token(i, n_vocab)).collect();
    s.prefill(&prompt, 20, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
    let mut logits = Vec::new();
    for i in 20..450 {
        s.decode(token(i, n_vocab)).unwrap();
        logits.push(s.logits().to_vec());
    }
    let recycled = all.lock().unwrap().clone();
    (recycled, logits)
}

#[test]
fn the_cpu_decides_as_the_reference() {
    for spec in SPECS.iter().chain(&DEMOTED) {
        let (want, got) = (run(BackendKind::Trace, spec), run(BackendKind::Cpu, spec));
        assert_eq!(got.0, want.0, "{spec}");
        assert_eq!(spec.starts_with("quest"), got.0.is_empty(), "{spec}");
        // Queries are rounded to eight bits for keys of four.
        let limit = if spec.contains("q4") { 1e-4 } else { 1e-5 };
        for (i, (a, b)) in got.1.iter().zip(&want.1).enumerate() {
            let error = lemma_tests::nmse(a, b);
            assert!(error < limit, "{spec}, step {i}: {error:.1e}");
        }
    }
}

#[test]
fn a_sequence_can_be_rewound_cleared_and_grown() {
    for spec in SPECS.iter().chain(&DEMOTED) {
        let (mut o, model) = load(BackendKind::Cpu, spec, 320, false);
        let n_vocab = model.hparams().n_vocab;
        let mut s = Session::new(Arc::clone(&model), &o).unwrap();
        assert_eq!(s.kv().bytes, s.plan().kv, "{spec}");
        let feed = |s: &mut Session, range: std::ops::Range<usize>| {
            for i in range {
                s.decode(token(i, n_vocab)).unwrap();
            }
            s.logits().to_vec()
        };
        let first = feed(&mut s, 0..100);
        feed(&mut s, 100..140);
        assert_eq!(s.rewind(60), Rewind::Done);
        assert_eq!(feed(&mut s, 60..100), first, "{spec}: nothing was recycled");
        let bytes = s.kv().bytes;
        let long = feed(&mut s, 100..420);
        assert_eq!(s.kv().bytes, bytes, "{spec}: memory stays");
        if !spec.starts_with("quest") {
            assert_eq!(s.rewind(50), Rewind::Refill, "{spec}");
            assert_eq!(s.pos(), 0);
        }
        s.clear();
        assert_eq!(feed(&mut s, 0..100), first, "{spec}: a new sequence");
        assert_eq!(feed(&mut s, 100..420).len(), long.len());

        // A pool of default size grows with a prompt.
        o.kv.budget = KvBudget::Default;
        o.kv.beyond_train = true;
        o.n_ctx = Some(6000);
        let mut s = Session::new(model, &o).unwrap();
        let prompt: Vec<u32> = (0..300).map(|i| token(i, n_vocab)).collect();
        let before = s.kv().bytes;
        s.prefill(&prompt, 300, &mut |_, _| ControlFlow::Continue(()))
            .unwrap();
        if !spec.starts_with("quest") {
            assert!(s.kv().bytes > before, "{spec}");
        }
        s.decode(1).unwrap();
        assert!(s.logits().iter().all(|l| l.is_finite()), "{spec}");
    }
}

/// The logits after a prompt that is longer than the first tier, and of steps after it.
fn long_prompt(backend: BackendKind, n_threads: usize, f32s: bool) -> Vec<Vec<f32>> {
    let (mut o, model) = load(backend, "raas:demote=q8_0:0.4+q4_0:0.3", 320, f32s);
    o.n_threads = Some(n_threads);
    // Tiers hold no more than the context.
    (o.n_ctx, o.kv.beyond_train) = (Some(2048), true);
    let n_vocab = model.hparams().n_vocab;
    let mut s = Session::new(model, &o).unwrap();
    let prompt: Vec<u32> = (0..400).map(|i| token(i, n_vocab)).collect();
    let go = ControlFlow::Continue(());
    s.prefill(&prompt, 400, &mut |_, _| go).unwrap();
    let kv = s.kv();
    assert!(kv.tiers[0].n_slots * kv.page < 320 && kv.recycled == 0);
    let moved = s.kv_pages(0).iter().filter(|p| p.pinned && p.tier > 0);
    assert!(moved.count() > 5);
    let mut logits = vec![s.logits().to_vec()];
    for i in 400..700 {
        s.decode(token(i, n_vocab)).unwrap();
        logits.push(s.logits().to_vec());
    }
    // Where new pages are f32, the others hold all of it.
    assert!(f32s || s.kv().recycled > 0);
    logits
}

#[test]
fn a_prompt_goes_through_the_tiers_the_same_way_everywhere() {
    let want = long_prompt(BackendKind::Trace, 1, true);
    let got = long_prompt(BackendKind::Cpu, 1, true);
    for (i, (a, b)) in got.iter().zip(&want).enumerate() {
        let error = lemma_tests::nmse(a, b);
        assert!(error < 1e-4, "step {i}: {error:.1e}");
    }
    let one = long_prompt(BackendKind::Cpu, 1, false);
    for n in [2, 3, 5] {
        let more = long_prompt(BackendKind::Cpu, n, false);
        assert_eq!(more, one, "{n} threads");
    }
}

#[test]
fn what_cannot_be_demoted_is_told() {
    let open = |model: &str, spec: &str| {
        let mut o = LoadOptions {
            backend: BackendKind::Cpu,
            ..LoadOptions::default()
        };
        o.kv.apply(spec).unwrap();
        let path = lemma_tests::data().join("arch").join(model);
        let model = Arc::new(Model::load(&path, &o).unwrap());
        let names = |s: Session| s.kv().tiers.into_iter().map(|t| t.name).collect::<Vec<_>>();
        Session::new(model, &o).map(|s| names(s).join("+"))
    };
    for (model, spec, said) in [
        (
            "qwen2-gqa-tied.gguf",
            "raas:demote=q8_0",
            "--kv-demote q8_0 with heads of 16",
        ),
        (
            "qwen3-tied.gguf",
            "raas:demote=q4_0+q8_0",
            "--kv-demote q8_0 after types as small",
        ),
        (
            "qwen3-tied.gguf",
            "raas:demote=q8_0,ctk=q8_0,ctv=q8_0",
            "--kv-demote q8_0 after",
        ),
        (
            "qwen3-tied.gguf",
            "raas:demote=q8_0,score=bound",
            "--kv-score bound",
        ),
        (
            "qwen2-gqa-tied.gguf",
            "raas:demote=k4/v2",
            "--kv-demote k4 with heads of 16",
        ),
        (
            "qwen3-tied.gguf",
            "raas:demote=k4/v2+q4_0",
            "--kv-demote q4_0 after types as small",
        ),
        (
            "qwen3-tied.gguf",
            "raas:demote=q8_0+k4/v2,page=8",
            "--kv-demote k4/v2 with pages of 8, expected pages of 16",
        ),
    ] {
        let e = open(model, spec).unwrap_err().to_string();
        assert!(e.contains(said), "{spec}: {e}");
    }
    let tiers = |spec| open("qwen3-tied.gguf", spec).unwrap();
    assert_eq!(tiers("raas:demote=q4_0,ctk=q8_0,ctv=q8_0"), "q8_0+q4_0");
    assert_eq!(tiers("raas"), "f16+k4/v2", "the default");
    assert_eq!(
        tiers("raas:page=8"),
        "f16+q8_0",
        "whole pages have 16 tokens"
    );
    assert_eq!(tiers("window"), "");
    assert_eq!(tiers("full:demote=q4_0"), "", "nothing has to go");
    assert_eq!(tiers("quest:demote=q4_0"), "");
}
