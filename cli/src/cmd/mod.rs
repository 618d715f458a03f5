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
pub(crate) mod quantize;
pub(crate) mod score;
pub(crate) mod synth;
pub(crate) mod vocab;

use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader, IsTerminal as _, stdin};
use std::path::{Path, PathBuf};

use crate::fail::{BATCH, Failure, Result};
use crate::stats::counted;
use crate::term::escape_path;
use crate::text::{self, MAX_INPUT};

/// Lines longer than this are not requests but accidents.
const MAX_LINE: u64 = 256 << 20;

/// The lines of a file, or of stdin for `None` and "-".
pub(crate) struct Lines {
    reader: Box<dyn BufRead>,
    path: Option<PathBuf>,
    number: u64,
    max_line: u64,
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
            max_line: MAX_LINE,
        })
    }

    /// The next line that is not blank.
    pub(crate) fn next(&mut self) -> Result<Option<Line>> {
        loop {
            let mut bytes = Vec::new();
            self.read_line(&mut bytes).map_err(|e| self.failure(&e))?;
            if bytes.is_empty() {
                return Ok(None);
            }
            self.number += 1;
            if bytes.len() as u64 == self.max_line && bytes.last() != Some(&b'\n') {
                self.skip_line()?;
                return Ok(Some(Line {
                    number: self.number,
                    text: Err(Failure::usage(format!(
                        "a line of more than {} bytes, expected a request",
                        self.max_line
                    ))),
                }));
            }
            // A byte order mark is a habit of some editors.
            let bytes = if self.number == 1 {
                bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes)
            } else {
                &bytes
            };
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let room = text::room_for(bytes.len(), text::LINE_GROWTH, "a line");
            let text = room.and_then(|()| match std::str::from_utf8(bytes) {
                Ok(t) => Ok(t.trim().to_owned()),
                Err(e) => Err(Failure::usage(format!(
                    "byte {} of the line is not UTF-8",
                    e.valid_up_to()
                ))),
            });
            return Ok(Some(Line {
                number: self.number,
                text,
            }));
        }
    }

    /// Whether the lines come from the file at `path`.
    pub(crate) fn is_file(&self, path: &Path) -> bool {
        use std::os::fd::AsFd as _;
        let source = match &self.path {
            Some(p) => std::fs::metadata(p),
            None => stdin()
                .as_fd()
                .try_clone_to_owned()
                .and_then(|fd| File::from(fd).metadata()),
        };
        match (source, std::fs::metadata(path)) {
            (Ok(a), Ok(b)) => a.is_file() && is_same_file(&a, &b),
            _ => false,
        }
    }

    /// Reads up to the end of a line or its largest length.
    fn read_line(&mut self, line: &mut Vec<u8>) -> std::io::Result<()> {
        let mut left = self.max_line as usize;
        while left > 0 {
            let part = match self.reader.fill_buf() {
                Ok(part) => &part[..part.len().min(left)],
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let end = part.iter().position(|&b| b == b'\n');
            let n = end.map_or(part.len(), |at| at + 1);
            line.try_reserve(n)?;
            line.extend_from_slice(&part[..n]);
            self.reader.consume(n);
            left -= n;
            if end.is_some() || n == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Drops the rest of a line.
    fn skip_line(&mut self) -> Result {
        loop {
            let (used, ended) = match self.reader.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(part) => match part.iter().position(|&b| b == b'\n') {
                    Some(at) => (at + 1, true),
                    None => (part.len(), false),
                },
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failure(&e)),
            };
            self.reader.consume(used);
            if ended {
                return Ok(());
            }
        }
    }

    fn failure(&self, e: &std::io::Error) -> Failure {
        match &self.path {
            Some(p) => Failure::file(p, e),
            None => Failure::io("stdin", e),
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
    Err(Failure::new(
        BATCH,
        format!(
            "{failed} of {} failed",
            counted(total as u64, "request", "requests")
        ),
    )
    .hint("records of failures have \"ok\":false"))
}

/// Whether two names lead to one file.
pub(crate) fn is_same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Refuses to write a model over what somebody may want to keep. An empty file (of `mktemp`) is nothing to keep.
pub(crate) fn free(output: &Path, force: bool) -> Result {
    let name = escape_path(output);
    if output.as_os_str() == "-" {
        return Err(Failure::usage(
            "-: a model is not written to stdout, expected a file to write",
        ));
    }
    match output.metadata() {
        Ok(there) if there.is_dir() => Err(Failure::usage(format!(
            "{name}: is a directory, expected a file to write"
        ))),
        Ok(there) if there.is_file() && there.len() > 0 && !force => Err(Failure::usage(format!(
            "{name}: exists already, expected a new file"
        ))
        .hint("--force replaces it")),
        _ => Ok(()),
    }
}

/// The text of an argument, a file, or all of stdin.
pub(crate) fn input_text(argument: Option<&String>, file: Option<&Path>) -> Result<String> {
    match (argument, file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) if path.as_os_str() != "-" => text::of_file(path, MAX_INPUT),
        _ if stdin().is_terminal() => Err(Failure::usage("no text: stdin is a terminal")
            .hint("give it as an argument, with -f FILE, or pipe it in")),
        _ => text::of_stdin(MAX_INPUT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_end_is_one_error() {
        let text: &[u8] = b"\n{\"a\":1}\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n{}\nyyyyyyyyyyyyyyy";
        let mut lines = Lines {
            reader: Box::new(BufReader::with_capacity(4, text)),
            path: None,
            number: 0,
            max_line: 10,
        };
        let mut seen = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            seen.push((line.number, line.text.ok()));
        }
        let text = |t: &str| Some(t.to_owned());
        assert_eq!(
            seen,
            [
                (2, text("{\"a\":1}")),
                (3, None),
                (4, text("{}")),
                (5, None)
            ]
        );
    }
}
