//! What surrounds a run: variables, streams, limits and signals.

mod common;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{ends, err, lemma, out, run, temp};
use lemma_engine::gguf::GgmlType;
use lemma_engine::gguf::write::Builder;

/// Runs the binary from a shell: `before` stands before `exec`, `behind` behind the arguments.
fn shell(before: &str, args: &[&str], behind: &str) -> Output {
    let program = lemma(&[]).get_program().to_owned();
    Command::new("sh")
        .args(["-c", &format!("{before} exec \"$0\" \"$@\" {behind}")])
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_variable_that_is_empty_is_not_set() {
    let variables = [
        "CTX_SIZE",
        "DEVICE",
        "ISA",
        "KV_BUDGET",
        "KV_POLICY",
        "LOG",
        "MIN_P",
        "MODEL",
        "N_PREDICT",
        "REPEAT_PENALTY",
        "SEED",
        "TEMP",
        "THINK",
        "THREADS",
        "TOP_K",
        "TOP_P",
    ];
    let empty = |args: &[&str]| {
        let mut c = lemma(args);
        for name in variables {
            c.env(format!("LEMMA_{name}"), "");
        }
        c.output().unwrap()
    };
    if cfg!(bundled_model) {
        let o = empty(&["-p", "What is 1+1?", "--json"]);
        ends(&o, 0);
        let record = common::json(&out(&o));
        assert_eq!(record["sampling"]["top_k"]["source"], "builtin");
        ends(&empty(&["bench", "-p", "4", "-n", "0", "-r", "1"]), 0);
    }
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/qwen3-tied.gguf");
    let line = ["quantize", model.to_str().unwrap(), "F16", "--dry-run"];
    ends(&empty(&line), 0);
    // One that says something still counts.
    let o = lemma(&["-p", "x"])
        .env("LEMMA_TOP_K", "x")
        .output()
        .unwrap();
    ends(&o, 2);
}

#[test]
fn a_variable_that_is_wrong_is_named() {
    for name in [
        "CTX_SIZE",
        "DEVICE",
        "ISA",
        "KV_BUDGET",
        "KV_POLICY",
        "LOG",
        "MIN_P",
        "N_PREDICT",
        "SEED",
        "THINK",
    ] {
        let variable = format!("LEMMA_{name}");
        let o = lemma(&["-p", "x"]).env(&variable, "foo").output().unwrap();
        ends(&o, 2);
        let text = err(&o);
        assert!(text.starts_with(&format!("error: {variable}")), "{text}");
    }
    // A flag says more, and is blamed then.
    let o = lemma(&["-p", "x", "--device", "bar"])
        .env("LEMMA_DEVICE", "foo")
        .output()
        .unwrap();
    assert!(err(&o).starts_with("error: --device bar"), "{}", err(&o));
}

#[test]
fn an_output_that_cannot_be_written_is_an_error() {
    for args in [
        &["--version"][..],
        &["-p", "What is 1+1?"],
        &["completions", "bash"],
        &["devices"],
    ] {
        let o = shell("", args, "1</dev/null");
        ends(&o, 1);
        assert_eq!(err(&o), "error: stdout: is not open for writing\n");
    }
    for redirection in [">/dev/null", "1<>/dev/null"] {
        ends(&shell("", &["--version"], redirection), 0);
    }
    // Who writes nothing there needs none.
    let line = ["synth", "qwen3-0.6b", "--type", "no-such-type", "-o", "x"];
    assert!(err(&shell("", &line, "1</dev/null")).contains("no-such-type"));
}

#[test]
#[cfg(all(target_os = "linux", bundled_model))]
fn too_little_memory_is_code_5_and_one_line() {
    let limit = |mib: u64| format!("ulimit -v {};", mib << 10);
    let is_enough = |mib: &u64| shell(&limit(*mib), &["--version"], "").status.success();
    let base = (32..).step_by(32).find(is_enough).unwrap();
    let question = ["-p", "What is 1+1?", "--temp", "0", "-t", "2"];
    ends(&shell(&limit(base + 1400), &question, ""), 0);
    let large = temp("large.txt");
    std::fs::write(&large, "one two ".repeat(6 << 20)).unwrap();
    let lines = temp("large.jsonl");
    let text = "one two ".repeat(2 << 20);
    std::fs::write(&lines, format!("{{\"text\":\"{text}\"}}\n")).unwrap();
    let [large_name, lines_name] = [&large, &lines].map(|p| p.to_str().unwrap());
    let batch = ["-no-cnv", "-ub", "16384", "-b", "16384"];
    for args in [
        // The stack of a template, activations, a text, a line, a buffer of its own.
        &question[..],
        &[&question[..], &batch].concat(),
        &["-no-cnv", "-f", large_name],
        &["tokenize", "-f", large_name],
        &["bench", "-p", "0", "-n", "1", "-r", "1", "--ceiling"],
    ] {
        let o = shell(&limit(base + 200), args, "");
        ends(&o, 5);
        let text = err(&o);
        assert!(
            text.starts_with("error: ") && text.lines().count() <= 2,
            "{args:?}: {text}"
        );
    }
    // A line of many is a record.
    let o = shell(&limit(base + 200), &["score", "-f", lines_name], "");
    ends(&o, 9);
    assert_eq!(common::json(out(&o).trim())["error"]["code"], 5);
    let _ = (std::fs::remove_file(large), std::fs::remove_file(lines));
}

/// Waits until `is` is so.
#[track_caller]
fn wait(is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Names in a folder.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
    let mut names: Vec<_> = entries.map(|e| name(e).into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_half_written_goes_with_a_signal() {
    let dir = temp("half-written");
    std::fs::create_dir_all(&dir).unwrap();
    let (source, target) = (dir.join("f32.gguf"), dir.join("new.gguf"));
    // Four gigabytes of zeros that are nowhere on the disk.
    let mut b = Builder::new();
    b.str("general.architecture", "llama");
    b.tensor("blk.0.ffn_up.weight", GgmlType::F32, &[4096, 1 << 18]);
    let size = b.n_bytes();
    let file = File::create(&source).unwrap();
    drop(b.begin(&file).unwrap());
    file.set_len(size).unwrap();
    let [source, target] = [&source, &target].map(|p| p.to_str().unwrap());
    let quantize = ["quantize", source, target, "Q6_K"];
    let synth = ["synth", "qwen3-8b", "-o", target];
    for (args, signal, code) in [
        (&quantize[..], "-TERM", 143),
        (&quantize[..], "-INT", 130),
        (&quantize[..], "-HUP", 129),
        (&synth[..], "-TERM", 143),
        (&synth[..], "-INT", 130),
    ] {
        let mut child = lemma(args).spawn().unwrap();
        wait(|| names(&dir).iter().any(|n| n.ends_with(".tmp")));
        let id = child.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(sent.success());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(code), "{args:?} {signal}");
        assert_eq!(names(&dir), ["f32.gguf"], "{args:?} {signal}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_file_that_cannot_be_made_is_named_in_plain_words() {
    let o = run(&["synth", "tiny", "-o", "/no/such/x.gguf"]);
    ends(&o, 1);
    assert_eq!(
        err(&o),
        "error: /no/such/x.gguf: No such file or directory\n"
    );
}

#[test]
fn models_are_not_written_over() {
    let path = temp("kept.gguf");
    let name = path.to_str().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/qwen3-tied.gguf");
    let quantize = ["quantize", model.to_str().unwrap(), name, "F16"];
    let synth = ["synth", "qwen3-8b", "-o", name];
    for line in [&quantize[..], &synth[..]] {
        std::fs::write(&path, "precious").unwrap();
        let o = run(line);
        ends(&o, 2);
        let text = err(&o);
        assert!(
            text.contains("exists already") && text.contains("--force"),
            "{text}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
    // A name that mktemp has made is free.
    std::fs::write(&path, "").unwrap();
    ends(&run(&quantize), 0);
    ends(&run(&[&quantize[..], &["--force"]].concat()), 0);
    // Random weights are made again, a model is not.
    let small = ["synth", "qwen3-0.6b", "--type", "q2_k", "-o", name];
    ends(&run(&small), 2);
    ends(&run(&[&small[..], &["--force"]].concat()), 0);
    ends(&run(&small), 0);
    let _ = std::fs::remove_file(&path);
}
