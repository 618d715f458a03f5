//! `qwen3moe`: attention as in `qwen3`, and in every layer a mixture of experts without shared ones: softmax over all of them, the best
//! few made to sum to one.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.n_ff = k.expert_width(hp)?;
    Ok(())
}
