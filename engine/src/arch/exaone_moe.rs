//! `exaone-moe`: K-EXAONE. Attention as in `qwen3` with a window in three of four layers, and only those rotate. A few dense layers, then
//! mixtures of experts as in DeepSeek-V3: a sigmoid of each, something added to it where they are chosen, and one that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use super::routing::expert_width;
use super::{HParams, QkNorm, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.rotate_in_windows(k.window()?, &k.window_pattern(hp.n_layer, 4)?);
    hp.n_ff_exp = expert_width(k)?;
    let name = "expert_shared_feed_forward_length";
    hp.n_ff_shexp = match k.optional(name)? {
        None | Some(0) => hp.n_ff_exp,
        Some(_) => k.count(name, MAX_DIM)?,
    };
    hp.routing = Routing::read(k, hp, Gating::Sigmoid)?;
    Ok(())
}
