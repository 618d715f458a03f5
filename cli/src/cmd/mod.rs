//! The commands that have a name of their own, one module each.
//!
//! What they share is here: JSONL input where a bad line costs a record and not the run.

pub(crate) mod batch;
pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod devices;
pub(crate) mod inspect;
pub(crate) mod kv;
pub(crate) mod perplexity;
pub(crate) mod score;
pub(crate) mod synth;
pub(crate) mod vocab;

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal as _, Read as _, stdin};
use std::path::{Path, PathBuf};

use crate::fail::{BATCH, Failure, Result};
use crate::term::escape_path;

/// Lines longer than this are not requests but accidents.
const MAX_LINE: u64 = 256 << 20;

/// The lines of a file, or of stdin for `None` and "-".
pub(crate) struct Lines {
    reader: Box<dyn BufRead>,
    path: Option<PathBuf>,
    number: u64,
}

/// One line that is not blank.
pub(crate) struct Line {
    /// Counted from 1, blank ones too.
    pub(crate) number: u64,
    /// The text, or what is wrong with the bytes.
    pub(crate) text: Result<String>,
}

impl Lines {
    pub(crate) fn open(path: Option<&Path>) -> Result<Self> {
        let path = path.filter(|p| p.as_os_str() != "-");
        let reader: Box<dyn BufRead> = match path {
            Some(p) => Box::new(BufReader::new(
                File::open(p).map_err(|e| Failure::file(p, &e))?,
            )),
            None if stdin().is_terminal() => {
                return Err(Failure::usage("no input: stdin is a terminal")
                    .hint("give a file, or pipe JSON lines in"));
            }
            None => Box::new(BufReader::new(stdin())),
        };
        Ok(Self {
            reader,
            path: path.map(Path::to_owned),
            number: 0,
        })
    }

    /// The next line that is not blank.
    pub(crate) fn next(&mut self) -> Result<Option<Line>> {
        loop {
            let mut bytes = Vec::new();
            let read = (&mut self.reader)
                .take(MAX_LINE)
                .read_until(b'\n', &mut bytes);
            let n = read.map_err(|e| match &self.path {
                Some(p) => Failure::file(p, &e),
                None => Failure::runtime(format!("stdin: {}", crate::fail::plain(&e))),
            })?;
            if n == 0 {
                return Ok(None);
            }
            self.number += 1;
            // A byte order mark is a habit of some editors.
            let bytes = if self.number == 1 {
                bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes)
            } else {
                &bytes
            };
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let text = match std::str::from_utf8(bytes) {
                Ok(t) => Ok(t.trim().to_owned()),
                Err(e) => Err(Failure::usage(format!(
                    "byte {} of the line is not UTF-8",
                    e.valid_up_to()
                ))),
            };
            return Ok(Some(Line {
                number: self.number,
                text,
            }));
        }
    }

    /// Puts the name and the line in front of a message.
    pub(crate) fn locate(&self, number: u64, failure: Failure) -> Failure {
        let name = self
            .path
            .as_deref()
            .map_or_else(|| "stdin".to_owned(), escape_path);
        Failure {
            message: format!("{name}:{number}: {}", failure.message),
            ..failure
        }
    }
}

/// The end of a run over lines: 9 if some failed.
pub(crate) fn verdict(failed: usize, total: usize) -> Result {
    if failed == 0 {
        return Ok(());
    }
    Err(
        Failure::new(BATCH, format!("{failed} of {total} requests failed"))
            .hint("their records have \"ok\":false"),
    )
}

/// The text of an argument, a file, or all of stdin.
pub(crate) fn input_text(argument: Option<&String>, file: Option<&Path>) -> Result<String> {
    let bytes = match (argument, file) {
        (Some(text), _) => return Ok(text.clone()),
        (None, Some(path)) if path.as_os_str() != "-" => {
            std::fs::read(path).map_err(|e| Failure::file(path, &e))?
        }
        _ if stdin().is_terminal() => {
            return Err(Failure::usage("no text: stdin is a terminal")
                .hint("give it as an argument, with -f FILE, or pipe it in"));
        }
        _ => {
            let mut bytes = Vec::new();
            stdin().lock().read_to_end(&mut bytes)?;
            bytes
        }
    };
    String::from_utf8(bytes).map_err(|e| {
        Failure::usage(format!(
            "byte {} of the input is not UTF-8",
            e.utf8_error().valid_up_to()
        ))
    })
}
