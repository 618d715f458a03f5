//! `lemma quantize`: the same model with other types of weights.

use std::path::Path;
use std::sync::Arc;

use lemma_engine::gguf::GgufFile;
use lemma_engine::gguf::write::temporary;
use lemma_engine::quantize::{self, Importance, Options, Override, Plan, Recipe};

use crate::args::argv::nearest;
use crate::args::config::{self, ModelSource};
use crate::args::tools::QuantizeArgs;
use crate::fail::{Failure, INTERRUPT, Result};
use crate::signals::{self, Polling, Unfinished};
use crate::stats::grouped;
use crate::term::{Style, Term, escape, escape_path};
use crate::{load, out, repl};

pub(crate) fn run(args: &QuantizeArgs, term: Term) -> Result {
    // Names first: a slip must not cost anything.
    let (ty, output) = match &args.ty {
        Some(ty) => (ty.clone(), Some(&*args.output)),
        // Nothing is written, so two words say all.
        None if args.dry_run => (args.output.to_string_lossy().into_owned(), None),
        None => {
            return Err(Failure::usage("quantize needs IN, OUT and TYPE")
                .hint("'lemma quantize --help' explains them"));
        }
    };
    let options = options(args, &ty)?;
    let n_threads = config::threads(args.last_threads.or(args.threads).unwrap_or(0))?;
    let file = load::gguf(&ModelSource::Path(args.input.clone()))?;
    let path = output.filter(|_| !args.dry_run);
    if let Some(path) = path {
        free(&file, &args.input, path, args.force)?;
    }
    let plan = quantize::plan(&file, &options)?;
    for line in plan.fallbacks() {
        log::warn!("{line}");
    }
    if let Some(first) = plan.unweighted().next() {
        let more = match plan.unweighted().count() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        log::warn!(
            "{}{more}: not in the importance matrix, written without",
            escape(&first.info.name)
        );
    }
    let Some(path) = path else {
        return list(&file, &plan);
    };

    let name = escape_path(path);
    let unfinished = Unfinished::begin(temporary(path).as_deref());
    let polling = Polling::begin();
    let mut shown = u64::MAX;
    let done = quantize::write_file(&file, &plan, n_threads, path, &mut |done, total| {
        let percent = done * 100 / total.max(1);
        if percent != shown {
            shown = percent;
            let text = format!("writing {name}: {percent} %");
            out::transient(&term, &text, Style::default());
        }
        !signals::interrupted()
    });
    drop((polling, unfinished));
    out::erase(&term);
    if !done? {
        return Err(Failure::quiet(INTERRUPT));
    }
    out::note(&format!("{name}: {}", summary(&file, &plan)));
    Ok(())
}

fn options(args: &QuantizeArgs, ty: &str) -> Result<Options> {
    let recipe = Recipe::parse(ty).map_err(|e| match nearest(ty, Recipe::names()) {
        Some(near) => Failure::from(e).hint(format!("did you mean {near}?")),
        None => e.into(),
    })?;
    let recipe = match args.pure {
        true => recipe.into_pure(),
        false => recipe,
    };
    let named = |flag: &str, e: lemma_engine::error::Error| {
        let failure = Failure::from(e);
        Failure {
            message: format!("{flag}: {}", failure.message),
            ..failure
        }
    };
    let of = |flag: &str, name: &Option<String>| {
        let ty = name.as_deref().map(quantize::writable).transpose();
        ty.map_err(|e| named(flag, e))
    };
    let importance = args.imatrix.as_deref().map(Importance::open);
    let overrides = args.tensor_type.iter().map(|text| Override::parse(text));
    Ok(Options {
        output_tensor: of("--output-tensor-type", &args.output_tensor_type)?,
        token_embedding: of("--token-embedding-type", &args.token_embedding_type)?,
        overrides: overrides
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| named("--tensor-type", e))?,
        leave_output: args.leave_output_tensor,
        allow_requantize: args.allow_requantize,
        importance: importance.transpose()?.map(Arc::new),
        ..Options::new(recipe)
    })
}

/// Refuses to write over what is being read, and over what somebody may want to keep.
fn free(file: &GgufFile, input: &Path, output: &Path, force: bool) -> Result {
    let there = output.metadata();
    let is_same = |path: &Path| match (path.metadata(), &there) {
        (Ok(m), Ok(there)) => super::is_same_file(&m, there),
        _ => false,
    };
    if is_same(input) || file.part_names().any(|part| is_same(Path::new(part))) {
        return Err(Failure::usage(format!(
            "{}: is the model to be read, expected another file",
            escape_path(output)
        )));
    }
    super::free(output, force)
}

/// What every tensor would become.
fn list(file: &GgufFile, plan: &Plan) -> Result {
    let rows: Vec<[String; 4]> = plan.tensors.iter().map(row).collect();
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    for [name, shape, types, sizes] in &rows {
        let [a, b, c] = widths;
        out::line(&format!("{name:a$}  {shape:>b$}  {types:c$}  {sizes}"))?;
    }
    out::line(&format!("{}: {}", escape(file.name()), summary(file, plan)))
}

fn row(t: &quantize::Planned) -> [String; 4] {
    let shape: Vec<String> = t.info.shape().iter().map(|&d| grouped(d)).collect();
    let before = grouped(t.info.n_bytes() as u64);
    let (types, sizes) = match t.ty == t.info.ty {
        true => (t.ty.name().to_owned(), before),
        false => (
            format!("{} -> {}", t.info.ty, t.ty),
            format!("{before} -> {}", grouped(t.n_bytes)),
        ),
    };
    let sizes = format!("{sizes} bytes");
    [escape(&t.info.name), shape.join(" × "), types, sizes]
}

/// Sizes and bits before and after.
fn summary(file: &GgufFile, plan: &Plan) -> String {
    let bits = |n_bytes: u64| n_bytes as f64 * 8.0 / plan.n_elements().max(1) as f64;
    format!(
        "{} -> {}, {:.2} -> {:.2} bits per weight",
        repl::size(file.n_file_bytes()),
        repl::size(quantize::n_file_bytes(file, plan)),
        bits(plan.n_bytes_before()),
        bits(plan.n_bytes_after())
    )
}
