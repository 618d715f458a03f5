//! `gpt2`: GPT-2. The layers of `starcoder`; each head has keys and values of its own.

pub(super) use super::decoder::Model;
pub(super) use super::starcoder::hparams;
