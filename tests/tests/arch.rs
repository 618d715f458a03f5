//! Whole models against llama.cpp: logits at every position, in a batch and step by step, and the greedy continuation.
//!
//! The reference data was made with llama.cpp on tiny models with random weights, one for each shape that an architecture comes in; that of
//! olmo3, which has windows, by plain loops in float64.

#![allow(
    clippy::print_stdout,
    reason = "figures for whoever runs it with --nocapture"
)]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use lemma_engine::arch;
use lemma_engine::kv::policy::POLICIES;
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
use lemma_engine::session::Session;
use lemma_quant::GgmlType;
use lemma_tests::{argmax, floats, folders, json, nmse};
use serde_json::Value;

struct Case {
    dir: PathBuf,
    entry: Value,
}

impl Case {
    fn name(&self) -> &str {
        self.entry["model"].as_str().unwrap()
    }

    fn tokens(&self) -> Vec<u32> {
        self.entry["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_u64().unwrap() as u32)
            .collect()
    }

    fn floats(&self, key: &str) -> Vec<f32> {
        floats(&self.dir.join(self.entry[key]["file"].as_str().unwrap()))
    }

    fn f32_weights(&self) -> bool {
        self.entry["weights"] == "F32"
    }

    fn load(&self, o: &LoadOptions) -> Arc<Model> {
        let model = Model::load(&self.dir.join(self.name()), o);
        Arc::new(model.unwrap_or_else(|e| panic!("{}: {e}", self.name())))
    }
}

/// Cases of the architectures that the engine has. Fails when there are too few, so that a lost folder is noticed.
fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for dir in folders("arch") {
        let manifest = json(&dir.join("manifest.json"));
        for entry in manifest["entries"].as_array().unwrap() {
            if arch::NAMES.contains(&entry["arch"].as_str().unwrap()) {
                all.push(Case {
                    dir: dir.clone(),
                    entry: entry.clone(),
                });
            }
        }
    }
    assert!(all.len() >= 20, "only {} models", all.len());
    all
}

/// Options to meet the reference with: longrope asks for the context that it was made in.
fn as_made(case: &Case, backend: BackendKind, kv: GgmlType) -> LoadOptions {
    let n_ctx = case.entry["n_ctx"].as_u64().unwrap();
    LoadOptions {
        n_ctx: Some(n_ctx as u32),
        ..options(backend, kv)
    }
}

fn options(backend: BackendKind, kv: GgmlType) -> LoadOptions {
    let mut o = LoadOptions {
        backend,
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    o.kv.ty_k = kv;
    o.kv.ty_v = kv;
    o
}

fn batch(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    let mut keep = |_: usize, logits: &[f32]| {
        all.extend_from_slice(logits);
        Ok(())
    };
    session.score(tokens, &mut keep).unwrap();
    all
}

fn steps(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    for &t in tokens {
        session.decode(t).unwrap();
        all.extend_from_slice(session.logits());
    }
    all
}

fn prefill(session: &mut Session, tokens: &[u32]) {
    session
        .prefill(tokens, tokens.len(), &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
}

/// Logits of a case by batch and by steps, and what they are held to.
fn check(case: &Case, backend: BackendKind, kv: GgmlType) {
    let o = as_made(case, backend, kv);
    let model = case.load(&o);
    let tokens = case.tokens();
    let by_batch = batch(&mut Session::new(model.clone(), &o).unwrap(), &tokens);
    let by_steps = steps(&mut Session::new(model.clone(), &o).unwrap(), &tokens);
    let t = &case.entry["tolerance"];
    let who = format!("{} on {backend:?} with {} pool", case.name(), kv.name());
    if case.f32_weights() {
        let limit = if kv == GgmlType::F32 {
            &t["f32_kv"]
        } else {
            &t["f16_kv"]
        }["nmse"]
            .as_f64()
            .unwrap();
        let b = nmse(&by_batch, &case.floats("logits_batch"));
        let s = nmse(&by_steps, &case.floats("logits_step"));
        println!("{who}: batch {b:.1e} steps {s:.1e}");
        assert!(
            b <= limit && s <= limit,
            "{who}: batch {b:.1e}, steps {s:.1e}, limit {limit:.1e}"
        );
    } else {
        // Activations are rounded as ggml does on the fast backend and not at all on the reference, so either of the two
        // comparisons may be the close one; the looser of them still finds any real mistake.
        let exact = case.floats("logits_ref");
        let ggml = case.floats("logits_batch");
        let limit = t["nmse"].as_f64().unwrap();
        for (how, got) in [("batch", &by_batch), ("steps", &by_steps)] {
            let (e, g) = (nmse(got, &exact), nmse(got, &ggml));
            println!("{who}: {how} {e:.1e} against f64, {g:.1e} against ggml");
            assert!(
                e <= limit || g <= 5e-4,
                "{who}: {how} {e:.1e} (limit {limit:.1e}), {g:.1e} (limit 5e-4)"
            );
        }
    }
}

#[test]
fn trace_agrees_with_llama_cpp() {
    for case in cases() {
        check(&case, BackendKind::Trace, GgmlType::F32);
    }
}

#[test]
fn cpu_agrees_with_llama_cpp() {
    for case in cases() {
        check(&case, BackendKind::Cpu, GgmlType::F32);
        check(&case, BackendKind::Cpu, GgmlType::F16);
    }
}

#[test]
fn greedy_continuation_is_the_same() {
    for case in cases() {
        let o = as_made(&case, BackendKind::Cpu, GgmlType::F32);
        let mut session = Session::new(case.load(&o), &o).unwrap();
        prefill(&mut session, &case.tokens());
        let greedy = &case.entry["greedy"];
        // Where the two best are closer than rounding moves them, the paths may part.
        let tolerance = if case.f32_weights() { 1e-3 } else { 0.5 };
        let margins = greedy["top1_minus_top2"].as_array().unwrap();
        for (i, (want, margin)) in greedy["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .zip(margins)
            .enumerate()
        {
            let got = argmax(session.logits());
            if u64::from(got) != want.as_u64().unwrap() {
                assert!(
                    margin.as_f64().unwrap() < tolerance,
                    "{}: token {i} is {got}, not {want}",
                    case.name()
                );
                break;
            }
            session.decode(got).unwrap();
        }
    }
}

/// All logits of a run as bits, so that equality is equality.
fn bits(model: &Arc<Model>, o: &LoadOptions, tokens: &[u32]) -> Vec<u32> {
    let mut session = Session::new(model.clone(), o).unwrap();
    let (prompt, rest) = tokens.split_at(tokens.len() / 2);
    prefill(&mut session, prompt);
    let mut all = session.logits().to_vec();
    all.extend(steps(&mut session, rest));
    all.iter().map(|x| x.to_bits()).collect()
}

fn long_text(n: usize, n_vocab: usize) -> Vec<u32> {
    (0..n as u32)
        .map(|i| i.wrapping_mul(2_654_435_761).rotate_left(7) % n_vocab as u32)
        .collect()
}

/// One model for each way through the verbs.
fn each_arch() -> Vec<Case> {
    let wanted = [
        "llama-gqa-tied.gguf",
        "llama-moe.gguf",
        "llama-q-q4_k_m.gguf",
        "qwen2-gqa-tied.gguf",
        "qwen3-tied.gguf",
        "qwen3moe.gguf",
        "gpt-oss.gguf",
        "phi3.gguf",
        "phi3-longrope-partial.gguf",
        "glm4.gguf",
        "granite.gguf",
        "olmo2.gguf",
        "olmo3.gguf",
        "smollm3.gguf",
        "gemma2.gguf",
        "gemma3.gguf",
        "deepseek2-v3.gguf",
        "deepseek2-noqlora.gguf",
        "qwen35.gguf",
        "qwen3next.gguf",
        "qwen3next-legacy.gguf",
        "qwen3vlmoe.gguf",
        "glm4moe.gguf",
        "exaone4-window.gguf",
        "hunyuan-moe.gguf",
        "mistral3.gguf",
        "minimax-m2.gguf",
        "bailingmoe2.gguf",
        "granitemoe.gguf",
        "qwen2moe.gguf",
        "cohere2.gguf",
        "apertus.gguf",
        "afmoe.gguf",
        "lfm2.gguf",
        "lfm2moe.gguf",
        "nemotron_h.gguf",
        "nemotron_h_moe.gguf",
        "granitehybrid.gguf",
        "falcon-h1.gguf",
        "stablelm.gguf",
        "starcoder2.gguf",
        "deci.gguf",
        "smallthinker.gguf",
        "nemotron_h_moe-latent.gguf",
        "olmo.gguf",
        "falcon-40b.gguf",
        "gptneox.gguf",
        "llama4.gguf",
        "minicpm3.gguf",
        "bitnet.gguf",
        "grok-2.gguf",
        "plamo3.gguf",
        "arctic.gguf",
        "starcoder.gguf",
    ];
    let mut found: Vec<Case> = Vec::new();
    for case in cases() {
        if wanted.contains(&case.name()) && found.iter().all(|c| c.name() != case.name()) {
            found.push(case);
        }
    }
    assert_eq!(found.len(), wanted.len());
    found
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for case in each_arch() {
        let mut o = options(BackendKind::Cpu, GgmlType::F16);
        let model = case.load(&o);
        let text = long_text(70, model.hparams().n_vocab);
        o.n_threads = Some(1);
        let one = bits(&model, &o, &text);
        for n in [2, 3, 5] {
            o.n_threads = Some(n);
            assert!(
                bits(&model, &o, &text) == one,
                "{} with {n} threads",
                case.name()
            );
        }
    }
}

#[test]
fn a_pool_that_never_fills_gives_the_same_bits_under_every_policy() {
    for case in each_arch() {
        let mut o = options(BackendKind::Cpu, GgmlType::F16);
        let model = case.load(&o);
        let text = long_text(100, model.hparams().n_vocab);
        o.kv.policy = "full".to_owned();
        let full = bits(&model, &o, &text);
        for policy in POLICIES {
            for budget in [KvBudget::Default, KvBudget::Tokens(128)] {
                o.kv.policy = policy.name.to_owned();
                o.kv.budget = budget;
                assert!(
                    bits(&model, &o, &text) == full,
                    "{} under {}",
                    case.name(),
                    policy.name
                );
            }
        }
    }
}

#[test]
fn recycling_agrees_with_the_reference() {
    for case in each_arch().into_iter().filter(Case::f32_weights) {
        for policy in POLICIES.iter().filter(|p| !p.whole_context) {
            let mut o = options(BackendKind::Trace, GgmlType::F32);
            o.kv.policy = policy.name.to_owned();
            o.kv.budget = KvBudget::Tokens(96);
            let model = case.load(&o);
            let text = long_text(200, model.hparams().n_vocab);
            let run = |o: &LoadOptions| {
                let mut session = Session::new(model.clone(), o).unwrap();
                prefill(&mut session, &text[..20]);
                let logits = steps(&mut session, &text[20..]);
                let first = |il| {
                    session
                        .kv_pages(il)
                        .iter()
                        .map(|p| p.first_pos)
                        .collect::<Vec<_>>()
                };
                let held: Vec<Vec<u32>> = (0..session.n_tables()).map(first).collect();
                (logits, held, session.kv().recycled)
            };
            let (want, want_held, recycled) = run(&o);
            o.backend = BackendKind::Cpu;
            let (got, got_held, _) = run(&o);
            assert!(
                recycled > 0,
                "{} under {} recycled nothing",
                case.name(),
                policy.name
            );
            assert_eq!(got_held, want_held, "{} under {}", case.name(), policy.name);
            let error = nmse(&got, &want);
            assert!(
                error < 1e-9,
                "{} under {}: {error:.1e}",
                case.name(),
                policy.name
            );
        }
    }
}

/// Parts of a text are 8,192 tokens long in `llama4`, and as many positions make queries of layers that see all of it grow.
#[test]
fn a_text_of_two_parts() {
    let dir = lemma_tests::data().join("arch");
    let mut o = options(BackendKind::Cpu, GgmlType::F32);
    o.n_ctx = Some(8448);
    let model = Arc::new(Model::load(&dir.join("llama4.gguf"), &o).unwrap());
    let (n, n_vocab) = (8204, model.hparams().n_vocab);
    let text = long_text(n, n_vocab);
    let [by_batch, by_steps] =
        ["batch", "step"].map(|how| floats(&dir.join(format!("llama4-long.{how}.bin"))));
    // The reference has the tokens of the second part alone.
    let second = 8192;
    assert_eq!(by_batch.len(), (n - second) * n_vocab);
    let mut session = Session::new(model.clone(), &o).unwrap();
    let all = batch(&mut session, &text);
    let b = nmse(&all[second * n_vocab..], &by_batch);
    let mut session = Session::new(model, &o).unwrap();
    prefill(&mut session, &text[..second]);
    let s = nmse(&steps(&mut session, &text[second..]), &by_steps);
    println!("batch {b:.1e} steps {s:.1e}");
    assert!(b <= 1e-9 && s <= 1e-9, "batch {b:.1e}, steps {s:.1e}");
}

/// No option makes a context that is longer than the table of positions.
#[test]
fn positions_end_where_their_embeddings_do() {
    let path = lemma_tests::data().join("arch").join("starcoder.gguf");
    let mut o = options(BackendKind::Cpu, GgmlType::F16);
    o.kv.beyond_train = true;
    let model = Arc::new(Model::load(&path, &o).unwrap());
    let most = model.hparams().n_ctx_train;
    o.n_ctx = Some(most);
    assert!(Session::new(model.clone(), &o).is_ok());
    o.n_ctx = Some(most + 1);
    let said = Session::new(model, &o).err().unwrap().to_string();
    assert!(said.contains("300 at most"), "{said}");
}

#[test]
fn quantized_pools_stay_close() {
    let case = each_arch()
        .into_iter()
        .find(|c| c.name() == "llama-q-q4_k_m.gguf")
        .unwrap();
    let full = options(BackendKind::Cpu, GgmlType::F32);
    let model = case.load(&full);
    let run = |o: &LoadOptions| batch(&mut Session::new(model.clone(), o).unwrap(), &case.tokens());
    let want = run(&full);
    for ty in lemma_engine::model::KV_TYPES {
        // The models are random and amplify errors; a wrong layout gives about 1.
        let limit = if ty.type_size() as f64 / ty.block_size() as f64 >= 1.0 {
            4e-3
        } else {
            0.1
        };
        let error = nmse(&run(&options(BackendKind::Cpu, ty)), &want);
        println!("{}: {error:.1e}", ty.name());
        assert!(error < limit, "{}: {error:.1e}", ty.name());
    }
}
