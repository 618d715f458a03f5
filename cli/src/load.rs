//! Opening models.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use lemma_engine::gguf::GgufFile;
use lemma_engine::memory::show;
use lemma_engine::model::Model;
use lemma_engine::options::LoadOptions;

use crate::args::argv::nearest;
use crate::args::config::ModelSource;
use crate::bundled;
use crate::fail::{Failure, NOT_FOUND, Result};
use crate::out;
use crate::term::{ERASE, is_dumb};

/// A model and how long it took to open.
pub(crate) struct Loaded {
    pub(crate) model: Arc<Model>,
    pub(crate) load_ms: f64,
}

/// Opens a model to run it.
pub(crate) fn model(source: &ModelSource, o: &LoadOptions) -> Result<Loaded> {
    let start = Instant::now();
    let model = match source {
        ModelSource::Path(path) => Model::load(path, o).map_err(|e| explain(e.into(), path))?,
        ModelSource::Bundled => Model::load_static(bundled_bytes()?, bundled::NAME, o)?,
    };
    Ok(Loaded {
        model: Arc::new(model),
        load_ms: start.elapsed().as_secs_f64() * 1e3,
    })
}

/// Fails as opening does if there is no such file.
pub(crate) fn exists(source: &ModelSource) -> Result {
    match source {
        ModelSource::Path(path) if std::fs::metadata(path).is_err() => gguf(source).map(drop),
        _ => Ok(()),
    }
}

/// Draws how much of the weights has gone to a device, if that takes long enough to be looked at.
pub(crate) fn show_upload(done: u64, all: u64) {
    /// Below this it is over before anybody wonders.
    const LARGE: u64 = 1 << 30;
    static SHOWN: AtomicU64 = AtomicU64::new(u64::MAX);
    if all < LARGE || is_dumb() {
        return;
    }
    let percent = done.min(all) * 100 / all;
    if done >= all {
        out::err(ERASE);
    } else if SHOWN.swap(percent, Ordering::Relaxed) != percent {
        out::err(&format!("{ERASE}to the GPU: {percent} % of {}", show(all)));
    }
}

/// Opens a file to look at it: one that holds a vocabulary and nothing else will do.
pub(crate) fn gguf(source: &ModelSource) -> Result<GgufFile> {
    match source {
        ModelSource::Path(path) => GgufFile::open(path).map_err(|e| explain(e.into(), path)),
        ModelSource::Bundled => Ok(GgufFile::from_static(bundled_bytes()?, bundled::NAME)?),
    }
}

fn bundled_bytes() -> Result<&'static [u8]> {
    bundled::bytes().ok_or_else(|| {
        Failure::new(NOT_FOUND, "no model: this build carries none")
            .hint("name a GGUF file with -m FILE or LEMMA_MODEL")
    })
}

/// A word that is no file may have been meant as a command.
fn explain(failure: Failure, path: &Path) -> Failure {
    const COMMANDS: &[&str] = &[
        "batch",
        "bench",
        "check",
        "completions",
        "detokenize",
        "devices",
        "inspect",
        "kv",
        "perplexity",
        "quantize",
        "score",
        "synth",
        "template",
        "tokenize",
    ];
    if failure.code != NOT_FOUND || failure.hint.is_some() {
        return failure;
    }
    if path.is_dir() {
        return failure.hint("name the GGUF file in it");
    }
    let word = path.to_string_lossy();
    if let Some(near) = nearest(&word, COMMANDS.iter().copied()) {
        return failure.hint(format!("did you mean the command '{near}'?"));
    }
    if word.contains(char::is_whitespace) && !word.contains('/') {
        return failure.hint("a prompt goes behind -p");
    }
    // `llama3.2`, `qwen3:8b`, `owner/repository`: names that other programs download by.
    if !word.ends_with(".gguf") && !path.exists() {
        return failure.hint("a model is named by its GGUF file; nothing is downloaded by name");
    }
    failure
}
