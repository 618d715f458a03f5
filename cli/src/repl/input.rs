//! The line editor: rustyline, taught this program's commands.
//!
//! Three ways lead to a message of several lines: paste it (bracketed paste keeps newlines as text), press Alt-Enter, or open with
//! `"""` and close with `"""`. The history is kept across starts, under the XDG state directory.

use std::borrow::Cow;
use std::io::{BufRead as _, ErrorKind, stdin};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, QueueSelector, SpecialCodeIndex, tcflush, tcgetattr,
    tcsetattr,
};
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::config::{BellStyle, CompletionType, Config};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Cmd, Context, Editor, Helper, KeyCode, KeyEvent, Modifiers};

use super::commands::{self, Args};
use crate::fail::{Failure, Result};
use crate::out;
use crate::signals::{Asking, Deaf, remember_terminal};
use crate::term::{Style, escape_path, is_dumb};

const PROMPT: &str = "> ";
const FENCE: &str = "\"\"\"";
const HISTORY_ENTRIES: usize = 2000;
/// What ends a bracketed paste.
const PASTED: &[u8] = b"\x1b[201~";
/// A paste without an end is waited for no longer than this.
const LONGEST_PASTE: Duration = Duration::from_secs(5);

/// What the user did at the prompt.
pub(crate) enum Input {
    Line(String),
    /// What stood between fences: a message, whatever it begins with.
    Literal(String),
    /// Ctrl-C: the line is gone, the program stays.
    Cleared,
    /// Ctrl-D on an empty line.
    End,
}

pub(crate) struct Reader {
    editor: Editor<Assistant, FileHistory>,
    history: Option<PathBuf>,
}

impl Reader {
    pub(crate) fn new(style: Style) -> Result<Self> {
        remember_terminal();
        let config = Config::builder()
            .max_history_size(HISTORY_ENTRIES)
            .and_then(|c| c.history_ignore_dups(true))
            .map_err(failure)?
            .history_ignore_space(true)
            .completion_type(CompletionType::List)
            .bell_style(BellStyle::None)
            .bracketed_paste(true)
            .build();
        let mut editor = Editor::with_config(config).map_err(failure)?;
        editor.set_helper(Some(Assistant {
            style,
            files: FilenameCompleter::new(),
        }));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        let history = history_file();
        if let Some(path) = &history {
            match editor.load_history(path) {
                Ok(()) => {}
                Err(ReadlineError::Io(e)) if e.kind() == ErrorKind::NotFound => create(path),
                Err(e) => {
                    let what = match e {
                        ReadlineError::Io(e) => crate::fail::plain(&e),
                        e => e.to_string(),
                    };
                    out::note(&format!("note: history {}: {what}", escape_path(path)));
                }
            }
        }
        Ok(Self { editor, history })
    }

    /// Waits for a line. What was typed during a reply is read first.
    pub(crate) fn read(&mut self) -> Result<Input> {
        loop {
            let line = match is_dumb() {
                true => ask()?,
                false => self.editor.readline(PROMPT),
            };
            match line {
                Ok(line) => {
                    if !line.trim().is_empty()
                        && self
                            .editor
                            .add_history_entry(line.as_str())
                            .unwrap_or(false)
                    {
                        self.remember();
                    }
                    return Ok(match unfence(&line) {
                        Some(text) => Input::Literal(text),
                        None => Input::Line(line),
                    });
                }
                Err(ReadlineError::Interrupted) => return Ok(Input::Cleared),
                Err(ReadlineError::Eof) => return Ok(Input::End),
                Err(ReadlineError::Io(e)) if e.kind() == ErrorKind::InvalidData => {
                    // A terminal that edits lines by itself has handed out all of it.
                    if !is_dumb() {
                        drop_rest();
                    }
                    out::note("note: the line was not UTF-8 and was dropped");
                }
                // A resized window is not an end of input.
                Err(ReadlineError::Signal(_)) => {}
                Err(e) => return Err(failure(e)),
            }
        }
    }

    /// Appended at once: the line must survive whatever the reply does.
    fn remember(&mut self) {
        if let Some(path) = &self.history
            && self.editor.append_history(path).is_err()
        {
            // Said once; a read-only home is no reason to nag.
            out::note(&format!(
                "note: the history cannot be written to {}",
                escape_path(path)
            ));
            self.history = None;
        }
    }
}

/// Reads a message on a terminal that cannot move the cursor and edits lines by itself. Ctrl-C drops all lines of it.
fn ask() -> Result<rustyline::Result<String>> {
    // Who sees the prompt may press Ctrl-C.
    let asking = Asking::begin();
    out::put(PROMPT)?;
    let mut text = String::new();
    loop {
        let mut line = Vec::new();
        match stdin().lock().read_until(b'\n', &mut line) {
            Ok(0) => return Ok(Err(ReadlineError::Eof)),
            Ok(_) => {}
            Err(e) => return Ok(Err(e.into())),
        }
        if asking.dropped() {
            text.clear();
        }
        let Ok(line) = String::from_utf8(line) else {
            return Ok(Err(ErrorKind::InvalidData.into()));
        };
        text.push_str(&line);
        if !is_open(&text) {
            return Ok(Ok(crate::text::chomp(text)));
        }
    }
}

/// Drops what follows the byte at which the editor gave up: up to the end of the paste, or until nothing more comes. The rest of a paste
/// must neither be taken for commands nor, as Ctrl-C, end the program.
fn drop_rest() {
    let Ok(before) = tcgetattr(stdin()) else {
        return;
    };
    let _deaf = Deaf::begin();
    let mut raw = before.clone();
    raw.local_modes
        .remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
    raw.input_modes.remove(InputModes::IXON | InputModes::ICRNL);
    // A read without a byte ends after a tenth of a second.
    raw.special_codes[SpecialCodeIndex::VMIN] = 0;
    raw.special_codes[SpecialCodeIndex::VTIME] = 1;
    if tcsetattr(stdin(), OptionalActions::Now, &raw).is_err() {
        return;
    }
    let start = Instant::now();
    let mut byte = [0];
    let mut last = [0; PASTED.len()];
    // One at a time: what is typed behind the paste is for the next line.
    while last != PASTED && matches!(rustix::io::read(stdin(), &mut byte), Ok(1)) {
        last.rotate_left(1);
        last[PASTED.len() - 1] = byte[0];
        if start.elapsed() > LONGEST_PASTE {
            let _ = tcflush(stdin(), QueueSelector::IFlush);
            break;
        }
    }
    let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
}

fn failure(e: ReadlineError) -> Failure {
    Failure::runtime(format!("terminal: {e}"))
}

/// `$XDG_STATE_HOME/lemma/history`, by default under `~/.local/state`.
fn history_file() -> Option<PathBuf> {
    let var = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    let state = var("XDG_STATE_HOME").or_else(|| Some(var("HOME")?.join(".local/state")))?;
    Some(state.join("lemma").join("history"))
}

/// What people ask is theirs alone.
fn create(path: &Path) {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    if let Some(dir) = path.parent() {
        let _ = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
    }
    let _ = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
}

/// The text between `"""` and `"""`, without the newlines next to them.
fn unfence(line: &str) -> Option<String> {
    let inner = line.trim().strip_prefix(FENCE)?.strip_suffix(FENCE)?;
    let inner = inner.strip_prefix('\n').unwrap_or(inner);
    Some(inner.strip_suffix('\n').unwrap_or(inner).to_owned())
}

/// Whether `"""` was opened and is not closed yet.
fn is_open(text: &str) -> bool {
    let text = text.trim();
    text.starts_with(FENCE) && (text.len() < 2 * FENCE.len() || !text.ends_with(FENCE))
}

struct Assistant {
    style: Style,
    files: FilenameCompleter,
}

impl Helper for Assistant {}

impl Hinter for Assistant {
    type Hint = String;
}

impl Validator for Assistant {
    fn validate(&self, ctx: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if is_open(ctx.input()) {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Highlighter for Assistant {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(
        &'s self,
        prompt: &'p str,
        _default: bool,
    ) -> Cow<'b, str> {
        if self.style.0 {
            Cow::Owned(format!(
                "{}{prompt}{}",
                self.style.bold(),
                self.style.reset()
            ))
        } else {
            Cow::Borrowed(prompt)
        }
    }
}

impl Completer for Assistant {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = &line[..pos];
        if !before.starts_with('/') || before.starts_with("//") {
            return Ok((pos, Vec::new()));
        }
        let Some((name, rest)) = before.split_once(' ') else {
            let names = commands::TABLE
                .iter()
                .map(|c| c.name)
                .filter(|n| n.starts_with(before));
            return Ok((0, names.map(|n| pair(n, true)).collect()));
        };
        match commands::find(name).map(|c| c.args) {
            Some(Args::Path) => self.files.complete_path(line, pos),
            Some(Args::OneOf(words)) if !rest.contains(' ') => {
                let start = pos - rest.len();
                Ok((
                    start,
                    words
                        .iter()
                        .filter(|w| w.starts_with(rest))
                        .map(|w| pair(w, true))
                        .collect(),
                ))
            }
            Some(Args::Setting) if !rest.contains(' ') => {
                let keys = lemma_engine::sampling::SamplerParams::NAMES
                    .iter()
                    .copied()
                    .chain(commands::SETTINGS.iter().copied());
                let start = pos - rest.len();
                Ok((
                    start,
                    keys.filter(|w| w.starts_with(rest))
                        .map(|w| pair(w, true))
                        .collect(),
                ))
            }
            _ => Ok((pos, Vec::new())),
        }
    }
}

fn pair(word: &str, space: bool) -> Pair {
    Pair {
        display: word.to_owned(),
        replacement: format!("{word}{}", if space { " " } else { "" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences() {
        assert!(is_open("\"\"\"") && is_open("\"\"\"a\nb") && is_open("  \"\"\"a\"\""));
        assert!(!is_open("\"\"\"a\nb\"\"\"") && !is_open("a \"\"\"") && !is_open("\"\"\"\"\"\""));
        assert_eq!(unfence("\"\"\"\na\n\nb\n\"\"\"").as_deref(), Some("a\n\nb"));
        assert_eq!(unfence("\"\"\"a\"\"\"").as_deref(), Some("a"));
        assert_eq!(unfence("\"\"\"\"\"\"").as_deref(), Some(""));
        assert_eq!(unfence("say \"\"\" please"), None);
    }
}
