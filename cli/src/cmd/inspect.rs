//! `lemma inspect`: what is in a file.
//!
//! Everything printed comes from a file that nobody has vetted, so every name and every text is escaped, and long ones are cut.

use std::collections::BTreeMap;

use lemma_engine::gguf::{GgufFile, Value};
use serde_json::{Map, Value as Json, json};

use crate::args::Invocation;
use crate::args::config;
use crate::args::tools::InspectArgs;
use crate::fail::Result;
use crate::stats::grouped;
use crate::term::{Term, escape};
use crate::{load, out, record, repl};

/// Elements of an array that are shown.
const SHOWN: usize = 4;
/// Characters of a text that are shown.
const WIDTH: usize = 100;
/// JSON gives arrays in full up to here; the vocabulary of a model would drown the rest.
const JSON_ELEMENTS: usize = 64;

pub(crate) fn run(args: &InspectArgs, invocation: &Invocation, term: Term) -> Result {
    let source = config::model_source(
        args.file.model.as_ref(),
        invocation.model_from_env(),
        args.file.positional.as_ref(),
    )?;
    let file = load::gguf(&source)?;
    if args.json {
        return out::json(&as_json(&file));
    }
    let style = term.out_style;
    let mut text = format!(
        "{}{}{}  GGUF version {}, {} keys, {} tensors, {}\n\n",
        style.bold(),
        escape(file.name()),
        style.reset(),
        file.version(),
        file.meta().len(),
        file.tensors().len(),
        repl::size(file.n_file_bytes()),
    );
    let width = file
        .meta()
        .iter()
        .map(|(k, _)| k.chars().count())
        .max()
        .unwrap_or(0)
        .min(48);
    for (key, value) in file.meta().iter() {
        text.push_str(&format!(
            "  {:<width$}  {:<6} {}\n",
            escape(key),
            kind(&value),
            shown(&value)
        ));
    }
    text.push('\n');
    let mut by_type: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    let width = file
        .tensors()
        .map(|t| t.name.chars().count())
        .max()
        .unwrap_or(0)
        .min(48);
    for t in file.tensors() {
        let shape: Vec<String> = t.shape().iter().map(u64::to_string).collect();
        let ty = t.ty.name();
        text.push_str(&format!(
            "  {:<width$}  {:<8} {:>16}  {:>14} bytes\n",
            escape(&t.name),
            ty,
            shape.join(" × "),
            grouped(t.n_bytes() as u64)
        ));
        let sum = by_type.entry(ty).or_default();
        (sum.0, sum.1) = (sum.0 + 1, sum.1 + t.n_elements());
    }
    let types: Vec<String> = by_type
        .iter()
        .map(|(ty, (n, _))| format!("{n} × {ty}"))
        .collect();
    let params: u64 = by_type.values().map(|(_, n)| n).sum();
    text.push_str(&format!(
        "\n{}{} parameters in {} of tensors{}{}{}\n",
        style.dim(),
        grouped(params),
        repl::size(file.n_tensor_bytes()),
        if types.is_empty() { "" } else { ": " },
        types.join(", "),
        style.reset()
    ));
    out::put(&text)
}

fn kind(v: &Value<'_>) -> String {
    match v {
        Value::Array(_) => "array".to_owned(),
        v => v.kind().name().to_owned(),
    }
}

fn cut(text: &str) -> String {
    let mut out: String = text.chars().take(WIDTH).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}

fn shown(v: &Value<'_>) -> String {
    match v {
        Value::Int { value, .. } => value.to_string(),
        Value::F32(x) => x.to_string(),
        Value::F64(x) => x.to_string(),
        Value::Bool(b) => b.to_string(),
        Value::Str(s) => cut(&lemma_engine::error::escape(s, 4 * WIDTH)),
        Value::Array(a) => {
            let some: Vec<String> = a
                .values()
                .take(SHOWN)
                .map(|v| {
                    if matches!(v, Value::Str(_)) {
                        format!("{:?}", shown(&v))
                    } else {
                        shown(&v)
                    }
                })
                .collect();
            let more = if a.len() > some.len() { ", …" } else { "" };
            format!(
                "{} × {} [{}{more}]",
                grouped(a.len() as u64),
                a.elem().name(),
                some.join(", ")
            )
        }
    }
}

fn as_json(file: &GgufFile) -> Json {
    let metadata: Map<String, Json> = file
        .meta()
        .iter()
        .map(|(k, v)| (k.to_owned(), value(&v)))
        .collect();
    let tensors: Vec<Json> = file
        .tensors()
        .map(|t| json!({ "name": &*t.name, "type": t.ty.name(), "shape": t.shape(), "bytes": t.n_bytes() }))
        .collect();
    json!({
        "file": file.name(),
        "version": file.version(),
        "file_bytes": file.n_file_bytes(),
        "tensor_bytes": file.n_tensor_bytes(),
        "n_params": file.tensors().map(|t| t.n_elements()).sum::<u64>(),
        "metadata": metadata,
        "tensors": tensors,
    })
}

fn value(v: &Value<'_>) -> Json {
    match v {
        Value::Int { value, .. } => i64::try_from(*value)
            .map(Json::from)
            .or_else(|_| u64::try_from(*value).map(Json::from))
            .unwrap_or(Json::Null),
        Value::F32(x) => record::number(x.to_string().parse().unwrap_or(f64::NAN)),
        Value::F64(x) => record::number(*x),
        Value::Bool(b) => (*b).into(),
        Value::Str(s) => String::from_utf8_lossy(s).into(),
        Value::Array(a) if a.len() <= JSON_ELEMENTS => a.values().map(|v| value(&v)).collect(),
        Value::Array(a) => json!({ "type": a.elem().name(), "length": a.len() }),
    }
}
