//! What the program knows about the terminal, and how it writes to it.
//!
//! The rule that scripts rely on: no colour, no carriage return and no cursor movement on a stream that is not a terminal. Streams
//! are judged one by one, because `lemma … | less` has a terminal on stderr and none on stdout.

pub(crate) mod filter;

use std::borrow::Cow;
use std::io::{IsTerminal as _, stderr, stdin, stdout};
use std::path::Path;
use std::sync::OnceLock;

/// When to colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

/// Which streams are terminals, and which of them take colour.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    pub(crate) in_tty: bool,
    pub(crate) out_tty: bool,
    pub(crate) err_tty: bool,
    pub(crate) out_style: Style,
    pub(crate) err_style: Style,
}

impl Term {
    /// Looks at the streams. `NO_COLOR` and `TERM=dumb` count under [`Color::Auto`] only: a flag says more than the environment.
    pub(crate) fn detect(color: Color) -> Self {
        let env_allows = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && !is_dumb();
        let style = |tty: bool| match color {
            Color::Always => Style(true),
            Color::Never => Style(false),
            Color::Auto => Style(tty && env_allows),
        };
        let (out_tty, err_tty) = (stdout().is_terminal(), stderr().is_terminal());
        Self {
            in_tty: stdin().is_terminal(),
            out_tty,
            err_tty,
            out_style: style(out_tty),
            err_style: style(err_tty),
        }
    }

    /// Whether lines on stderr can be taken back.
    pub(crate) fn can_redraw(&self) -> bool {
        self.err_tty && !is_dumb()
    }

    /// Columns of the terminal, 80 if there is none to ask.
    pub(crate) fn width() -> usize {
        let asked = [
            rustix::termios::tcgetwinsize(stderr()),
            rustix::termios::tcgetwinsize(stdout()),
        ];
        let columns = asked
            .into_iter()
            .flatten()
            .map(|w| usize::from(w.ws_col))
            .find(|&w| w > 0);
        columns
            .or_else(|| std::env::var("COLUMNS").ok()?.parse().ok())
            .unwrap_or(80)
    }
}

/// Facts in a row, with dots between them; where one would cross the edge a new line begins.
pub(crate) fn row(facts: &[String], width: usize) -> String {
    let mut text = String::new();
    let mut used = 0;
    for fact in facts {
        let n = fact.chars().count();
        if used > 0 && used + 3 + n > width {
            text.push('\n');
            used = 0;
        } else if used > 0 {
            text.push_str(" · ");
            used += 3;
        }
        text.push_str(fact);
        used += n;
    }
    text
}

/// Whether the terminal says of itself that it takes no sequences.
pub(crate) fn is_dumb() -> bool {
    static DUMB: OnceLock<bool> = OnceLock::new();
    *DUMB.get_or_init(|| std::env::var_os("TERM").is_some_and(|t| t == "dumb"))
}

/// Takes back a line that the next one replaces.
pub(crate) const ERASE: &str = "\r\x1b[K";

/// A line that the next one replaces. It is cut at the edge: one that wraps could not be taken back.
pub(crate) fn transient(text: &str, width: usize, style: Style) -> String {
    let shown: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{ERASE}{}{shown}{}", style.dim(), style.reset())
}

/// Escape sequences, or nothing where colour is off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style(pub(crate) bool);

impl Style {
    fn code(self, code: &'static str) -> &'static str {
        if self.0 { code } else { "" }
    }
    pub(crate) fn dim(self) -> &'static str {
        self.code("\x1b[2m")
    }
    pub(crate) fn bold(self) -> &'static str {
        self.code("\x1b[1m")
    }
    pub(crate) fn red(self) -> &'static str {
        self.code("\x1b[1;31m")
    }
    pub(crate) fn cyan(self) -> &'static str {
        self.code("\x1b[36m")
    }
    pub(crate) fn reset(self) -> &'static str {
        self.code("\x1b[0m")
    }
    /// A colour of the 256-colour table.
    pub(crate) fn fg(self, index: u8) -> Cow<'static, str> {
        if self.0 {
            Cow::Owned(format!("\x1b[38;5;{index}m"))
        } else {
            Cow::Borrowed("")
        }
    }
}

/// Columns that `text` takes, escape sequences not counted.
#[cfg(test)]
pub(crate) fn columns(text: &str) -> usize {
    use unicode_width::UnicodeWidthChar as _;
    filter::Filter::default()
        .clean(text)
        .chars()
        .map(|c| c.width().unwrap_or(0))
        .sum()
}

/// A text from a file or a command line as it may be shown: controls, invisible characters and quotes of the terminal escaped.
pub(crate) fn escape(text: &str) -> String {
    lemma_engine::error::escape(text, 400)
}

/// A path as it may be shown.
pub(crate) fn escape_path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_replaced_does_not_wrap() {
        let off = super::Style(false);
        assert_eq!(super::transient("12345", 80, off), "\r\x1b[K12345");
        assert_eq!(super::transient("12345", 5, off), "\r\x1b[K1234");
    }

    #[test]
    fn rows_break_between_facts() {
        let facts = ["one".to_owned(), "two".to_owned(), "three".to_owned()];
        assert_eq!(super::row(&facts, 80), "one · two · three");
        assert_eq!(super::row(&facts, 9), "one · two\nthree");
        assert_eq!(super::row(&facts, 1), "one\ntwo\nthree");
    }
}
