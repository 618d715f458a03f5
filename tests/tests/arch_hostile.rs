//! Every architecture with every key of its own at values that nobody expects, without each of its tensors, and with a bias for each of them: a
//! file is refused in a line or runs, and nothing panics.

use std::collections::BTreeSet;

use lemma_engine::arch::HParams;
use lemma_engine::backend::cpu::CpuRunner;
use lemma_engine::backend::{Outputs, Runner};
use lemma_engine::error::Error;
use lemma_engine::gguf::write::Builder;
use lemma_engine::gguf::{GgufFile, Value};
use lemma_engine::kv::{Cache, Layout, policy};
use lemma_engine::options::LoadOptions;
use lemma_quant::GgmlType;
use lemma_tests::{copy_key, data, json};

/// What is written in place of a key's value.
#[derive(Clone, Copy, Debug)]
enum New {
    U32(u32),
    F32(f32),
    Text,
    I32s(&'static [i32]),
    /// The array that was there, with another number in one place.
    At(usize, i32),
    Nothing,
}

const NUMBERS: [New; 14] = [
    New::U32(0),
    New::U32(1),
    New::U32(2),
    New::U32(3),
    New::U32(6),
    New::U32(64),
    New::U32(1 << 14),
    New::U32(1 << 24),
    New::U32(u32::MAX),
    New::F32(0.5),
    New::Text,
    New::I32s(&[]),
    New::I32s(&[-1, i32::MAX, 0, 1]),
    New::Nothing,
];

const FLOATS: [New; 8] = [
    New::F32(0.0),
    New::F32(-1.0),
    New::F32(f32::NAN),
    New::F32(f32::INFINITY),
    New::F32(1e-45),
    New::F32(3e38),
    New::Text,
    New::Nothing,
];

/// What is changed of a file.
#[derive(Clone, Copy, Default)]
struct Change<'a> {
    key: Option<(&'a str, New)>,
    /// A tensor that is left out.
    without: Option<&'a str>,
    /// One more of ones, by its shape.
    with: Option<(&'a str, &'a [u64])>,
}

fn changed(file: &GgufFile, change: Change<'_>) -> Vec<u8> {
    let mut b = Builder::new();
    for (name, value) in file.meta().iter() {
        match change.key.filter(|(k, _)| *k == name) {
            None => copy_key(&mut b, name, value),
            Some((_, New::U32(n))) => drop(b.u32(name, n)),
            Some((_, New::F32(x))) => drop(b.f32(name, x)),
            Some((_, New::Text)) => drop(b.str(name, "linear")),
            Some((_, New::I32s(all))) => drop(b.i32s(name, all.iter().copied())),
            Some((_, New::At(i, n))) => {
                let Value::Array(all) = value else {
                    unreachable!("{name} is an array")
                };
                let all = all.ints().into_iter().flatten().enumerate();
                let all: Vec<i32> = all
                    .map(|(j, x)| if i == j { n } else { x as i32 })
                    .collect();
                b.i32s(name, all.into_iter());
            }
            Some((_, New::Nothing)) => {}
        }
    }
    let kept = || file.tensors().filter(|t| Some(&*t.name) != change.without);
    for t in kept() {
        b.tensor(&t.name, t.ty, t.shape());
    }
    if let Some((name, shape)) = change.with {
        b.tensor(name, GgmlType::F32, shape);
    }
    let mut body = b.begin(Vec::new()).unwrap();
    for t in kept() {
        body.write(t.data).unwrap();
    }
    if let Some((_, shape)) = change.with {
        let n = shape.iter().product::<u64>() as usize;
        body.write(&1.0f32.to_le_bytes().repeat(n)).unwrap();
    }
    body.finish().unwrap()
}

/// A few tokens at once and one more.
fn run(bytes: Vec<u8>) -> Result<(), Error> {
    let file = GgufFile::from_bytes(bytes, "hostile.gguf")?;
    let hp = HParams::read(&file)?;
    let o = LoadOptions {
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    let layout = Layout::new(&o.kv, hp.n_layer_kv(), hp.n_head_kv, 4, 64);
    let policy = policy::find(&o.kv.policy).unwrap();
    let mut runner = CpuRunner::new(&file, &hp, &o, &layout, 8)?;
    let mut cache = Cache::with_layout(&o.kv, policy, layout);
    for tokens in [&[3, 1, 4][..], &[5]] {
        cache.begin(tokens.len(), false).unwrap();
        runner.run(tokens, &mut cache, Outputs::All)?;
        assert_eq!(runner.logits().len(), tokens.len() * hp.n_vocab);
    }
    Ok(())
}

/// The first model of each architecture, and one with keys that it lacks.
fn files() -> Vec<(String, GgufFile)> {
    let dir = data().join("arch");
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for e in json(&dir.join("manifest.json"))["entries"]
        .as_array()
        .unwrap()
    {
        let [arch, model] = ["arch", "model"].map(|k| e[k].as_str().unwrap());
        let more = model == "nemotron_h_moe-latent.gguf";
        if e["weights"] == "F32" && (seen.insert(arch.to_owned()) || more) {
            all.push((arch.to_owned(), GgufFile::open(&dir.join(model)).unwrap()));
        }
    }
    assert!(all.len() >= 14, "only {}", all.len());
    all
}

#[test]
fn keys_of_any_value() {
    let (mut refused, mut ran) = (0, 0);
    for (arch, file) in files() {
        for (key, value) in file.meta().iter() {
            if !key.starts_with(&format!("{arch}.")) {
                continue;
            }
            let mut values = match value {
                Value::F32(_) => FLOATS.to_vec(),
                _ => NUMBERS.to_vec(),
            };
            if let Value::Array(all) = value
                && all.ints().is_some()
            {
                let places = (0..all.len()).flat_map(|i| [0, 1, 7, i32::MAX].map(|n| (i, n)));
                values.extend(places.map(|(i, n)| New::At(i, n)));
            }
            for new in values {
                let change = Change {
                    key: Some((key, new)),
                    ..Change::default()
                };
                match run(changed(&file, change)) {
                    Ok(()) => ran += 1,
                    Err(e) => {
                        let line = e.to_string();
                        assert!(!line.contains('\n'), "{key} {new:?}: {line}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 1000 && ran > 500, "{refused} refused, {ran} ran");
}

#[test]
fn tensors_that_are_missing() {
    for (arch, file) in files() {
        for t in file.tensors() {
            // Layers beyond the second have the same tensors again.
            let layer = t
                .name
                .strip_prefix("blk.")
                .and_then(|n| n.split('.').next());
            if layer.is_some_and(|n| n.parse::<u32>().unwrap() > 3) {
                continue;
            }
            let without = Change {
                without: Some(&*t.name),
                ..Change::default()
            };
            // Biases, factors and the output matrix may be missing.
            if let Err(e) = run(changed(&file, without)) {
                let line = e.to_string();
                // Some may have one of two names, and the first of them is missed.
                let other = t.name.replace("post_attention_norm", "ffn_norm");
                let other = other.replace("attn_qkv", "attn_q");
                let other = other.replace("layer_output_norm", "post_ffw_norm");
                // A layer without a router is dense where files do not say which are.
                let other = other.replace("ffn_gate_inp.", "ffn_gate.");
                let named = line.contains(&*t.name) || line.contains(&other);
                assert!(named, "{arch} without {}: {line}", t.name);
            }
        }
    }
}

/// Files of before and of tomorrow: a bias is added, or nobody looks at it.
#[test]
fn biases_that_nobody_expects() {
    for (arch, file) in files() {
        let mut seen = BTreeSet::new();
        for t in file.tensors() {
            let Some(stem) = t.name.strip_suffix(".weight") else {
                continue;
            };
            // The same of all layers.
            let kind: String = stem.chars().filter(|c| !c.is_ascii_digit()).collect();
            let bias = format!("{stem}.bias");
            if file.tensor(&bias).is_some() || !seen.insert(kind) {
                continue;
            }
            // Of what is multiplied the outputs, of norms all, of experts those of each.
            let shape = &t.shape()[usize::from(t.shape().len() > 1)..];
            let with = Change {
                with: Some((&bias, shape)),
                ..Change::default()
            };
            if let Err(e) = run(changed(&file, with)) {
                assert!(e.to_string().contains(&bias), "{arch} with {bias}: {e}");
            }
        }
    }
}
