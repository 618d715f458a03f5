//! Files that differ from those of the reference data in one thing: the type of their weights, a key, a tensor.

use std::sync::Arc;

use lemma_engine::error::Error;
use lemma_engine::gguf::GgufFile;
use lemma_engine::gguf::write::Builder;
use lemma_engine::model::Model;
use lemma_engine::options::{BackendKind, KvBudget, LoadOptions};
use lemma_engine::session::Session;
use lemma_quant::GgmlType;
use lemma_tests::{copy_key, data, nmse};

/// What is changed of a file.
#[derive(Default)]
struct Change<'a> {
    /// Type of the matrices.
    ty: Option<GgmlType>,
    /// Keys that are left out, or written anew by `keys`.
    without: &'a [&'a str],
    keys: &'a [NewKey<'a>],
    /// A tensor that others take the place of.
    tensor: Option<(&'a str, &'a [NewTensor])>,
}

/// A key and its value.
type NewKey<'a> = (&'a str, New<'a>);

/// A value of a key.
#[derive(Clone, Copy)]
enum New<'a> {
    U32(u32),
    F32(f32),
    I32s(&'a [i32]),
}

/// A tensor of f32: its name, its shape, its numbers.
type NewTensor = (String, Vec<u64>, Vec<f32>);

/// The file `name` of the reference data with a change.
fn changed(name: &str, change: &Change<'_>) -> &'static [u8] {
    let file = GgufFile::open(&data().join("arch").join(name)).unwrap();
    let mut b = Builder::new();
    for (key, value) in file.meta().iter() {
        if !change.without.contains(&key) {
            copy_key(&mut b, key, value);
        }
    }
    for (key, value) in change.keys {
        match value {
            New::U32(n) => b.u32(key, *n),
            New::F32(x) => b.f32(key, *x),
            New::I32s(all) => b.i32s(key, all.iter().copied()),
        };
    }
    let mut all: Vec<Vec<u8>> = Vec::new();
    for t in file.tensors() {
        if let Some((_, new)) = change.tensor.filter(|(gone, _)| **gone == *t.name) {
            for (name, shape, values) in new {
                b.tensor(name, GgmlType::F32, shape);
                all.push(values.iter().flat_map(|x| x.to_le_bytes()).collect());
            }
            continue;
        }
        let ty = change.ty.filter(|_| t.shape().len() > 1).unwrap_or(t.ty);
        b.tensor(&t.name, ty, t.shape());
        all.push(if ty == t.ty {
            t.data.to_vec()
        } else {
            let width = t.shape()[0] as usize;
            let mut row = vec![0; ty.row_size(width).unwrap()];
            let numbers = numbers(t.data);
            let quantize = ty.traits().quantize_row.unwrap();
            let rows = numbers.chunks_exact(width).map(|x| {
                quantize(x, &mut row);
                row.clone()
            });
            rows.flatten().collect()
        });
    }
    let mut body = b.begin(Vec::new()).unwrap();
    for t in all {
        body.write(&t).unwrap();
    }
    body.finish().unwrap().leak()
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|b| f32::from_le_bytes(*b)).collect()
}

fn options(backend: BackendKind) -> LoadOptions {
    let mut o = LoadOptions {
        backend,
        n_threads: Some(2),
        ..LoadOptions::default()
    };
    (o.kv.ty_k, o.kv.ty_v) = (GgmlType::F32, GgmlType::F32);
    o
}

/// Logits behind a prompt and of some steps, or why there are none.
fn logits(bytes: &'static [u8], backend: BackendKind) -> Result<Vec<f32>, Error> {
    let o = options(backend);
    let model = Arc::new(Model::load_static(bytes, "variant.gguf", &o)?);
    let mut session = Session::new(model, &o)?;
    let tokens: Vec<u32> = (0..24).map(|i| (i * 37 + 5) % 250).collect();
    let mut all = Vec::new();
    session.score(&tokens[..18], &mut |_, logits| {
        all.extend_from_slice(logits);
        Ok(())
    })?;
    for &t in &tokens[18..] {
        session.decode(t)?;
        all.extend_from_slice(session.logits());
    }
    Ok(all)
}

/// The tensor `name` of a file, cut into tensors of so many rows.
fn cut(file: &str, name: &str, parts: &[(&str, usize)]) -> Vec<NewTensor> {
    let file = GgufFile::open(&data().join("arch").join(file)).unwrap();
    let t = file.tensor(name).unwrap();
    let (width, x) = (t.shape()[0] as usize, numbers(t.data));
    let mut at = 0;
    let part = |&(name, n): &(&str, usize)| {
        at += n;
        let values = x[(at - n) * width..at * width].to_vec();
        (name.to_owned(), vec![width as u64, n as u64], values)
    };
    parts.iter().map(part).collect()
}

/// Rows of quantized tensors that are several matrices begin where they should: the fast backend, which rounds activations, stays close to the
/// reference, and that to the file with numbers.
#[test]
fn parts_of_quantized_tensors() {
    for name in [
        "phi3.gguf",
        "glm4.gguf",
        "granite.gguf",
        // Rows of these are not whole blocks.
        "bailingmoe2.gguf",
        "qwen3next-legacy.gguf",
    ] {
        let plain = logits(changed(name, &Change::default()), BackendKind::Trace).unwrap();
        for (ty, limit) in [
            (GgmlType::F16, 1e-5),
            (GgmlType::BF16, 2e-3),
            (GgmlType::Q8_0, 1e-2),
            (GgmlType::Q4_0, 0.8),
        ] {
            let odd = ["bailingmoe2.gguf", "qwen3next-legacy.gguf"].contains(&name);
            if odd && ty.block_size() > 1 {
                continue;
            }
            let change = Change {
                ty: Some(ty),
                ..Change::default()
            };
            let bytes = changed(name, &change);
            let want = logits(bytes, BackendKind::Trace).unwrap();
            let got = logits(bytes, BackendKind::Cpu).unwrap();
            let (fast, types) = (nmse(&got, &want), nmse(&want, &plain));
            // Where processors multiply pairs of bf16, activations of batches are rounded to them, and tokens go to other experts where two of
            // those all but tie.
            let most = if odd && ty == GgmlType::BF16 {
                3e-2
            } else {
                5e-3
            };
            assert!(fast < most, "{name} as {}: {fast:.1e}", ty.name());
            assert!(types < limit, "{name} as {}: {types:.1e}", ty.name());
        }
    }
}

/// A bias of a tensor that is several matrices is theirs, in the same order.
#[test]
fn parts_of_a_bias() {
    let bias: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin()).collect();
    let name = "blk.0.attn_qkv.weight";
    let mut new = cut("phi3.gguf", name, &[(name, 128)]);
    let with_bias = {
        let mut new = new.clone();
        new.push(("blk.0.attn_qkv.bias".to_owned(), vec![128], bias.clone()));
        new
    };
    let change = |new: &[NewTensor]| {
        let change = Change {
            tensor: Some((name, new)),
            ..Change::default()
        };
        changed("phi3.gguf", &change)
    };
    let plain = logits(change(&new), BackendKind::Cpu).unwrap();
    let want = logits(change(&with_bias), BackendKind::Trace).unwrap();
    let got = logits(change(&with_bias), BackendKind::Cpu).unwrap();
    assert!(nmse(&got, &want) < 1e-9 && nmse(&got, &plain) > 1e-3);
    // A bias that is too short is called by its name.
    new.push(("blk.0.attn_qkv.bias".to_owned(), vec![64], vec![0.0; 64]));
    let e = logits(change(&new), BackendKind::Cpu)
        .unwrap_err()
        .to_string();
    assert!(e.contains("blk.0.attn_qkv.bias"), "{e}");
}

/// Windows that see everything change nothing, and a period is the same as a list.
#[test]
fn windows_of_olmo2() {
    let (window, pattern) = (
        "olmo2.attention.sliding_window",
        "olmo2.attention.sliding_window_pattern",
    );
    let run = |keys: &[NewKey<'_>]| {
        let change = Change {
            keys,
            ..Change::default()
        };
        logits(changed("olmo2.gguf", &change), BackendKind::Cpu).unwrap()
    };
    let plain = run(&[]);
    assert!(plain == run(&[(window, New::U32(64))]) && plain == run(&[(window, New::U32(0))]));
    let by_period = run(&[(window, New::U32(4)), (pattern, New::U32(2))]);
    let by_list = run(&[(window, New::U32(4)), (pattern, New::I32s(&[1, 0]))]);
    assert!(by_period == by_list && nmse(&by_list, &plain) > 1e-3);
}

/// Layers of different heads, some of which look at the pages of others: small pools whose pages are recycled say what the reference says.
#[test]
fn small_pools_of_unlike_heads() {
    for file in ["gemma4", "gemma4-moe", "mimo2", "step35", "deci-kv"] {
        for policy in ["raas", "window", "h2o"] {
            let all = [BackendKind::Trace, BackendKind::Cpu].map(|backend| {
                let bytes = changed(&format!("{file}.gguf"), &Change::default());
                let mut o = options(backend);
                o.kv.apply(policy).unwrap();
                o.kv.budget = KvBudget::Tokens(64);
                let model = Arc::new(Model::load_static(bytes, "unlike.gguf", &o).unwrap());
                let mut session = Session::new(model, &o).unwrap();
                session.score(&[3, 1, 4, 1, 5], &mut |_, _| Ok(())).unwrap();
                for t in 0..110 {
                    session.decode((t * 37 + 5) % 250).unwrap();
                }
                assert!(session.first_recycle().is_some(), "{file} {policy}");
                session.logits().to_vec()
            });
            let [want, got] = &all;
            let error = nmse(got, want);
            assert!(error < 1e-9, "{file} {policy}: {error:e}");
        }
    }
}

/// What such pools cannot do is said in a line.
#[test]
fn options_that_unlike_heads_do_not_have() {
    for (options, names) in [
        ("raas:scope=head", "--kv-scope head"),
        ("raas:budget_scope=model", "--kv-budget-scope model"),
        ("raas:demote=q8_0", "--kv-demote"),
        ("raas:score=bound", "--kv-score"),
        ("raas:redundancy=0.5", "--kv-redundancy"),
        ("raas:guard=0.1", "--kv-guard"),
        ("quest", "--kv-policy quest"),
    ] {
        let bytes = changed("gemma4.gguf", &Change::default());
        let mut o = LoadOptions::default();
        o.kv.apply(options).unwrap();
        let model = Arc::new(Model::load_static(bytes, "unlike.gguf", &o).unwrap());
        let Err(e) = Session::new(model, &o) else {
            panic!("{options} is taken");
        };
        let line = e.to_string();
        assert!(line.contains(names) && !line.contains('\n'), "{line}");
    }
}

/// Every mistake has one line that names what is wrong.
#[test]
fn mistakes_are_named() {
    let refused = |file: &str, change: &Change<'_>, names: &str| {
        let e = logits(changed(file, change), BackendKind::Cpu).unwrap_err();
        let line = e.to_string();
        assert!(line.contains(names) && !line.contains('\n'), "{line}");
    };
    let four = ("granite.expert_count", New::U32(4));
    let keys: [(&str, &str, &[NewKey<'_>]); 9] = [
        ("granite", "logit_scale", &[]),
        (
            "granite",
            "residual_scale",
            &[("granite.residual_scale", New::F32(f32::NAN))],
        ),
        (
            "granite",
            "expert_count",
            &[four, ("granite.expert_used_count", New::U32(2))],
        ),
        (
            "phi3",
            "rope.dimension_count",
            &[("phi3.rope.dimension_count", New::U32(18))],
        ),
        (
            "glm4",
            "rope.dimension_count",
            &[("glm4.rope.dimension_count", New::U32(5))],
        ),
        (
            "glm4",
            "rope.dimension_sections",
            &[("glm4.rope.dimension_sections", New::I32s(&[2, 1, 1, 0]))],
        ),
        (
            "olmo2",
            "rope.dimension_count",
            &[("olmo2.rope.dimension_count", New::U32(8))],
        ),
        (
            "smollm3",
            "rope.dimension_count",
            &[("smollm3.rope.dimension_count", New::U32(8))],
        ),
        ("smollm3", "feed_forward_length", &[]),
    ];
    for (arch, name, keys) in keys {
        let name = format!("{arch}.{name}");
        let change = Change {
            without: &[&name],
            keys,
            ..Change::default()
        };
        refused(&format!("{arch}.gguf"), &change, &name);
    }
    let pattern = "olmo2.attention.sliding_window_pattern";
    let change = Change {
        keys: &[
            ("olmo2.attention.sliding_window", New::U32(4)),
            (pattern, New::I32s(&[1, 0, 1])),
        ],
        ..Change::default()
    };
    refused("olmo2.gguf", &change, pattern);

    let tensor = |file: &str, name: &str, new: &[NewTensor], names: &str| {
        let change = Change {
            tensor: Some((name, new)),
            ..Change::default()
        };
        refused(file, &change, names);
    };
    // What is added where experts are chosen may be missing elsewhere, but not here.
    let bias = "blk.3.exp_probs_b.bias";
    tensor("nemotron_h_moe.gguf", bias, &[], bias);
    let name = "rope_factors_long.weight";
    let of = |values: &[f32]| vec![(name.to_owned(), vec![values.len() as u64], values.to_vec())];
    tensor("phi3-longrope-partial.gguf", name, &of(&[1.0; 8]), name);
    tensor("phi3-longrope-partial.gguf", name, &of(&[0.0; 6]), name);
    let qkv = "blk.1.attn_qkv.weight";
    tensor("phi3.gguf", qkv, &cut("phi3.gguf", qkv, &[(qkv, 96)]), qkv);
    tensor(
        "glm4.gguf",
        "blk.1.ffn_up.weight",
        &[],
        "blk.1.ffn_up.weight",
    );
}
