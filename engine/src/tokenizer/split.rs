//! Cutting text into words: runs the passes of [`super::pre`] over a string.

use super::pre::{Split, Step, Tail};
use super::source::TokenizerError;
use tokenizers::utils::SysRegex;

/// A compiled pre-tokenizer.
#[derive(Debug)]
pub(super) struct Splitter {
    passes: Vec<Pass>,
}

#[derive(Debug)]
enum Pass {
    Regex(Box<SysRegex>, Tail),
    Plain(Step),
}

impl Splitter {
    /// Compiles the passes of `split`.
    pub(super) fn new(split: Split) -> Result<Self, TokenizerError> {
        let passes = split
            .steps()
            .iter()
            .map(|step| match *step {
                Step::Regex(re, tail) => SysRegex::new(re)
                    .map(|re| Pass::Regex(Box::new(re), tail))
                    .map_err(|e| TokenizerError::Build(format!("expression {re}: {e}"))),
                other => Ok(Pass::Plain(other)),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { passes })
    }

    /// Ends of the words of `text`, ascending byte offsets; the last is `text.len()`.
    pub(super) fn split(&self, text: &str) -> Vec<usize> {
        let mut ends = if text.is_empty() {
            vec![]
        } else {
            vec![text.len()]
        };
        for pass in &self.passes {
            let mut cuts = Cuts {
                ends: Vec::with_capacity(ends.len()),
                last: 0,
            };
            let mut start = 0;
            for end in ends {
                match pass {
                    Pass::Regex(re, tail) => split_regex(re, *tail, text, start, end, &mut cuts),
                    Pass::Plain(Step::Newlines) => split_newlines(text, start, end, &mut cuts),
                    Pass::Plain(Step::DigitsFromRight) => split_digits(text, start, end, &mut cuts),
                    Pass::Plain(_) => split_ascii_triples(text, start, end, &mut cuts),
                }
                cuts.push(end);
                start = end;
            }
            ends = cuts.ends;
        }
        ends
    }
}

/// Growing list of ends; an empty piece is never recorded.
struct Cuts {
    ends: Vec<usize>,
    last: usize,
}

impl Cuts {
    fn push(&mut self, end: usize) {
        if end > self.last {
            self.ends.push(end);
            self.last = end;
        }
    }
}

fn split_regex(re: &SysRegex, tail: Tail, text: &str, start: usize, end: usize, cuts: &mut Cuts) {
    let mut pos = start;
    // The search starts anew after a match that was shortened, on a slice: no expression looks behind.
    'search: while pos < end {
        let base = pos;
        for (from, to) in re.find_iter(&text[base..end]) {
            let (from, to) = (base + from, base + to);
            if to == from {
                continue;
            }
            cuts.push(from);
            let keep = if to == end && tail != Tail::Cascade {
                to
            } else {
                shorten(tail, text, from, to, end, cuts)
            };
            cuts.push(keep);
            pos = keep;
            if keep != to {
                continue 'search;
            }
        }
        return;
    }
}

/// Applies `tail` to the match `from..to` in the piece that ends at `end`; returns where the match ends now.
fn shorten(tail: Tail, text: &str, from: usize, to: usize, end: usize, cuts: &mut Cuts) -> usize {
    let matched = &text[from..to];
    let Some(last) = matched.chars().next_back() else {
        return to;
    };
    let is_newline = |c: char| c == '\r' || c == '\n';
    if tail == Tail::Keep || !last.is_whitespace() {
        return to;
    }
    if matches!(tail, Tail::GiveBackUnlessNewline | Tail::Cascade) && is_newline(last) {
        return to;
    }
    if tail == Tail::GiveBackUnlessStartsNewline && matched.starts_with(is_newline) {
        return to;
    }
    if tail == Tail::Cascade {
        return cascade(text, from, to, to == end, cuts);
    }
    let keep = to - last.len_utf8();
    if keep == from { to } else { keep }
}

/// Cuts a run of white space into pieces of 512, 256, …, 4, 2, 1 characters, leaving one for what follows unless the
/// text ends here; returns the end of the last piece.
fn cascade(text: &str, from: usize, to: usize, at_end: bool, cuts: &mut Cuts) -> usize {
    let n = text[from..to].chars().count();
    let mut left = if at_end { n } else { n - 1 };
    if left == 0 {
        return to;
    }
    let mut chars = text[from..to].chars();
    let mut pos = from;
    while left > 0 {
        let take = [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
            .into_iter()
            .find(|&k| k <= left)
            .unwrap_or(1);
        pos += chars.by_ref().take(take).map(char::len_utf8).sum::<usize>();
        cuts.push(pos);
        left -= take;
    }
    pos
}

fn split_newlines(text: &str, start: usize, end: usize, cuts: &mut Cuts) {
    let piece = &text.as_bytes()[start..end];
    for i in 1..piece.len() {
        if (piece[i] == b'\n') != (piece[i - 1] == b'\n') {
            cuts.push(start + i);
        }
    }
}

/// Groups runs of numeric characters by three from the right. Nothing is cut before a run: text in front of it stays
/// with the first group, which is what llama.cpp does and what later passes are tuned to.
fn split_digits(text: &str, start: usize, end: usize, cuts: &mut Cuts) {
    let mut run: Vec<usize> = Vec::new(); // end offset of each character of the run
    let flush = |run: &mut Vec<usize>, cuts: &mut Cuts| {
        let n = run.len();
        for (i, &e) in run.iter().enumerate() {
            if (n - 1 - i).is_multiple_of(3) {
                cuts.push(e);
            }
        }
        run.clear();
    };
    for (i, c) in text[start..end].char_indices() {
        if c.is_numeric() {
            run.push(start + i + c.len_utf8());
        } else {
            flush(&mut run, cuts);
        }
    }
    flush(&mut run, cuts);
}

/// `(?=(\d{3})+(?!\d))`: a cut wherever the ASCII digits that follow are a multiple of three.
fn split_ascii_triples(text: &str, start: usize, end: usize, cuts: &mut Cuts) {
    let piece = &text.as_bytes()[start..end];
    let mut i = 0;
    while i < piece.len() {
        let run = piece[i..].iter().take_while(|b| b.is_ascii_digit()).count();
        for k in 0..run {
            if (run - k).is_multiple_of(3) {
                cuts.push(start + i + k);
            }
        }
        i += run.max(1);
    }
}
