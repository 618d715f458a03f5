//! Whole texts from files and stdin.
//!
//! All of them have a limit: what never ends (`lemma -f /dev/zero`, `yes | lemma`) must be an error and not take the memory of the
//! machine first.

use std::fs::File;
use std::io::{Read, stdin};
use std::path::Path;

use lemma_engine::memory::{ask, show};

use crate::fail::{Failure, PROMPT, Result};
use crate::term::escape_path;

/// Prompts and what goes with them. Ten million tokens of English are about as much.
pub(crate) const MAX_PROMPT: u64 = 64 << 20;
/// What is only tokenized or measured.
pub(crate) const MAX_INPUT: u64 = 1 << 30;
const BOM: char = '\u{feff}';

/// The text of a file.
pub(crate) fn of_file(path: &Path, limit: u64) -> Result<String> {
    let file = File::open(path).map_err(|e| Failure::file(path, &e))?;
    read(file, &escape_path(path), limit)
}

/// All of stdin.
pub(crate) fn of_stdin(limit: u64) -> Result<String> {
    read(stdin().lock(), "stdin", limit)
}

/// Bytes that a byte of a prompt takes at most on its way to tokens, as message, words and ids.
const PROMPT_GROWTH: u64 = 16;
/// The same for texts whose tokens are written one by one.
const INPUT_GROWTH: u64 = 80;
/// The same for lines of JSON, where a number may take one byte and is kept as a text.
pub(crate) const LINE_GROWTH: u64 = 140;
/// Texts up to here are not asked about.
const LITTLE: usize = 1 << 20;

/// Fails if there is no memory to work on a text of `n` bytes that grows so much.
pub(crate) fn room_for(n: usize, growth: u64, name: &str) -> Result {
    if n > LITTLE {
        let what = format!("{name}: {} of text", show(n as u64));
        ask(n as u64 * growth, what)?;
    }
    Ok(())
}

fn read(from: impl Read, name: &str, limit: u64) -> Result<String> {
    let mut bytes = Vec::new();
    from.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::io(name, &e))?;
    if bytes.len() as u64 > limit {
        return Err(Failure::new(
            PROMPT,
            format!("{name}: more than {} MiB, expected a text", limit >> 20),
        ));
    }
    let is_prompt = limit <= MAX_PROMPT;
    let growth = match is_prompt {
        true => PROMPT_GROWTH,
        false => INPUT_GROWTH,
    };
    room_for(bytes.len(), growth, name)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::usage(format!("{name}: byte {at} is not UTF-8, expected a text"))
    })?;
    // Who asks for the tokens of a text wants to see those of a mark as well.
    Ok(match is_prompt {
        true => unmarked(text),
        false => text,
    })
}

/// Without a byte order mark, which says how a text is written and is no part of it.
pub(crate) fn unmarked(mut text: String) -> String {
    if text.starts_with(BOM) {
        text.drain(..BOM.len_utf8());
    }
    text
}

/// Without the final newline, which belongs to the file and not to what is asked.
pub(crate) fn chomp(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_ends_is_an_error() {
        assert_eq!(read(&b"abcd"[..], "x", 4).unwrap(), "abcd");
        let marked = &b"\xef\xbb\xbfab"[..];
        assert_eq!(read(marked, "x", 9).unwrap(), "ab");
        assert_eq!(read(marked, "x", MAX_INPUT).unwrap(), "\u{feff}ab");
        let e = read(std::io::repeat(b'a'), "x", 3 << 20).unwrap_err();
        assert_eq!(
            (e.code, e.message.as_str()),
            (PROMPT, "x: more than 3 MiB, expected a text")
        );
        for (bytes, at) in [(&b"ab\xff"[..], 2), (b"\xef\xbb\xbfab\xff", 5)] {
            assert_eq!(
                read(bytes, "x", 9).unwrap_err().message,
                format!("x: byte {at} is not UTF-8, expected a text")
            );
        }
    }

    #[test]
    fn one_newline_goes() {
        for (given, kept) in [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("", "")] {
            assert_eq!(chomp(given.to_owned()), kept);
        }
    }
}
