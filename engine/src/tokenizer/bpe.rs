//! Byte-pair encoding over the BPE model of the `tokenizers` crate.
//!
//! The crate wants owned strings in hash maps, which for 150,000 tokens costs more than everything else that happens
//! before the first token. But a word can only ever become tokens that it contains: for a short text a model of just
//! those, made on the spot, gives the same tokens ([`Contained`]). The complete model is built for the first long text, or,
//! by a thread in the background, once short ones keep coming.
//!
//! Where the crate and llama.cpp differ on defective vocabularies, placeholder ids (`n_vocab` and up) make the crate
//! behave: characters without a token must still keep their neighbours apart, and a merge whose result is no token
//! still happens and falls apart into bytes at the end.

use super::pre::Split;
use super::source::TokenizerError;
use super::split::Splitter;
use super::table::{Arena, TokenMap, byte_to_char, byte_token};
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

/// Token texts and their index, shared with the thread that builds the model.
#[derive(Debug)]
pub(super) struct Texts {
    /// `[n_vocab]` texts.
    pub(super) arena: Arena,
    /// Text → id.
    pub(super) map: TokenMap,
}

impl Texts {
    /// Id of `text`.
    pub(super) fn id(&self, text: &[u8]) -> Option<u32> {
        self.map.get(&self.arena, text)
    }
}

/// What the build needs.
#[derive(Debug)]
pub(super) struct BpeParts {
    pub(super) texts: Arc<Texts>,
    /// `left right`, best first.
    pub(super) merges: Arena,
    pub(super) split: Split,
    pub(super) ignore_merges: bool,
}

type Built = Result<BpeModel, TokenizerError>;

/// Parts of words at most, for a model of their own.
const MAX_CONTAINED: usize = 1 << 14;
/// Texts with a model of their own before the complete one is built beside them.
const SHORT_TEXTS: usize = 8;

/// A model that may not be complete yet.
#[derive(Debug)]
pub(super) struct Bpe {
    parts: Arc<BpeParts>,
    splitter: OnceLock<Result<Splitter, TokenizerError>>,
    built: OnceLock<Built>,
    thread: Mutex<Option<JoinHandle<Built>>>,
    short: AtomicUsize,
}

impl Bpe {
    /// Nothing is built yet.
    pub(super) fn new(parts: BpeParts) -> Self {
        Self {
            parts: Arc::new(parts),
            splitter: OnceLock::new(),
            built: OnceLock::new(),
            thread: Mutex::new(None),
            short: AtomicUsize::new(0),
        }
    }

    /// Completes the model.
    pub(super) fn ready(&self) -> Result<(), TokenizerError> {
        self.splitter()?;
        self.complete().map(|_| ())
    }

    /// Appends the ids of `text` to `out`.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let words = Words::new(text, self.splitter()?, self.parts.split);
        if !self.is_complete()
            && let Some(contained) = Contained::new(&words)
        {
            if self.short.fetch_add(1, Ordering::Relaxed) + 1 == SHORT_TEXTS {
                self.build_beside();
            }
            return BpeModel::build(&self.parts, Some(&contained))?.encode(&words, out);
        }
        self.complete()?.encode(&words, out)
    }

    fn splitter(&self) -> Result<&Splitter, TokenizerError> {
        let made = self
            .splitter
            .get_or_init(|| Splitter::new(self.parts.split));
        made.as_ref().map_err(Clone::clone)
    }

    /// Whether the complete model is there, or has only to be fetched from its thread.
    fn is_complete(&self) -> bool {
        let built = |t: &Option<JoinHandle<Built>>| t.as_ref().is_some_and(JoinHandle::is_finished);
        self.built.get().is_some() || self.thread.lock().is_ok_and(|t| built(&t))
    }

    /// Has a thread build the complete model.
    fn build_beside(&self) {
        let parts = Arc::clone(&self.parts);
        let spawned = std::thread::Builder::new()
            .name("lemma-tokenizer".into())
            .spawn(move || BpeModel::build(&parts, None));
        // Without a thread it is built when a long text comes.
        if let (Ok(thread), Ok(mut place)) = (spawned, self.thread.lock()) {
            *place = Some(thread);
        }
    }

    /// The complete model; waits until it is built.
    fn complete(&self) -> Result<&BpeModel, TokenizerError> {
        let built = self.built.get_or_init(|| {
            let thread = self.thread.lock().ok().and_then(|mut t| t.take());
            match thread.map(JoinHandle::join) {
                Some(Ok(built)) => built,
                Some(Err(_)) => Err(TokenizerError::Build("the building thread panicked".into())),
                None => BpeModel::build(&self.parts, None),
            }
        });
        built.as_ref().map_err(Clone::clone)
    }
}

/// A text in words, in the characters of the vocabulary.
struct Words {
    text: String,
    ends: Vec<usize>,
}

impl Words {
    fn new(text: &str, splitter: &Splitter, split: Split) -> Self {
        let ends = splitter.split(text);
        if split.raw_text() {
            return Self {
                text: text.to_owned(),
                ends,
            };
        }
        let mut words = Self {
            text: String::with_capacity(text.len() + text.len() / 4),
            ends,
        };
        let mut start = 0;
        for end in &mut words.ends {
            words
                .text
                .extend(text[start..*end].bytes().map(byte_to_char));
            start = std::mem::replace(end, words.text.len());
        }
        words
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, &end)| &self.text[start..end])
    }
}

/// Every part of some words: all that can be a token of them, or of a step on the way to one.
struct Contained<'a> {
    parts: HashSet<&'a str>,
    /// A bit for each [`mark`] that a part has.
    marks: Vec<u64>,
}

impl<'a> Contained<'a> {
    /// `None` if they are too many.
    fn new(words: &'a Words) -> Option<Self> {
        let (mut parts, mut seen, mut visited) = (HashSet::new(), HashSet::new(), 0);
        for word in words.iter().filter(|w| seen.insert(*w)) {
            for (start, _) in word.char_indices() {
                for (i, c) in word[start..].char_indices() {
                    parts.insert(&word[start..start + i + c.len_utf8()]);
                    visited += 1;
                    if visited > MAX_CONTAINED {
                        return None;
                    }
                }
            }
        }
        let mut marks = vec![0; MARKS / 64];
        for part in &parts {
            if let [first, .., last] | [first @ last] = part.as_bytes() {
                let mark = mark(*first, *last, part.len());
                marks[mark / 64] |= 1 << (mark % 64);
            }
        }
        Some(Self { parts, marks })
    }

    /// Whether a merge may be one that [happens](Self::has): of 150,000 hardly any remain for a short text, and the look costs next to nothing.
    fn may_have(&self, merge: &[u8]) -> bool {
        let ([first, .., last] | [first @ last]) = merge else {
            return false;
        };
        // The space between the parts is not in what they become.
        let mark = mark(*first, *last, merge.len() - 1);
        self.marks[mark / 64] >> (mark % 64) & 1 != 0
    }

    /// Whether a merge can happen in the words.
    fn has(&self, (a, b): (&str, &str)) -> bool {
        let parts = &self.parts;
        parts.contains(a) && parts.contains(b) && parts.contains([a, b].concat().as_str())
    }
}

/// How many marks there are.
const MARKS: usize = 1 << 16;

/// What a text of `len` bytes is known by at a glance: its first and last byte and its length, below [`MARKS`].
fn mark(first: u8, last: u8, len: usize) -> usize {
    let all = u32::from(first) | u32::from(last) << 8 | (len as u32) << 16;
    (all.wrapping_mul(0x9e37_79b1) >> 16) as usize
}

/// The finished model.
#[derive(Debug)]
struct BpeModel {
    model: BPE,
    texts: Arc<Texts>,
    split: Split,
    ignore_merges: bool,
}

/// Splits a merge at its first space that is not the first character; `None` if a part is missing.
pub(super) fn parse_merge(merge: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = merge.iter().skip(1).position(|&b| b == b' ')? + 1;
    let (left, right) = (&merge[..at], &merge[at + 1..]);
    (!right.is_empty()).then_some((left, right))
}

/// The parts as strings. Merges of bytes that are not UTF-8 can never apply: text is UTF-8 when it gets here.
fn utf8_merge(merge: &[u8]) -> Option<(&str, &str)> {
    let (left, right) = parse_merge(merge)?;
    Some((
        std::str::from_utf8(left).ok()?,
        std::str::from_utf8(right).ok()?,
    ))
}

impl BpeModel {
    /// The model of everything, or of some words only.
    fn build(parts: &BpeParts, only: Option<&Contained<'_>>) -> Built {
        let merges = parts.merges.iter();
        let mut merges: Vec<(&str, &str)> = match only {
            Some(only) => merges
                .filter(|m| only.may_have(m))
                .filter_map(utf8_merge)
                .filter(|&m| only.has(m))
                .collect(),
            None => merges.filter_map(utf8_merge).collect(),
        };
        // The crate lets the last of equal merges win (the first must) and would write past the longest token.
        let repeated = has_repeated(&merges);
        if repeated {
            let mut seen = HashSet::with_capacity(merges.len());
            merges.retain(|m| seen.insert(*m));
        }
        let build = |complete: bool| {
            let (mut vocab, unk) = vocabulary(parts, only);
            if complete {
                add_missing(&mut vocab, &merges, parts.texts.arena.len());
            } else {
                let longest = vocab.keys().map(String::len).max().unwrap_or(0);
                if merges.iter().any(|(a, b)| a.len() + b.len() > longest) {
                    return Err("a merge is longer than any token".to_owned());
                }
            }
            let owned = merges.iter().map(|&(a, b)| (a.to_owned(), b.to_owned()));
            let mut builder = BPE::builder()
                .vocab_and_merges(vocab, owned.collect::<Merges>())
                .cache_capacity(0);
            if let Some(unk) = unk {
                builder = builder.unk_token(unk);
            }
            builder.build().map_err(|e| e.to_string())
        };
        let sound = (!repeated).then(|| build(false).ok()).flatten();
        Ok(Self {
            model: match sound {
                Some(model) => model,
                None => build(true).map_err(TokenizerError::Build)?,
            },
            texts: Arc::clone(&parts.texts),
            split: parts.split,
            ignore_merges: parts.ignore_merges,
        })
    }

    /// Appends the ids of words to `out`.
    fn encode(&self, words: &Words, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        words.iter().try_for_each(|w| self.encode_word(w, out))
    }

    fn encode_word(&self, word: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let whole =
            self.ignore_merges || (self.split == Split::Gemma4 && word.bytes().all(|b| b == b'\n'));
        if whole && let Some(id) = self.texts.id(word.as_bytes()) {
            out.push(id);
            return Ok(());
        }
        let tokens = self
            .model
            .tokenize(word)
            .map_err(|e| TokenizerError::Build(e.to_string()))?;
        let n_vocab = self.texts.arena.len() as u32;
        for token in tokens {
            if token.id < n_vocab {
                out.push(token.id);
                continue;
            }
            // A placeholder: whatever byte tokens there are for its text.
            for &byte in &word.as_bytes()[token.offsets.0..token.offsets.1] {
                out.extend(if self.split.raw_text() {
                    self.texts.id(&byte_token(byte))
                } else {
                    self.texts.id(&[byte])
                });
            }
        }
        Ok(())
    }
}

/// Some merge is listed twice (or, once in 10^9 files, two have the same hash, which costs nothing but time).
fn has_repeated(merges: &[(&str, &str)]) -> bool {
    let hasher = RandomState::new();
    let mut hashes: Vec<u64> = merges.iter().map(|m| hasher.hash_one(m)).collect();
    hashes.sort_unstable();
    hashes.windows(2).any(|w| w[0] == w[1])
}

/// The vocabulary for the crate, of everything or of what some words contain, with placeholders for missing characters; the
/// name of the unknown token where characters are not known beforehand.
fn vocabulary(parts: &BpeParts, only: Option<&Contained<'_>>) -> (Vocab, Option<String>) {
    let texts = &parts.texts;
    let n = texts.arena.len();
    let mut vocab: Vocab = match only {
        Some(contained) => {
            let known = |&text: &&str| Some((text.to_owned(), texts.id(text.as_bytes())?));
            contained.parts.iter().filter_map(known).collect()
        }
        None => {
            let texts = texts.arena.iter().enumerate();
            let utf8 = |(id, text)| Some((std::str::from_utf8(text).ok()?.to_owned(), id as u32));
            texts.filter_map(utf8).collect()
        }
    };
    if parts.split.raw_text() {
        // No character sequence of two can be looked up as one, so this name never matches text.
        let mut unk = String::from("<lemma:unknown>");
        while vocab.contains_key(&unk) {
            unk.push('>');
        }
        vocab.insert(unk.clone(), n as u32);
        return (vocab, Some(unk));
    }
    for byte in 0..=255 {
        let next = vocab_next(&vocab, n);
        vocab.entry(byte_to_char(byte).to_string()).or_insert(next);
    }
    (vocab, None)
}

/// A placeholder id that is not taken: placeholders only ever add entries.
fn vocab_next(vocab: &Vocab, n: usize) -> u32 {
    (n + vocab.len()) as u32
}

/// Placeholders for parts and results of merges that are not tokens.
fn add_missing(vocab: &mut Vocab, merges: &[(&str, &str)], n: usize) {
    let mut whole = String::new();
    for (a, b) in merges {
        whole.clear();
        whole.push_str(a);
        whole.push_str(b);
        for text in [a, b, whole.as_str()] {
            if !vocab.contains_key(text) {
                let next = vocab_next(vocab, n);
                vocab.insert(text.to_owned(), next);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_merge_that_happens_is_passed_over() {
        let words = Words {
            text: "thought\u{120}thing\u{e9}\u{e9}".to_owned(),
            ends: vec![7, 14, 18],
        };
        let contained = Contained::new(&words).unwrap();
        let mut n = 0;
        for word in words.iter() {
            let ends = |from| (from + 1..=word.len()).filter(|&e| word.is_char_boundary(e));
            for start in (0..word.len()).filter(|&s| word.is_char_boundary(s)) {
                for middle in ends(start) {
                    for end in ends(middle) {
                        let (a, b) = (&word[start..middle], &word[middle..end]);
                        assert!(contained.has((a, b)));
                        assert!(contained.may_have(format!("{a} {b}").as_bytes()), "{a} {b}");
                        n += 1;
                    }
                }
            }
        }
        assert!(n > 80, "{n}");
        let others = (0..10_000).map(|i| format!("x{} y{}", i / 25, i % 25));
        let n = others.filter(|m| contained.may_have(m.as_bytes())).count();
        assert!(n < 100, "{n} of 10,000");
    }
}
