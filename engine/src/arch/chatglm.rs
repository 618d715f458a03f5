//! `chatglm`: ChatGLM3 and GLM-4 of 2024. Llama in which half of each head rotates; queries, keys and values are one matrix, gate and up another.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.partial_rotary = true;
    hp.gate_in_up = true;
    k.no_experts(hp)
}
