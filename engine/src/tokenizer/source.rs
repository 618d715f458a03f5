//! What a tokenizer is built from, and what can be wrong with it.
//!
//! [`VocabSource`] is a plain view of the `tokenizer.ggml.*` metadata. It knows nothing of the file it came from, so
//! that vocabularies can be made in tests and read from any container.

use crate::gguf::Strings;

/// A list of byte strings: where a file has them, or somewhere else. To copy 300,000 addresses would take longer than to look at the
/// strings themselves.
#[derive(Debug, Clone)]
pub enum TextList<'a> {
    /// As they lie in a file.
    Stored(Strings<'a>),
    /// As they were given.
    Given(Vec<&'a [u8]>),
}

impl Default for TextList<'_> {
    fn default() -> Self {
        Self::Given(Vec::new())
    }
}

impl<'a> FromIterator<&'a [u8]> for TextList<'a> {
    fn from_iter<I: IntoIterator<Item = &'a [u8]>>(texts: I) -> Self {
        Self::Given(texts.into_iter().collect())
    }
}

impl<'a> TextList<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Stored(texts) => texts.len(),
            Self::Given(texts) => texts.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The strings in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        let (stored, given) = match self {
            Self::Stored(texts) => (Some(texts.clone()), &[][..]),
            Self::Given(texts) => (None, &texts[..]),
        };
        stored.into_iter().flatten().chain(given.iter().copied())
    }

    /// Bytes of all of them together, or a little more.
    pub(super) fn n_bytes(&self) -> usize {
        match self {
            Self::Stored(texts) => texts.n_bytes(),
            Self::Given(texts) => texts.iter().map(|t| t.len()).sum(),
        }
    }
}

/// The vocabulary as the file states it: borrowed text, nothing checked.
///
/// Field names follow the metadata keys `tokenizer.ggml.*`; a key that is absent is `None`.
#[derive(Debug, Clone, Default)]
pub struct VocabSource<'a> {
    /// `tokenizer.ggml.model`: `gpt2`, `llama`, `gemma4`, …
    pub model: &'a str,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer.
    pub pre: Option<&'a str>,
    /// `general.name`: a few models get token attributes by name.
    pub model_name: Option<&'a str>,
    /// `general.architecture`: likewise.
    pub arch: Option<&'a str>,
    /// `tokenizer.ggml.tokens`, `[n_vocab]`.
    pub tokens: TextList<'a>,
    /// `tokenizer.ggml.scores`, `[n_vocab]` or longer.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`, `[n_vocab]` or longer: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`: `left right`, best first.
    pub merges: Option<TextList<'a>>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `eom_token_id`.
    pub eom: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `seperator_token_id` (spelt so in the format).
    pub sep: Option<u32>,
    /// `padding_token_id`.
    pub pad: Option<u32>,
    /// `mask_token_id`.
    pub mask: Option<u32>,
    /// `fim_pre_token_id`, or the older `prefix_token_id`.
    pub fim_pre: Option<u32>,
    /// `fim_suf_token_id`, or the older `suffix_token_id`.
    pub fim_suf: Option<u32>,
    /// `fim_mid_token_id`, or the older `middle_token_id`.
    pub fim_mid: Option<u32>,
    /// `fim_pad_token_id`.
    pub fim_pad: Option<u32>,
    /// `fim_rep_token_id`.
    pub fim_rep: Option<u32>,
    /// `fim_sep_token_id`.
    pub fim_sep: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
}

/// Choices of the user that overrule the file.
#[derive(Debug, Clone, Default)]
pub struct TokenizerOptions {
    /// Use this pre-tokenizer instead of `tokenizer.ggml.pre`.
    pub pre_override: Option<String>,
}

/// Why a vocabulary cannot be used. Text taken from the file is escaped and cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// `tokenizer.ggml.model` names a kind that is not implemented.
    #[error(
        "tokenizer.ggml.model: unsupported tokenizer model \"{model}\", expected one of gpt2, llama, gemma4, plamo2"
    )]
    UnsupportedModel {
        /// The name, escaped.
        model: String,
    },
    /// `tokenizer.ggml.pre` (or the override) is not known.
    #[error("{}: unknown pre-tokenizer \"{pre}\"", if *by_user { "pre-tokenizer override" } else { "tokenizer.ggml.pre" })]
    UnknownPre {
        /// The name was given as [`TokenizerOptions::pre_override`].
        by_user: bool,
        /// The name, escaped.
        pre: String,
        /// The names that are known, separated by spaces.
        known: String,
    },
    /// A merge that is not two parts separated by a space.
    #[error(
        "tokenizer.ggml.merges: entry {index} is \"{text}\", expected two parts separated by a space"
    )]
    BadMerge {
        /// Position in the list.
        index: usize,
        /// The entry, escaped.
        text: String,
    },
    /// No tokens at all.
    #[error("tokenizer.ggml.tokens: the vocabulary is empty")]
    EmptyVocab,
    /// More tokens or bytes than 32-bit indices hold.
    #[error("{what}: {got} is more than the {limit} that can be indexed")]
    TooLarge {
        /// The key.
        what: &'static str,
        /// What the file holds.
        got: usize,
        /// What is possible.
        limit: usize,
    },
    /// A parallel array is shorter than the token list.
    #[error("{what}: {got} entries for {expected} tokens")]
    LengthMismatch {
        /// The key.
        what: &'static str,
        /// Entries found.
        got: usize,
        /// Entries needed.
        expected: usize,
    },
    /// A byte-pair vocabulary without merges.
    #[error("tokenizer.ggml.merges: missing, a \"{model}\" tokenizer needs it")]
    MissingMerges {
        /// `tokenizer.ggml.model`, escaped.
        model: String,
    },
    /// The regex of a pre-tokenizer or the merge table was rejected by the library.
    #[error("the tokenizer could not be built: {0}")]
    Build(String),
}

/// Text from the file, made fit for a message.
pub(super) fn escape(bytes: &[u8]) -> String {
    crate::error::escape(bytes, 64)
}
