//! `minimax-m2`: MiniMax-M2. Queries and keys are normed over all heads together, a part of each head rotates; in every layer a mixture of
//! experts: a sigmoid of each, something added to it where they are chosen, the best few made to sum to one.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.qk_norm = QkNorm::Whole;
    hp.n_ff = k.expert_width(hp)?;
    hp.routing = Routing {
        norm_topk: true,
        ..Routing::read(k, hp, Gating::Sigmoid)?
    };
    Ok(())
}
