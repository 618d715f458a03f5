//! Segmentation by score (`plamo2`): of all ways to cut a text into tokens the one whose scores have the largest sum, and of equals the one
//! whose first token is longest. A character that no token begins with becomes the tokens of its bytes, at a price that no token has.
//!
//! Costs are whole numbers, ten thousandths of scores, so that sums do not depend on their order.

use std::ops::Range;

use super::bpe::Texts;
use super::vocab::{BYTE, CONTROL, UNKNOWN, Vocab};

/// What a character costs that is spelt in bytes.
const UNKNOWN_COST: i64 = 10_000_000;
/// Tokens that cost as much are never chosen.
const MAX_COST: i64 = 20_000_000;
/// Nor are longer ones, in bytes: published vocabularies have none, and no text may take longer than so many looks at each of its characters.
const MAX_LEN: usize = 1024;

/// The tokens that text may become.
#[derive(Debug)]
pub(super) struct Lattice {
    /// Their ids, in the order of their bytes.
    sorted: Vec<u32>,
    /// What each costs, `[n_vocab]`.
    costs: Vec<i64>,
}

/// How the rest of a text goes on.
#[derive(Clone, Copy)]
struct Best {
    /// What it costs.
    cost: i64,
    /// Bytes of its first token.
    len: usize,
    /// That token, if it is not spelt in bytes.
    id: Option<u32>,
}

impl Lattice {
    /// The tokens of a vocabulary. What steers the model is not among them: text cannot become it.
    pub(super) fn new(vocab: &Vocab) -> Self {
        let texts = &vocab.texts;
        let cost = |id: u32| {
            let score = vocab.scores.get(id as usize).copied().unwrap_or(0.0);
            // Casts saturate; what is not a number is never chosen.
            match score.is_finite() {
                true => -((f64::from(score) * 1e4).round() as i64),
                false => MAX_COST,
            }
        };
        let costs: Vec<i64> = (0..vocab.n_vocab()).map(cost).collect();
        let is_text = |id: &u32| {
            let text = texts.arena.get(*id);
            vocab.bits(*id) & (BYTE | CONTROL | UNKNOWN) == 0
                && costs[*id as usize] < MAX_COST
                && text.len() <= MAX_LEN
                // Of equal texts the last.
                && texts.id(text) == Some(*id)
        };
        let mut sorted: Vec<u32> = (0..vocab.n_vocab()).filter(is_text).collect();
        sorted.sort_unstable_by_key(|id| texts.arena.get(*id));
        Self { sorted, costs }
    }

    /// Calls `emit` with each token of `text`, or with the bytes of a character that has none, from left to right.
    pub(super) fn segment(
        &self,
        text: &str,
        texts: &Texts,
        mut emit: impl FnMut(Option<u32>, &[u8]),
    ) {
        // A mark of the order of bytes is not text.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let end = Best {
            cost: 0,
            len: 0,
            id: None,
        };
        let mut best = vec![end; text.len() + 1];
        let mut found = Vec::new();
        for (at, c) in text.char_indices().rev() {
            found.clear();
            self.tokens_at(&text[at..], texts, &mut found);
            let spelt = (c.len_utf8(), None, UNKNOWN_COST);
            let longest_first = found.iter().rev();
            let all = longest_first.map(|&(len, id)| (len, Some(id), self.costs[id as usize]));
            let mut first: Option<Best> = None;
            for (len, id, cost) in all.chain([spelt]) {
                let cost = cost + best[at + len].cost;
                if first.is_none_or(|b| cost < b.cost) {
                    first = Some(Best { cost, len, id });
                }
            }
            best[at] = first.unwrap_or(end);
        }
        let mut at = 0;
        while at < text.len() {
            let Best { len, id, .. } = best[at];
            emit(id, &text.as_bytes()[at..at + len]);
            at += len;
        }
    }

    /// The tokens that `text` begins with, and how long they are, the shortest first.
    fn tokens_at(&self, text: &str, texts: &Texts, found: &mut Vec<(usize, u32)>) {
        let mut among = 0..self.sorted.len();
        for (i, byte) in text.bytes().enumerate() {
            among = self.narrowed(among, i, byte, texts);
            let Some(&id) = self.sorted.get(among.start).filter(|_| !among.is_empty()) else {
                return;
            };
            let len = i + 1;
            if texts.arena.get(id).len() == len && text.is_char_boundary(len) {
                found.push((len, id));
            }
        }
    }

    /// Of tokens that have the first `i` bytes in common those whose next one is `byte`.
    fn narrowed(&self, among: Range<usize>, i: usize, byte: u8, texts: &Texts) -> Range<usize> {
        let tokens = &self.sorted[among.clone()];
        let next = |id: &u32| texts.arena.get(*id).get(i).copied();
        let from = tokens.partition_point(|id| next(id) < Some(byte));
        let n = tokens[from..].partition_point(|id| next(id) == Some(byte));
        among.start + from..among.start + from + n
    }
}
