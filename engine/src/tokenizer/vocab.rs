//! The vocabulary itself: texts, types, special ids and the bytes each token stands for.

use super::bpe::Texts;
use super::eog;
use super::pre::{self, Pre};
use super::source::{TokenizerError, TokenizerOptions, VocabSource, escape};
use super::table::{Arena, TokenMap, char_to_byte, parse_byte_token};
use std::sync::{Arc, OnceLock};

/// Tokens whose bytes are made together.
const GROUP: usize = 64;

pub(super) const UNKNOWN: u8 = 1;
pub(super) const UNUSED: u8 = 2;
pub(super) const NORMAL: u8 = 4;
pub(super) const CONTROL: u8 = 8;
pub(super) const USER_DEFINED: u8 = 16;
pub(super) const BYTE: u8 = 32;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenAttr {
    /// Text.
    Normal,
    /// Steers the model and is not shown.
    Control,
    /// One byte of fallback.
    Byte,
    /// Added by the maker of the model; found in any text and shown.
    UserDefined,
    /// Stands for what the vocabulary cannot say.
    Unknown,
    /// A placeholder that training never saw, or a type this version does not know.
    Unused,
}

/// How text becomes tokens.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Byte-pair merges after a pre-tokenizer.
    Bpe(&'static Pre),
    /// SentencePiece byte-pair encoding by score.
    Spm,
    /// The segmentation with the best sum of scores.
    Lattice,
}

/// Ids with a role; all are below `n_vocab`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) eot: Option<u32>,
    pub(super) eom: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) sep: Option<u32>,
    pub(super) pad: Option<u32>,
    pub(super) mask: Option<u32>,
    pub(super) fim_pre: Option<u32>,
    pub(super) fim_suf: Option<u32>,
    pub(super) fim_mid: Option<u32>,
    pub(super) fim_pad: Option<u32>,
    pub(super) fim_rep: Option<u32>,
    pub(super) fim_sep: Option<u32>,
}

#[derive(Debug)]
pub(super) struct Vocab {
    pub(super) kind: Kind,
    pub(super) texts: Arc<Texts>,
    /// `[n_vocab]` bit sets.
    pub(super) attrs: Vec<u8>,
    /// `[n_vocab]`, or empty: all 0.
    pub(super) scores: Vec<f32>,
    /// The bytes that tokens stand for, special tokens shown: each list is [`GROUP`] of them, made when one is asked for, since a short reply
    /// needs few of 150,000.
    pieces: Box<[OnceLock<Arena>]>,
    pub(super) ids: SpecialIds,
    /// End-of-generation ids, ascending.
    pub(super) eog: Vec<u32>,
    pub(super) add_bos: bool,
    pub(super) add_eos: bool,
    pub(super) add_space_prefix: bool,
    pub(super) clean_spaces: bool,
    /// What was corrected while loading, for people.
    pub(super) warnings: Vec<String>,
}

impl Vocab {
    pub(super) fn new(
        src: &VocabSource<'_>,
        options: &TokenizerOptions,
    ) -> Result<Self, TokenizerError> {
        let kind = kind(src, options)?;
        let n = src.tokens.len();
        if n == 0 {
            return Err(TokenizerError::EmptyVocab);
        }
        let limit = i32::MAX as usize;
        if n > limit {
            return Err(TokenizerError::TooLarge {
                what: "tokenizer.ggml.tokens",
                got: n,
                limit,
            });
        }
        check_len(
            "tokenizer.ggml.token_type",
            src.token_types.as_ref().map(Vec::len),
            n,
        )?;
        check_len(
            "tokenizer.ggml.scores",
            src.scores.as_ref().map(Vec::len),
            n,
        )?;

        let mut warnings = Vec::new();
        let mut arena = Arena::with_capacity(n, src.tokens.n_bytes());
        for (id, text) in src.tokens.iter().enumerate() {
            if text.is_empty() {
                arena.push("tokenizer.ggml.tokens", format!("[EMPTY_{id}]").as_bytes())?;
            } else {
                arena.push("tokenizer.ggml.tokens", text)?;
            }
        }
        let map = TokenMap::new(&arena);
        if map.n_duplicates > 0 {
            warnings.push(format!(
                "tokenizer.ggml.tokens: {} tokens repeat the text of another; the last of equals is used",
                map.n_duplicates
            ));
        }
        let attrs = match &src.token_types {
            Some(types) => types[..n].iter().map(|&t| attr_of_type(t)).collect(),
            None => vec![NORMAL; n],
        };
        // Adding 0.0 turns -0.0 into 0.0: equal scores must compare equal.
        let scores = src
            .scores
            .as_ref()
            .map(|s| s[..n].iter().map(|x| x + 0.0).collect())
            .unwrap_or_default();

        let (add_bos, clean_spaces, add_space_prefix) = match kind {
            Kind::Bpe(pre) => (pre.add_bos, pre.clean_spaces, false),
            Kind::Spm => (true, false, true),
            Kind::Lattice => (false, false, false),
        };
        let mut vocab = Self {
            kind,
            texts: Arc::new(Texts { arena, map }),
            attrs,
            scores,
            pieces: (0..n.div_ceil(GROUP)).map(|_| OnceLock::new()).collect(),
            ids: special_ids(src, kind, n, &mut warnings),
            eog: Vec::new(),
            add_bos: src.add_bos.unwrap_or(add_bos),
            add_eos: src.add_eos.unwrap_or(false),
            add_space_prefix: src.add_space_prefix.unwrap_or(add_space_prefix),
            clean_spaces,
            warnings,
        };
        if matches!(
            kind,
            Kind::Bpe(Pre {
                split: pre::Split::Gemma4,
                ..
            })
        ) && !vocab.add_bos
        {
            // Files of this family are known to state it wrongly.
            vocab.add_bos = true;
            vocab
                .warnings
                .push("tokenizer.ggml.add_bos_token: taken as true for gemma4".into());
        }
        eog::complete(&mut vocab);
        for warning in &vocab.warnings {
            log::warn!("{warning}");
        }
        Ok(vocab)
    }

    pub(super) fn n_vocab(&self) -> u32 {
        self.attrs.len() as u32
    }

    /// Bits of `id`; none when out of range.
    pub(super) fn bits(&self, id: u32) -> u8 {
        self.attrs.get(id as usize).copied().unwrap_or(0)
    }

    pub(super) fn attr(&self, id: u32) -> TokenAttr {
        match self.bits(id) {
            b if b & CONTROL != 0 => TokenAttr::Control,
            b if b & UNKNOWN != 0 => TokenAttr::Unknown,
            b if b & USER_DEFINED != 0 => TokenAttr::UserDefined,
            b if b & NORMAL != 0 => TokenAttr::Normal,
            b if b & BYTE != 0 => TokenAttr::Byte,
            _ => TokenAttr::Unused,
        }
    }

    /// The bytes that `id` stands for; none when out of range.
    pub(super) fn piece(&self, id: u32) -> &[u8] {
        let (group, i) = (id as usize / GROUP, id as usize % GROUP);
        match self.pieces.get(group) {
            Some(pieces) => pieces.get_or_init(|| self.pieces_of(group)).get(i as u32),
            None => &[],
        }
    }

    /// The bytes that the tokens of a group stand for.
    fn pieces_of(&self, group: usize) -> Arena {
        let ids = group * GROUP..((group + 1) * GROUP).min(self.attrs.len());
        let (mut pieces, mut buf) = (Arena::default(), Vec::new());
        for id in ids {
            buf.clear();
            self.spell(id as u32, &mut buf);
            // No list of so few tokens outgrows an arena: their texts are a part of one, and what is spelt out is a few times as long.
            if pieces.push("tokenizer.ggml.tokens", &buf).is_err() {
                break;
            }
        }
        pieces
    }

    fn spell(&self, id: u32, buf: &mut Vec<u8>) {
        let (text, bits) = (self.texts.arena.get(id), self.bits(id));
        let plain = matches!(self.kind, Kind::Lattice);
        let escaped = match self.kind {
            Kind::Spm => true,
            Kind::Lattice => false,
            Kind::Bpe(pre) => pre.escape_spaces,
        };
        if bits & (UNKNOWN | CONTROL | USER_DEFINED) != 0 || plain && bits & BYTE == 0 {
            buf.extend_from_slice(text);
        } else if bits & NORMAL != 0 {
            if escaped {
                unescape_spaces(text, buf)
            } else {
                decode_bytes(text, buf)
            }
        } else if bits & BYTE != 0 {
            match parse_byte_token(text) {
                Some(byte) => buf.push(byte),
                None => buf.extend_from_slice(text),
            }
        }
    }
}

fn kind(src: &VocabSource<'_>, options: &TokenizerOptions) -> Result<Kind, TokenizerError> {
    let known_bpe = match src.model {
        "llama" => return Ok(Kind::Spm),
        "plamo2" => return Ok(Kind::Lattice),
        "gpt2" => options
            .pre_override
            .as_deref()
            .or(src.pre.filter(|p| !p.is_empty())),
        "gemma4" => Some(options.pre_override.as_deref().unwrap_or("gemma4")),
        other => {
            return Err(TokenizerError::UnsupportedModel {
                model: escape(other.as_bytes()),
            });
        }
    };
    let name = known_bpe.unwrap_or_else(|| {
        log::warn!("tokenizer.ggml.pre: missing, \"default\" is assumed; answers may suffer");
        "default"
    });
    let pre = pre::lookup(name).ok_or_else(|| TokenizerError::UnknownPre {
        by_user: options.pre_override.is_some(),
        pre: escape(name.as_bytes()),
        known: pre::names(),
    })?;
    if src.merges.is_none() && name != "kimi-k2" {
        return Err(TokenizerError::MissingMerges {
            model: escape(src.model.as_bytes()),
        });
    }
    Ok(Kind::Bpe(pre))
}

fn check_len(
    what: &'static str,
    got: Option<usize>,
    expected: usize,
) -> Result<(), TokenizerError> {
    match got {
        Some(got) if got < expected => Err(TokenizerError::LengthMismatch {
            what,
            got,
            expected,
        }),
        Some(got) if got > expected => {
            log::warn!("{what}: {got} entries for {expected} tokens; the rest is ignored");
            Ok(())
        }
        _ => Ok(()),
    }
}

fn attr_of_type(token_type: i32) -> u8 {
    match token_type {
        1 => NORMAL,
        2 => UNKNOWN,
        3 => CONTROL,
        4 => USER_DEFINED,
        5 => UNUSED,
        6 => BYTE,
        _ => 0,
    }
}

fn special_ids(
    src: &VocabSource<'_>,
    kind: Kind,
    n: usize,
    warnings: &mut Vec<String>,
) -> SpecialIds {
    // What the metadata leaves out has a default that depends on the kind.
    let (bos, eos, unk) = match kind {
        Kind::Spm | Kind::Lattice => (Some(1), Some(2), Some(0)),
        Kind::Bpe(_) if src.model == "gemma4" => (None, None, None),
        Kind::Bpe(pre) => (
            if pre.no_default_bos { None } else { Some(11) },
            Some(11),
            None,
        ),
    };
    let mut pick = |key: &str, given: Option<u32>, default: Option<u32>| {
        let default = default.filter(|&id| (id as usize) < n);
        match given {
            Some(id) if (id as usize) < n => Some(id),
            Some(id) => {
                let used = default.map_or("none".to_owned(), |d| d.to_string());
                warnings.push(format!(
                    "tokenizer.ggml.{key}: {id} is not below the {n} tokens; using {used}"
                ));
                default
            }
            None => default,
        }
    };
    SpecialIds {
        bos: pick("bos_token_id", src.bos, bos),
        eos: pick("eos_token_id", src.eos, eos),
        eot: pick("eot_token_id", src.eot, None),
        eom: pick("eom_token_id", src.eom, None),
        unk: pick("unknown_token_id", src.unk, unk),
        sep: pick("seperator_token_id", src.sep, None),
        pad: pick("padding_token_id", src.pad, None),
        mask: pick("mask_token_id", src.mask, None),
        fim_pre: pick("fim_pre_token_id", src.fim_pre, None),
        fim_suf: pick("fim_suf_token_id", src.fim_suf, None),
        fim_mid: pick("fim_mid_token_id", src.fim_mid, None),
        fim_pad: pick("fim_pad_token_id", src.fim_pad, None),
        fim_rep: pick("fim_rep_token_id", src.fim_rep, None),
        fim_sep: pick("fim_sep_token_id", src.fim_sep, None),
    }
}

/// U+2581 → space.
fn unescape_spaces(text: &[u8], out: &mut Vec<u8>) {
    const MARK: &[u8] = "\u{2581}".as_bytes();
    let mut rest = text;
    while let Some(&byte) = rest.first() {
        if let Some(after) = rest.strip_prefix(MARK) {
            out.push(b' ');
            rest = after;
        } else {
            out.push(byte);
            rest = &rest[1..];
        }
    }
}

/// Byte-level text → bytes. A character outside the alphabet is spelt out the way llama.cpp does.
fn decode_bytes(text: &[u8], out: &mut Vec<u8>) {
    /// The spelling repeats the whole text for each such character; a hostile token must not square its length.
    const MAX_REPEATED: usize = 256;
    for c in super::lossy(text).chars() {
        if let Some(byte) = char_to_byte(c) {
            out.push(byte);
            continue;
        }
        out.extend_from_slice(b"[UNK_BYTE_0x");
        let mut buf = [0; 4];
        for byte in c.encode_utf8(&mut buf).bytes() {
            out.extend_from_slice(format!("{byte:02x}").as_bytes());
        }
        if text.len() <= MAX_REPEATED {
            out.extend_from_slice(text);
        }
        out.push(b']');
    }
}
