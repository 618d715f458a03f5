//! Synthetic models: the shapes, metadata and type mixes of published models, with seeded random weights.
//!
//! They say nothing sensible, but they load everywhere, decode at exactly the speed of the real thing, and can be made
//! anywhere in seconds: what a benchmark or a test needs. Weights have a scale at which activations stay finite, and
//! quantized tensors are made of random blocks ([`blocks`]) rather than quantized, which is a hundred times faster.
//! The same shape, type and seed give the same bytes on every machine and for every number of threads.

mod blocks;
mod shape;
mod vocab;

use std::io::{BufWriter, Write};
use std::path::Path;

use lemma_quant::GgmlType;

use crate::error::{Error, NAME_MAX, Result, escape, plain};
use crate::gguf::write::{Builder, to_file};
use crate::gguf::{GgufFile, Value};
pub use crate::quantize::Recipe;
use crate::quantize::{Facts, Place, fallback};
pub use shape::Shape;

/// What models made here say of themselves.
const DESCRIPTION: &str = "random weights in the shape of a published model";

/// Whether `file` was made here: the same could be made again.
pub fn is_synthetic(file: &GgufFile) -> bool {
    matches!(file.meta().get("general.description"), Some(Value::Str(text)) if text == DESCRIPTION.as_bytes())
}

/// Called as data is written: bytes done, bytes in total.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// A tensor to be made.
struct Plan {
    name: String,
    ty: GgmlType,
    /// Row length first.
    shape: Vec<u64>,
    fill: Fill,
}

/// What a tensor is filled with.
#[derive(Clone, Copy)]
enum Fill {
    /// Near-gaussian numbers of this mean and standard deviation.
    Random { mean: f32, std: f32 },
    /// Divisors of the rotary frequencies as Llama 3 scales them, for this factor.
    RopeFreqs { factor: f32 },
}

/// Writes a model to `out`; `ftype` is a name [`Recipe::parse`] knows, such as `q4_k_m`.
///
/// # Errors
/// [`Error::Usage`] for an unknown shape or type, [`Error::Runtime`] if `out` fails.
pub fn write(
    shape: &str,
    ftype: &str,
    seed: u64,
    out: impl Write,
    progress: Progress<'_>,
) -> Result<()> {
    let shape = Shape::parse(shape)?;
    let recipe = Recipe::parse(ftype)?;
    let plans = plan(&shape, &recipe);
    let mut builder = Builder::new();
    metadata(&shape, &recipe, &mut builder);
    for p in &plans {
        builder.tensor(&p.name, p.ty, &p.shape);
    }
    let total = builder.n_bytes();
    let failed = |e: std::io::Error| Error::runtime(plain(&e));
    let mut body = builder
        .begin(BufWriter::with_capacity(1 << 20, out))
        .map_err(failed)?;
    let mut done = 0;
    for (i, p) in plans.iter().enumerate() {
        let n: u64 = p.shape.iter().product();
        match p.fill {
            Fill::Random { mean, std } => {
                let maker = blocks::Maker::new(p.ty, mean, std)?;
                let stream = blocks::mix_seed(seed, i as u64);
                maker.stream(n, stream, &mut |piece| {
                    body.write(piece).map_err(failed)?;
                    done += piece.len() as u64;
                    progress(done, total);
                    Ok(())
                })?;
            }
            Fill::RopeFreqs { factor } => {
                let freqs = rope_freqs(shape.head_dim, shape.rope_freq_base, factor);
                let bytes: Vec<u8> = freqs.flat_map(f32::to_le_bytes).collect();
                body.write(&bytes).map_err(failed)?;
            }
        }
    }
    body.finish().map_err(failed)?;
    progress(total, total);
    Ok(())
}

/// Writes a model to the file `path`, which appears only when it is complete. What is there and not a regular file (a
/// pipe, a device) is written into, never replaced.
///
/// # Errors
/// Those of [`write`], naming the file.
pub fn write_file(
    shape: &str,
    ftype: &str,
    seed: u64,
    path: &Path,
    progress: Progress<'_>,
) -> Result<()> {
    to_file(path, |file| {
        write(shape, ftype, seed, file, progress).map(|()| true)
    })
    .map(|_| ())
}

/// All tensors of a shape with their types, in file order.
fn plan(s: &Shape, recipe: &Recipe) -> Vec<Plan> {
    let (n_embd, n_ff, n_layer) = (u64::from(s.n_embd), u64::from(s.n_ff), s.n_layer);
    let n_vocab = u64::from(s.n_vocab);
    let mut plans = Vec::new();
    let facts = facts(s);
    let matrix = |name: String, il: u32, n_in: u64, n_out: u64, std: f32| Plan {
        ty: type_of(recipe, &facts, &name, il, n_in),
        name,
        shape: vec![n_in, n_out],
        fill: Fill::Random { mean: 0.0, std },
    };
    let vector = |name: String, n: u64, mean: f32, std: f32| Plan {
        name,
        ty: GgmlType::F32,
        shape: vec![n],
        fill: Fill::Random { mean, std },
    };
    let is_gpt_oss = s.arch == "gpt-oss";
    let norm = |name: String, n: u64| vector(name, n, 1.0, 0.02);
    let unit = |n: u64| 1.0 / (n as f32).sqrt();
    // What is added to the residual stream is scaled down by depth, so that the stream's size does not depend on it.
    let depth = 1.0 / (2.0 * n_layer as f32).sqrt();
    // Logits of normalized activations get a standard deviation of 2.5: a distribution neither flat nor one-hot.
    let logits = 2.5 * unit(n_embd);

    plans.push(matrix(
        "token_embd.weight".into(),
        0,
        n_embd,
        n_vocab,
        logits,
    ));
    if let Some(factor) = s.rope_factor {
        plans.push(Plan {
            name: "rope_freqs.weight".into(),
            ty: GgmlType::F32,
            shape: vec![u64::from(s.head_dim / 2)],
            fill: Fill::RopeFreqs { factor },
        });
    }
    for il in 0..n_layer {
        let name = |part: &str| format!("blk.{il}.{part}");
        // What blocks read is normed, what they give, or both.
        let behind = ["glm4", "olmo2"].contains(&s.arch);
        let ahead = s.arch != "olmo2";
        if ahead {
            plans.push(norm(name("attn_norm.weight"), n_embd));
        }
        if let Some([n_k, n_v, dim]) = s.delta.filter(|_| (il + 1) % 4 != 0) {
            let [n_k, n_v, dim] = [n_k, n_v, dim].map(u64::from);
            let (n_qkv, values) = ((2 * n_k + n_v) * dim, n_v * dim);
            for (part, n) in [
                ("attn_qkv", n_qkv),
                ("attn_gate", values),
                ("ssm_beta", n_v),
                ("ssm_alpha", n_v),
            ] {
                let part = name(&format!("{part}.weight"));
                plans.push(matrix(part, il, n_embd, n, unit(n_embd)));
            }
            let mut conv = vector(name("ssm_conv1d.weight"), 4, 0.0, 0.5);
            conv.shape.push(n_qkv);
            plans.extend([
                conv,
                vector(name("ssm_a"), n_v, -1.0, 0.2),
                vector(name("ssm_dt.bias"), n_v, 0.0, 0.1),
                norm(name("ssm_norm.weight"), dim),
            ]);
            let out = name("ssm_out.weight");
            plans.push(matrix(out, il, values, n_embd, depth * unit(values)));
        } else {
            plans.extend(attention(s, il, &matrix, &vector));
        }
        let ffn_norm = match is_gpt_oss || ["seed_oss", "qwen35"].contains(&s.arch) {
            true => "post_attention_norm.weight",
            false => "ffn_norm.weight",
        };
        if behind {
            plans.push(norm(name("post_attention_norm.weight"), n_embd));
            plans.push(norm(name("post_ffw_norm.weight"), n_embd));
        }
        if ahead {
            plans.push(norm(name(ffn_norm), n_embd));
        }
        let n_expert = u64::from(s.n_expert);
        if n_expert > 0 {
            let router = name("ffn_gate_inp.weight");
            plans.push(matrix(router, il, n_embd, n_expert, unit(n_embd)));
        }
        if is_gpt_oss {
            plans.push(vector(name("ffn_gate_inp.bias"), n_expert, 0.0, 0.1));
        }
        let [mut gate, mut up] =
            ["ffn_gate", "ffn_up"].map(|part| (part, n_embd, n_ff, unit(n_embd)));
        if s.arch == "glm4" {
            // Both in one matrix.
            (gate.2, up.2) = (0, 2 * n_ff);
        }
        let down = ("ffn_down", n_ff, n_embd, depth * unit(n_ff));
        for (part, n_in, n_out, std) in [gate, up, down].into_iter().filter(|part| part.2 > 0) {
            if n_expert == 0 {
                plans.push(matrix(
                    name(&format!("{part}.weight")),
                    il,
                    n_in,
                    n_out,
                    std,
                ));
                continue;
            }
            let mut all = matrix(name(&format!("{part}_exps.weight")), il, n_in, n_out, std);
            all.shape.push(n_expert);
            plans.push(all);
            if is_gpt_oss {
                let mut all = vector(name(&format!("{part}_exps.bias")), n_out, 0.0, 0.1);
                all.shape.push(n_expert);
                plans.push(all);
            }
        }
    }
    plans.push(norm("output_norm.weight".into(), n_embd));
    if !s.tied {
        plans.push(matrix("output.weight".into(), 0, n_embd, n_vocab, logits));
    }
    plans
}

/// The tensors of a layer's attention, made as the others are: a matrix by name, layer, shape and size of its numbers, a vector by name,
/// length, mean and size.
fn attention(
    s: &Shape,
    il: u32,
    matrix: &dyn Fn(String, u32, u64, u64, f32) -> Plan,
    vector: &dyn Fn(String, u64, f32, f32) -> Plan,
) -> Vec<Plan> {
    let n_embd = u64::from(s.n_embd);
    let n_q = u64::from(s.n_head * s.head_dim);
    let n_kv = u64::from(s.n_head_kv * s.head_dim);
    let unit = |n: u64| 1.0 / (n as f32).sqrt();
    let depth = 1.0 / (2.0 * s.n_layer as f32).sqrt();
    let name = |part: &str| format!("blk.{il}.{part}");
    let is_gpt_oss = s.arch == "gpt-oss";
    // Queries have their gates beside them.
    let n_q_rows = if s.delta.is_some() { 2 * n_q } else { n_q };
    let mut plans = Vec::new();
    for (part, n) in [("attn_q", n_q_rows), ("attn_k", n_kv), ("attn_v", n_kv)] {
        let weight = name(&format!("{part}.weight"));
        plans.push(matrix(weight, il, n_embd, n, unit(n_embd)));
        if is_gpt_oss || ["qwen2", "seed_oss", "glm4"].contains(&s.arch) {
            plans.push(vector(name(&format!("{part}.bias")), n, 0.0, 0.1));
        }
    }
    if ["qwen3", "qwen3moe", "qwen35"].contains(&s.arch) {
        for part in ["attn_q_norm.weight", "attn_k_norm.weight"] {
            plans.push(vector(name(part), u64::from(s.head_dim), 1.0, 0.02));
        }
    }
    if s.arch == "olmo2" {
        for (part, n) in [("attn_q_norm.weight", n_q), ("attn_k_norm.weight", n_kv)] {
            plans.push(vector(name(part), n, 1.0, 0.02));
        }
    }
    let out = name("attn_output.weight");
    plans.push(matrix(out, il, n_q, n_embd, depth * unit(n_q)));
    if is_gpt_oss {
        plans.push(vector(name("attn_output.bias"), n_embd, 0.0, 0.1));
        let sinks = name("attn_sinks.weight");
        plans.push(vector(sinks, u64::from(s.n_head), 0.0, 1.0));
    }
    plans
}

/// What the rules of a mix ask about a shape.
fn facts(s: &Shape) -> Facts {
    Facts {
        importance: false,
        n_layer: s.n_layer,
        n_attn_v: s.delta.map_or(s.n_layer, |_| s.n_layer / 4),
        n_gqa: s.n_head / s.n_head_kv,
        n_expert: s.n_expert,
        tied: s.tied,
        is_70b: Facts::is_70b(s.arch, s.n_layer, s.n_head, s.n_head_kv),
        is_falcon: s.arch == "falcon",
    }
}

/// The type of the matrix `name` in layer `il`, with rows of `n_in` values.
fn type_of(recipe: &Recipe, facts: &Facts, name: &str, il: u32, n_in: u64) -> GgmlType {
    // A router decides what everything else is worth; published files never quantize it.
    if name.contains("ffn_gate_inp") {
        return GgmlType::F32;
    }
    let place = Place {
        name,
        index: il,
        n_in,
        stacked: name.contains("_exps"),
    };
    // A shape is there to be measured: where nothing is published, something near has to serve.
    let near = || match n_in.is_multiple_of(GgmlType::Q4_0.block_size() as u64) {
        true => GgmlType::Q4_0,
        false => GgmlType::F16,
    };
    fallback(recipe.type_of(&place, facts), n_in).unwrap_or_else(near)
}

/// Hyper-parameters, vocabulary and template.
fn metadata(s: &Shape, recipe: &Recipe, b: &mut Builder) {
    let key = |k: &str| format!("{}.{k}", s.arch);
    b.str("general.architecture", s.arch)
        .str("general.type", "model")
        .str(
            "general.name",
            &format!("synthetic {}", escape(s.name, NAME_MAX)),
        )
        .str("general.description", DESCRIPTION)
        .u32("general.file_type", recipe.file_type)
        .u32("general.quantization_version", 2)
        .u32(&key("block_count"), s.n_layer)
        .u32(&key("context_length"), s.n_ctx)
        .u32(&key("embedding_length"), s.n_embd)
        .u32(&key("feed_forward_length"), s.n_ff)
        .u32(&key("attention.head_count"), s.n_head)
        .u32(&key("attention.head_count_kv"), s.n_head_kv)
        .u32(&key("attention.key_length"), s.head_dim)
        .u32(&key("attention.value_length"), s.head_dim)
        .f32(&key("attention.layer_norm_rms_epsilon"), s.norm_rms_eps)
        .f32(&key("rope.freq_base"), s.rope_freq_base)
        .u32(
            &key("rope.dimension_count"),
            // Of heads beside delta nets a quarter.
            match s.arch {
                "qwen35" => s.head_dim / 4,
                "glm4" => s.head_dim / 2,
                _ => s.head_dim,
            },
        )
        .u32(&key("vocab_size"), s.n_vocab);
    if let Some([n_k, n_v, dim]) = s.delta {
        // Pairs take turns of three coordinates, which are the same in text.
        let section = s.head_dim as i32 / 24 + 1;
        let sections = [section, section, section, 0];
        b.i32s(&key("rope.dimension_sections"), sections.into_iter())
            .u32(&key("full_attention_interval"), 4)
            .u32(&key("ssm.conv_kernel"), 4)
            .u32(&key("ssm.state_size"), dim)
            .u32(&key("ssm.group_count"), n_k)
            .u32(&key("ssm.time_step_rank"), n_v)
            .u32(&key("ssm.inner_size"), n_v * dim);
    }
    if s.n_expert > 0 {
        b.u32(&key("expert_count"), s.n_expert)
            .u32(&key("expert_used_count"), s.n_expert_used)
            .u32(&key("expert_feed_forward_length"), s.n_ff);
    }
    if let Some(window) = s.window {
        b.u32(&key("attention.sliding_window"), window);
    }
    if let Some((factor, n_ctx)) = s.yarn {
        b.str(&key("rope.scaling.type"), "yarn")
            .f32(&key("rope.scaling.factor"), factor)
            .u32(&key("rope.scaling.original_context_length"), n_ctx);
    }
    vocab::metadata(s, b);
}

/// Llama 3's divisors of the rotary frequencies: low frequencies are slowed by `factor`, high ones kept, and those
/// between blended (published with Llama 3.1; training context 8192, bounds 1 and 4).
fn rope_freqs(head_dim: u32, base: f32, factor: f32) -> impl Iterator<Item = f32> {
    let (low, high, n_ctx) = (1.0_f32, 4.0_f32, 8192.0_f32);
    (0..head_dim / 2).map(move |i| {
        let freq = base.powf(-2.0 * i as f32 / head_dim as f32);
        let wavelength = 2.0 * std::f32::consts::PI / freq;
        if wavelength < n_ctx / high {
            1.0
        } else if wavelength > n_ctx / low {
            factor
        } else {
            let smooth = (n_ctx / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFile;

    fn make(shape: &str, ftype: &str, seed: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut last = 0;
        write(shape, ftype, seed, &mut out, &mut |done, total| {
            assert!(done >= last && done <= total);
            last = done;
        })
        .unwrap();
        assert_eq!(last, out.len() as u64);
        out
    }

    #[test]
    fn every_tiny_shape_and_type_opens_with_weights_of_sensible_scale() {
        let pure = GgmlType::ALL.iter().map(|ty| format!("pure:{ty}"));
        for (i, ftype) in Recipe::names().map(String::from).chain(pure).enumerate() {
            let ftype = ftype.as_str();
            if write("tiny", ftype, 0, &mut std::io::sink(), &mut |_, _| ()).is_err() {
                continue; // not a type of weights
            }
            let shape = [
                "tiny",
                "tiny-llama",
                "tiny-qwen2",
                "tiny-gpt-oss",
                "tiny-qwen35",
                "tiny-glm4",
                "tiny-olmo2",
            ][i % 7];
            let file = GgufFile::from_bytes(make(shape, ftype, 1), ftype).unwrap();
            for t in file.tensors() {
                let mut x = vec![0.0; t.n_elements() as usize];
                (t.ty.traits().dequantize_row)(t.data, &mut x);
                let rms = (x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32).sqrt();
                let expected = match &*t.name {
                    _ if x.len() < 16 => continue, // a handful of numbers may be anything
                    n if n.ends_with("norm.weight") || n.ends_with("ssm_a") => 1.0,
                    n if n.contains("conv1d") => 0.5,
                    n if n.contains("ssm_out") => 0.35 / (t.dims[0] as f32).sqrt(),
                    n if n.ends_with(".bias") => 0.1,
                    "rope_freqs.weight" => continue,
                    "token_embd.weight" | "output.weight" => 2.5 / 16.0,
                    n if n.contains("attn_output") || n.contains("ffn_down") => {
                        0.5 / (t.dims[0] as f32).sqrt()
                    }
                    _ => 1.0 / 16.0,
                };
                // Power-of-two scales cannot be closer than a factor of the square root of two.
                assert!(
                    (0.6..1.6).contains(&(rms / expected)),
                    "{ftype} {} {}: {rms} vs {expected}",
                    t.name,
                    t.ty
                );
            }
        }
    }

    #[test]
    fn same_seed_same_bytes() {
        let a = make("tiny", "q4_k_m", 7);
        assert!(a == make("tiny", "q4_k_m", 7));
        assert!(a != make("tiny", "q4_k_m", 8));
    }

    #[test]
    fn a_file_appears_whole_and_a_pipe_stays_a_pipe() {
        let dir = std::env::temp_dir().join(format!("lemma-synth-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (file, pipe) = (dir.join("a.gguf"), dir.join("pipe"));
        write_file("tiny", "q8_0", 3, &file, &mut |_, _| ()).unwrap();
        assert!(
            std::process::Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read(pipe).unwrap()
        });
        write_file("tiny", "q8_0", 3, &pipe, &mut |_, _| ()).unwrap();
        assert!(reader.join().unwrap() == std::fs::read(&file).unwrap());
        assert!(!pipe.metadata().unwrap().is_file());
        assert!(write_file("tiny", "q8_0", 3, &dir, &mut |_, _| ()).is_err());
        assert_eq!(
            std::fs::read_dir(&dir).unwrap().count(),
            2,
            "no temporary file is left"
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn experts_alone_are_of_the_type_that_is_made_for_them() {
        let recipe = Recipe::parse("mxfp4").unwrap();
        let plans = plan(&Shape::parse("gpt-oss-20b").unwrap(), &recipe);
        let of = |ty: &str| plans.iter().filter(|p| p.ty.name() == ty).count();
        // As in the published file.
        assert_eq!((of("f32"), of("q8_0"), of("mxfp4")), (289, 98, 72));
        let elements = plans.iter().map(|p| p.shape.iter().product::<u64>());
        assert_eq!(elements.sum::<u64>() / 100_000_000, 209);
        let recipe = Recipe::parse("q4_k_m").unwrap();
        let plans = plan(&Shape::parse("qwen3-30b-a3b").unwrap(), &recipe);
        let elements = plans.iter().map(|p| p.shape.iter().product::<u64>());
        assert_eq!(
            (plans.len(), elements.sum::<u64>() / 100_000_000),
            (579, 305)
        );
    }

    #[test]
    fn three_layers_of_four_are_delta_nets() {
        let recipe = Recipe::parse("q4_k_m").unwrap();
        let plans = plan(&Shape::parse("qwen3.5-4b").unwrap(), &recipe);
        let of = |part: &str| plans.iter().filter(|p| p.name.contains(part)).count();
        assert_eq!((of("ssm_out"), of("attn_qkv"), of("attn_q.")), (24, 24, 8));
        let elements = plans.iter().map(|p| p.shape.iter().product::<u64>());
        assert_eq!(
            (plans.len(), elements.sum::<u64>() / 100_000_000),
            (426, 42)
        );
    }

    #[test]
    fn q4_k_m_mix_is_that_of_published_files() {
        let recipe = Recipe::parse("q4_k_m").unwrap();
        let types = |shape: &str| -> Vec<(String, &'static str)> {
            let plans = plan(&Shape::parse(shape).unwrap(), &recipe);
            plans.into_iter().map(|p| (p.name, p.ty.name())).collect()
        };
        let llama = types("llama-3.1-8b");
        let of = |name: &str| llama.iter().find(|t| t.0 == name).unwrap().1;
        assert_eq!(of("token_embd.weight"), "q4_K");
        assert_eq!(of("output.weight"), "q6_K");
        let six = |part: &str| {
            (0..32)
                .filter(|il| of(&format!("blk.{il}.{part}.weight")) == "q6_K")
                .collect::<Vec<_>>()
        };
        let more = vec![0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31];
        assert_eq!(six("ffn_down"), more);
        assert_eq!(six("attn_v"), more);
        assert!(six("attn_q").is_empty());
        // Tied embeddings serve as the output and get its type; rows of 896 do not fit blocks of 256.
        assert_eq!(types("qwen3-0.6b")[0].1, "q6_K");
        let small = types("qwen2.5-0.5b");
        assert_eq!(small[0].1, "q8_0");
        assert!(
            small
                .iter()
                .any(|t| t.0 == "blk.10.attn_q.weight" && t.1 == "q5_0")
        );
    }
}
