//! Failures and exit codes.
//!
//! Every way in which the program can end has one number, and scripts may rely on it:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | answered |
//! | 1 | runtime error |
//! | 2 | usage |
//! | 3 | model not found or unreadable |
//! | 4 | model malformed or unsupported |
//! | 5 | not enough memory |
//! | 6 | the prompt does not fit (KV pool or position limit) |
//! | 7 | no answer: cut while still thinking, or empty |
//! | 8 | grammar or schema invalid |
//! | 9 | batch finished with failures |
//! | 70 | a bug in lemma |
//! | 130, 143, 141 | SIGINT, SIGTERM, SIGPIPE |
//!
//! A [`Failure`] is what the user reads: one line that says what was found and what was expected, one line that says what to do
//! about it, and the number. The same failure becomes the last lines of stderr or an error record of a JSONL stream.

use std::fmt;
use std::io;

use lemma_engine::error::Error as EngineError;
pub(crate) use lemma_engine::error::plain;

pub(crate) const RUNTIME: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const NOT_FOUND: u8 = 3;
pub(crate) const MALFORMED: u8 = 4;
pub(crate) const MEMORY: u8 = 5;
pub(crate) const PROMPT: u8 = 6;
pub(crate) const NO_ANSWER: u8 = 7;
pub(crate) const GRAMMAR: u8 = 8;
pub(crate) const BATCH: u8 = 9;
pub(crate) const BUG: u8 = 70;
pub(crate) const INTERRUPT: u8 = 130;
pub(crate) const PIPE: u8 = 141;
pub(crate) const TERMINATE: u8 = 143;

/// Why the program, or one request of it, did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    /// One word for programs, beside the number.
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            kind: kind(code),
            message: message.into(),
            hint: None,
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(USAGE, message)
    }

    pub(crate) fn runtime(message: impl Into<String>) -> Self {
        Self::new(RUNTIME, message)
    }

    /// An end that prints nothing: the reader went away, or the user said stop.
    pub(crate) fn quiet(code: u8) -> Self {
        Self::new(code, "")
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.message.is_empty()
    }

    /// A failed operation on a file that is not a model.
    pub(crate) fn file(path: &std::path::Path, error: &io::Error) -> Self {
        Self::io(&crate::term::escape_path(path), error)
    }

    /// A failed operation on what errors call `name`.
    pub(crate) fn io(name: &str, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::BrokenPipe => return Self::quiet(PIPE),
            io::ErrorKind::OutOfMemory => MEMORY,
            _ => RUNTIME,
        };
        Self::new(code, format!("{name}: {}", plain(error)))
    }
}

fn kind(code: u8) -> &'static str {
    match code {
        USAGE => "usage",
        NOT_FOUND => "not_found",
        MALFORMED => "malformed",
        MEMORY => "memory",
        PROMPT => "prompt_too_long",
        NO_ANSWER => "no_answer",
        GRAMMAR => "grammar",
        BATCH => "batch",
        BUG => "internal",
        INTERRUPT | TERMINATE => "interrupt",
        PIPE => "pipe",
        _ => "runtime",
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<EngineError> for Failure {
    fn from(e: EngineError) -> Self {
        Self {
            code: e.exit_code(),
            kind: e.kind(),
            message: e.to_string(),
            hint: e.hint().map(Into::into),
        }
    }
}

/// Errors of stdin and stdout; those of named files go through [`Failure::file`].
impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self::quiet(PIPE),
            io::ErrorKind::OutOfMemory => Self::new(MEMORY, plain(&e)),
            _ => Self::runtime(plain(&e)),
        }
    }
}
