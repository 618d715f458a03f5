//! Latent attention (`deepseek2`) where no file of llama.cpp's reaches: files of before, YaRN, and pages that are stored anew. Files are
//! made here, from the tiny ones that the other tests read.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use lemma_engine::error::Error;
use lemma_engine::gguf::write::Builder;
use lemma_engine::gguf::{GgmlType, GgufFile};
use lemma_engine::kv::Demoted;
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
use lemma_engine::session::Session;
use lemma_tests::{copy_key, data, floats, json, nmse};

const MODELS: [&str; 2] = ["deepseek2-v3", "deepseek2-noqlora"];
const BACKENDS: [BackendKind; 2] = [BackendKind::Trace, BackendKind::Cpu];

/// A file whose keys and tensors can be changed: tensors are name, row length first, and f32.
struct Draft {
    file: GgufFile,
    left_out: Vec<&'static str>,
    keys: Builder,
    tensors: Vec<(String, Vec<u64>, Vec<f32>)>,
    /// Whether matrices are, in types that their rows allow.
    quantized: bool,
}

impl Draft {
    fn of(name: &str) -> Self {
        let file = GgufFile::open(&data().join("arch").join(format!("{name}.gguf"))).unwrap();
        let tensor = |t: lemma_engine::gguf::TensorView<'_>| {
            let mut x = vec![0.0; t.n_elements() as usize];
            (t.ty.traits().dequantize_row)(t.data, &mut x);
            (t.name.to_string(), t.shape().to_vec(), x)
        };
        let tensors = file.tensors().map(tensor).collect();
        Self {
            file,
            left_out: Vec::new(),
            keys: Builder::new(),
            tensors,
            quantized: false,
        }
    }

    fn without(mut self, key: &'static str) -> Self {
        self.left_out.push(key);
        self
    }

    fn with(mut self, key: &'static str, add: impl Fn(&mut Builder, &str)) -> Self {
        let key_of_arch = format!("deepseek2.{key}");
        add(&mut self.keys, &key_of_arch);
        self.without(key)
    }

    fn number(self, key: &'static str, n: u32) -> Self {
        self.with(key, |b, k| {
            b.u32(k, n);
        })
    }

    fn model(self, o: &LoadOptions) -> Arc<Model> {
        Arc::new(self.load(o).unwrap())
    }

    fn load(mut self, o: &LoadOptions) -> Result<Model, Error> {
        let b = &mut self.keys;
        for (key, value) in self.file.meta().iter() {
            let own = key.strip_prefix("deepseek2.");
            if own.is_some_and(|k| self.left_out.contains(&k)) {
                continue;
            }
            copy_key(b, key, value);
        }
        let mut b = self.keys;
        let ty = |shape: &[u64]| match shape {
            [n, _, ..] if self.quantized && n % 256 == 0 => GgmlType::Q4_K,
            [n, _, ..] if self.quantized && n % 32 == 0 => GgmlType::Q8_0,
            _ => GgmlType::F32,
        };
        for (name, shape, _) in &self.tensors {
            b.tensor(name, ty(shape), shape);
        }
        let mut body = b.begin(Vec::new()).unwrap();
        for (_, shape, x) in &self.tensors {
            let (ty, n) = (ty(shape), shape[0] as usize);
            let quantize_row = ty.traits().quantize_row.unwrap();
            let mut row = vec![0; ty.row_size(n).unwrap()];
            for x in x.chunks_exact(n) {
                quantize_row(x, &mut row);
                body.write(&row).unwrap();
            }
        }
        let bytes = body.finish().unwrap().leak();
        Model::load_static(bytes, "made here", o)
    }
}

fn options(backend: BackendKind, spec: &str) -> LoadOptions {
    let mut o = LoadOptions {
        backend,
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    o.kv.set("ctk", "f32").unwrap();
    o.kv.apply(spec).unwrap();
    o
}

fn score(model: Arc<Model>, o: &LoadOptions, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    let mut keep = |_: usize, logits: &[f32]| {
        all.extend_from_slice(logits);
        Ok(())
    };
    let mut session = Session::new(model, o).unwrap();
    session.score(tokens, &mut keep).unwrap();
    all
}

/// Tokens and logits of llama.cpp.
fn golden(name: &str) -> (Vec<u32>, Vec<f32>) {
    let dir = data().join("arch");
    let manifest = json(&dir.join("manifest.json"));
    let mut entries = manifest["entries"].as_array().unwrap().iter();
    let entry = entries.find(|e| e["model"] == format!("{name}.gguf"));
    let entry = entry.unwrap();
    let tokens = entry["tokens"].as_array().unwrap().iter();
    let logits = dir.join(entry["logits_batch"]["file"].as_str().unwrap());
    let tokens = tokens.map(|t| t.as_u64().unwrap() as u32).collect();
    (tokens, floats(&logits))
}

/// Files of before have the matrices of keys and values in one, and keys of heads in place of latent ones.
#[test]
fn files_of_before_give_the_same() {
    for name in MODELS {
        let (tokens, want) = golden(name);
        for backend in BACKENDS {
            let o = options(backend, "full");
            let mut draft = Draft::of(name);
            let take = |all: &mut Vec<(String, Vec<u64>, Vec<f32>)>, name: &str| {
                let at = all.iter().position(|t| t.0 == name).unwrap();
                all.remove(at)
            };
            let mut widths = (0, 0, 0);
            for il in 0..2 {
                let [k, v] = ["k", "v"].map(|part| {
                    take(
                        &mut draft.tensors,
                        &format!("blk.{il}.attn_{part}_b.weight"),
                    )
                });
                let [n_nope, kv_lora, n_head] = [0, 1, 2].map(|i| k.1[i] as usize);
                let n_v = v.1[1] as usize;
                let mut both = Vec::new();
                for h in 0..n_head {
                    let k = &k.2[h * kv_lora * n_nope..];
                    for i in 0..n_nope {
                        both.extend((0..kv_lora).map(|j| k[j * n_nope + i]));
                    }
                    both.extend(&v.2[h * n_v * kv_lora..][..n_v * kv_lora]);
                }
                let shape = vec![kv_lora as u64, (n_head * (n_nope + n_v)) as u64];
                let name = format!("blk.{il}.attn_kv_b.weight");
                draft.tensors.push((name, shape, both));
                widths = (n_head, n_nope, n_v);
            }
            let (n_head, n_nope, n_v) = widths;
            let n_rot = draft.file.meta().opt_u32("deepseek2.rope.dimension_count");
            let n_rot = n_rot.unwrap().unwrap();
            let model = draft
                .without("attention.key_length_mla")
                .without("attention.value_length_mla")
                .number("attention.head_count_kv", n_head as u32)
                .number("attention.key_length", n_nope as u32 + n_rot)
                .number("attention.value_length", n_v as u32)
                .model(&o);
            let error = nmse(&score(model, &o, &tokens), &want);
            assert!(error < 1e-9, "{name} on {backend:?}: {error:.1e}");
        }
    }
}

/// What DeepSeek's own code makes of `mscale_all_dim` (1 in V3, 0.707 in V2-Lite) and `mscale`, which is the same: scores have the square of
/// `0.1 mscale_all_dim ln(factor) + 1` as a factor, and the rotation has none. Files state a tenth of `mscale_all_dim`.
#[test]
fn yarn_makes_scores_grow() {
    let plain = 1.0 / 24.0f64.sqrt();
    for (stated, factor, want, magnitude) in [
        (
            None,
            40.0,
            1.0 + 0.1 * 40.0f64.ln(),
            1.0 + 0.1 * 40.0f64.ln(),
        ),
        (Some(0.1), 40.0, 0.1 * 40.0f64.ln() + 1.0, 1.0),
        (Some(0.0707), 40.0, 0.0707 * 40.0f64.ln() + 1.0, 1.0),
        (Some(0.1), 1.0, 1.0, 1.0),
    ] {
        let mut logits = Vec::new();
        let (tokens, golden) = golden("deepseek2-v3");
        for backend in BACKENDS {
            let o = options(backend, "full");
            let mut draft = Draft::of("deepseek2-v3")
                .with("rope.scaling.type", |b, k| {
                    b.str(k, "yarn");
                })
                .with("rope.scaling.factor", |b, k| {
                    b.f32(k, factor);
                })
                .number("rope.scaling.original_context_length", 64);
            if let Some(stated) = stated {
                draft = draft.with("rope.scaling.yarn_log_multiplier", |b, k| {
                    b.f32(k, stated);
                });
            }
            let model = draft.model(&o);
            let hp = model.hparams();
            let scale = want * want * plain;
            assert!((f64::from(hp.attn_scale) / scale - 1.0).abs() < 1e-6);
            assert!((f64::from(hp.ropes[0].magnitude) / magnitude - 1.0).abs() < 1e-6);
            logits.push(score(model, &o, &tokens));
        }
        let error = nmse(&logits[1], &logits[0]);
        assert!(error < 1e-9, "{stated:?} {factor}: {error:.1e}");
        assert_eq!(nmse(&logits[0], &golden) < 1e-9, factor == 1.0);
    }
}

fn random(seed: &mut u32, n: u64, size: f32) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(|_| size * next()).collect()
}

/// A model whose latent keys are two blocks of 32, of random weights.
fn wide(o: &LoadOptions) -> Arc<Model> {
    let mut draft = Draft::of("deepseek2-noqlora");
    let (n_head, n_rot, kv_lora, n_nope) = (3, 12, 52, 12);
    let mut seed = 1;
    let mut random = |n| random(&mut seed, n, 0.3);
    for (name, shape, x) in &mut draft.tensors {
        let part = name.rsplit('.').nth(1).unwrap();
        let new = match part {
            "attn_kv_a_mqa" => vec![shape[0], kv_lora + n_rot],
            "attn_kv_a_norm" => vec![kv_lora],
            "attn_k_b" => vec![n_nope, kv_lora, n_head],
            "attn_v_b" => vec![kv_lora, shape[1], n_head],
            _ => continue,
        };
        *x = random(new.iter().product());
        if part == "attn_kv_a_norm" {
            x.iter_mut().for_each(|x| *x += 1.0);
        }
        *shape = new;
    }
    draft
        .number("attention.kv_lora_rank", kv_lora as u32)
        .model(o)
}

#[test]
fn pages_of_latent_keys_move_as_in_the_reference() {
    for spec in [
        "raas:demote=none",
        "raas:demote=q8_0",
        "raas:demote=q8_0+k4/v2",
        "window:demote=q4_0",
        "lag:demote=q8_0,guard=0.25,redundancy=0.6",
        "quest",
    ] {
        let runs = BACKENDS.map(|backend| {
            let mut o = options(backend, spec);
            o.kv.budget = KvBudget::Tokens(96);
            let model = wide(&o);
            assert_eq!(model.hparams().head_dim, 64);
            // Keys in f32 and nothing else.
            assert_eq!(model.kv_row_bytes(&o.kv).unwrap(), 64 * 4);
            let n_vocab = model.hparams().n_vocab;
            let text: Vec<u32> = (0..260u32)
                .map(|i| i.wrapping_mul(2_654_435_761).rotate_left(7) % n_vocab as u32)
                .collect();
            let mut s = Session::new(model, &o).unwrap();
            let demoted = Arc::new(Mutex::new(Vec::new()));
            let all = demoted.clone();
            s.on_demote(Some(Box::new(move |pages: &[Demoted], _: &[u32]| {
                let key = |d: &Demoted| (d.il, d.page.first_pos, d.tier);
                all.lock().unwrap().extend(pages.iter().map(key));
            })));
            let prompt = &text[..20];
            s.prefill(prompt, prompt.len(), &mut |_, _| ControlFlow::Continue(()))
                .unwrap();
            let mut logits = Vec::new();
            for &t in &text[20..] {
                s.decode(t).unwrap();
                logits.extend_from_slice(s.logits());
            }
            let demoted = demoted.lock().unwrap().clone();
            (demoted, s.kv().recycled, logits)
        });
        let [want, got] = runs;
        assert_eq!(got.0, want.0, "{spec}");
        assert_eq!(
            (got.1, got.0.is_empty()),
            (want.1, !spec.contains("demote=q")),
            "{spec}"
        );
        // What is rounded to few bits may be rounded the other way; for keys of four bits queries have eight.
        let limit = match want.0.is_empty() {
            true => 1e-9,
            false if spec.contains("q4") => 5e-4,
            false => 1e-4,
        };
        let error = nmse(&got.2, &want.2);
        assert!(error < limit, "{spec}: {error:.1e}");
    }
}

#[test]
fn routing_that_nobody_can_follow_is_refused() {
    for (key, n) in [
        ("expert_gating_func", 3),
        ("expert_group_count", 3),
        ("expert_group_count", 128),
        ("expert_group_used_count", 1),
        ("expert_group_used_count", 5),
        ("attention.kv_lora_rank", 31),
    ] {
        let draft = Draft::of("deepseek2-v3").number(key, n);
        let said = match draft.load(&LoadOptions::default()) {
            Ok(_) => panic!("{key} {n} was taken"),
            Err(e) => e.to_string(),
        };
        assert!(
            said.contains(key) || said.contains("tensor"),
            "{key} {n}: {said}"
        );
    }
    let mut draft = Draft::of("deepseek2-v3");
    draft.tensors.retain(|t| t.0 != "blk.1.attn_v_b.weight");
    let said = draft.load(&LoadOptions::default()).map(|_| ()).unwrap_err();
    assert!(said.to_string().contains("blk.1.attn_v_b.weight"), "{said}");
}

/// Attention as wide as in DeepSeek-V2-Lite, weights in types that such files have. On the CPU activations have eight bits, in the reference
/// they are as they are.
#[test]
fn published_widths_with_quantized_weights() {
    let (n_head, n_nope, n_rot, n_v, kv_lora) = (16, 128, 64, 128, 512);
    let make = |o: &LoadOptions| {
        let mut draft = Draft::of("deepseek2-noqlora");
        draft.quantized = true;
        let mut seed = 7;
        // 48 wide are a residual stream and 32 an expert, which become 256 each.
        let wider = |n: &u64| {
            if matches!(*n, 32 | 48 | 64 | 96) {
                256
            } else {
                *n
            }
        };
        for (name, shape, x) in &mut draft.tensors {
            let part = name.rsplit('.').nth(1).unwrap();
            let n_embd = 256;
            *shape = match part {
                "attn_q" => vec![n_embd, n_head * (n_nope + n_rot)],
                "attn_kv_a_mqa" => vec![n_embd, kv_lora + n_rot],
                "attn_kv_a_norm" => vec![kv_lora],
                "attn_k_b" => vec![n_nope, kv_lora, n_head],
                "attn_v_b" => vec![kv_lora, n_v, n_head],
                "attn_output" => vec![n_head * n_v, n_embd],
                "ffn_gate_shexp" | "ffn_up_shexp" => vec![n_embd, 512],
                "ffn_down_shexp" => vec![512, n_embd],
                _ => shape.iter().map(wider).collect(),
            };
            let norm = shape.len() == 1;
            // Products of unit size.
            let size = if norm {
                0.1
            } else {
                (3.0 / shape[0] as f32).sqrt()
            };
            *x = random(&mut seed, shape.iter().product(), size);
            x.iter_mut()
                .for_each(|x| *x += if norm { 1.0 } else { 0.0 });
        }
        draft
            .number("embedding_length", 256)
            .number("feed_forward_length", 256)
            .number("expert_feed_forward_length", 256)
            .number("attention.head_count", n_head as u32)
            .number("attention.key_length_mla", (n_nope + n_rot) as u32)
            .number("attention.value_length_mla", n_v as u32)
            .number("attention.kv_lora_rank", kv_lora as u32)
            .number("rope.dimension_count", n_rot as u32)
            .model(o)
    };
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 250).collect();
    let [want, got] = BACKENDS.map(|backend| {
        let o = options(backend, "full");
        score(make(&o), &o, &tokens)
    });
    let error = nmse(&got, &want);
    assert!(error < 5e-3, "{error:.1e}");
    // A token alone gets what it gets in a batch.
    let o = options(BackendKind::Cpu, "full");
    let mut session = Session::new(make(&o), &o).unwrap();
    for (i, &t) in tokens.iter().enumerate() {
        session.decode(t).unwrap();
        let n = session.logits().len();
        let error = nmse(session.logits(), &got[i * n..][..n]);
        assert!(error < 1e-9, "token {i}: {error:.1e}");
    }
}
