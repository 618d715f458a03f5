//! Hyper-parameters that published models have, from headers alone.

mod hybrids;
mod older;
mod unlike;

use super::{HParams, Past, QkNorm, Rope, RopeScaling};
use crate::backend::Gating;
use crate::error::Error;
use crate::gguf::write::Builder;
use crate::gguf::{GgmlType, GgufFile};

/// Reads the hyper-parameters of a header with these keys and what all files have.
fn read(arch: &str, numbers: &[(&str, u32)], floats: &[(&str, f32)]) -> Result<HParams, Error> {
    read_more(arch, numbers, floats, |_| {})
}

/// The same with what `add` adds.
fn read_more(
    arch: &str,
    numbers: &[(&str, u32)],
    floats: &[(&str, f32)],
    add: impl Fn(&mut Builder),
) -> Result<HParams, Error> {
    let mut b = Builder::new();
    add(&mut b);
    let key = |name: &str| format!("{arch}.{name}");
    b.str("general.architecture", arch)
        .u32(&key("context_length"), 131_072)
        .u32(&key("feed_forward_length"), 64)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-6);
    for (name, n) in numbers {
        b.u32(&key(name), *n);
    }
    for (name, x) in floats {
        b.f32(&key(name), *x);
    }
    let n_embd = numbers.iter().find(|(k, _)| *k == "embedding_length");
    let n_embd = n_embd.map_or(32, |(_, n)| *n);
    b.tensor("token_embd.weight", GgmlType::F16, &[n_embd.into(), 1]);
    let mut body = b.begin(Vec::new()).unwrap();
    body.write(&vec![0; 2 * n_embd as usize]).unwrap();
    HParams::read(&GgufFile::from_bytes(body.finish().unwrap(), "header").unwrap())
}

/// Windows of the layers, `.` for none.
fn windows(hp: &HParams) -> String {
    let mark = |w: Option<u32>| if w.is_some() { 'w' } else { '.' };
    hp.layers.iter().map(|l| mark(l.window)).collect()
}

#[test]
fn gemma_3_27b() {
    let shape = [
        ("block_count", 62),
        ("embedding_length", 5376),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 16),
        ("attention.key_length", 128),
        ("attention.value_length", 128),
    ];
    let floats = [("rope.freq_base", 1e6), ("rope.scaling.factor", 8.0)];
    let window = ("attention.sliding_window", 1024);
    let hp = read("gemma3", &[&shape[..], &[window]].concat(), &floats).unwrap();
    assert_eq!(hp.attn_scale, 1.0 / 168.0f32.sqrt());
    assert_eq!(windows(&hp)[..13], *"wwwww.wwwww.w");
    assert_eq!(
        (hp.layers[0].window, hp.layers[0].rope),
        (Some(1024), Some(1))
    );
    assert_eq!(hp.layers[5].rope, Some(0));
    assert_eq!(hp.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(
        (hp.ropes[1].freq_base, hp.ropes[1].scaling),
        (10_000.0, RopeScaling::None)
    );
    assert_eq!((hp.attn_softcap, hp.logit_softcap), (None, None));

    let pattern = ("attention.sliding_window_pattern", 3);
    let hp = read(
        "gemma3",
        &[&shape[..], &[window, pattern]].concat(),
        &floats,
    )
    .unwrap();
    assert_eq!(windows(&hp)[..7], *"ww.ww.w");
    let hp = read("gemma3", &shape, &floats).unwrap();
    assert_eq!((windows(&hp).contains('w'), hp.ropes.len()), (false, 1));
}

#[test]
fn gemma_2() {
    let shape = |n_layer| {
        [
            ("block_count", n_layer),
            ("embedding_length", 4608),
            ("attention.head_count", 32),
            ("attention.head_count_kv", 16),
            ("attention.key_length", 128),
        ]
    };
    let hp = read("gemma2", &shape(46), &[]).unwrap();
    assert_eq!(hp.attn_scale, 1.0 / 144.0f32.sqrt());
    assert_eq!(
        (windows(&hp)[..5].to_owned(), hp.layers[0].window),
        ("w.w.w".to_owned(), Some(4096))
    );
    assert_eq!(
        (hp.attn_softcap, hp.logit_softcap, hp.ropes.len()),
        (Some(50.0), Some(30.0), 1)
    );
    let caps = [
        ("attn_logit_softcapping", 0.0),
        ("final_logit_softcapping", 7.0),
    ];
    let hp = read("gemma2", &shape(42), &caps).unwrap();
    assert_eq!(hp.attn_scale, 1.0 / 128.0f32.sqrt());
    assert_eq!((hp.attn_softcap, hp.logit_softcap), (None, Some(7.0)));
    let said = read("gemma2", &shape(42), &[("attn_logit_softcapping", -1.0)]).unwrap_err();
    assert!(
        said.to_string().contains("gemma2.attn_logit_softcapping"),
        "{said}"
    );
}

#[test]
fn deepseek_v3() {
    let mut shape = vec![
        ("block_count", 61),
        ("embedding_length", 7168),
        ("attention.head_count", 128),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 576),
        ("attention.value_length", 512),
        ("attention.key_length_mla", 192),
        ("attention.value_length_mla", 128),
        ("attention.q_lora_rank", 1536),
        ("attention.kv_lora_rank", 512),
        ("rope.dimension_count", 64),
        ("expert_count", 256),
        ("expert_used_count", 8),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", 2048),
    ];
    let hp = read("deepseek2", &shape, &[]).unwrap();
    assert_eq!(
        (hp.n_head_kv, hp.head_dim, hp.head_dim_v, hp.rope_from()),
        (1, 576, 512, 512)
    );
    assert_eq!((hp.n_ff, hp.n_ff_exp, hp.n_ff_shexp), (64, 2048, 2048));
    assert_eq!(hp.attn_scale, 1.0 / 192.0f32.sqrt());

    let floats = [("attention.temperature_scale", 0.1)];
    let said = read("deepseek2", &shape, &floats).unwrap_err();
    assert!(said.to_string().contains("temperature_scale"), "{said}");
    for (name, n) in [
        ("attention.key_length_mla", 64),
        ("attention.kv_lora_rank", 1 << 20),
        ("attention.value_length_mla", 1 << 20),
        ("attention.q_lora_rank", u32::MAX),
        ("expert_shared_count", 1 << 20),
        ("rope.dimension_count", 63),
        ("rope.dimension_count", u32::MAX),
    ] {
        let i = shape.iter().position(|(k, _)| *k == name).unwrap();
        let usual = std::mem::replace(&mut shape[i].1, n);
        let said = read("deepseek2", &shape, &[]).unwrap_err().to_string();
        assert!(
            said.contains(name) || said.contains("key_length_mla"),
            "{name} {n}: {said}"
        );
        shape[i].1 = usual;
    }
}

#[test]
fn qwen_3_5_4b() {
    let mut shape = vec![
        ("block_count", 32),
        ("embedding_length", 2560),
        ("attention.head_count", 16),
        ("attention.head_count_kv", 4),
        ("attention.key_length", 256),
        ("attention.value_length", 256),
        ("rope.dimension_count", 64),
        ("full_attention_interval", 4),
        ("ssm.conv_kernel", 4),
        ("ssm.state_size", 128),
        ("ssm.group_count", 16),
        ("ssm.time_step_rank", 32),
        ("ssm.inner_size", 4096),
    ];
    let sections = |b: &mut Builder| {
        b.i32s(
            "qwen35.rope.dimension_sections",
            [11, 11, 10, 0].into_iter(),
        );
    };
    let hp = read_more("qwen35", &shape, &[("rope.freq_base", 1e7)], sections).unwrap();
    assert_eq!(
        (hp.n_layer, hp.n_layer_kv(), hp.n_layer_state()),
        (32, 8, 24)
    );
    assert_eq!(
        [2, 3, 4, 31].map(|il| hp.layers[il].past),
        [
            Past::State(2),
            Past::Pages(0),
            Past::State(3),
            Past::Pages(7)
        ]
    );
    let d = hp.delta.unwrap();
    assert_eq!((d.n_qkv(), d.n_v()), (8192, 4096));
    assert_eq!(hp.state_bytes(), 2 * 24 * 4 * (3 * 8192 + 4096 * 128));
    // All 32 pairs rotate in text.
    let mut table = [0.0; 64];
    Rope::new(&hp, None).fill(0, 1000, 1, 64, &mut table);
    assert!(table.chunks_exact(2).all(|pair| pair[1] != 0.0));

    // A block behind the layers that guesses tokens is not one of them.
    shape[0].1 = 33;
    shape.push(("nextn_predict_layers", 1));
    let hp = read_more("qwen35", &shape, &[], sections).unwrap();
    assert_eq!((hp.n_layer, hp.layers.len(), hp.n_layer_kv()), (32, 32, 8));
    let said = read("qwen35", &shape, &[]).unwrap_err().to_string();
    assert!(said.contains("rope.dimension_sections"), "{said}");
    for (name, n) in [
        ("nextn_predict_layers", 33),
        ("full_attention_interval", 0),
        ("full_attention_interval", 33),
        ("ssm.conv_kernel", u32::MAX),
        ("ssm.state_size", 1 << 24),
        ("ssm.state_size", 8),
        ("ssm.group_count", 5),
        ("ssm.group_count", 0),
        ("ssm.time_step_rank", u32::MAX),
        ("ssm.inner_size", 4095),
        ("rope.dimension_count", 258),
    ] {
        let i = shape.iter().position(|(k, _)| *k == name).unwrap();
        let usual = std::mem::replace(&mut shape[i].1, n);
        let said = read_more("qwen35", &shape, &[], sections);
        let said = said.unwrap_err().to_string();
        assert!(said.contains(name), "{name} {n}: {said}");
        shape[i].1 = usual;
    }
}

/// Layers that guess further tokens are none of the model's, and a pattern of windows may leave them out or not.
#[test]
fn layers_that_guess() {
    let mut shape = vec![
        ("block_count", 65),
        ("embedding_length", 5120),
        ("attention.head_count", 40),
        ("attention.head_count_kv", 8),
        ("attention.key_length", 128),
        ("nextn_predict_layers", 1),
        ("attention.sliding_window", 4096),
    ];
    let pattern = |n: usize| {
        read_more("exaone4", &shape, &[], |b| {
            let all = (0..n).map(|il| i32::from(il % 4 < 3));
            b.i32s("exaone4.attention.sliding_window_pattern", all);
        })
    };
    for n in [64, 65] {
        let hp = pattern(n).unwrap();
        assert_eq!((hp.n_layer, hp.layers.len()), (64, 64));
        let last = |il: usize| (hp.layers[il].window, hp.layers[il].rope);
        assert_eq!((last(62), last(63)), ((Some(4096), Some(0)), (None, None)));
    }
    assert!(pattern(63).is_err());
    shape.truncate(6);
    shape[0].1 = 41;
    let hp = read("glm4", &shape, &[]).unwrap();
    assert_eq!((hp.n_layer, hp.layers.len()), (40, 40));
}

#[test]
fn glm_4_5_air() {
    let mut shape = vec![
        ("block_count", 47),
        ("embedding_length", 4096),
        ("attention.head_count", 96),
        ("attention.head_count_kv", 8),
        ("attention.key_length", 128),
        ("attention.value_length", 128),
        ("rope.dimension_count", 64),
        ("nextn_predict_layers", 1),
        ("leading_dense_block_count", 1),
        ("expert_count", 128),
        ("expert_used_count", 8),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", 1408),
        ("expert_group_count", 1),
        ("expert_group_used_count", 1),
    ];
    let scale = [("expert_weights_scale", 1.0)];
    let hp = read("glm4moe", &shape, &scale).unwrap();
    assert_eq!((hp.n_layer, hp.layers.len()), (46, 46));
    assert_eq!((hp.n_ff, hp.n_ff_exp, hp.n_ff_shexp), (64, 1408, 1408));
    // What files do not say.
    assert_eq!(
        (hp.routing.gating, hp.qk_norm),
        (Gating::Sigmoid, QkNorm::None)
    );
    assert_eq!((hp.routing.n_dense, hp.routing.n_group), (1, 1));
    // Pictures have positions of their own, text has not.
    let sections = |all: [i32; 4]| {
        read_more("glm4moe", &shape, &scale, |b| {
            b.i32s("glm4moe.rope.dimension_sections", all.into_iter());
        })
    };
    assert!(sections([8, 12, 12, 0]).is_ok());
    for wrong in [
        [8, 12, 11, 1],
        [8, 12, 11, 0],
        [0, 0, 0, 0],
        [-1, 20, 20, 0],
    ] {
        let said = sections(wrong).unwrap_err().to_string();
        assert!(said.contains("rope.dimension_sections"), "{said}");
    }
    for (name, n) in [
        ("nextn_predict_layers", 47),
        ("expert_count", 0),
        ("expert_used_count", 129),
        ("expert_shared_count", 1 << 20),
        ("expert_feed_forward_length", 0),
        ("expert_group_count", 3),
        ("rope.dimension_count", 130),
    ] {
        let i = shape.iter().position(|(k, _)| *k == name).unwrap();
        let usual = std::mem::replace(&mut shape[i].1, n);
        let said = read("glm4moe", &shape, &scale).unwrap_err().to_string();
        let named = said.contains(name) || said.contains("expert_used_count");
        assert!(named, "{name} {n}: {said}");
        shape[i].1 = usual;
    }
}

#[test]
fn exaone_4() {
    let shape = |n_layer, n_head| {
        vec![
            ("block_count", n_layer),
            ("embedding_length", 128 * n_head),
            ("attention.head_count", n_head),
            ("attention.head_count_kv", 8),
        ]
    };
    let window = ("attention.sliding_window", 4096);
    let hp = read("exaone4", &[shape(64, 40), vec![window]].concat(), &[]).unwrap();
    assert_eq!(windows(&hp)[..9], *"www.www.w");
    assert_eq!(
        [2, 3].map(|il| (hp.layers[il].window, hp.layers[il].rope)),
        [(Some(4096), Some(0)), (None, None)]
    );
    // Early files do not state the window.
    let hp = read("exaone4", &shape(64, 40), &[]).unwrap();
    assert_eq!(hp.layers[0].window, Some(4096));
    let hp = read("exaone4", &shape(30, 16), &[]).unwrap();
    assert!(!windows(&hp).contains('w') && hp.layers.iter().all(|l| l.rope == Some(0)));
}

#[test]
fn ministral_3() {
    let shape = [
        ("block_count", 34),
        ("embedding_length", 4096),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 8),
        ("attention.key_length", 128),
        ("rope.scaling.original_context_length", 16_384),
    ];
    let scale = ("attention.temperature_scale", 0.1);
    let hp = read("mistral3", &shape, &[scale]).unwrap();
    let rope = Rope::new(&hp, None);
    assert_eq!((hp.n_rope_tables(), rope.of_queries(0)), (2, 1));
    // Keys never grow, queries do from the original context on.
    let length = |table, pos| {
        let mut pairs = [0.0; 128];
        rope.fill(table, pos, 1, 128, &mut pairs);
        pairs[0].hypot(pairs[1])
    };
    for (pos, factor) in [
        (0, 1.0),
        (16_383, 1.0),
        (16_384, 1.0 + 0.1 * 2.0f32.ln()),
        (100_000, 1.0 + 0.1 * 7.0f32.ln()),
    ] {
        assert!((length(0, pos) - 1.0).abs() < 1e-6);
        assert!((length(1, pos) - factor).abs() < 1e-6, "{pos}");
    }
    let hp = read("mistral3", &shape, &[]).unwrap();
    assert_eq!(hp.temperature, None);
    assert_eq!(Rope::new(&hp, None).of_queries(0), 0);
    let bad = [("attention.temperature_scale", f32::NAN)];
    let said = read("mistral3", &shape, &bad).unwrap_err().to_string();
    assert!(said.contains("temperature_scale"), "{said}");
}
