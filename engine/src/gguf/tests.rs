//! Tests of opening files: what the writer makes, what the guard refuses, and that guard and decoder agree.

use std::path::PathBuf;

use super::write::Builder;
use super::*;

/// A small file with every kind of value and some tensors; tensor i is filled with bytes of value i.
fn sample(tensors: &[(&str, GgmlType, &[u64])], edit: impl FnOnce(&mut Builder)) -> Vec<u8> {
    let mut b = Builder::new();
    edit(&mut b);
    let sizes: Vec<usize> = tensors
        .iter()
        .map(|(name, ty, shape)| {
            b.tensor(name, *ty, shape);
            (shape.iter().product::<u64>() / ty.block_size() as u64) as usize * ty.type_size()
        })
        .collect();
    let n = b.n_bytes();
    let mut body = b.begin(Vec::new()).unwrap();
    for (i, size) in sizes.iter().enumerate() {
        body.write(&vec![i as u8; *size]).unwrap();
    }
    let out = body.finish().unwrap();
    assert_eq!(out.len() as u64, n);
    out
}

fn open(bytes: Vec<u8>) -> Result<GgufFile> {
    GgufFile::from_bytes(bytes, "test.gguf")
}

fn refused(bytes: Vec<u8>) -> String {
    open(bytes).unwrap_err().to_string()
}

#[test]
fn what_was_written_is_read() {
    let tokens = ["a", "", "\u{e9}"];
    let tensors: &[(&str, GgmlType, &[u64])] = &[
        ("f", GgmlType::F32, &[3]),
        ("q", GgmlType::Q8_0, &[64, 2, 3]),
        ("k", GgmlType::Q4_K, &[256, 5, 1, 1]),
        ("b", GgmlType::BF16, &[7, 1]),
    ];
    let bytes = sample(tensors, |b| {
        b.u32("u32", 7)
            .i32("i32", -7)
            .u64("u64", u64::MAX)
            .u16("u16", 9)
            .f32("nan", f32::NAN)
            .f32("x", 1e-5);
        b.bool("yes", true)
            .str("text", "t\u{1f600}")
            .strings("tokens", tokens.iter());
        b.i32s("types", [1, -2].into_iter())
            .f32s("scores", [0.5, -1.0].into_iter());
        b.i32s("long", (0..5000).collect::<Vec<_>>().into_iter());
    });
    let file = open(bytes).unwrap();
    let meta = file.meta();
    assert_eq!(
        (file.version(), meta.len(), file.name()),
        (3, 12, "test.gguf")
    );
    assert_eq!(
        (
            meta.u32("u32").unwrap(),
            meta.u64("u64").unwrap(),
            meta.u32("u16").unwrap()
        ),
        (7, u64::MAX, 9)
    );
    assert!(meta.f32("nan").unwrap().is_nan());
    assert_eq!(
        (meta.f32("x").unwrap(), meta.bool("yes").unwrap()),
        (1e-5, true)
    );
    assert_eq!(meta.str("text").unwrap(), "t\u{1f600}");
    assert!(
        meta.strings("tokens")
            .unwrap()
            .eq(tokens.iter().map(|t| t.as_bytes()))
    );
    assert!(meta.opt_i32s("types").unwrap().unwrap().eq([1, -2]));
    assert!(meta.opt_f32s("scores").unwrap().unwrap().eq([0.5, -1.0]));
    assert_eq!(meta.opt_i32s("long").unwrap().unwrap().len(), 5000);
    assert_eq!(
        meta.opt_u32_per_layer("u32", 3).unwrap(),
        Some(vec![7, 7, 7])
    );
    assert_eq!(meta.opt_u32("nothing").unwrap(), None);
    assert!(
        file.tensors()
            .map(|t| t.name.to_string())
            .eq(tensors.iter().map(|t| t.0.to_owned()))
    );
    for (i, (name, ty, shape)) in tensors.iter().enumerate() {
        let t = file.tensor(name).unwrap();
        assert_eq!((t.ty, t.shape()), (*ty, *shape));
        assert!(t.data.iter().all(|b| *b == i as u8) && t.data.len() == t.n_bytes());
        assert_eq!(&*file.bytes_of(t.info), t.data);
    }
    assert_eq!(file.tensor("k").unwrap().n_rows(), 5);
    assert!(file.tensor("nope").is_none());
}

#[test]
fn a_value_of_the_wrong_type_is_named() {
    let file = open(sample(&[], |b| {
        b.i32("minus", -1)
            .str("text", "x")
            .f32s("scores", [0.5].into_iter())
            .u32("n", 3);
    }))
    .unwrap();
    let meta = file.meta();
    let text = |e: Error| e.to_string();
    assert_eq!(
        text(meta.u32("minus").unwrap_err()),
        "test.gguf: metadata key 'minus' is -1 (i32), expected u32"
    );
    assert_eq!(
        text(meta.opt_f32("text").unwrap_err()),
        "test.gguf: metadata key 'text' is of type string, expected f32"
    );
    assert_eq!(
        text(meta.strings("scores").unwrap_err()),
        "test.gguf: metadata key 'scores' is of type array of 1 f32, expected array of string"
    );
    assert_eq!(
        text(meta.bool("none").unwrap_err()),
        "test.gguf: metadata key 'none' is missing, expected bool"
    );
    assert!(meta.opt_i32s("scores").is_err() && meta.opt_u32_per_layer("scores", 1).is_err());
    assert!(
        meta.opt_f32("n").is_err(),
        "an integer is not taken for a float"
    );
}

#[test]
fn types_beyond_the_decoder_are_served_by_the_guard() {
    let Some(ty) = GgmlType::ALL.iter().find(|t| t.id() > 39) else {
        return;
    };
    let file = open(sample(
        &[("w", *ty, &[512, 2]), ("n", GgmlType::F32, &[4])],
        |_| (),
    ))
    .unwrap();
    assert_eq!(file.tensor("w").unwrap().ty, *ty);
    assert!(file.tensor("n").unwrap().data.iter().all(|b| *b == 1));
}

#[test]
fn guard_and_decoder_agree_on_every_type() {
    for ty in GgmlType::ALL.iter().filter(|t| t.id() <= 39) {
        let bytes = sample(&[("a", *ty, &[256]), ("b", *ty, &[512, 3])], |b| {
            b.strings("tokenizer.ggml.tokens", ["x"; 1000].iter());
        });
        let header = guard::check(&bytes, "x").unwrap();
        let decoded = decode::decode(&bytes, &header, "x")
            .unwrap()
            .expect("a type the decoder knows");
        assert_eq!(decoded.len(), 2, "{ty}");
    }
}

#[test]
fn embedded_bytes_work_at_any_address() {
    let bytes = sample(&[("f", GgmlType::F32, &[4])], |b| {
        b.u32("k", 5);
    });
    for shift in [0, 1, 3] {
        let mut moved = vec![0; shift];
        moved.extend_from_slice(&bytes);
        let file = GgufFile::from_static(&moved.leak()[shift..], "embedded").unwrap();
        assert_eq!(file.meta().u32("k").unwrap(), 5);
        let at = file.tensor("f").unwrap().data.as_ptr().addr();
        assert!(at.is_multiple_of(file.data_alignment()));
    }
}

#[test]
fn names_from_the_file_are_escaped_in_errors() {
    let e = refused(sample(
        &[
            ("w\x1b[2J\n", GgmlType::F32, &[1]),
            ("w\x1b[2J\n", GgmlType::F32, &[1]),
        ],
        |_| (),
    ));
    assert_eq!(
        e,
        "test.gguf: tensor 'w\\u{1b}[2J\\u{a}' is given twice, expected once"
    );
}

#[test]
fn old_and_foreign_files_are_told_apart() {
    let mut bytes = sample(&[], |_| ());
    bytes[4] = 1;
    assert!(refused(bytes.clone()).contains("GGUF version 1"));
    bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
    assert!(refused(bytes).contains("big-endian"));
    assert!(
        open(b"<html>".to_vec())
            .unwrap_err()
            .hint()
            .unwrap()
            .contains("web page")
    );
}

#[test]
fn a_split_model_opens_as_one() {
    let dir = std::env::temp_dir().join(format!("lemma-split-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let part = |no: u16, count: u16, name: &str, total: i32| {
        sample(&[(name, GgmlType::F32, &[8])], |b| {
            b.u16("split.no", no)
                .u16("split.count", count)
                .i32("split.tensors.count", total);
        })
    };
    let path = |i: u32| -> PathBuf { dir.join(format!("m-{i:05}-of-00002.gguf")) };
    let put = |i: u32, bytes: Vec<u8>| std::fs::write(path(i), bytes).unwrap();
    let failed = |i: u32| GgufFile::open(&path(i)).unwrap_err();

    put(1, part(0, 2, "a", 2));
    let e = failed(1);
    assert!(
        e.exit_code() == 3 && e.to_string().contains("m-00002-of-00002.gguf: part 2 of 2"),
        "{e}"
    );
    put(2, part(1, 2, "b", 2));
    let file = GgufFile::open(&path(1)).unwrap();
    assert!(file.tensor("a").is_some() && file.tensor("b").is_some());
    assert!(failed(2).to_string().contains("first part"));
    put(2, part(1, 2, "a", 2));
    assert!(
        failed(1)
            .to_string()
            .contains("tensor 'a' is also in another part")
    );
    put(2, part(0, 2, "b", 2));
    assert!(
        failed(1)
            .to_string()
            .contains("split 0 of 2, expected 1 of 2")
    );
    put(2, part(1, 2, "b", 2));
    put(1, part(0, 2, "a", 3));
    assert!(failed(1).to_string().contains("hold 2 tensors, expected 3"));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn announced_counts_allocate_nothing() {
    // A header that promises as much as its size allows, and an array that promises 2^60 strings.
    let mut bytes = sample(&[], |b| {
        b.strings("x", ["y"].iter());
    });
    let at = bytes
        .windows(8)
        .rposition(|w| w == 1_u64.to_le_bytes())
        .unwrap();
    // The last such word is the length of "y"; the one before is the array's.
    let at = bytes[..at]
        .windows(8)
        .rposition(|w| w == 1_u64.to_le_bytes())
        .unwrap();
    bytes[at..at + 8].copy_from_slice(&(1_u64 << 60).to_le_bytes());
    assert!(refused(bytes).contains("metadata key 'x' is an array of length 1152921504606846976"));
}

/// Bytes of `path` in the tables of this process.
#[cfg(target_os = "linux")]
fn entered(path: &std::path::Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let of_file = maps
        .lines()
        .skip_while(|l| !l.ends_with(path.to_str().unwrap()));
    let rss = of_file.skip(1).find_map(|l| l.strip_prefix("Rss:"));
    let kib = rss.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<usize>().unwrap() << 10
}

#[test]
#[cfg(target_os = "linux")]
fn pages_are_entered_while_nobody_reads_them() {
    // An embedding of which rows are read, experts of which some are, and a matrix, of 2 MiB each.
    let tensors: &[(&str, GgmlType, &[u64])] = &[
        ("token_embd.weight", GgmlType::F32, &[512, 1024]),
        ("blk.0.ffn_up_exps.weight", GgmlType::F32, &[512, 16, 64]),
        ("output.weight", GgmlType::F32, &[512, 1024]),
    ];
    let name = format!("lemma-enter-{}.gguf", std::process::id());
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, sample(tensors, |_| ())).unwrap();
    let file = GgufFile::open(&path).unwrap();
    let before = entered(&path);
    let entering = file.enter();
    let done = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        entered(&path) >= before + (1 << 20)
    });
    drop(entering);
    let all = entered(&path);
    drop(file);
    std::fs::remove_file(&path).unwrap();
    assert!(done, "{before} bytes, later {all}");
}
