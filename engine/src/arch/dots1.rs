//! `dots1`: dots.llm1. Attention as in `qwen3`; feed-forward blocks as in `deepseek2`: a few dense layers, then mixtures of experts with some
//! that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::routing::{expert_width, shared_width};
use super::{HParams, QkNorm, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = shared_width(k, hp.n_ff_exp)?;
    hp.routing = Routing::read(k, hp, Gating::Sigmoid)?;
    Ok(())
}
