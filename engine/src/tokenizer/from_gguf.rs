//! The vocabulary of a GGUF file.

use super::Tokenizer;
use super::source::{TextList, TokenizerError, TokenizerOptions, VocabSource};
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, Meta, Value};

/// A token id. Negative numbers, which some converters write for "none", and numbers beyond 32 bits become an id that
/// is out of range of every vocabulary: the tokenizer then says so and uses its default.
fn id(meta: Meta<'_>, key: &str) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{key}");
    match meta.get(&key) {
        Some(Value::Int { value, .. }) => Ok(Some(u32::try_from(value).unwrap_or(u32::MAX))),
        _ => meta.opt_u32(&key),
    }
}

/// The first of two keys that is there.
fn id_of(meta: Meta<'_>, key: &str, older: &str) -> Result<Option<u32>> {
    Ok(id(meta, key)?.or(id(meta, older)?))
}

impl<'a> VocabSource<'a> {
    /// Reads the `tokenizer.ggml.*` metadata of `file`; token texts and merges are borrowed from it.
    ///
    /// # Errors
    /// [`Error::Malformed`] if a key has the wrong type, or if the tokenizer's model or tokens are missing.
    pub fn from_gguf(file: &'a GgufFile) -> Result<Self> {
        let meta = file.meta();
        const SCORES: &str = "tokenizer.ggml.scores";
        let int_scores = meta.opt_array(SCORES)?.and_then(|a| a.ints());
        let scores = match int_scores {
            Some(ints) => Some(ints.map(|x| x as f32).collect()),
            None => meta.opt_f32s(SCORES)?.map(Iterator::collect),
        };
        Ok(Self {
            model: meta.str("tokenizer.ggml.model")?,
            pre: meta.opt_str("tokenizer.ggml.pre")?,
            model_name: meta.opt_str("general.name").ok().flatten(),
            arch: meta.opt_str("general.architecture").ok().flatten(),
            tokens: TextList::Stored(meta.strings("tokenizer.ggml.tokens")?),
            scores,
            token_types: meta
                .opt_i32s("tokenizer.ggml.token_type")?
                .map(Iterator::collect),
            merges: meta
                .opt_strings("tokenizer.ggml.merges")?
                .map(TextList::Stored),
            bos: id(meta, "bos_token_id")?,
            eos: id(meta, "eos_token_id")?,
            eot: id(meta, "eot_token_id")?,
            eom: id(meta, "eom_token_id")?,
            unk: id(meta, "unknown_token_id")?,
            sep: id(meta, "seperator_token_id")?,
            pad: id(meta, "padding_token_id")?,
            mask: id(meta, "mask_token_id")?,
            fim_pre: id_of(meta, "fim_pre_token_id", "prefix_token_id")?,
            fim_suf: id_of(meta, "fim_suf_token_id", "suffix_token_id")?,
            fim_mid: id_of(meta, "fim_mid_token_id", "middle_token_id")?,
            fim_pad: id(meta, "fim_pad_token_id")?,
            fim_rep: id(meta, "fim_rep_token_id")?,
            fim_sep: id(meta, "fim_sep_token_id")?,
            add_bos: meta.opt_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: meta.opt_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: meta.opt_bool("tokenizer.ggml.add_space_prefix")?,
        })
    }
}

impl Tokenizer {
    /// The tokenizer of `file`.
    ///
    /// # Errors
    /// Those of [`VocabSource::from_gguf`] and [`Tokenizer::with_options`], naming the file.
    pub fn from_gguf(file: &GgufFile, options: &TokenizerOptions) -> Result<Self> {
        let source = VocabSource::from_gguf(file)?;
        Self::with_options(&source, options).map_err(|e| Error::from(e).in_file(file.name()))
    }
}

impl From<TokenizerError> for Error {
    fn from(e: TokenizerError) -> Self {
        match &e {
            TokenizerError::UnsupportedModel { .. } => Error::unsupported(e),
            TokenizerError::UnknownPre {
                by_user: true,
                known,
                ..
            } => Error::usage(&e).with_hint(format!("known names: {known}")),
            TokenizerError::UnknownPre { known, .. } => Error::unsupported(&e).with_hint(format!(
                "if you know which one the model was trained with, name it; known names: {known}"
            )),
            TokenizerError::Build(_) => Error::runtime(e),
            _ => Error::malformed(e),
        }
    }
}
