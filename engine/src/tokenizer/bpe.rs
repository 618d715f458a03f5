//! Byte-pair encoding over the BPE model of the `tokenizers` crate.
//!
//! The crate wants owned strings in hash maps, which for 150,000 tokens costs about as much as everything else that
//! happens before the first token. So the model is built by a thread of its own while weights are being mapped, and
//! [`Bpe::get`] waits for it.
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

/// A model that may still be under construction.
#[derive(Debug)]
pub(super) struct Bpe {
    built: OnceLock<Built>,
    thread: Mutex<Option<JoinHandle<Built>>>,
}

impl Bpe {
    /// Starts building.
    pub(super) fn start(parts: BpeParts) -> Self {
        let parts = Arc::new(parts);
        let theirs = Arc::clone(&parts);
        let spawned = std::thread::Builder::new()
            .name("lemma-tokenizer".into())
            .spawn(move || BpeModel::build(&theirs));
        match spawned {
            Ok(thread) => Self {
                built: OnceLock::new(),
                thread: Mutex::new(Some(thread)),
            },
            // No thread to be had: build here.
            Err(_) => Self {
                built: OnceLock::from(BpeModel::build(&parts)),
                thread: Mutex::new(None),
            },
        }
    }

    /// The model; waits until it is built.
    pub(super) fn get(&self) -> Result<&BpeModel, &TokenizerError> {
        self.built
            .get_or_init(|| {
                let thread = self.thread.lock().ok().and_then(|mut t| t.take());
                match thread.map(JoinHandle::join) {
                    Some(Ok(built)) => built,
                    Some(Err(_)) | None => {
                        Err(TokenizerError::Build("the building thread panicked".into()))
                    }
                }
            })
            .as_ref()
    }
}

/// The finished model.
#[derive(Debug)]
pub(super) struct BpeModel {
    model: BPE,
    splitter: Splitter,
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
    fn build(parts: &BpeParts) -> Built {
        let splitter = Splitter::new(parts.split)?;
        let mut merges: Vec<(&str, &str)> = parts.merges.iter().filter_map(utf8_merge).collect();
        // The crate lets the last of equal merges win (the first must) and would write past the longest token.
        let repeated = has_repeated(&parts.merges);
        if repeated {
            let mut seen = HashSet::with_capacity(merges.len());
            merges.retain(|m| seen.insert(*m));
        }
        let max_len = parts.texts.map.max_len;
        let sound = !repeated && merges.iter().all(|(a, b)| a.len() + b.len() <= max_len);

        let try_build = |complete: bool| {
            // Half of the time goes into copying strings; two threads halve that.
            let ((mut vocab, unk), owned) = std::thread::scope(|scope| {
                let copy = || {
                    merges
                        .iter()
                        .map(|&(a, b)| (a.to_owned(), b.to_owned()))
                        .collect::<Merges>()
                };
                let copying = std::thread::Builder::new().spawn_scoped(scope, copy);
                let vocab = vocabulary(parts);
                (
                    vocab,
                    copying
                        .ok()
                        .and_then(|t| t.join().ok())
                        .unwrap_or_else(copy),
                )
            });
            if complete {
                add_missing(&mut vocab, &merges, parts.texts.arena.len());
            }
            let mut builder = BPE::builder()
                .vocab_and_merges(vocab, owned)
                .cache_capacity(0);
            if let Some(unk) = unk {
                builder = builder.unk_token(unk);
            }
            builder.build()
        };
        let model = if sound {
            try_build(false).or_else(|_| try_build(true))
        } else {
            try_build(true)
        };
        Ok(Self {
            model: model.map_err(|e| TokenizerError::Build(e.to_string()))?,
            splitter,
            texts: Arc::clone(&parts.texts),
            split: parts.split,
            ignore_merges: parts.ignore_merges,
        })
    }

    /// Appends the ids of `text` to `out`; invalid UTF-8 counts as U+FFFD.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut start = 0;
        let mut encoded = String::new();
        for end in self.splitter.split(text) {
            let word = &text[start..end];
            start = end;
            if self.split.raw_text() {
                self.encode_word(word, out)?;
            } else {
                encoded.clear();
                encoded.extend(word.bytes().map(byte_to_char));
                self.encode_word(&encoded, out)?;
            }
        }
        Ok(())
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
fn has_repeated(merges: &Arena) -> bool {
    let hasher = RandomState::new();
    let mut hashes: Vec<u64> = merges.iter().map(|m| hasher.hash_one(m)).collect();
    hashes.sort_unstable();
    hashes.windows(2).any(|w| w[0] == w[1])
}

/// The vocabulary for the crate, with placeholders for missing characters; the name of the unknown token where
/// characters are not known beforehand.
fn vocabulary(parts: &BpeParts) -> (Vocab, Option<String>) {
    let texts = &parts.texts;
    let n = texts.arena.len();
    let mut vocab = Vocab::with_capacity(n + 257);
    for (id, text) in texts.arena.iter().enumerate() {
        if let Ok(text) = std::str::from_utf8(text) {
            vocab.insert(text.to_owned(), id as u32);
        }
    }
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
