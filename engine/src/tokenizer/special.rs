//! Finding special tokens in text.
//!
//! Longer tokens go first: every occurrence of the longest token that is still in free text becomes that token, then
//! the next longest, and so on (not the leftmost match, as added tokens are found elsewhere). One walk over a trie
//! finds which tokens occur and where, so the cost does not grow with the number of special tokens, of which some
//! vocabularies have thousands.

use std::collections::{BTreeMap, HashMap};

/// A special token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Special {
    /// Token id.
    pub(super) id: u32,
    /// Length of its text in bytes, not 0.
    pub(super) len: u32,
    /// Found only where special tokens are parsed (control and unknown tokens); user-defined ones always are.
    pub(super) only_parsed: bool,
    /// White space before it is dropped.
    pub(super) lstrip: bool,
    /// White space after it is dropped.
    pub(super) rstrip: bool,
}

/// A stretch of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment {
    /// Bytes `start..end`, to be tokenized.
    Text(usize, usize),
    /// A special token.
    Token(u32),
}

/// Trie over the texts of the special tokens.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    /// Longest first; equal lengths by id.
    tokens: Vec<Special>,
    texts: Vec<Box<[u8]>>,
    edges: HashMap<(u32, u8), u32>,
    /// Node → index into `tokens`, `u32::MAX` for none.
    terminal: Vec<u32>,
    /// Which first bytes exist: most positions of a text are rejected here.
    first: Vec<bool>,
}

const NONE: u32 = u32::MAX;
/// Positions kept per byte of text before falling back to one scan per token.
const MAX_HITS_PER_BYTE: usize = 4;

impl SpecialTokens {
    /// Builds the trie; `text` gives the text of a token.
    pub(super) fn new<'a>(mut tokens: Vec<Special>, text: impl Fn(u32) -> &'a [u8]) -> Self {
        tokens.retain(|t| t.len > 0);
        tokens.sort_by_key(|t| (std::cmp::Reverse(t.len), t.id));
        let mut this = Self {
            terminal: vec![NONE],
            first: vec![false; 256],
            ..Self::default()
        };
        for (i, t) in tokens.iter().enumerate() {
            let bytes = text(t.id);
            let mut node = 0;
            for &b in bytes {
                let next = this.terminal.len() as u32;
                node = *this.edges.entry((node, b)).or_insert(next);
                if node == next {
                    this.terminal.push(NONE);
                }
            }
            this.first[usize::from(bytes[0])] = true;
            // Equal texts cannot both be found; the later id is the one that its text names.
            this.terminal[node as usize] = i as u32;
            this.texts.push(bytes.into());
        }
        this.tokens = tokens;
        this
    }

    /// Where control tokens begin in `text`, ascending.
    pub(super) fn control_starts(&self, text: &[u8]) -> Vec<usize> {
        let mut starts: Vec<usize> = self
            .hits(text, true)
            .into_iter()
            .filter(|(index, _)| self.tokens[*index as usize].only_parsed)
            .flat_map(|(index, list)| list.unwrap_or_else(|| self.scan_one(text, index)))
            .map(|start| start as usize)
            .collect();
        starts.sort_unstable();
        starts.dedup();
        starts
    }

    /// Cuts `text` into fragments, in order. No token is found across a position in `marks` (ascending).
    pub(super) fn partition(
        &self,
        text: &[u8],
        marks: &[usize],
        parse_special: bool,
    ) -> Vec<Fragment> {
        if text.is_empty() {
            return vec![];
        }
        let hits = self.hits(text, parse_special);
        if hits.is_empty() {
            return vec![Fragment::Text(0, text.len())];
        }
        let mut free: BTreeMap<usize, usize> = BTreeMap::from([(0, text.len())]);
        let mut found: Vec<(usize, u32)> = Vec::new();
        for (index, positions) in hits {
            let token = self.tokens[index as usize];
            let rescanned;
            let positions = match &positions {
                Some(list) => list,
                None => {
                    rescanned = self.scan_one(text, index);
                    &rescanned
                }
            };
            for &pos in positions {
                let (start, end) = (pos as usize, pos as usize + token.len as usize);
                let next_mark = marks.partition_point(|&m| m <= start);
                if marks.get(next_mark).is_some_and(|&m| m < end) {
                    continue;
                }
                take(&mut free, text, pos as usize, token, &mut found);
            }
        }
        let mut out: Vec<(usize, Fragment)> = free
            .into_iter()
            .map(|(s, e)| (s, Fragment::Text(s, e)))
            .collect();
        out.extend(
            found
                .into_iter()
                .map(|(pos, id)| (pos, Fragment::Token(id))),
        );
        out.sort_by_key(|&(pos, _)| pos);
        out.into_iter().map(|(_, f)| f).collect()
    }

    /// Which tokens occur, longest first, with their positions (`None`: too many to keep, look again).
    fn hits(&self, text: &[u8], parse_special: bool) -> BTreeMap<u32, Option<Vec<u32>>> {
        let mut hits: BTreeMap<u32, Option<Vec<u32>>> = BTreeMap::new();
        let mut budget = MAX_HITS_PER_BYTE
            .saturating_mul(text.len())
            .saturating_add(1024);
        for start in 0..text.len() {
            if !self.first[usize::from(text[start])] {
                continue;
            }
            let mut node = 0;
            for &b in &text[start..] {
                let Some(&next) = self.edges.get(&(node, b)) else {
                    break;
                };
                node = next;
                let index = self.terminal[node as usize];
                if index == NONE || (self.tokens[index as usize].only_parsed && !parse_special) {
                    continue;
                }
                let entry = hits.entry(index).or_insert_with(|| Some(Vec::new()));
                match entry {
                    Some(list) if budget > 0 => {
                        budget -= 1;
                        list.push(start as u32);
                    }
                    _ => *entry = None,
                }
            }
        }
        hits
    }

    fn scan_one(&self, text: &[u8], index: u32) -> Vec<u32> {
        let needle = &self.texts[index as usize];
        (0..text.len())
            .filter(|&i| text[i..].starts_with(needle))
            .map(|i| i as u32)
            .collect()
    }
}

/// Takes `pos..pos+len` out of the free text, if all of it is still free.
fn take(
    free: &mut BTreeMap<usize, usize>,
    text: &[u8],
    pos: usize,
    token: Special,
    found: &mut Vec<(usize, u32)>,
) {
    let Some((&start, &end)) = free.range(..=pos).next_back() else {
        return;
    };
    let token_end = pos + token.len as usize;
    if token_end > end {
        return;
    }
    // What isspace() of the C locale accepts.
    let is_space = |b: u8| matches!(b, b' ' | b'\t'..=b'\r');
    let (mut left, mut right) = (pos, token_end);
    while token.lstrip && left > start && is_space(text[left - 1]) {
        left -= 1;
    }
    while token.rstrip && right < end && is_space(text[right]) {
        right += 1;
    }
    free.remove(&start);
    if left > start {
        free.insert(start, left);
    }
    if right < end {
        free.insert(right, end);
    }
    found.push((pos, token.id));
}
