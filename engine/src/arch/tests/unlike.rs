//! Models whose layers have heads of their own.

use super::{read_more, windows};
use crate::arch::Past;
use crate::gguf::write::Builder;

/// Gemma 4 E4B with some keys changed.
fn e4b(
    changed: &[(&str, u32)],
    n_head_kv: Option<&[i32]>,
) -> Result<crate::arch::HParams, crate::error::Error> {
    let mut shape = vec![
        ("block_count", 42),
        ("embedding_length", 2560),
        ("attention.head_count", 8),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 512),
        ("attention.value_length", 512),
        ("attention.key_length_swa", 256),
        ("attention.value_length_swa", 256),
        ("rope.dimension_count", 512),
        ("rope.dimension_count_swa", 256),
        ("attention.sliding_window", 512),
        ("attention.shared_kv_layers", 18),
        ("embedding_length_per_layer_input", 256),
    ];
    for (name, n) in changed {
        let key = shape.iter_mut().find(|(k, _)| k == name).unwrap();
        key.1 = *n;
    }
    if n_head_kv.is_some() {
        shape.retain(|(k, _)| *k != "attention.head_count_kv");
    }
    let floats = [("rope.freq_base", 1e6), ("rope.freq_base_swa", 1e4)];
    read_more("gemma4", &shape, &floats, |b: &mut Builder| {
        let all = (0..42).map(|il| i32::from(il % 6 != 5));
        b.i32s("gemma4.attention.sliding_window_pattern", all);
        if let Some(n) = n_head_kv {
            b.i32s("gemma4.attention.head_count_kv", n.iter().copied());
        }
    })
}

#[test]
fn gemma_4_e4b() {
    let hp = e4b(&[], None).unwrap();
    assert_eq!(windows(&hp), "wwwww.".repeat(7));
    let [narrow, wide] = [0, 5].map(|il| hp.heads(il));
    assert_eq!(
        (narrow.n, narrow.n_kv, narrow.dim, narrow.dim_v),
        (8, 2, 256, 256)
    );
    assert_eq!((wide.n, wide.n_kv, wide.dim, wide.dim_v), (8, 2, 512, 512));
    assert_eq!(
        (hp.head_dim, hp.attn_scale, hp.n_layer_kv()),
        (512, 1.0, 24)
    );
    // The last layers look at the last two of each kind before them.
    assert_eq!(hp.layers[23].past, Past::Pages(23));
    assert!(!hp.layers[23].borrows && hp.layers[24].borrows);
    assert_eq!([24, 29, 41].map(|il| hp.layer_of_pool(il)), [22, 23, 23]);
    assert_eq!(
        hp.ropes.iter().map(|r| r.n_rot).collect::<Vec<_>>(),
        [Some(512), Some(256)]
    );
    assert_eq!(
        hp.ropes.iter().map(|r| r.undivided).collect::<Vec<_>>(),
        [false, true]
    );
}

/// Heads are all alike, but what rotates is said for layers of two kinds.
#[test]
fn rotation_of_like_heads_is_looked_at_too() {
    let like = [
        ("attention.shared_kv_layers", 0),
        ("attention.key_length_swa", 512),
        ("attention.value_length_swa", 512),
    ];
    let hp = e4b(&like, None).unwrap();
    assert!(!hp.has_unlike_heads() && hp.heads(0).dim == 512);
    for n in [514, 257] {
        let mut wrong = like.to_vec();
        wrong.push(("rope.dimension_count_swa", n));
        let said = e4b(&wrong, None).unwrap_err().to_string();
        assert!(said.contains("rope.dimension_count"), "{n}: {said}");
    }
}

#[test]
fn heads_that_nobody_can_use_are_named() {
    for (name, n) in [
        // There would be nobody to look at, or one of another kind.
        ("attention.shared_kv_layers", 41),
        ("attention.shared_kv_layers", 20),
        ("embedding_length_per_layer_input", 1 << 24),
        ("attention.head_count_kv", 3),
        ("attention.key_length_swa", 1 << 24),
        ("rope.dimension_count_swa", 258),
    ] {
        let said = e4b(&[(name, n)], None).unwrap_err().to_string();
        let name = name.replace("_swa", "");
        assert!(said.contains(&name), "{name} {n}: {said}");
    }
    let mut n_head_kv = vec![2; 42];
    for n in [0, 3, -1] {
        n_head_kv[30] = n;
        let said = e4b(&[], Some(&n_head_kv)).unwrap_err().to_string();
        assert!(said.contains("head"), "{n}: {said}");
    }
    assert!(e4b(&[], Some(&[2; 41])).is_err());
}
