//! `hy_v3`: Hunyuan 3. Attention as in `qwen3`; a few dense layers, then mixtures of experts: a sigmoid of each, something added to it where they
//! are chosen, and one that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use super::routing::{expert_width, first_router};
use super::{HParams, QkNorm, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.n_ff_exp = expert_width(k)?;
    let name = "expert_shared_feed_forward_length";
    hp.n_ff_shexp = match k.optional(name)? {
        None | Some(0) => hp.n_ff_exp,
        Some(_) => k.count(name, MAX_DIM)?,
    };
    // Files do not say how many layers have no router.
    let n_dense = first_router(k, hp);
    hp.routing = Routing {
        n_dense,
        is_biased: k.has_tensor(n_dense, "exp_probs_b"),
        ..Routing::read(k, hp, Gating::Sigmoid)?
    };
    Ok(())
}
