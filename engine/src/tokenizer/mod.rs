//! Text to tokens and back.
//!
//! A GGUF file carries its vocabulary as metadata: token texts, their types, and either merges (`gpt2`: byte-pair
//! encoding after a named pre-tokenizer) or scores (`llama`: SentencePiece byte-pair encoding). [`Tokenizer`] is built
//! from a [`VocabSource`], which is that metadata and nothing else, and gives the ids that llama.cpp gives.
//!
//! How a text becomes ids:
//!
//! 1. `special`: special tokens are found in the raw bytes and cut out. User-defined tokens always, control tokens only
//!    where `parse_special` is on, so that what a user types cannot pose as the structure of a chat.
//! 2. Each stretch of text in between goes either through `split` (the expressions in `pre`) and `bpe` (merges, by the
//!    `tokenizers` crate), or through `spm` (merges by score) or `lattice` (the best sum of scores).
//! 3. Beginning- and end-of-sequence tokens are added where asked for.
//!
//! The way back needs no model: the bytes of every token are computed once (`vocab`), and `detok` joins them.
//!
//! Everything read from the file is hostile until proven otherwise: a defective vocabulary gives a [`TokenizerError`]
//! or works as far as it goes, and no text makes encoding slower than a constant times its length times the logarithm
//! of its longest word.

mod bpe;
mod detok;
mod eog;
mod from_gguf;
mod lattice;
mod pre;
mod pre_regex;
mod source;
mod special;
mod split;
mod spm;
mod table;
#[cfg(test)]
mod tests;
mod vocab;

pub use detok::{Detokenizer, Utf8Carry};
pub use source::{TextList, TokenizerError, TokenizerOptions, VocabSource};
pub use vocab::TokenAttr;

use bpe::{Bpe, BpeParts};
use lattice::Lattice;
use special::{Fragment, Special, SpecialTokens};
use std::sync::Arc;
use table::{Arena, byte_token};
use vocab::{CONTROL, Kind, UNKNOWN, USER_DEFINED, Vocab};

/// A vocabulary that encodes and decodes. Cheap to share behind a reference; all methods take `&self`.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    special: SpecialTokens,
    /// Of vocabularies with merges.
    bpe: Option<Bpe>,
    /// Of those whose text is cut by the sum of scores.
    lattice: Option<Lattice>,
}

impl Tokenizer {
    /// Checks a vocabulary and builds its tokenizer, with default options.
    ///
    /// # Errors
    /// See [`TokenizerError`]; each names the metadata key at fault.
    pub fn new(source: &VocabSource<'_>) -> Result<Self, TokenizerError> {
        Self::with_options(source, &TokenizerOptions::default())
    }

    /// Checks a vocabulary and builds its tokenizer.
    ///
    /// The merge table is not built yet: short texts do without it, a long one or [`ready`](Self::ready) builds it.
    ///
    /// # Errors
    /// See [`TokenizerError`]; each names the metadata key at fault.
    pub fn with_options(
        source: &VocabSource<'_>,
        options: &TokenizerOptions,
    ) -> Result<Self, TokenizerError> {
        let vocab = Vocab::new(source, options)?;
        let bpe = match vocab.kind {
            Kind::Spm | Kind::Lattice => None,
            Kind::Bpe(pre) => {
                let none = TextList::default();
                let list = source.merges.as_ref().unwrap_or(&none);
                let mut merges = Arena::with_capacity(list.len(), list.n_bytes());
                for (index, merge) in list.iter().enumerate() {
                    if bpe::parse_merge(merge).is_none() {
                        let text = source::escape(merge);
                        return Err(TokenizerError::BadMerge { index, text });
                    }
                    merges.push("tokenizer.ggml.merges", merge)?;
                }
                Some(Bpe::new(BpeParts {
                    texts: Arc::clone(&vocab.texts),
                    merges,
                    split: pre.split,
                    ignore_merges: pre.ignore_merges,
                }))
            }
        };
        let special = find_special(source, &vocab);
        let lattice = matches!(vocab.kind, Kind::Lattice).then(|| Lattice::new(&vocab));
        Ok(Self {
            lattice,
            vocab,
            special,
            bpe,
        })
    }

    /// Builds the complete merge table.
    ///
    /// # Errors
    /// [`TokenizerError::Build`] if the `tokenizers` crate refused it.
    pub fn ready(&self) -> Result<(), TokenizerError> {
        match &self.bpe {
            Some(bpe) => bpe.ready(),
            None => Ok(()),
        }
    }

    /// Text → ids.
    ///
    /// `add_special` adds the beginning- and end-of-sequence tokens if the vocabulary wants them. `parse_special` turns
    /// the text of control tokens into these tokens: on for text that a template made, off for text that a user typed.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        self.encode_bytes(text.as_bytes(), add_special, parse_special)
    }

    /// As [`encode`](Self::encode), for bytes that need not be UTF-8: an invalid byte becomes its byte token
    /// (SentencePiece) or U+FFFD.
    pub fn encode_bytes(&self, text: &[u8], add_special: bool, parse_special: bool) -> Vec<u32> {
        self.encode_parts(text, &[], add_special, parse_special)
    }

    /// As [`encode`](Self::encode) with control tokens parsed, except that no special token is found across any of
    /// `marks` (byte positions, ascending): where a template holds what a user typed, a mark inside every string that
    /// looks like a control token ([`control_starts`](Self::control_starts)) keeps it text.
    pub fn encode_marked(&self, text: &str, marks: &[usize], add_special: bool) -> Vec<u32> {
        self.encode_parts(text.as_bytes(), marks, add_special, true)
    }

    /// Byte positions at which the text of a control token begins, ascending.
    pub fn control_starts(&self, text: &str) -> Vec<usize> {
        self.special.control_starts(text.as_bytes())
    }

    fn encode_parts(
        &self,
        text: &[u8],
        marks: &[usize],
        add_special: bool,
        parse_special: bool,
    ) -> Vec<u32> {
        let vocab = &self.vocab;
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if add_special && vocab.add_bos {
            out.extend(vocab.ids.bos);
        }
        let n_added = out.len();
        // The first stretch of text, and each that follows a special token, gets the space that words begin with.
        let mut after_special = true;
        for fragment in self.special.partition(text, marks, parse_special) {
            match fragment {
                Fragment::Token(id) => {
                    out.push(id);
                    after_special = true;
                }
                Fragment::Text(start, end) => {
                    let prefix = after_special && vocab.add_space_prefix;
                    self.encode_text(&text[start..end], prefix, &mut out);
                    after_special = false;
                }
            }
        }
        if n_added == 1 && out.get(1) == out.first() {
            log::warn!(
                "the text begins with the beginning-of-sequence token, which is added as well: there are two now"
            );
        }
        if add_special && vocab.add_eos {
            out.extend(vocab.ids.eos);
        }
        out
    }

    /// Text without special tokens.
    fn encode_text(&self, text: &[u8], space_prefix: bool, out: &mut Vec<u32>) {
        match (&self.bpe, self.vocab.kind) {
            (Some(bpe), Kind::Bpe(pre)) => {
                let mut text = lossy(text);
                if pre.escape_spaces {
                    text = text.replace(' ', "\u{2581}");
                }
                if let Err(e) = bpe.encode(&text, out) {
                    log::error!("{e}");
                }
            }
            _ => match &self.lattice {
                Some(lattice) => self.encode_lattice(lattice, text, out),
                None => self.encode_spm(text, space_prefix, out),
            },
        }
    }

    fn encode_lattice(&self, lattice: &Lattice, text: &[u8], out: &mut Vec<u32>) {
        let vocab = &self.vocab;
        lattice.segment(&lossy(text), &vocab.texts, |id, bytes| match id {
            Some(id) => out.push(id),
            None => {
                let spelt = bytes.iter().map(|b| vocab.texts.id(&byte_token(*b)));
                out.extend(spelt.filter_map(|id| id.or(vocab.ids.unk)));
            }
        });
    }

    fn encode_spm(&self, text: &[u8], space_prefix: bool, out: &mut Vec<u32>) {
        const MARK: &[u8] = "\u{2581}".as_bytes();
        let vocab = &self.vocab;
        let mut escaped = Vec::with_capacity(text.len() + text.len() / 2 + MARK.len());
        if space_prefix {
            escaped.extend_from_slice(MARK);
        }
        for &byte in text {
            if byte == b' ' {
                escaped.extend_from_slice(MARK);
            } else {
                escaped.push(byte);
            }
        }
        let score = |s: &[u8]| {
            let id = vocab.texts.id(s)?;
            Some(vocab.scores.get(id as usize).copied().unwrap_or(0.0))
        };
        spm::merge(
            &escaped,
            vocab.texts.map.max_len,
            score,
            |symbol| match vocab.texts.id(symbol) {
                Some(id) => out.push(id),
                None => {
                    for &byte in symbol {
                        let id = vocab
                            .texts
                            .id(&byte_token(byte))
                            .or_else(|| vocab.texts.id(&[byte]));
                        out.extend(id.or(vocab.ids.unk));
                    }
                }
            },
        );
    }

    /// Number of tokens.
    pub fn n_vocab(&self) -> usize {
        self.vocab.attrs.len()
    }

    /// Beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.ids.bos
    }

    /// End-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.vocab.ids.eos
    }

    /// End-of-turn token.
    pub fn eot(&self) -> Option<u32> {
        self.vocab.ids.eot
    }

    /// End-of-message token.
    pub fn eom(&self) -> Option<u32> {
        self.vocab.ids.eom
    }

    /// Token for what the vocabulary cannot say.
    pub fn unk(&self) -> Option<u32> {
        self.vocab.ids.unk
    }

    /// Separator token.
    pub fn sep(&self) -> Option<u32> {
        self.vocab.ids.sep
    }

    /// Padding token.
    pub fn pad(&self) -> Option<u32> {
        self.vocab.ids.pad
    }

    /// Mask token.
    pub fn mask(&self) -> Option<u32> {
        self.vocab.ids.mask
    }

    /// Fill-in-the-middle tokens: prefix, suffix, middle.
    pub fn fim(&self) -> [Option<u32>; 3] {
        let ids = &self.vocab.ids;
        [ids.fim_pre, ids.fim_suf, ids.fim_mid]
    }

    /// [`encode`](Self::encode) puts [`bos`](Self::bos) in front when asked to add special tokens.
    pub fn add_bos(&self) -> bool {
        self.vocab.add_bos
    }

    /// [`encode`](Self::encode) puts [`eos`](Self::eos) at the end when asked to add special tokens.
    pub fn add_eos(&self) -> bool {
        self.vocab.add_eos
    }

    /// Generation ends with this token.
    pub fn is_eog(&self, id: u32) -> bool {
        self.vocab.eog.binary_search(&id).is_ok()
    }

    /// Tokens that end generation, ascending.
    pub fn eog(&self) -> &[u32] {
        &self.vocab.eog
    }

    /// Text of a token as the file has it (spaces as U+2581 or Ġ), `None` when out of range. Need not be UTF-8.
    pub fn token_text(&self, id: u32) -> Option<&[u8]> {
        (id < self.vocab.n_vocab()).then(|| self.vocab.texts.arena.get(id))
    }

    /// Id of the token with this text, as the file has it.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.vocab.texts.id(text.as_bytes())
    }

    /// Kind of a token; [`TokenAttr::Unused`] when out of range.
    pub fn attr(&self, id: u32) -> TokenAttr {
        self.vocab.attr(id)
    }

    /// The single token that the text of a tag such as `<think>` becomes, if there is one: a token of that text, or
    /// the one token that encoding gives.
    pub fn find_tag(&self, tag: &str) -> Option<u32> {
        self.token_id(tag)
            .or_else(|| match self.encode(tag, false, true).as_slice() {
                [id] => Some(*id),
                _ => None,
            })
    }

    /// What was corrected in the file's statements while loading; each was also logged.
    pub fn warnings(&self) -> &[String] {
        &self.vocab.warnings
    }

    /// Name of the pre-tokenizer in use; `None` for vocabularies with scores.
    pub fn pre_name(&self) -> Option<&'static str> {
        match self.vocab.kind {
            Kind::Bpe(pre) => Some(pre.name),
            Kind::Spm | Kind::Lattice => None,
        }
    }

    /// Names of all pre-tokenizers, the possible values of [`TokenizerOptions::pre_override`].
    pub fn pre_names() -> impl Iterator<Item = &'static str> {
        pre::PRE.iter().map(|p| p.name)
    }
}

/// Collects the tokens that are found as such in text. A few models want white space beside them dropped; files do not
/// say so, hence the decision by name.
fn find_special(source: &VocabSource<'_>, vocab: &Vocab) -> SpecialTokens {
    let name = source.model_name.unwrap_or_default().to_ascii_lowercase();
    let pre = source.pre.unwrap_or_default();
    let arch = source.arch.unwrap_or_default();
    let any = |s: &str, parts: &[&str]| parts.iter().any(|p| s.contains(p));

    let (mut lstrip, mut rstrip_all) = (None, false);
    if any(pre, &["jina-v2-de", "jina-v2-es", "jina-v2-code"])
        || any(arch, &["nomic-bert-moe", "jina-bert-v3"])
    {
        lstrip = vocab.texts.id(b"<mask>");
    } else if any(&name, &["phi-3", "phi3"]) {
        rstrip_all = true;
    } else if any(&name, &["modern-bert"]) {
        lstrip = vocab.texts.id(b"[MASK]");
    }
    let no_rstrip: &[&[u8]] = &[b"<unk>", b"<s>", b"<|endoftext|>"];

    let mut list = Vec::new();
    for id in 0..vocab.n_vocab() {
        let bits = vocab.bits(id);
        if bits & (CONTROL | USER_DEFINED | UNKNOWN) == 0 {
            continue;
        }
        let text = vocab.texts.arena.get(id);
        list.push(Special {
            id,
            len: text.len() as u32,
            only_parsed: bits & (CONTROL | UNKNOWN) != 0,
            lstrip: lstrip == Some(id),
            rstrip: rstrip_all && !no_rstrip.contains(&text),
        });
    }
    SpecialTokens::new(list, |id| vocab.texts.arena.get(id))
}

/// UTF-8 with U+FFFD for each byte that is not part of a character.
fn lossy(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    out
}
