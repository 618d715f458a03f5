//! `internlm2`: InternLM 2 and 2.5, which are Llama in other names.

pub(super) use super::llama::{Model, hparams};
