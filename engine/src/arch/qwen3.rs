//! `qwen3`: grouped-query attention with a norm over each head of queries and keys, no biases, SwiGLU.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    k.no_experts(hp)
}
