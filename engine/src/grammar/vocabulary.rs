//! The vocabulary as the constraint engine wants it: the bytes of every token that text may consist of, in a trie.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie,
};

use super::limits;
use crate::conversation::think_tags;
use crate::error::Error;
use crate::model::Model;

/// Longer tokens are never allowed: the trie counts depth in a byte.
const MAX_TOKEN: usize = 200;

/// What all grammars over one model share. It is made when the first grammar is.
pub(crate) struct Vocabulary {
    pub(super) factory: ParserFactory,
}

impl Vocabulary {
    /// Takes the tokens of a model. Control tokens and the tags of thinking are no text and never allowed; the tokens that end
    /// generation are allowed where the grammar may end.
    pub(crate) fn new(model: &Model) -> Result<Self, Error> {
        let tokenizer = model.tokenizer();
        let n_vocab = model.hparams().n_vocab;
        let mut words: Vec<Vec<u8>> = (0..n_vocab as u32)
            .map(|id| tokenizer.token_bytes(id, false))
            // 0xff begins what the trie takes for a control token, and occurs in no text.
            .map(|bytes| match bytes {
                [] | [0xff, ..] => Vec::new(),
                _ if bytes.len() > MAX_TOKEN => Vec::new(),
                _ => bytes.to_vec(),
            })
            .collect();
        let tags = think_tags(model);
        let tags = tags.iter().flat_map(|t| t.ids());
        for id in tags.chain(tokenizer.eog().iter().copied()) {
            if let Some(word) = words.get_mut(id as usize) {
                word.clear();
            }
        }
        let eog: Vec<u32> = tokenizer
            .eog()
            .iter()
            .copied()
            .filter(|&id| (id as usize) < n_vocab)
            .collect();
        let first = eog.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(n_vocab as u32, first), &words);
        if !eog.is_empty() {
            trie = trie.with_eos_tokens(&eog);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|e| Error::runtime(format!("the vocabulary: {e}")))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory })
    }
}
