//! Models in parts: `NAME-00001-of-0000N.gguf` and the keys `split.no`, `split.count`, `split.tensors.count`.

use std::path::{Path, PathBuf};

use super::source::Source;
use super::{Meta, Part};
use crate::error::{Error, Result};

/// A view of one part's metadata. Parts other than the first have a handful of keys, so no sorted index is kept.
fn with_meta<T>(part: &Part, f: impl FnOnce(Meta<'_>) -> T) -> T {
    let (bytes, kv) = (part.source.bytes(), &part.header.kv);
    let mut sorted: Vec<u32> = (0..kv.len() as u32).collect();
    sorted.sort_unstable_by_key(|i| &bytes[kv[*i as usize].key.clone()]);
    f(Meta {
        file: &part.name,
        bytes,
        header: &part.header,
        sorted: &sorted,
    })
}

/// How many parts the model has: `split.count`, 1 without the key.
pub(super) fn count(part: &Part) -> Result<u64> {
    with_meta(part, |meta| {
        Ok(meta.opt_u64("split.count")?.unwrap_or(1).max(1))
    })
}

/// All parts of the model that `first` (at `path`) begins.
pub(super) fn complete(path: &Path, first: Part) -> Result<Vec<Part>> {
    let n = count(&first)?;
    if n == 1 {
        return Ok(vec![first]);
    }
    let (no, n_tensors) = with_meta(&first, |meta| {
        Ok::<_, Error>((
            meta.opt_u64("split.no")?.unwrap_or(0),
            meta.opt_u64("split.tensors.count")?,
        ))
    })?;
    if no != 0 {
        return Err(Error::malformed_in(
            &first.name,
            format!(
                "is part {} of a split model of {n}, expected the first part (-00001-of-{n:05}.gguf)",
                no + 1
            ),
        ));
    }
    let Some(prefix) = prefix(path, n) else {
        return Err(Error::malformed_in(
            &first.name,
            format!("split.count is {n}, but the name does not end in -00001-of-{n:05}.gguf, expected it to"),
        )
        .with_hint("give the parts of a split model their original names"));
    };
    let mut parts = vec![first];
    for i in 1..n {
        let path = part_path(path, &prefix, i, n);
        let name = path.to_string_lossy().into_owned();
        let source = Source::open(&path).map_err(|e| match e {
            Error::NotFound(_) => Error::not_found_in(
                &name,
                format!(
                    "part {} of {n} of the split model is missing, expected it beside the first",
                    i + 1
                ),
            ),
            e => e,
        })?;
        let part = Part::new(name, source)?;
        let found = with_meta(&part, |meta| {
            Ok::<_, Error>((meta.u64("split.no")?, meta.u64("split.count")?))
        })?;
        if found != (i, n) {
            return Err(Error::malformed_in(
                &part.name,
                format!(
                    "says it is split {} of {}, expected {i} of {n}",
                    found.0, found.1
                ),
            ));
        }
        parts.push(part);
    }
    let found: usize = parts.iter().map(|p| p.header.tensors.len()).sum();
    match n_tensors {
        Some(expected) if expected != found as u64 => Err(Error::malformed_in(
            &parts[0].name,
            format!(
                "the {n} parts of the split model hold {found} tensors, expected {expected} (split.tensors.count)"
            ),
        )),
        _ => Ok(parts),
    }
}

/// The file name up to the part number; `None` if it does not end like the first of `n` parts.
fn prefix(path: &Path, n: u64) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(&format!("-00001-of-{n:05}.gguf"))
        .map(str::to_owned)
}

fn part_path(first: &Path, prefix: &str, i: u64, n: u64) -> PathBuf {
    first.with_file_name(format!("{prefix}-{:05}-of-{n:05}.gguf", i + 1))
}
