//! The tokenizer against reference data made with llama.cpp: ids, pieces, detokenization, end-of-generation sets.
//! See `tests/data/tokenizer/README.md` for the format and for the two environment variables that add data.

use lemma_engine::gguf::GgufFile;
use lemma_engine::tokenizer::{Tokenizer, TokenizerOptions};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn open(path: &Path) -> Tokenizer {
    let file = GgufFile::open(path).unwrap();
    Tokenizer::from_gguf(&file, &TokenizerOptions::default()).unwrap()
}

fn data_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tokenizer")];
    if let Some(dir) = std::env::var_os("LEMMA_FIXTURES").filter(|v| !v.is_empty()) {
        let dir = PathBuf::from(dir);
        let sub = dir.join("tokenizer");
        dirs.push(if sub.is_dir() { sub } else { dir });
    }
    dirs
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

fn ids_of(v: &Value) -> Vec<u32> {
    v.as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[derive(Default)]
struct Report {
    checked: usize,
    failures: Vec<String>,
}

impl Report {
    fn check(&mut self, ok: bool, what: impl FnOnce() -> String) {
        self.checked += 1;
        if !ok {
            self.failures.push(what());
        }
    }
    fn finish(self, name: &str) {
        let n = self.failures.len();
        assert!(
            n == 0,
            "{name}: {n} of {} checks failed:\n{}",
            self.checked,
            self.failures[..n.min(20)].join("\n")
        );
        assert!(self.checked > 0, "{name}: no data");
    }
}

fn adversarial(t: &Tokenizer, record: &Value, report: &mut Report) {
    let text = record["text"].as_str().unwrap();
    let want = ids_of(&record["ids"]);
    let add = record["add_special"].as_bool().unwrap_or(false);
    let modes: &[bool] = match &record["parse_special"] {
        Value::Bool(true) => &[true],
        Value::Bool(false) => &[false],
        _ => &[true, false],
    };
    for &parse in modes {
        let got = t.encode(text, add, parse);
        report.check(got == want, || {
            format!("{text:?} parse {parse} add {add}: {got:?}, want {want:?}")
        });
    }
    if let Some(pieces) = record["pieces_hex"].as_array() {
        for (&id, piece) in want.iter().zip(pieces) {
            let got = hex(t.token_bytes(id, true));
            report.check(got == piece.as_str().unwrap(), || {
                format!("piece of {id}: {got}, want {piece}")
            });
        }
    }
    let want_text = match record["detok_hex"].as_str() {
        Some(h) => h.to_owned(),
        None if record["detok_equals_text"] == Value::Bool(true) => hex(text.as_bytes()),
        None => return,
    };
    let got = hex(&t.decode(&want, false, true));
    report.check(got == want_text, || {
        format!("detokenize {text:?}: {got}, want {want_text}")
    });
}

/// A few short texts do without the complete model: here every fourth meets a new tokenizer (some of them, to save time).
#[test]
fn reference_data_for_new_tokenizers() {
    for dir in data_dirs() {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        for vocab in manifest["vocabs"].as_array().unwrap() {
            let name = vocab["name"].as_str().unwrap();
            let path = dir.join(vocab["gguf"].as_str().unwrap());
            let mut report = Report::default();
            let records = json_lines(&dir.join(format!("{name}.adversarial.jsonl")));
            for records in records.chunks(4).step_by(4) {
                let t = open(&path);
                for record in records {
                    let text = record["text"].as_str().unwrap();
                    let add = record["add_special"].as_bool().unwrap_or(false);
                    let parse = record["parse_special"].as_bool().unwrap_or(true);
                    let (got, want) = (t.encode(text, add, parse), ids_of(&record["ids"]));
                    report.check(got == want, || format!("{text:?}: {got:?}, want {want:?}"));
                }
            }
            report.finish(name);
        }
    }
}

#[test]
fn reference_data() {
    for dir in data_dirs() {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        for vocab in manifest["vocabs"].as_array().unwrap() {
            let name = vocab["name"].as_str().unwrap();
            let t = open(&dir.join(vocab["gguf"].as_str().unwrap()));
            t.ready().unwrap();
            let mut report = Report::default();

            report.check(
                t.n_vocab() as u64 == vocab["n_tokens"].as_u64().unwrap(),
                || "n_vocab".into(),
            );
            report.check(t.bos().map(u64::from) == vocab["bos"].as_u64(), || {
                format!("bos {:?}", t.bos())
            });
            report.check(t.eos().map(u64::from) == vocab["eos"].as_u64(), || {
                format!("eos {:?}", t.eos())
            });
            report.check(Some(t.add_bos()) == vocab["add_bos"].as_bool(), || {
                "add_bos".into()
            });
            report.check(Some(t.add_eos()) == vocab["add_eos"].as_bool(), || {
                "add_eos".into()
            });
            let eog = ids_of(&vocab["eog_ids"]);
            report.check(t.eog() == eog, || {
                format!("eog {:?}, want {eog:?}", t.eog())
            });
            let mut want: Vec<u32> = vocab["load_warnings"]
                .as_array()
                .unwrap()
                .iter()
                .map(|w| {
                    w.as_str()
                        .unwrap()
                        .split_once("token:")
                        .unwrap()
                        .1
                        .split_whitespace()
                        .next()
                        .unwrap()
                })
                .map(|n| n.parse().unwrap())
                .collect();
            want.sort_unstable();
            let mut got: Vec<u32> = t
                .warnings()
                .iter()
                .filter_map(|w| w.strip_prefix("token ")?.split_once(' ')?.0.parse().ok())
                .collect();
            got.sort_unstable();
            report.check(got == want, || {
                format!("corrected types {got:?}, want {want:?}")
            });

            for record in json_lines(&dir.join(format!("{name}.reference.jsonl"))) {
                let text = record["text"].as_str().unwrap();
                let (got, want) = (t.encode(text, false, false), ids_of(&record["ids"]));
                report.check(got == want, || format!("{text:?}: {got:?}, want {want:?}"));
            }
            for record in json_lines(&dir.join(format!("{name}.adversarial.jsonl"))) {
                adversarial(&t, &record, &mut report);
            }
            report.finish(name);
        }
    }
}

/// Pairs of `.inp` and `.out` next to vocabularies, as llama.cpp ships them.
#[test]
fn published_pairs() {
    let Some(dir) = std::env::var_os("LEMMA_VOCABS").filter(|v| !v.is_empty()) else {
        return;
    };
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let with =
            |ext: &str| std::fs::read_to_string(path.with_file_name(format!("{file}.{ext}")));
        let (true, Ok(inp), Ok(out)) = (file.ends_with(".gguf"), with("inp"), with("out")) else {
            continue;
        };
        let gguf = GgufFile::open(&path).unwrap();
        if gguf.meta().str("tokenizer.ggml.model").unwrap() == "bert" {
            continue;
        }
        let t = Tokenizer::from_gguf(&gguf, &TokenizerOptions::default()).unwrap();
        let mut report = Report::default();
        for (text, ids) in inp.split("\n__ggml_vocab_test__\n").zip(out.lines()) {
            let want: Vec<u32> = ids.split_whitespace().map(|x| x.parse().unwrap()).collect();
            let got = t.encode(text, false, false);
            report.check(got == want, || format!("{text:?}: {got:?}, want {want:?}"));
        }
        report.finish(&file);
    }
}
