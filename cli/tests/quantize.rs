//! `lemma quantize`.

mod common;

use std::path::{Path, PathBuf};

use common::{ends, err, out, run, temp};
use lemma_engine::gguf::write::Builder;
use lemma_engine::gguf::{GgmlType, GgufFile};

/// A model that the project carries.
fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch");
    path.join(name).to_str().unwrap().to_owned()
}

/// A file to write, which goes away in the end.
struct Target(PathBuf);

impl Target {
    fn new(name: &str) -> Self {
        let path = temp(name);
        let _ = std::fs::remove_file(&path);
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    fn open(&self) -> GgufFile {
        GgufFile::open(&self.0).unwrap()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn values(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut x = vec![0.0; bytes.len() / ty.type_size() * ty.block_size()];
    (ty.traits().dequantize_row)(bytes, &mut x);
    x
}

/// Every tensor of `new` is that of `old`, or what the quantizer of its type makes of each row.
fn same_weights(old: &GgufFile, new: &GgufFile) {
    assert_eq!(old.tensors().len(), new.tensors().len());
    for (a, b) in old.tensors().zip(new.tensors()) {
        assert_eq!((&a.name, a.shape()), (&b.name, b.shape()));
        if a.ty == b.ty {
            assert!(a.data == b.data, "{}", a.name);
            continue;
        }
        let n = a.dims[0] as usize;
        let row = b.ty.row_size(n).unwrap();
        let quantize = b.ty.traits().quantize_row.unwrap();
        for (x, y) in values(a.ty, a.data).chunks(n).zip(b.data.chunks(row)) {
            let mut expected = vec![0; row];
            quantize(x, &mut expected);
            assert!(expected == y, "{} {}", b.name, b.ty);
        }
    }
}

/// Every key is there with its value, but for those that say what the types are.
fn same_metadata(old: &GgufFile, new: &GgufFile) {
    for (key, pair) in old.meta().entries() {
        if !matches!(key, "general.file_type" | "general.quantization_version") {
            let there = new.meta().entries().find(|e| e.0 == key).map(|e| e.1);
            assert!(there == Some(pair), "{key}");
        }
    }
}

fn answers(path: &str) {
    let o = run(&[
        "-m",
        path,
        "-p",
        "to be",
        "-n",
        "8",
        "--temp",
        "0",
        "-no-cnv",
        "--ignore-eos",
    ]);
    ends(&o, 0);
    assert!(!out(&o).trim().is_empty());
}

#[test]
fn every_type_is_that_of_its_quantizer() {
    let source = data("qwen3-tied.gguf");
    let old = GgufFile::open(Path::new(&source)).unwrap();
    for (ty, file_type) in [
        ("F16", 1),
        ("bf16", 32),
        ("Q8_0", 7),
        ("Q4_K_M", 15),
        ("q5_1", 9),
        ("iq4_nl", 25),
    ] {
        // Its rows are of 64, 128 and 144 values; some types need help with the last.
        let new = Target::new(&format!("quantize-{ty}.gguf"));
        let line = [
            "quantize",
            &source,
            new.path(),
            ty,
            "-t",
            "2",
            "--tensor-type",
            "ffn_down=f16",
        ];
        let o = run(&line);
        ends(&o, 0);
        assert_eq!(out(&o), "");
        let last = err(&o).lines().last().unwrap().to_owned();
        assert!(
            last.starts_with(new.path()) && last.ends_with(" bits per weight"),
            "{last}"
        );
        let file = new.open();
        same_weights(&old, &file);
        same_metadata(&old, &file);
        let meta = file.meta();
        assert_eq!(meta.u32("general.file_type"), Ok(file_type));
        assert_eq!(meta.u32("general.quantization_version"), Ok(2));
        drop(file);
        let o = run(&["check", new.path()]);
        ends(&o, 0);
        assert!(out(&o).ends_with("ok\n"), "{}", out(&o));
        answers(new.path());
    }
}

#[test]
fn mixes_are_those_of_llama_quantize() {
    // Made by llama-quantize from models of these shapes; rows of ffn_down are not whole blocks of 256.
    let more = std::env::var_os("LEMMA_FIXTURES")
        .filter(|v| !v.is_empty())
        .map(|p| PathBuf::from(p).join("arch"));
    let folders = std::iter::once(PathBuf::from(data(""))).chain(more);
    let files = folders.flat_map(|f| std::fs::read_dir(f).unwrap());
    let paths = files.map(|f| f.unwrap().path().to_str().unwrap().to_owned());
    let published: Vec<String> = paths
        .filter(|p| p.contains("-q-") && p.ends_with(".gguf"))
        .collect();
    assert!(published.len() >= 4);
    for published in published {
        let name = Path::new(&published).file_stem().unwrap().to_str().unwrap();
        let ty = name.split_once("-q-").unwrap().1;
        let numbers = Target::new(&format!("quantize-numbers-{name}.gguf"));
        let o = run(&["quantize", &published, numbers.path(), "f32"]);
        ends(&o, 2);
        assert!(err(&o).contains("--allow-requantize"), "{}", err(&o));
        let requantize = "--allow-requantize";
        ends(
            &run(&["quantize", &published, numbers.path(), "f32", requantize]),
            0,
        );
        assert!(numbers.open().tensors().all(|t| t.ty == GgmlType::F32));

        let new = Target::new(&format!("quantize-mix-{name}.gguf"));
        let o = run(&["quantize", numbers.path(), new.path(), ty]);
        ends(&o, 0);
        let expected = GgufFile::open(Path::new(&published)).unwrap();
        let file = new.open();
        same_weights(&numbers.open(), &file);
        for (a, b) in expected.tensors().zip(file.tensors()) {
            assert_eq!((&a.name, a.ty), (&b.name, b.ty));
        }
        for (key, pair) in expected.meta().entries() {
            let there = file.meta().entries().find(|e| e.0 == key).map(|e| e.1);
            assert!(there == Some(pair), "{name}: {key}");
        }
        assert_eq!(
            err(&o).contains("rows of"),
            !ty.ends_with("_0"),
            "{}",
            err(&o)
        );
        answers(new.path());
    }
}

#[test]
fn numbers_are_rounded_as_by_llama_quantize() {
    for (ty, published) in [
        ("f16", "llama-gqa-tied-f16.gguf"),
        ("bf16", "llama-gqa-tied-bf16.gguf"),
    ] {
        let new = Target::new(&format!("quantize-tied-{ty}.gguf"));
        ends(
            &run(&["quantize", &data("llama-gqa-tied.gguf"), new.path(), ty]),
            0,
        );
        let file = new.open();
        for a in GgufFile::open(Path::new(&data(published)))
            .unwrap()
            .tensors()
        {
            let b = file.tensor(&a.name).unwrap();
            assert!(a.ty == b.ty && a.data == b.data, "{}", a.name);
        }
    }
}

#[test]
fn flags_say_more_than_the_mix() {
    let source = Target::new("quantize-flags.gguf");
    ends(
        &run(&["synth", "tiny-llama", "--type", "bf16", "-o", source.path()]),
        0,
    );
    // Types that a dry run lists, of some tensors.
    let types = |flags: &[&str]| {
        let o = run(&[&["quantize", source.path(), "q4_k_m", "--dry-run"], flags].concat());
        ends(&o, 0);
        let text = out(&o);
        let of = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(&format!("{name} ")));
            let words: Vec<&str> = line.unwrap().split_whitespace().collect();
            match words.iter().position(|w| *w == "->") {
                Some(at) => words[at + 1].to_owned(),
                None => "stays".to_owned(),
            }
        };
        [
            "token_embd.weight",
            "output.weight",
            "blk.0.attn_v.weight",
            "blk.1.attn_v.weight",
            "blk.0.ffn_norm.weight",
            "blk.0.ffn_down.weight",
        ]
        .map(of)
        .join(" ")
    };
    assert_eq!(types(&[]), "q4_K q6_K q4_K q6_K stays q4_K");
    assert_eq!(types(&["--pure"]), "q4_K q4_K q4_K q4_K stays q4_K");
    assert_eq!(
        types(&[
            "--token-embedding-type",
            "Q8_0",
            "--output-tensor-type",
            "f16"
        ]),
        "q8_0 f16 q4_K q6_K stays q4_K"
    );
    assert_eq!(
        types(&["--leave-output-tensor"]),
        "q4_K stays q4_K q6_K stays q4_K"
    );
    assert_eq!(
        types(&[
            "--tensor-type",
            r"blk\.[0-9]+\.attn_v=q5_k",
            "--tensor-type",
            "blk.0=q6_k"
        ]),
        "q4_K q6_K q5_K q5_K stays q6_K"
    );
    // Nothing was written under the name of a type.
    assert!(!Path::new("q4_k_m").exists());

    // Random models have the mixes of real ones.
    for ty in [
        "q2_k",
        "q3_k_m",
        "q4_k_s",
        "q5_k_m",
        "q6_k",
        "iq4_xs",
        "tq2_0",
        "mxfp4_moe",
    ] {
        let (random, new) = (
            Target::new(&format!("quantize-random-{ty}.gguf")),
            Target::new(&format!("quantize-real-{ty}.gguf")),
        );
        ends(
            &run(&["synth", "tiny-llama", "--type", ty, "-o", random.path()]),
            0,
        );
        ends(&run(&["quantize", source.path(), new.path(), ty]), 0);
        same_weights(&source.open(), &new.open());
        for (a, b) in random.open().tensors().zip(new.open().tensors()) {
            assert_eq!((&a.name, a.ty), (&b.name, b.ty), "{ty}");
        }
    }
}

#[test]
fn threads_do_not_change_a_byte() {
    let (one, three) = (
        Target::new("quantize-t1.gguf"),
        Target::new("quantize-t3.gguf"),
    );
    let source = Target::new("quantize-threads.gguf");
    ends(
        &run(&["synth", "tiny", "--type", "f16", "-o", source.path()]),
        0,
    );
    ends(
        &run(&["quantize", source.path(), one.path(), "q4_k_m", "-t", "1"]),
        0,
    );
    // As llama-quantize takes them.
    ends(
        &run(&["quantize", source.path(), three.path(), "Q4_K_M", "3"]),
        0,
    );
    assert!(std::fs::read(&one.0).unwrap() == std::fs::read(&three.0).unwrap());
}

#[test]
fn parts_become_one_file() {
    let source = data("qwen3-tied.gguf");
    let old = GgufFile::open(Path::new(&source)).unwrap();
    let parts = [1, 2].map(|i| Target::new(&format!("quantize-0000{i}-of-00002.gguf")));
    let half = old.tensors().len() / 2;
    for (i, part) in parts.iter().enumerate() {
        let mut b = Builder::new();
        if i == 0 {
            old.meta().entries().for_each(|(_, pair)| {
                b.entry(pair);
            });
        }
        b.u16("split.no", i as u16).u16("split.count", 2);
        b.i32("split.tensors.count", old.tensors().len() as i32);
        let mine: Vec<_> = match i {
            0 => old.tensors().take(half).collect(),
            _ => old.tensors().skip(half).collect(),
        };
        for t in &mine {
            b.tensor(&t.name, t.ty, t.shape());
        }
        let mut body = b.begin(std::fs::File::create(&part.0).unwrap()).unwrap();
        mine.iter().for_each(|t| body.write(t.data).unwrap());
        body.finish().unwrap();
    }
    let line = [
        "quantize",
        parts[0].path(),
        parts[1].path(),
        "bf16",
        "--force",
    ];
    ends(&run(&line), 2);
    let new = Target::new("quantize-parts.gguf");
    ends(&run(&["quantize", parts[0].path(), new.path(), "bf16"]), 0);
    let file = new.open();
    same_weights(&old, &file);
    same_metadata(&old, &file);
    assert!(!file.meta().entries().any(|e| e.0.starts_with("split.")));
    answers(new.path());
}

#[test]
fn what_a_type_cannot_hold_is_refused() {
    let (bad, new) = (
        Target::new("quantize-bad.gguf"),
        Target::new("quantize-bad-out.gguf"),
    );
    for (value, ty, code, text) in [
        (f32::NAN, "q8_0", 4, "value 65 of tensor 'a.weight' is NaN"),
        (1e5, "f16", 4, "value 65 of tensor 'a.weight' is 100000"),
        (1e5, "bf16", 0, "bits per weight"),
    ] {
        let mut b = Builder::new();
        b.str("general.architecture", "none").alignment(64);
        b.tensor("a.weight", GgmlType::F32, &[64, 2]);
        let mut body = b.begin(std::fs::File::create(&bad.0).unwrap()).unwrap();
        let values = (0..128).map(|i| if i == 65 { value } else { 1.0 });
        body.write(&values.flat_map(f32::to_le_bytes).collect::<Vec<_>>())
            .unwrap();
        body.finish().unwrap();
        let o = run(&["quantize", bad.path(), new.path(), ty]);
        ends(&o, code);
        assert!(err(&o).contains(text), "{}", err(&o));
        assert_eq!(new.0.exists(), code == 0);
    }
    assert_eq!(new.open().alignment(), 64);
    let dir = new.0.parent().unwrap().read_dir().unwrap();
    let mut names = dir.map(|f| f.unwrap().file_name().to_string_lossy().into_owned());
    assert!(
        !names.any(|n| n.contains("quantize-bad-out.gguf.")),
        "a temporary file is left"
    );
}

#[test]
fn refusals() {
    let source = data("qwen3-tied.gguf");
    let there = Target::new("quantize-there.gguf");
    std::fs::write(&there.0, "mine").unwrap();
    let o = run(&["quantize", &source, there.path(), "f16"]);
    ends(&o, 2);
    assert!(err(&o).contains("exists already") && err(&o).contains("hint: --force"));
    assert_eq!(std::fs::read(&there.0).unwrap(), b"mine");
    ends(
        &run(&["quantize", &source, there.path(), "f16", "--force"]),
        0,
    );
    there.open();

    let before = std::fs::read(&there.0).unwrap();
    let o = run(&["quantize", there.path(), there.path(), "bf16", "--force"]);
    ends(&o, 2);
    assert!(err(&o).contains("is the model to be read"), "{}", err(&o));
    assert!(std::fs::read(&there.0).unwrap() == before);

    let new = Target::new("quantize-refused.gguf");
    for (ty, code, text) in [
        ("q4_k_x", 2, "hint: did you mean q4_k_"),
        ("iq2_xxs", 2, "importance matrix"),
        ("pure:q8_K", 2, "cannot be written"),
    ] {
        let o = run(&["quantize", &source, new.path(), ty]);
        ends(&o, code);
        assert!(err(&o).contains(text), "{ty}: {}", err(&o));
        assert!(!new.0.exists());
    }
    for (line, code, text) in [
        (&["--tensor-type", "x"][..], 2, "expected NAME=TYPE"),
        (&["--tensor-type", "x=q4_k_m"], 2, "unknown tensor type"),
        (&["--tensor-type", "(=q4_0"], 2, "not a name"),
        (
            &["--output-tensor-type", "iq1_s"],
            2,
            "--output-tensor-type: ",
        ),
        (&["--imatrix", "x"], 3, "expected an importance matrix"),
        (&["-t", "100000"], 2, "--threads"),
    ] {
        let line = [&["quantize", &source, new.path(), "f16"], line].concat();
        let o = run(&line);
        ends(&o, code);
        assert!(err(&o).contains(text), "{line:?}: {}", err(&o));
        assert!(!new.0.exists());
    }
    // Rows of 72 values are not blocks of 32, and q8_0 has nothing to fall back to.
    let o = run(&["quantize", &data("llama-gqa-tied.gguf"), new.path(), "q8_0"]);
    ends(&o, 4);
    assert!(err(&o).contains("rows of 72 values"), "{}", err(&o));
    ends(&run(&["quantize", "/no/such.gguf", new.path(), "q8_0"]), 3);
    ends(
        &run(&["quantize", &source, "/no/such/folder/x.gguf", "f16"]),
        1,
    );
    ends(&run(&["quantize", &source, new.path()]), 2);
    assert!(!new.0.exists());
}
