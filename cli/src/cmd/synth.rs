//! `lemma synth`: a model of random weights in the shape of a published one, to measure with and to test with.

use std::path::Path;

use lemma_engine::gguf::GgufFile;
use lemma_engine::gguf::write::temporary;
use lemma_engine::synth::{Recipe, Shape, is_synthetic, write_file};

use crate::args::argv::nearest;
use crate::args::tools::SynthArgs;
use crate::fail::{Failure, Result};
use crate::signals::Unfinished;
use crate::term::{Style, Term, escape_path};
use crate::{out, repl};

pub(crate) fn run(args: &SynthArgs, term: Term) -> Result {
    if args.list {
        return out::line(&Shape::names().collect::<Vec<_>>().join("\n"));
    }
    let (Some(shape), Some(path)) = (&args.shape, &args.output) else {
        return Err(Failure::usage("synth needs a SHAPE and -o FILE"));
    };
    names(shape, &args.ty)?;
    // What was made like this can be made again, so that scripts may write it twice.
    let again = || GgufFile::open(path).is_ok_and(|there| is_synthetic(&there));
    super::free(path, args.force || again())?;
    let n = write(shape, &args.ty, path, args.seed, term)?;
    out::note(&format!(
        "{}: {shape} {}, {}",
        escape_path(path),
        args.ty,
        repl::size(n)
    ));
    Ok(())
}

/// Writes the model; returns its size.
pub(crate) fn write(shape: &str, ty: &str, path: &Path, seed: u64, term: Term) -> Result<u64> {
    names(shape, ty)?;
    let unfinished = Unfinished::begin(temporary(path).as_deref());
    let mut shown = u64::MAX;
    let mut size = 0;
    write_file(shape, ty, seed, path, &mut |done, total| {
        size = total;
        let percent = done * 100 / total.max(1);
        if percent != shown {
            shown = percent;
            let text = format!("writing {}: {percent} %", escape_path(path));
            out::transient(&term, &text, Style::default());
        }
    })?;
    drop(unfinished);
    out::erase(&term);
    Ok(size)
}

/// Names first: a slip must not touch the disk.
fn names(shape: &str, ty: &str) -> Result {
    let names = Shape::parse(shape).and_then(|_| Recipe::parse(ty));
    names.map(|_| ()).map_err(|e| hint(e.into(), shape, ty))
}

/// The nearest name, where one was not known.
fn hint(failure: Failure, shape: &str, ty: &str) -> Failure {
    let near = if Shape::parse(shape).is_err() {
        nearest(shape, Shape::names())
    } else if Recipe::parse(ty).is_err() {
        nearest(ty, Recipe::names())
    } else {
        None
    };
    match near {
        Some(near) => failure.hint(format!("did you mean {near}?")),
        None => failure,
    }
}
