//! The tokenizer against reference data made with llama.cpp: ids, pieces, detokenization, end-of-generation sets.
//! See `tests/data/tokenizer/README.md` for the format and for the two environment variables that add data.

use lemma_engine::tokenizer::{Tokenizer, VocabSource};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Just enough of GGUF to read vocabulary-only files.
#[derive(Default)]
struct Meta {
    numbers: HashMap<String, u64>,
    strings: HashMap<String, String>,
    lists: HashMap<String, Vec<Vec<u8>>>,
    floats: HashMap<String, Vec<f32>>,
    ints: HashMap<String, Vec<i32>>,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        head
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }
    fn bytes(&mut self) -> &'a [u8] {
        let n = self.u64() as usize;
        self.take(n)
    }
}

fn read_meta(path: &Path) -> Meta {
    let file = std::fs::read(path).unwrap();
    let mut r = Reader(&file);
    assert_eq!(r.take(4), b"GGUF");
    let (_version, _tensors, n) = (r.u32(), r.u64(), r.u64());
    let mut meta = Meta::default();
    for _ in 0..n {
        let key = String::from_utf8(r.bytes().to_vec()).unwrap();
        match r.u32() {
            0 | 1 | 7 => drop(meta.numbers.insert(key, u64::from(r.take(1)[0]))),
            2 | 3 => drop(r.take(2)),
            4 | 5 => drop(meta.numbers.insert(key, u64::from(r.u32()))),
            6 => drop(r.take(4)),
            8 => drop(
                meta.strings
                    .insert(key, String::from_utf8_lossy(r.bytes()).into_owned()),
            ),
            9 => {
                let (kind, n) = (r.u32(), r.u64() as usize);
                match kind {
                    8 => drop(
                        meta.lists
                            .insert(key, (0..n).map(|_| r.bytes().to_vec()).collect()),
                    ),
                    6 => drop(
                        meta.floats
                            .insert(key, (0..n).map(|_| f32::from_bits(r.u32())).collect()),
                    ),
                    4 | 5 => drop(
                        meta.ints
                            .insert(key, (0..n).map(|_| r.u32() as i32).collect()),
                    ),
                    0 | 1 | 7 => drop(r.take(n)),
                    other => panic!("array type {other}"),
                }
            }
            _ => drop(r.u64()),
        }
    }
    meta
}

impl Meta {
    fn source(&self) -> VocabSource<'_> {
        let ggml = |k: &str| format!("tokenizer.ggml.{k}");
        let string = |k: &str| self.strings.get(k).map(String::as_str);
        let id = |k: &str| self.numbers.get(&ggml(k)).map(|&x| x as u32);
        let flag = |k: &str| self.numbers.get(&ggml(k)).map(|&x| x != 0);
        let list = |k: &str| {
            self.lists
                .get(&ggml(k))
                .map(|l| l.iter().map(Vec::as_slice).collect::<Vec<_>>())
        };
        VocabSource {
            model: string("tokenizer.ggml.model").unwrap(),
            pre: string("tokenizer.ggml.pre"),
            model_name: string("general.name"),
            arch: string("general.architecture"),
            tokens: list("tokens").unwrap(),
            scores: self.floats.get(&ggml("scores")).cloned(),
            token_types: self.ints.get(&ggml("token_type")).cloned(),
            merges: list("merges"),
            bos: id("bos_token_id"),
            eos: id("eos_token_id"),
            eot: id("eot_token_id"),
            eom: id("eom_token_id"),
            unk: id("unknown_token_id"),
            sep: id("seperator_token_id"),
            pad: id("padding_token_id"),
            mask: id("mask_token_id"),
            fim_pre: id("fim_pre_token_id").or(id("prefix_token_id")),
            fim_suf: id("fim_suf_token_id").or(id("suffix_token_id")),
            fim_mid: id("fim_mid_token_id").or(id("middle_token_id")),
            fim_pad: id("fim_pad_token_id"),
            fim_rep: id("fim_rep_token_id"),
            fim_sep: id("fim_sep_token_id"),
            add_bos: flag("add_bos_token"),
            add_eos: flag("add_eos_token"),
            add_space_prefix: flag("add_space_prefix"),
        }
    }
}

fn data_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tokenizer")];
    if let Some(dir) = std::env::var_os("LEMMA_FIXTURES") {
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

#[test]
fn reference_data() {
    for dir in data_dirs() {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        for vocab in manifest["vocabs"].as_array().unwrap() {
            let name = vocab["name"].as_str().unwrap();
            let meta = read_meta(&dir.join(vocab["gguf"].as_str().unwrap()));
            let t = Tokenizer::new(&meta.source()).unwrap();
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
    let Some(dir) = std::env::var_os("LEMMA_VOCABS") else {
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
        let meta = read_meta(&path);
        if meta.strings["tokenizer.ggml.model"] == "bert" {
            continue;
        }
        let t = Tokenizer::new(&meta.source()).unwrap();
        let mut report = Report::default();
        for (text, ids) in inp.split("\n__ggml_vocab_test__\n").zip(out.lines()) {
            let want: Vec<u32> = ids.split_whitespace().map(|x| x.parse().unwrap()).collect();
            let got = t.encode(text, false, false);
            report.check(got == want, || format!("{text:?}: {got:?}, want {want:?}"));
        }
        report.finish(&file);
    }
}
