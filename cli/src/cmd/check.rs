//! `lemma check`: read a model file from end to end.
//!
//! Opening a model looks at its metadata only; this looks at every weight. It reports values that are not finite, and whether the
//! file can be run: its architecture, tokenizer and chat template.

use lemma_engine::options::LoadOptions;

use crate::args::Invocation;
use crate::args::config;
use crate::args::tools::CheckArgs;
use crate::fail::{Failure, INTERRUPT, MALFORMED, Result};
use crate::signals::{self, Polling};
use crate::stats::grouped;
use crate::term::{Style, Term, escape};
use crate::{load, out, repl};

/// Values that are decoded at a time.
const CHUNK: usize = 1 << 16;

pub(crate) fn run(args: &CheckArgs, invocation: &Invocation, term: Term) -> Result {
    let source = config::model_source(
        args.file.model.as_ref(),
        invocation.model_from_env(),
        args.file.positional.as_ref(),
    )?;
    let file = load::gguf(&source)?;
    let name = escape(file.name());
    out::line(&format!(
        "{name}: {} keys, {} tensors, {}",
        file.meta().len(),
        file.tensors().len(),
        repl::size(file.n_file_bytes())
    ))?;

    let polling = Polling::begin();
    let mut bad = Vec::new();
    let mut values = Vec::new();
    let mut n_values = 0;
    for t in file.tensors() {
        let traits = t.ty.traits();
        let n = CHUNK / traits.block_size * traits.block_size;
        values.resize(n, 0.0);
        let mut not_finite = 0;
        for block in t.data.chunks(n / traits.block_size * traits.type_size) {
            let row = &mut values[..block.len() / traits.type_size * traits.block_size];
            (traits.dequantize_row)(block, row);
            not_finite += row.iter().filter(|v| !v.is_finite()).count();
        }
        n_values += t.n_elements();
        if not_finite > 0 {
            bad.push(format!(
                "{}: {} of {} values are not finite",
                escape(&t.name),
                grouped(not_finite as u64),
                grouped(t.n_elements())
            ));
        }
        if signals::interrupted() {
            return Err(Failure::quiet(INTERRUPT));
        }
        out::transient(&term, &escape(&t.name), Style::default());
    }
    drop(polling);
    out::erase(&term);
    out::line(&format!(
        "weights: {} values read, {}",
        grouped(n_values),
        if bad.is_empty() {
            "all finite".to_owned()
        } else {
            bad.join("; ")
        }
    ))?;
    drop(file);

    let model = load::model(&source, &LoadOptions::default())?.model;
    out::line(&format!(
        "architecture: {}, {} layers",
        model.arch(),
        model.hparams().n_layer
    ))?;
    out::line(&format!(
        "tokenizer: {} tokens",
        grouped(model.tokenizer().n_vocab() as u64)
    ))?;
    match model.template() {
        Ok(_) => out::line("chat template: compiles")?,
        Err(_) if !model.has_template() => out::line("chat template: none")?,
        Err(e) => {
            out::line(&format!("chat template: {e}"))?;
            bad.push("the chat template does not compile".to_owned());
        }
    }
    verdict(&name, &bad)
}

fn verdict(name: &str, bad: &[String]) -> Result {
    match bad.first() {
        None => out::line("ok"),
        Some(first) => Err(Failure::new(MALFORMED, format!("{name}: {first}"))),
    }
}
