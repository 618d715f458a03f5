//! `bailingmoe2`: Ling 2.0, Ring 2.0. Attention as in `qwen3` with a part of each head rotated and one matrix for queries, keys and values. A
//! few dense layers, then mixtures of experts as in DeepSeek-V3: groups of them, a sigmoid of each, something added to it where they are
//! chosen, and some that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use super::routing::{expert_width, shared_width};
use super::{HParams, QkNorm, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.qk_norm = QkNorm::Heads;
    hp.n_ff_exp = expert_width(k)?;
    let name = "expert_shared_feed_forward_length";
    let each = match k.optional(name)? {
        None | Some(0) => hp.n_ff_exp,
        Some(_) => k.count(name, MAX_DIM)?,
    };
    hp.n_ff_shexp = shared_width(k, each)?;
    hp.routing = Routing::read(k, hp, Gating::Sigmoid)?;
    Ok(())
}
