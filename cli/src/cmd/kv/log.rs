//! The log of an evaluation: a header that says what was measured, then one line for each result as it comes.
//!
//! A run over a log that exists goes on where it was cut. What makes results differ and is not part of a cell is in the header (model,
//! sampling, options of the pool); a log with another header is refused rather than mixed. Problems go by set, id and a hash of their text,
//! so an edited problem is run again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::fail::{Failure, Result};
use crate::term::escape_path;

/// Where results are kept.
pub(super) struct Log {
    /// `None`: nowhere.
    file: Option<(File, PathBuf)>,
    found: HashMap<String, Value>,
}

impl Log {
    /// Opens the log at `path`, or none. `header` is what this run measures.
    pub(super) fn open(path: Option<&Path>, header: &Value) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self {
                file: None,
                found: HashMap::new(),
            });
        };
        let failed = |e: std::io::Error| Failure::file(path, &e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(failed)?;
        let (first, found, whole) = read(&file).map_err(failed)?;
        if let Some(other) = first.filter(|other| other != header) {
            return Err(mismatch(path, header, &other));
        }
        file.set_len(whole).map_err(failed)?;
        file.seek(std::io::SeekFrom::End(0)).map_err(failed)?;
        if whole == 0 {
            file.write_all(format!("{header}\n").as_bytes())
                .map_err(failed)?;
        }
        Ok(Self {
            file: Some((file, path.to_owned())),
            found,
        })
    }

    /// What the log has under a key.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.found.get(key)
    }

    /// Adds a record; its `key` field is what it is found by.
    pub(super) fn write(&mut self, record: &Value) -> Result {
        match &mut self.file {
            None => Ok(()),
            // One write: a run that is killed leaves whole lines, or one that is recognised as cut.
            Some((file, path)) => file
                .write_all(format!("{}\n", crate::record::text(record)).as_bytes())
                .map_err(|e| Failure::file(path, &e)),
        }
    }
}

/// The header, the records by key, and the length of the file up to its last whole line.
fn read(file: &File) -> std::io::Result<(Option<Value>, HashMap<String, Value>, u64)> {
    let mut reader = BufReader::new(file);
    let (mut header, mut found, mut whole) = (None, HashMap::new(), 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = reader.read_until(b'\n', &mut line)?;
        if n == 0 || line.last() != Some(&b'\n') {
            return Ok((header, found, whole));
        }
        let value = serde_json::from_slice::<Value>(&line).unwrap_or_default();
        if whole == 0 {
            header = Some(value);
        } else if let Some(key) = value["key"].as_str() {
            found.insert(key.to_owned(), value);
        }
        whole += n as u64;
    }
}

fn mismatch(path: &Path, header: &Value, other: &Value) -> Failure {
    let differs = header.as_object().and_then(|h| {
        let mut names = h.keys();
        names.find(|k| other.get(k.as_str()) != header.get(k.as_str()))
    });
    let what = differs.map_or("format", String::as_str);
    let shown = |v: &Value| crate::term::escape(&v[what].to_string());
    Failure::usage(format!(
        "{}: holds results of another {what}: {}, expected {}",
        escape_path(path),
        shown(other),
        shown(header)
    ))
    .hint("give another directory with -o, or remove this one")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn goes_on_and_refuses_to_mix() {
        let path = std::env::temp_dir().join(format!("lemma-kv-log-{}.jsonl", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let header = json!({ "v": 1, "model": "a" });
        let mut log = Log::open(Some(&path), &header).unwrap();
        log.write(&json!({ "key": "x", "right": true })).unwrap();
        drop(log);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"key\":\"y\",\"ri").unwrap();
        let mut log = Log::open(Some(&path), &header).unwrap();
        assert!(log.get("x").is_some() && log.get("y").is_none());
        log.write(&json!({ "key": "y" })).unwrap();
        let Err(e) = Log::open(Some(&path), &json!({ "v": 1, "model": "b" })) else {
            panic!("mixed")
        };
        assert!(
            e.message.contains("another model: \"a\", expected \"b\""),
            "{e}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
        let _ = std::fs::remove_file(&path);
    }
}
