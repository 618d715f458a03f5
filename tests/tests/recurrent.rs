//! Models with recurrent states (delta nets, state spaces, short convolutions): batches, sequences that go back, pools that recycle, and shapes that no file of
//! llama.cpp's covers, over files that are made here.

#![allow(
    clippy::print_stdout,
    reason = "figures for whoever runs it with --nocapture"
)]

use std::ops::ControlFlow;
use std::sync::Arc;

use lemma_engine::conversation::reuse;
use lemma_engine::error::Error;
use lemma_engine::gguf::write::Builder;
use lemma_engine::gguf::{GgmlType, GgufFile};
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
use lemma_engine::session::{Rewind, Session};
use lemma_tests::{copy_key, data, nmse};

const BACKENDS: [BackendKind; 2] = [BackendKind::Cpu, BackendKind::Trace];

fn options(backend: BackendKind, spec: &str) -> LoadOptions {
    let mut o = LoadOptions {
        backend,
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    (o.kv.ty_k, o.kv.ty_v) = (GgmlType::F32, GgmlType::F32);
    o.kv.apply(spec).unwrap();
    o
}

/// One model for each kind of state.
const KINDS: [&str; 4] = ["qwen35", "lfm2", "nemotron_h", "falcon-h1"];

fn golden(kind: &str, o: &LoadOptions) -> Arc<Model> {
    Arc::new(Model::load(&data().join(format!("arch/{kind}.gguf")), o).unwrap())
}

fn text(n: usize, seed: u32) -> Vec<u32> {
    let word = |i: u32| {
        (i + 1)
            .wrapping_mul(2_654_435_761 + 2 * seed)
            .rotate_left(9)
            % 280
    };
    (0..n as u32).map(word).collect()
}

fn prefill(s: &mut Session, tokens: &[u32]) {
    s.prefill(tokens, tokens.len(), &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Logits behind a text and of some steps after it.
fn ends(s: &mut Session, rest: &[u32]) -> Vec<u32> {
    prefill(s, rest);
    let mut all = bits(s.logits());
    for t in [3, 14, 15] {
        s.decode(t).unwrap();
        all.extend(bits(s.logits()));
    }
    all
}

#[test]
fn any_batches_give_the_same_bits() {
    for kind in KINDS {
        any_batches(kind);
    }
}

fn any_batches(kind: &str) {
    let tokens = text(61, 1);
    let mut o = options(BackendKind::Cpu, "full");
    let model = golden(kind, &o);
    let mut want = None;
    for n in [1, 2, 3, 16, 512] {
        o.n_ubatch = n;
        let mut all = Vec::new();
        let mut session = Session::new(model.clone(), &o).unwrap();
        let mut keep = |_: usize, logits: &[f32]| {
            all.extend(bits(logits));
            Ok(())
        };
        session.score(&tokens, &mut keep).unwrap();
        assert!(
            *want.get_or_insert(all.clone()) == all,
            "{kind}: batches of {n}"
        );
        // So does a sequence that begins again.
        session.clear();
        all.clear();
        for &t in &tokens {
            session.decode(t).unwrap();
            all.extend(bits(session.logits()));
        }
        assert!(want == Some(all), "{kind}: steps after batches of {n}");
    }
}

#[test]
fn layers_with_a_state_have_no_pages() {
    let o = options(BackendKind::Cpu, "raas");
    let model = golden("qwen35", &o);
    let session = Session::new(model, &o).unwrap();
    assert_eq!(
        (session.model().hparams().n_layer, session.n_tables()),
        (4, 1)
    );
    // The context of 512 tokens, two heads of 24 numbers, keys and values.
    assert_eq!(session.plan().kv, 512 * 2 * 24 * 2 * 4);
    // Three layers; the last inputs of three tokens and four matrices; and once more for going back.
    let layer = 3 * 256 + 4 * 32 * 32;
    assert_eq!(session.plan().state, 2 * 3 * layer * 4);
}

/// Layers that are feed-forward blocks keep nothing, and those that look back in two ways keep both.
#[test]
fn layers_keep_what_they_look_back_to() {
    let o = options(BackendKind::Cpu, "raas");
    let width = |n_inner: u64, n_group: u64, d_state: u64| n_inner + 2 * n_group * d_state;
    for (kind, n_layer, n_pages, state) in [
        ("lfm2", 4, 2, 2 * (3 * 32)),
        ("nemotron_h", 5, 1, 2 * (2 * width(96, 3, 8) + 96 * 8)),
        ("granitehybrid", 3, 1, 2 * (3 * width(48, 1, 16) + 48 * 16)),
        ("falcon-h1", 2, 2, 2 * (width(48, 1, 8) + 48 * 8)),
    ] {
        let session = Session::new(golden(kind, &o), &o).unwrap();
        let hp = session.model().hparams();
        assert_eq!(
            (hp.n_layer, session.n_tables()),
            (n_layer, n_pages),
            "{kind}"
        );
        // Keys and values of the context of 512 tokens.
        let row = 2 * hp.n_head_kv * hp.head_dim * 4;
        assert_eq!(session.plan().kv, (512 * n_pages * row) as u64, "{kind}");
        // Once more for going back.
        assert_eq!(session.plan().state, 2 * 4 * state, "{kind}");
    }
}

#[test]
fn sequences_that_go_back_are_as_if_they_had_not_been_ahead() {
    let said = text(50, 2);
    for (kind, backend) in KINDS.iter().flat_map(|k| BACKENDS.map(|b| (k, b))) {
        let o = options(backend, "raas");
        let model = golden(kind, &o);
        let mut one = Session::new(model.clone(), &o).unwrap();
        let mut other = Session::new(model, &o).unwrap();
        // Where the new text parts from the old, and how much of it is reused: a state is kept 8 tokens before the end of a prompt.
        for (common, reused) in [
            (50, 42),
            (45, 42),
            (42, 42),
            (41, 0),
            (3, 0),
            (0, 0),
            (53, 53),
        ] {
            one.clear();
            ends(&mut one, &said);
            let mut next = said.clone();
            next.extend([3, 14, 15]);
            next.truncate(common);
            next.extend(text(12, 3));
            let kept = reuse(&mut one, &next);
            assert_eq!(
                (kept, one.pos() as usize),
                (reused, reused),
                "{backend:?} {common}"
            );
            assert_eq!(one.tokens(), &next[..kept]);
            let got = ends(&mut one, &next[kept..]);
            other.clear();
            assert!(
                got == ends(&mut other, &next),
                "{kind} on {backend:?}, common {common}"
            );
            // The same prompt again, as for another reply.
            let kept = reuse(&mut one, &next);
            assert_eq!(kept, next.len() - 8, "{backend:?}");
            assert!(
                got == ends(&mut one, &next[kept..]),
                "{kind} on {backend:?}, once more"
            );
        }
    }
}

#[test]
fn short_prompts_keep_the_state_before_them() {
    let o = options(BackendKind::Cpu, "raas");
    let mut s = Session::new(golden("qwen35", &o), &o).unwrap();
    prefill(&mut s, &text(5, 1));
    assert_eq!(s.rewind(4), Rewind::Refill);
    assert_eq!(s.pos(), 0);
    prefill(&mut s, &text(5, 1));
    prefill(&mut s, &text(4, 2));
    assert_eq!(s.rewind(9), Rewind::Done);
    assert_eq!(s.rewind(7), Rewind::Back(5));
    assert_eq!(s.rewind(5), Rewind::Done);
    assert_eq!(s.rewind(4), Rewind::Refill);
}

/// What was recycled is gone, and the state that was kept does not help.
#[test]
fn a_page_that_was_recycled_means_reading_again() {
    for spec in [
        "raas:demote=none",
        "window",
        "h2o",
        "quest",
        "raas:scope=head,page=8,demote=none",
    ] {
        let mut o = options(BackendKind::Cpu, spec);
        o.kv.budget = KvBudget::Tokens(96);
        let mut s = Session::new(golden("qwen35", &o), &o).unwrap();
        let said = text(40, 4);
        prefill(&mut s, &said);
        for t in text(100, 5) {
            s.decode(t).unwrap();
        }
        let recycled = s.kv().recycled > 0;
        assert!(recycled || spec == "quest", "{spec}");
        let mut next = said[..36].to_vec();
        next.extend(text(9, 6));
        let kept = reuse(&mut s, &next);
        assert_eq!(kept, if recycled { 0 } else { 32 }, "{spec}");
        let got = ends(&mut s, &next[kept..]);
        let mut fresh = Session::new(golden("qwen35", &o), &o).unwrap();
        assert!(got == ends(&mut fresh, &next), "{spec}");
    }
}

/// A model that is made here.
#[derive(Clone)]
struct Draft {
    arch: &'static str,
    /// Key and value heads of the delta nets, width of each.
    heads: (usize, usize, usize),
    d_conv: usize,
    /// Layers, and which of them are recurrent; said by a list, if that is no regular pattern.
    recurrent: Vec<bool>,
    interval: Option<u32>,
    /// Layers behind those that guess tokens.
    n_guess: usize,
    sections: [i32; 4],
    /// Type of the matrices that are wide enough.
    ty: GgmlType,
}

const N_EMBD: usize = 64;
const N_FF: usize = 96;
const HEAD_DIM: usize = 32;
const N_EXPERT: usize = 4;

impl Draft {
    fn new() -> Self {
        Self {
            arch: "qwen35",
            heads: (1, 3, 32),
            d_conv: 3,
            recurrent: vec![true, false, true, false],
            interval: Some(2),
            n_guess: 0,
            sections: [3, 3, 2, 0],
            ty: GgmlType::F32,
        }
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (n_k, n_v, dim) = self.heads;
        let (n_qkv, values) = ((2 * n_k + n_v) * dim, n_v * dim);
        let mut all = vec![
            ("token_embd.weight".to_owned(), vec![N_EMBD, 284]),
            ("output_norm.weight".to_owned(), vec![N_EMBD]),
        ];
        for (il, recurrent) in self.recurrent.iter().enumerate() {
            let mut add = |name: &str, shape: &[usize]| {
                all.push((format!("blk.{il}.{name}"), shape.to_vec()));
            };
            add("attn_norm.weight", &[N_EMBD]);
            add("post_attention_norm.weight", &[N_EMBD]);
            if *recurrent {
                add("attn_qkv.weight", &[N_EMBD, n_qkv]);
                add("attn_gate.weight", &[N_EMBD, values]);
                add("ssm_conv1d.weight", &[self.d_conv, n_qkv]);
                add("ssm_dt.bias", &[n_v]);
                add("ssm_a", &[n_v]);
                add("ssm_beta.weight", &[N_EMBD, n_v]);
                add("ssm_alpha.weight", &[N_EMBD, n_v]);
                add("ssm_norm.weight", &[dim]);
                add("ssm_out.weight", &[values, N_EMBD]);
            } else {
                add("attn_q.weight", &[N_EMBD, 2 * 2 * HEAD_DIM]);
                add("attn_k.weight", &[N_EMBD, HEAD_DIM]);
                add("attn_v.weight", &[N_EMBD, HEAD_DIM]);
                add("attn_q_norm.weight", &[HEAD_DIM]);
                add("attn_k_norm.weight", &[HEAD_DIM]);
                add("attn_output.weight", &[2 * HEAD_DIM, N_EMBD]);
            }
            if self.arch == "qwen35moe" {
                add("ffn_gate_inp.weight", &[N_EMBD, N_EXPERT]);
                add("ffn_gate_exps.weight", &[N_EMBD, 32, N_EXPERT]);
                add("ffn_up_exps.weight", &[N_EMBD, 32, N_EXPERT]);
                add("ffn_down_exps.weight", &[32, N_EMBD, N_EXPERT]);
                add("ffn_gate_inp_shexp.weight", &[N_EMBD]);
                add("ffn_gate_shexp.weight", &[N_EMBD, N_FF]);
                add("ffn_up_shexp.weight", &[N_EMBD, N_FF]);
                add("ffn_down_shexp.weight", &[N_FF, N_EMBD]);
            } else {
                add("ffn_gate.weight", &[N_EMBD, N_FF]);
                add("ffn_up.weight", &[N_EMBD, N_FF]);
                add("ffn_down.weight", &[N_FF, N_EMBD]);
            }
        }
        all
    }

    /// The file; tensors that `leave_out` says are missing.
    fn write(&self, leave_out: &str) -> &'static [u8] {
        let file = GgufFile::open(&data().join("arch/qwen35.gguf")).unwrap();
        let mut b = Builder::new();
        for (key, value) in file.meta().iter() {
            if key.starts_with("tokenizer.") {
                copy_key(&mut b, key, value);
            }
        }
        let (n_k, n_v, dim) = self.heads;
        b.str("general.architecture", self.arch);
        let key = |name: &str| format!("{}.{name}", self.arch);
        let moe = self.arch == "qwen35moe";
        let mut numbers = vec![
            ("context_length", 512),
            ("embedding_length", N_EMBD),
            ("block_count", self.recurrent.len() + self.n_guess),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("attention.key_length", HEAD_DIM),
            ("attention.value_length", HEAD_DIM),
            ("rope.dimension_count", 16),
            ("ssm.conv_kernel", self.d_conv),
            ("ssm.state_size", dim),
            ("ssm.group_count", n_k),
            ("ssm.time_step_rank", n_v),
            ("ssm.inner_size", n_v * dim),
        ];
        if moe {
            numbers.extend([
                ("expert_count", N_EXPERT),
                ("expert_used_count", 2),
                ("expert_feed_forward_length", 32),
                ("expert_shared_feed_forward_length", N_FF),
            ]);
        } else {
            numbers.push(("feed_forward_length", N_FF));
        }
        if self.n_guess > 0 {
            numbers.push(("nextn_predict_layers", self.n_guess));
        }
        for (name, n) in numbers {
            b.u32(&key(name), n as u32);
        }
        b.f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
            .f32(&key("rope.freq_base"), 100.0)
            .i32s(&key("rope.dimension_sections"), self.sections.into_iter());
        match self.interval {
            Some(n) => b.u32(&key("full_attention_interval"), n),
            None => {
                let guess = vec![0; self.n_guess];
                let all = self.recurrent.iter().map(|r| i32::from(*r)).chain(guess);
                let all: Vec<i32> = all.collect();
                b.i32s(&key("attention.recurrent_layers"), all.into_iter())
            }
        };
        let mut body = Vec::new();
        for (i, (name, shape)) in self.tensors().iter().enumerate() {
            if !leave_out.is_empty() && name.contains(leave_out) {
                continue;
            }
            let matrix = shape.len() > 1 && !name.contains("conv1d");
            let fits = shape[0].is_multiple_of(self.ty.block_size());
            let ty = if matrix && fits {
                self.ty
            } else {
                GgmlType::F32
            };
            let shape: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
            b.tensor(name, ty, &shape);
            let n: u64 = shape.iter().product();
            let scale = if matrix {
                (shape[0] as f32).sqrt().recip()
            } else {
                0.7
            };
            let x = (0..n as u32).map(|j| {
                let hash =
                    (j + 1).wrapping_mul(2_654_435_761) ^ (i as u32 + 7).wrapping_mul(0x9E37_79B9);
                let hash = hash
                    .wrapping_mul(0x85EB_CA6B)
                    .rotate_right(13)
                    .wrapping_mul(0xC2B2_AE35);
                let x = 1.7 * scale * (hash as f32 / 2f32.powi(31) - 1.0);
                match name.as_str() {
                    n if n.ends_with("norm.weight") => 1.0 + x / 2.0,
                    n if n.ends_with("ssm_a") => -x.abs() - 0.05,
                    _ => x,
                }
            });
            let x: Vec<f32> = x.collect();
            let quantize = ty.traits().quantize_row.unwrap();
            let mut row = vec![0; ty.row_size(shape[0] as usize).unwrap()];
            for x in x.chunks_exact(shape[0] as usize) {
                quantize(x, &mut row);
                body.extend_from_slice(&row);
            }
        }
        let mut file = b.begin(Vec::new()).unwrap();
        file.write(&body).unwrap();
        file.finish().unwrap().leak()
    }

    fn load(&self, o: &LoadOptions) -> Result<Arc<Model>, Error> {
        Model::load_static(self.write(""), "made.gguf", o).map(Arc::new)
    }
}

/// Logits of a text, some of it in a batch and some in steps.
fn logits(model: &Arc<Model>, o: &LoadOptions) -> Vec<f32> {
    let mut session = Session::new(model.clone(), o).unwrap();
    let tokens = text(24, 7);
    let mut all = Vec::new();
    let mut keep = |_: usize, logits: &[f32]| {
        all.extend_from_slice(logits);
        Ok(())
    };
    session.score(&tokens[..18], &mut keep).unwrap();
    for &t in &tokens[18..] {
        session.decode(t).unwrap();
        all.extend_from_slice(session.logits());
    }
    all
}

fn both(d: &Draft) -> (Vec<f32>, Vec<f32>) {
    let [got, want] = BACKENDS.map(|backend| {
        let o = options(backend, "full");
        logits(&d.load(&o).unwrap(), &o)
    });
    (got, want)
}

#[test]
fn other_shapes_meet_the_reference() {
    let plain = Draft::new();
    let drafts = [
        ("other widths", plain.clone()),
        (
            "experts",
            Draft {
                arch: "qwen35moe",
                heads: (2, 4, 16),
                ..plain.clone()
            },
        ),
        (
            "a list of layers, and one that guesses",
            Draft {
                interval: None,
                recurrent: vec![false, true, true],
                n_guess: 1,
                ..plain.clone()
            },
        ),
        (
            "all layers attend",
            Draft {
                interval: Some(1),
                recurrent: vec![false; 2],
                ..plain.clone()
            },
        ),
    ];
    for (what, d) in drafts {
        let (got, want) = both(&d);
        let error = nmse(&got, &want);
        println!("{what}: {error:.1e}");
        assert!(error < 1e-10, "{what}: {error:.1e}");
        let differs = want.chunks_exact(284).any(|l| l[0] != want[0]);
        assert!(differs && want.iter().all(|x| x.is_finite()), "{what}");
    }
}

#[test]
fn quantized_matrices_stay_close() {
    for arch in ["qwen35", "qwen35moe"] {
        let plain = Draft {
            arch,
            ..Draft::new()
        };
        let exact = both(&plain).1;
        for ty in [
            GgmlType::F16,
            GgmlType::BF16,
            GgmlType::Q8_0,
            GgmlType::Q4_0,
        ] {
            let (got, want) = both(&Draft {
                ty,
                ..plain.clone()
            });
            let (fast, types) = (nmse(&got, &want), nmse(&want, &exact));
            println!("{arch} as {}: {fast:.1e}, the type {types:.1e}", ty.name());
            // The fast backend rounds activations, which these models amplify (another expert may be chosen) as they do the rounding of
            // weights. Rows from elsewhere give about 1.
            assert!(
                fast < (2.0 * types).min(0.1),
                "{arch} as {}: {fast:.1e}, the type {types:.1e}",
                ty.name()
            );
        }
    }
}

/// Pairs that no coordinate of a text rotates stay as they are: with sections of the first three alone nothing else changes.
#[test]
fn sections_say_which_pairs_rotate() {
    let with = |sections| {
        both(&Draft {
            sections,
            ..Draft::new()
        })
        .1
    };
    let plain = with([3, 3, 2, 0]);
    // Eight pairs take turns of three; all are covered.
    assert!(plain == with([8, 8, 8, 0]));
    for sections in [[4, 2, 2, 0], [3, 3, 1, 1], [0, 0, 0, 8]] {
        assert!(nmse(&with(sections), &plain) > 1e-6, "{sections:?}");
    }
}

#[test]
fn mistakes_are_named() {
    let o = options(BackendKind::Cpu, "full");
    let refused = |d: &Draft, leave_out: &str, names: &str| {
        let said = match Model::load_static(d.write(leave_out), "made.gguf", &o) {
            Ok(_) => panic!("{names} was not missed"),
            Err(e) => e.to_string(),
        };
        assert!(said.contains(names) && !said.contains('\n'), "{said}");
    };
    let plain = Draft::new();
    for tensor in [
        "blk.2.ssm_a",
        "blk.0.ssm_dt.bias",
        "blk.2.ssm_conv1d.weight",
        "blk.0.attn_gate.weight",
        "blk.1.attn_q_norm.weight",
    ] {
        refused(&plain, tensor, tensor);
    }
    let moe = Draft {
        arch: "qwen35moe",
        ..plain.clone()
    };
    refused(
        &moe,
        "blk.1.ffn_gate_inp_shexp",
        "blk.1.ffn_gate_inp_shexp.weight",
    );
    let with = |change: &dyn Fn(&mut Draft), names: &str| {
        let mut d = plain.clone();
        change(&mut d);
        refused(&d, "", names);
    };
    with(&|d| d.d_conv = 1, "qwen35.ssm.conv_kernel");
    with(&|d| d.d_conv = 9, "qwen35.ssm.conv_kernel");
    with(&|d| d.heads = (2, 3, 16), "qwen35.ssm.group_count");
    with(&|d| d.heads.2 = 24, "qwen35.ssm.state_size");
    with(&|d| d.sections = [0; 4], "qwen35.rope.dimension_sections");
    with(&|d| d.sections[3] = -1, "qwen35.rope.dimension_sections");
    with(&|d| d.interval = Some(0), "qwen35.full_attention_interval");
    with(&|d| d.interval = Some(9), "qwen35.full_attention_interval");
    with(
        &|d| (d.interval, d.recurrent) = (None, vec![true; 2]),
        "qwen35.attention.recurrent_layers",
    );
}
