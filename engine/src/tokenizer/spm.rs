//! SentencePiece-style byte-pair encoding: of all neighbours whose concatenation is a token, the pair with the best
//! score is merged first, the leftmost of equals.
//!
//! The pairs are looked up in the vocabulary while merging. A table of merges ranked by score, which the BPE model of
//! the `tokenizers` crate would need, cannot express that equal scores are taken from left to right, and for a
//! vocabulary of 262,000 tokens it is several times larger than the vocabulary itself.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

const END: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    prev: u32,
    next: u32,
    start: u32,
    /// 0 once merged into the symbol to its left.
    len: u32,
}

/// A candidate for merging; the greatest is merged first.
struct Bigram {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of both sides when queued: tells an outdated entry.
    len: u32,
}

impl Ord for Bigram {
    fn cmp(&self, other: &Self) -> Ordering {
        // total_cmp: a NaN in a hostile file must not break the heap.
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}
impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Bigram {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Bigram {}

/// Length of a UTF-8 sequence from its first byte; a stray continuation byte counts as one.
fn utf8_len(first: u8) -> usize {
    match first >> 4 {
        0xc | 0xd => 2,
        0xe => 3,
        0xf => 4,
        _ => 1,
    }
}

/// Merges `text` (spaces already escaped; any bytes) and calls `emit` with each final symbol, from left to right.
///
/// `score` gives the score of a byte string that is a token, `max_len` the length of the longest token in bytes.
pub(super) fn merge(
    text: &[u8],
    max_len: usize,
    score: impl Fn(&[u8]) -> Option<f32>,
    mut emit: impl FnMut(&[u8]),
) {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    let mut start = 0;
    while start < text.len() {
        let len = utf8_len(text[start]).min(text.len() - start);
        let index = symbols.len() as u32;
        symbols.push(Symbol {
            prev: index.wrapping_sub(1),
            next: index + 1,
            start: start as u32,
            len: len as u32,
        });
        start += len;
    }
    let Some(last) = symbols.last_mut() else {
        return;
    };
    last.next = END;

    let mut queue = BinaryHeap::new();
    let push = |queue: &mut BinaryHeap<Bigram>, symbols: &[Symbol], left: u32, right: u32| {
        if left == END || right == END {
            return;
        }
        let (l, r) = (symbols[left as usize], symbols[right as usize]);
        let len = l.len + r.len;
        if len as usize > max_len {
            return;
        }
        let bytes = &text[l.start as usize..(l.start + len) as usize];
        if let Some(score) = score(bytes) {
            queue.push(Bigram {
                score,
                left,
                right,
                len,
            });
        }
    };
    for right in 1..symbols.len() as u32 {
        push(&mut queue, &symbols, right - 1, right);
    }
    while let Some(Bigram {
        left, right, len, ..
    }) = queue.pop()
    {
        let (l, r) = (symbols[left as usize], symbols[right as usize]);
        if l.len == 0 || r.len == 0 || l.len + r.len != len {
            continue;
        }
        symbols[left as usize].len = len;
        symbols[left as usize].next = r.next;
        symbols[right as usize].len = 0;
        if r.next != END {
            symbols[r.next as usize].prev = left;
        }
        push(&mut queue, &symbols, l.prev, left);
        push(&mut queue, &symbols, left, r.next);
    }
    let mut i = 0;
    while i != END {
        let s = symbols[i as usize];
        emit(&text[s.start as usize..(s.start + s.len) as usize]);
        i = s.next;
    }
}
