//! `gemma`: Gemma 1. The layers of `gemma2` without windows, caps and norms behind a block.

use super::HParams;
pub(super) use super::gemma2::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.embedding_scale = (hp.n_embd as f32).sqrt();
    k.no_experts(hp)
}
