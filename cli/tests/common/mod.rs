//! Helpers of the tests that drive the binary.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{SigHandler, Signal, signal};

/// The binary with a clean environment: nothing that a developer has set reaches a test.
pub(crate) fn lemma(args: &[&str]) -> Command {
    with_args(env!("CARGO_BIN_EXE_lemma"), args)
}

/// A shell whose script finds the binary and its arguments in `"$0" "$@"`.
pub(crate) fn shell(script: &str, args: &[&str]) -> Command {
    let binary = ["-c", script, env!("CARGO_BIN_EXE_lemma")];
    with_args("sh", &[&binary, args].concat())
}

fn with_args(program: &str, args: &[&str]) -> Command {
    let mut c = Command::new(program);
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("LEMMA_")
            || key == "NO_COLOR"
            || key == "RUST_BACKTRACE"
        {
            c.env_remove(key);
        }
    }
    c.args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let heed = || {
        for s in [
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGTSTP,
        ] {
            // SAFETY: no handler is installed.
            unsafe { signal(s, SigHandler::SigDfl) }?;
        }
        Ok(())
    };
    // SAFETY: it makes system calls and nothing else. Tests that run in the background were started with some of these ignored.
    unsafe { c.pre_exec(heed) };
    c
}

/// Runs to the end.
pub(crate) fn run(args: &[&str]) -> Output {
    lemma(args).output().expect("the binary runs")
}

/// Runs with `input` on stdin.
pub(crate) fn pipe(args: &[&str], input: &[u8]) -> Output {
    use std::io::Write as _;
    let mut child = lemma(args)
        .stdin(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("the binary ends");
    writer.join().expect("the writer ends");
    output
}

pub(crate) fn code(o: &Output) -> Option<i32> {
    o.status.code()
}

pub(crate) fn out(o: &Output) -> String {
    String::from_utf8(o.stdout.clone()).expect("stdout is UTF-8")
}

pub(crate) fn err(o: &Output) -> String {
    String::from_utf8(o.stderr.clone()).expect("stderr is UTF-8")
}

/// Asserts the exit code, showing stderr if it is another.
#[track_caller]
pub(crate) fn ends(o: &Output, expected: i32) {
    assert_eq!(code(o), Some(expected), "stderr: {}", err(o));
}

/// A path in a directory of this test run.
pub(crate) fn temp(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&dir).expect("a directory for temporary files");
    dir.join(format!("{}-{name}", std::process::id()))
}

/// A number from a JSON record, whatever its form.
pub(crate) fn json(line: &str) -> serde_json::Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}
