//! Models of which some layers keep a state in place of keys and values, or beside them.

use super::{read, read_more};
use crate::arch::Past;

const KV: &str = "attention.head_count_kv";

#[test]
fn lfm2_1_2b() {
    let kinds = "ccaccaccacacacac";
    let shape = [
        ("block_count", 16),
        ("embedding_length", 2048),
        ("attention.head_count", 32),
        ("shortconv.l_cache", 3),
    ];
    let with = |shape: &[(&str, u32)], n_kv: &[i32]| {
        let n_kv = n_kv.to_vec();
        read_more("lfm2", shape, &[("rope.freq_base", 1e6)], move |b| {
            b.i32s(&format!("lfm2.{KV}"), n_kv.clone().into_iter());
        })
    };
    let n_kv: Vec<i32> = kinds
        .chars()
        .map(|c| if c == 'a' { 8 } else { 0 })
        .collect();
    let hp = with(&shape, &n_kv).unwrap();
    assert_eq!((hp.n_layer_kv(), hp.n_layer_state()), (6, 10));
    assert_eq!((hp.n_head_kv, hp.head_dim), (8, 64));
    assert_eq!(
        [1, 2, 15].map(|il| hp.layers[il].past),
        [Past::State(1), Past::Pages(0), Past::State(9)]
    );
    // The inputs of two tokens, and once more for going back.
    assert_eq!(hp.state_bytes(), 2 * 10 * 4 * 2 * 2048);

    // Widths must be the same where there are any, and there must be some.
    let mut other = n_kv.clone();
    other[5] = 4;
    for wrong in [&other[..], &n_kv[..15], &[0; 16], &[-1; 16]] {
        let said = with(&shape, wrong).unwrap_err().to_string();
        assert!(said.contains(KV), "{wrong:?}: {said}");
    }
    for (i, n, name) in [
        (3, 0, "shortconv.l_cache"),
        (3, 1, "shortconv.l_cache"),
        (3, 9, "shortconv.l_cache"),
        (1, 2056, "embedding_length"),
    ] {
        let mut shape = shape;
        shape[i].1 = n;
        let said = with(&shape, &n_kv).unwrap_err().to_string();
        assert!(said.contains(name), "{name} {n}: {said}");
    }
    // Other architectures do not speak of layers that have none.
    let said = read_more("qwen3", &shape, &[], |b| {
        b.i32s(&format!("qwen3.{KV}"), n_kv.clone().into_iter());
    });
    let said = said.unwrap_err().to_string();
    assert!(said.contains("differs between layers"), "{said}");
}

/// Every layer attends and has a state.
#[test]
fn falcon_h1_7b() {
    let shape = [
        ("block_count", 44),
        ("embedding_length", 3072),
        ("attention.head_count", 12),
        (KV, 2),
        ("attention.key_length", 128),
        ("attention.value_length", 128),
        ("ssm.conv_kernel", 4),
        ("ssm.inner_size", 3072),
        ("ssm.state_size", 256),
        ("ssm.time_step_rank", 24),
        ("ssm.group_count", 1),
    ];
    let hp = read("falcon-h1", &shape, &[("rope.freq_base", 1e11)]).unwrap();
    assert_eq!((hp.n_layer_kv(), hp.n_layer_state()), (44, 44));
    let both = Past::Both {
        pages: 43,
        state: 43,
    };
    assert_eq!(hp.layers[43].past, both);
    let s = hp.ssm.unwrap();
    assert_eq!((s.head_dim, s.n_xbc()), (128, 3072 + 512));
    assert_eq!(hp.state_bytes(), 2 * 44 * 4 * (3 * 3584 + 3072 * 256));

    for (name, n) in [
        ("ssm.conv_kernel", 1),
        ("ssm.conv_kernel", u32::MAX),
        ("ssm.inner_size", 0),
        ("ssm.inner_size", 3080),
        ("ssm.inner_size", 24 * 8),
        ("ssm.state_size", 0),
        ("ssm.state_size", 252),
        ("ssm.state_size", 1 << 24),
        ("ssm.time_step_rank", 25),
        ("ssm.time_step_rank", 1 << 14),
        ("ssm.group_count", 5),
        ("ssm.group_count", 0),
    ] {
        let mut shape = shape;
        let i = shape.iter().position(|(k, _)| *k == name).unwrap();
        shape[i].1 = n;
        let said = read("falcon-h1", &shape, &[]).unwrap_err().to_string();
        // What does not fit the number of heads is said of the width.
        let names = [name, "ssm.inner_size"];
        assert!(names.iter().any(|n| said.contains(n)), "{name} {n}: {said}");
    }
}
