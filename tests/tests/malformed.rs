//! Malformed and odd GGUF files: each must load, or fail with an error that names the culprit, as its manifest says.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lemma_engine::error::Error;
use lemma_engine::model::Model;
use lemma_engine::options::LoadOptions;
use lemma_engine::session::Session;
use lemma_tests::{folders, json};
use serde_json::Value;

/// Loads all that a command would load.
fn load_everything(path: &Path) -> Result<(), Error> {
    let o = LoadOptions::default();
    let model = Model::load(path, &o)?;
    model.tokenizer().ready().map_err(Error::from)?;
    let mut session = Session::new(Arc::new(model), &o)?;
    for token in 0..3 {
        session.decode(token)?;
    }
    Ok(())
}

/// The cases of a folder.
fn cases(folder: &Path) -> Vec<Value> {
    let manifest = json(&folder.join("manifest.json"));
    let cases = manifest.get("cases").unwrap_or(&manifest);
    cases.as_array().unwrap().clone()
}

/// A fresh directory for files that are made here; removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("lemma-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sparse(path: &Path, len: u64) {
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
        .set_len(len)
        .unwrap();
}

fn make_special(name: &str, folder: &Path, dir: &Path) -> PathBuf {
    let path = dir.join(name);
    match name {
        "special-directory.gguf" => fs::create_dir(&path).unwrap(),
        "special-sparse-zero-1GB.gguf" => sparse(&path, 1 << 30),
        "special-sparse-valid-head.gguf" => {
            fs::copy(folder.join("ok-control.gguf"), &path).unwrap();
            sparse(&path, 4 << 30);
        }
        _ => panic!("unknown special case {name}"),
    }
    path
}

/// The manifest's patterns are alternatives of plain words, in which only the dot is escaped.
fn matches(pattern: &str, line: &str) -> bool {
    let line = line.to_lowercase();
    pattern
        .split('|')
        .any(|word| line.contains(&word.replace('\\', "").to_lowercase()))
}

/// `Err` with the reason if an error is not one printable line that names all it should.
fn check_error(e: &Error, case: &Value) -> Result<(), String> {
    // The name of the case itself must not count as naming the culprit.
    let file = e
        .report()
        .file()
        .unwrap_or("")
        .replace(case["file"].as_str().unwrap(), "");
    let line = format!("{file} {}", e.report().what());
    if e.to_string().chars().any(char::is_control) {
        return Err(format!("control characters in {e:?}"));
    }
    for pattern in case["should_name"].as_array().unwrap() {
        let pattern = pattern.as_str().unwrap();
        if !matches(pattern, &line) {
            return Err(format!("does not name /{pattern}/: {e}"));
        }
    }
    Ok(())
}

#[test]
fn every_case_is_loaded_or_refused_by_name() {
    for folder in folders("malformed") {
        check_cases(&folder);
    }
}

fn check_cases(folder: &Path) {
    let scratch = Scratch::new("malformed");
    let mut wrong = Vec::new();
    for case in &cases(folder) {
        let (name, expect) = (
            case["file"].as_str().unwrap(),
            case["expect"].as_str().unwrap(),
        );
        let path = if name.starts_with("special-") {
            make_special(name, folder, &scratch.0)
        } else {
            folder.join(name)
        };
        let start = Instant::now();
        let result = load_everything(&path);
        let verdict = match (&result, expect) {
            (Err(e), "error" | "no_crash") => check_error(e, case),
            (Ok(()), "load" | "no_crash" | "load_but_chat_error") => Ok(()),
            (Ok(()), _) => Err("loads".to_owned()),
            (Err(e), _) => Err(format!("must load, but: {e}")),
        };
        if let Err(why) = verdict {
            wrong.push(format!("{name}: expected {expect}: {why}"));
        }
        if start.elapsed() > Duration::from_secs(2) {
            wrong.push(format!("{name}: took {:?}", start.elapsed()));
        }
        let exit_code = if matches!(name, "special-directory.gguf" | "split-00001-of-00003.gguf") {
            3
        } else {
            4
        };
        if let Err(e) = &result
            && e.exit_code() != exit_code
        {
            wrong.push(format!(
                "{name}: exit code {}, expected {exit_code}: {e}",
                e.exit_code()
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}, {} cases:\n{}",
        folder.display(),
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn what_is_not_a_file_is_refused_at_once() {
    let scratch = Scratch::new("not-a-file");
    let fifo = scratch.0.join("pipe.gguf");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    for (path, named) in [
        (fifo.as_path(), "regular file"),
        (Path::new("/dev/zero"), "regular file"),
        (Path::new("/dev/null"), "regular file"),
        (Path::new("/nonexistent/model.gguf"), "no such file"),
        (scratch.0.as_path(), "directory"),
        (Path::new("/dev/null/model.gguf"), "cannot be read"),
    ] {
        let e = load_everything(path).unwrap_err();
        assert_eq!(e.exit_code(), 3, "{e}");
        assert!(e.to_string().contains(named), "{e}");
    }
}
