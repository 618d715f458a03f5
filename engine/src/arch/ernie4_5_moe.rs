//! `ernie4_5-moe`: ERNIE 4.5 with mixtures of experts behind the first layers: softmax over all of them, something added to it where they are
//! chosen, the best few made to sum to one, and some that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use super::routing::expert_width;
use super::{HParams, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    let step = "interleave_moe_layer_step";
    match k.optional(step)?.unwrap_or(1) {
        1 => {}
        n => return Err(k.bad(step, n, "1".to_owned())),
    }
    hp.n_ff_exp = expert_width(k)?;
    let shared = k.optional("expert_shared_feed_forward_length")?;
    if shared.is_some_and(|n| n > 0) {
        hp.n_ff_shexp = k.count("expert_shared_feed_forward_length", MAX_DIM)?;
    }
    hp.routing = Routing {
        gating: Gating::Softmax,
        norm_topk: true,
        ..Routing::read(k, hp, Gating::Softmax)?
    };
    Ok(())
}
