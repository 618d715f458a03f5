//! The one error type of the engine.
//!
//! Every failure that a person or a script can meet becomes one line, `FILE: what was found, what was expected`, an
//! optional hint, a kind and an exit code. The text often quotes names that come from files nobody has vetted, so the
//! constructors escape everything that could move a cursor, recolour a terminal or break the line: a [`Report`] cannot
//! hold a control character.

use std::fmt::{self, Write as _};

/// Longest name, in characters, that an error quotes from a file.
pub const NAME_MAX: usize = 96;
/// Longest report text in characters; longer ones end in `…`.
const TEXT_MAX: usize = 900;

/// Result with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is said about a failure: the file it concerns (if any), the text, and a hint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    file: Option<String>,
    what: String,
    hint: Option<String>,
}

impl Report {
    /// Builds a report; all parts are escaped and cut to a sane length here.
    fn new(file: Option<&str>, what: &str) -> Self {
        Self {
            file: file.map(|f| escape(f, 4 * NAME_MAX)),
            what: escape(what, TEXT_MAX),
            hint: None,
        }
    }

    /// The file the report is about, escaped for display.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// What was found and what was expected, without the file name.
    pub fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{file}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// An engine failure. The variant decides the exit code and the machine-readable kind; the text is in the [`Report`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The model file does not exist (exit code 3).
    #[error("{0}")]
    NotFound(Report),
    /// The model file exists but cannot be read: permissions, a directory, a pipe (exit code 3).
    #[error("{0}")]
    Unreadable(Report),
    /// The model file contradicts its format or itself (exit code 4).
    #[error("{0}")]
    Malformed(Report),
    /// The model file is valid but asks for something this engine does not do (exit code 4).
    #[error("{0}")]
    Unsupported(Report),
    /// The machine cannot hold what was asked for (exit code 5).
    #[error("{0}")]
    Memory(Report),
    /// The prompt fits neither the pool nor the position limit (exit code 6).
    #[error("{0}")]
    PromptTooLong(Report),
    /// The caller asked for something contradictory or out of range (exit code 2).
    #[error("{0}")]
    Usage(Report),
    /// A grammar or JSON schema is invalid (exit code 8).
    #[error("{0}")]
    Grammar(Report),
    /// Anything that went wrong while running: devices, templates, writes (exit code 1).
    #[error("{0}")]
    Runtime(Report),
}

/// One constructor per variant, with and without a file.
macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident $name_in:ident => $variant:ident;)*) => {
        impl Error {
            $(
                $(#[$doc])*
                pub fn $name(what: impl fmt::Display) -> Self {
                    Error::$variant(Report::new(None, &what.to_string()))
                }

                $(#[$doc])*
                /// The report starts with the name of `file`.
                pub fn $name_in(file: impl AsRef<str>, what: impl fmt::Display) -> Self {
                    Error::$variant(Report::new(Some(file.as_ref()), &what.to_string()))
                }
            )*
        }
    };
}

constructors! {
    /// A [`Error::NotFound`].
    not_found not_found_in => NotFound;
    /// An [`Error::Unreadable`].
    unreadable unreadable_in => Unreadable;
    /// A [`Error::Malformed`].
    malformed malformed_in => Malformed;
    /// An [`Error::Unsupported`].
    unsupported unsupported_in => Unsupported;
    /// A [`Error::Memory`].
    memory memory_in => Memory;
    /// A [`Error::PromptTooLong`].
    prompt_too_long prompt_too_long_in => PromptTooLong;
    /// A [`Error::Usage`].
    usage usage_in => Usage;
    /// A [`Error::Grammar`].
    grammar grammar_in => Grammar;
    /// A [`Error::Runtime`].
    runtime runtime_in => Runtime;
}

impl Error {
    /// The exit code of a command that ends with this error (see the table of exit codes in the manual).
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Runtime(_) => 1,
            Error::Usage(_) => 2,
            Error::NotFound(_) | Error::Unreadable(_) => 3,
            Error::Malformed(_) | Error::Unsupported(_) => 4,
            Error::Memory(_) => 5,
            Error::PromptTooLong(_) => 6,
            Error::Grammar(_) => 8,
        }
    }

    /// A stable word for scripts (`error.kind` in JSON records).
    pub fn kind(&self) -> &'static str {
        match self {
            Error::NotFound(_) => "not_found",
            Error::Unreadable(_) => "unreadable",
            Error::Malformed(_) => "malformed",
            Error::Unsupported(_) => "unsupported",
            Error::Memory(_) => "memory",
            Error::PromptTooLong(_) => "prompt_too_long",
            Error::Usage(_) => "usage",
            Error::Grammar(_) => "grammar",
            Error::Runtime(_) => "runtime",
        }
    }

    /// The report inside.
    pub fn report(&self) -> &Report {
        match self {
            Error::NotFound(r)
            | Error::Unreadable(r)
            | Error::Malformed(r)
            | Error::Unsupported(r)
            | Error::Memory(r)
            | Error::PromptTooLong(r)
            | Error::Usage(r)
            | Error::Grammar(r)
            | Error::Runtime(r) => r,
        }
    }

    fn report_mut(&mut self) -> &mut Report {
        match self {
            Error::NotFound(r)
            | Error::Unreadable(r)
            | Error::Malformed(r)
            | Error::Unsupported(r)
            | Error::Memory(r)
            | Error::PromptTooLong(r)
            | Error::Usage(r)
            | Error::Grammar(r)
            | Error::Runtime(r) => r,
        }
    }

    /// What to try next, if there is something to say (printed as `hint: …`).
    pub fn hint(&self) -> Option<&str> {
        self.report().hint.as_deref()
    }

    /// Adds a hint, escaped like the text.
    #[must_use]
    pub fn with_hint(mut self, hint: impl fmt::Display) -> Self {
        self.report_mut().hint = Some(escape(hint.to_string(), TEXT_MAX));
        self
    }

    /// Names the file the error is about, unless it names one already.
    #[must_use]
    pub fn in_file(mut self, file: impl AsRef<str>) -> Self {
        let report = self.report_mut();
        if report.file.is_none() {
            report.file = Some(escape(file.as_ref(), 4 * NAME_MAX));
        }
        self
    }
}

/// Makes bytes from an untrusted source printable on one line, `max` characters at most (then `…` follows).
///
/// Control characters (C0, C1, DEL), line and paragraph separators, bidirectional overrides and isolates, zero-width
/// characters and the byte order mark become `\u{..}`; bytes that are not UTF-8 become `\x..`. The backslash itself is
/// kept: the result is for people, and escaping it twice must change nothing.
pub fn escape(s: impl AsRef<[u8]>, max: usize) -> String {
    let mut out = String::new();
    let mut room = max;
    // An escape sequence is kept whole: half of `\u{1b}` would only puzzle.
    let mut push = |out: &mut String, piece: &str| {
        let n = piece.chars().count();
        if n > room {
            out.push('…');
            return false;
        }
        room -= n;
        out.push_str(piece);
        true
    };
    let mut piece = String::new();
    for chunk in s.as_ref().utf8_chunks() {
        for c in chunk.valid().chars() {
            piece.clear();
            if is_hostile(c) {
                let _ = write!(piece, "\\u{{{:x}}}", c as u32);
            } else {
                piece.push(c);
            }
            if !push(&mut out, &piece) {
                return out;
            }
        }
        for b in chunk.invalid() {
            piece.clear();
            let _ = write!(piece, "\\x{b:02x}");
            if !push(&mut out, &piece) {
                return out;
            }
        }
    }
    out
}

/// The text of an I/O error without Rust's "(os error 2)".
pub fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// True for characters that can act on a terminal, reorder text or hide in it.
fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_what_could_act_on_a_terminal() {
        assert_eq!(escape("plain äöü 日本", 50), "plain äöü 日本");
        assert_eq!(
            escape("a\x1b[31mb\nc\u{202e}d\u{9b}", 50),
            "a\\u{1b}[31mb\\u{a}c\\u{202e}d\\u{9b}"
        );
        assert_eq!(escape(b"ok\xff\xc3", 50), "ok\\xff\\xc3");
        assert_eq!(escape("abcdef", 3), "abc…");
        assert_eq!(escape("ab\x1b", 3), "ab…", "an escape is never cut in half");
        let once = escape("\x1b\u{feff}", 50);
        assert_eq!(escape(&once, 50), once);
    }

    #[test]
    fn errors_are_one_printable_line() {
        let e = Error::malformed_in("dir/\x07bad.gguf", "key 'a\nb' is twice in the file")
            .with_hint("x\ty");
        assert_eq!(
            e.to_string(),
            "dir/\\u{7}bad.gguf: key 'a\\u{a}b' is twice in the file"
        );
        assert_eq!(
            (e.exit_code(), e.kind(), e.hint()),
            (4, "malformed", Some("x\\u{9}y"))
        );
        assert_eq!(
            Error::usage("no").in_file("f").in_file("g").to_string(),
            "f: no"
        );
    }
}
