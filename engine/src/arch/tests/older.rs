//! Models whose files say little, and models of before.

use super::{read, read_more, windows};
use crate::arch::{FfnReads, Past, RopeScaling, Temperature};
use crate::backend::Gating;

/// The first `n` layers: `c` for parts of the text, `r` for rotation, `-` for neither.
fn kinds(hp: &crate::arch::HParams, n: usize) -> String {
    let kind = |l: &crate::arch::LayerParams| match (l.chunk, l.rope) {
        (Some(8192), Some(1)) => 'c',
        (None, Some(_)) => 'r',
        (None, None) => '-',
        _ => '?',
    };
    hp.layers[..n].iter().map(kind).collect()
}

#[test]
fn llama_4_scout() {
    let shape = [
        ("block_count", 48),
        ("embedding_length", 5120),
        ("attention.head_count", 40),
        ("attention.head_count_kv", 8),
        ("attention.key_length", 128),
        ("attention.value_length", 128),
        ("rope.dimension_count", 128),
        ("expert_count", 16),
        ("expert_used_count", 1),
        ("expert_feed_forward_length", 8192),
        ("interleave_moe_layer_step", 1),
    ];
    let floats = [("rope.freq_base", 5e5)];
    let hp = read("llama4", &shape, &floats).unwrap();
    assert_eq!(kinds(&hp, 9), "ccc-ccc-c");
    assert!(hp.layers.iter().all(|l| l.window.is_none()));
    let wanted = Temperature {
        scale: 0.1,
        n_floor: 8192,
        offset: 1,
    };
    assert_eq!((hp.heat, hp.temperature), (Some(wanted), None));
    // The step begins with the last token of a part.
    assert_eq!([0, 8190].map(|p| wanted.at(f64::from(p))), [1.0; 2]);
    assert!(wanted.at(8191.0) > 1.06);
    let sees = [0, 8191, 8192, 8193, 20_000].map(|p| hp.layers[0].oldest(p));
    assert_eq!(sees, [0, 0, 8192, 8192, 16_384]);
    assert_eq!(hp.layers[3].oldest(20_000), 0);
    assert_eq!((hp.n_ff_exp, hp.n_ff_shexp), (8192, 8192));
    let routing = hp.routing;
    assert_eq!((routing.gating, routing.step), (Gating::Sigmoid, 1));
    assert!(routing.weighs_input && !routing.norm_topk);

    // Maverick has experts in every other layer.
    let mut other = shape;
    (other[7].1, other[10].1) = (128, 2);
    let hp = read("llama4", &other, &floats).unwrap();
    let experts = |il: &usize| hp.routing.has_experts(*il);
    assert_eq!((0..6).filter(experts).collect::<Vec<_>>(), [1, 3, 5]);

    for (name, n) in [
        ("interleave_moe_layer_step", 0),
        ("interleave_moe_layer_step", u32::MAX),
        ("expert_count", 0),
        ("expert_feed_forward_length", u32::MAX),
        ("attention.sliding_window", 0),
        ("attention.sliding_window", 4096),
    ] {
        let mut wrong: Vec<(&str, u32)> = shape.to_vec();
        wrong.retain(|(k, _)| *k != name);
        wrong.push((name, n));
        let said = read("llama4", &wrong, &floats).unwrap_err().to_string();
        assert!(said.contains("llama4."), "{name} {n}: {said}");
    }
}

#[test]
fn minicpm_3_4b() {
    let shape = [
        ("block_count", 62),
        ("embedding_length", 2560),
        ("attention.head_count", 40),
        ("attention.key_length", 96),
        ("attention.value_length", 64),
        ("attention.q_lora_rank", 768),
        ("attention.kv_lora_rank", 256),
        ("rope.dimension_count", 32),
    ];
    let hp = read("minicpm3", &shape, &[]).unwrap();
    assert_eq!(
        (hp.n_head_kv, hp.head_dim, hp.head_dim_v, hp.rope_from()),
        (1, 288, 256, 256)
    );
    assert_eq!(hp.attn_scale, 1.0 / 96.0f32.sqrt());
    assert_eq!((hp.embedding_scale, hp.logit_scale), (12.0, 0.1));
    assert_eq!(hp.residual_scale, 1.4 / 62.0f32.sqrt());
    for (i, n, name) in [
        (5, 0, "q_lora_rank"),
        (5, u32::MAX, "q_lora_rank"),
        (6, u32::MAX, "kv_lora_rank"),
        (7, 96, "key_length"),
    ] {
        let mut wrong = shape;
        wrong[i].1 = n;
        let said = read("minicpm3", &wrong, &[]).unwrap_err().to_string();
        assert!(said.contains(name), "{name} {n}: {said}");
    }
}

#[test]
fn grok_1() {
    let shape = [
        ("block_count", 64),
        ("embedding_length", 6144),
        ("attention.head_count", 48),
        ("attention.head_count_kv", 8),
        ("expert_count", 8),
        ("expert_used_count", 2),
    ];
    let hp = read("grok", &shape, &[]).unwrap();
    assert_eq!((hp.attn_softcap, hp.logit_softcap), (Some(30.0), None));
    assert_eq!(hp.attn_scale, 0.088_388_346);
    assert_eq!(
        (hp.embedding_scale, hp.logit_scale),
        (78.383_675, 0.577_350_26)
    );
    assert_eq!((hp.n_ff, hp.n_ff_exp), (64, 64));
    // Fewer rotations than elsewhere, where a file does not say.
    let yarn = [("rope.scaling.factor", 16.0)];
    let hp = read_more("grok", &shape, &yarn, |b| {
        b.str("grok.rope.scaling.type", "yarn");
    });
    let RopeScaling::Yarn { beta_fast, .. } = hp.unwrap().ropes[0].scaling else {
        panic!("not stretched");
    };
    assert_eq!(beta_fast, 8.0);
    for name in ["logit_scale", "attn_logit_softcapping", "embedding_scale"] {
        let said = read("grok", &shape, &[(name, 0.0)]).unwrap_err();
        assert!(said.to_string().contains(name), "{said}");
    }
}

#[test]
fn plamo_3_8b() {
    let shape = [
        ("block_count", 32),
        ("embedding_length", 4096),
        ("attention.head_count", 32),
        ("attention.head_count_kv", 4),
        ("attention.sliding_window", 2048),
    ];
    let floats = [("rope.freq_base", 1e6)];
    let hp = read("plamo3", &shape, &floats).unwrap();
    assert_eq!(windows(&hp)[..17], *"wwwwwww.wwwwwww.w");
    let bases = [0, 7].map(|il: usize| hp.ropes[hp.layers[il].rope.unwrap()].freq_base);
    assert_eq!(bases, [1e4, 1e6]);
    let hp = read("plamo3", &shape[..4], &floats).unwrap();
    assert!(hp.layers.iter().all(|l| l.window.is_none()) && hp.ropes.len() == 1);
}

#[test]
fn positions_with_embeddings() {
    let shape = [
        ("block_count", 24),
        ("embedding_length", 2048),
        ("attention.head_count", 16),
        ("attention.head_count_kv", 1),
    ];
    let eps = [("attention.layer_norm_epsilon", 1e-5)];
    let hp = read("starcoder", &shape, &eps).unwrap();
    assert!(hp.learns_positions && hp.layers.iter().all(|l| l.rope.is_none()));
    assert_eq!(hp.layers[23].past, Past::Pages(23));
    let said = read("starcoder", &shape, &[]).unwrap_err().to_string();
    assert!(said.contains("layer_norm_epsilon"), "{said}");
}

#[test]
fn bounds_of_queries_and_keys() {
    let shape = [
        ("block_count", 2),
        ("embedding_length", 64),
        ("attention.head_count", 4),
    ];
    let with = |x| {
        let floats = [
            ("attention.layer_norm_epsilon", 1e-5),
            ("attention.clamp_kqv", x),
        ];
        read("olmo", &shape, &floats)
    };
    let hp = with(8.0).unwrap();
    assert_eq!((hp.clamp_kqv, hp.ffn_reads), (Some(8.0), FfnReads::After));
    assert!(hp.norms_plain && hp.centers && hp.cpu_only.is_some());
    let hp = with(0.0).unwrap();
    assert_eq!((hp.clamp_kqv, hp.cpu_only), (None, None));
    assert!(with(f32::NAN).is_err());
}
