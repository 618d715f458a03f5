//! `bailingmoe`: Ling and Ring of the first generation. Llama with a mixture of experts in every layer, softmax over all of them, and some that
//! every token is sent to.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::routing::{Routing, expert_width, shared_width};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = shared_width(k, hp.n_ff_exp)?;
    hp.routing = Routing {
        gating: Gating::Softmax,
        n_dense: 0,
        ..Routing::read(k, hp, Gating::Softmax)?
    };
    k.only_experts(hp)
}
