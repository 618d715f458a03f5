//! The only module that writes to stdout and stderr.
//!
//! stdout carries the answer (or JSON) and nothing else; everything else goes to stderr. A reader that goes away (`| head -1`) ends
//! the program quietly with 141, as SIGPIPE would; any other failure to write an answer is an error, because an answer that was cut
//! by a full disk must not look complete. Failures to write to stderr have nowhere to be told and are ignored.
//!
//! A stdout that is open for reading alone is such a failure, which the standard library hides: it takes "bad file descriptor" for success.
//! One that is closed (`>&-`) is `/dev/null` before `main` begins, so that who closes it throws answers away.

use std::io::{Write as _, stderr, stdout};
use std::sync::OnceLock;

use rustix::fs::{OFlags, fcntl_getfl};

use serde_json::Value;

use crate::fail::{Failure, Result};
use crate::record;
use crate::term::{ERASE, Style, Term};

/// Fails if nothing can be written to stdout: for commands that work for long before they write.
pub(crate) fn check() -> Result {
    // Once: every token of a reply comes by.
    static IS_OPEN: OnceLock<bool> = OnceLock::new();
    let is_open = || {
        let mode = fcntl_getfl(rustix::stdio::stdout()).map(|flags| flags & OFlags::RWMODE);
        matches!(mode, Ok(OFlags::WRONLY | OFlags::RDWR))
    };
    match IS_OPEN.get_or_init(is_open) {
        true => Ok(()),
        false => Err(Failure::runtime("stdout: is not open for writing")),
    }
}

/// Writes to stdout and flushes: who watches a stream wants each token when it is there.
pub(crate) fn put(text: &str) -> Result {
    check()?;
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(stdout_error)
}

/// Writes one line to stdout.
pub(crate) fn line(text: &str) -> Result {
    check()?;
    let mut out = stdout().lock();
    let written = out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush());
    written.map_err(stdout_error)
}

/// Writes one line of JSON to stdout.
pub(crate) fn json(value: &Value) -> Result {
    line(&record::text(value))
}

/// Writes raw bytes to stdout: the text of arbitrary tokens need not be UTF-8.
pub(crate) fn bytes(data: &[u8]) -> Result {
    check()?;
    let mut out = stdout().lock();
    out.write_all(data)
        .and_then(|()| out.flush())
        .map_err(stdout_error)
}

fn stdout_error(e: std::io::Error) -> Failure {
    let mut failure = Failure::from(e);
    if !failure.is_quiet() {
        failure.message = format!("stdout: {}", failure.message);
    }
    failure
}

/// Writes to stderr as it is.
pub(crate) fn err(text: &str) {
    let mut out = stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes a line to stderr.
pub(crate) fn note(text: &str) {
    // One write: lines of several processes on one terminal must not mix.
    err(&format!("{text}\n"));
}

/// Writes a line to stderr that the next one replaces, where a terminal can do that.
pub(crate) fn transient(term: &Term, text: &str, style: Style) {
    if term.can_redraw() {
        err(&crate::term::transient(text, Term::width(), style));
    }
}

/// Takes back what [`transient`] wrote.
pub(crate) fn erase(term: &Term) {
    if term.can_redraw() {
        err(ERASE);
    }
}

/// The last lines of a program that failed.
pub(crate) fn failure(failure: &Failure, style: Style) {
    if failure.is_quiet() {
        return;
    }
    let mut text = format!(
        "{}error:{} {}\n",
        style.red(),
        style.reset(),
        failure.message
    );
    if let Some(hint) = &failure.hint {
        text.push_str(&format!("{}hint:{} {hint}\n", style.cyan(), style.reset()));
    }
    err(&text);
}
