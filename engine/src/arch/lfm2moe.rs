//! `lfm2moe`: LFM2-8B-A1B. The layers of `lfm2` with mixtures of experts, except in the first ones: a sigmoid of each, something added where they
//! are chosen, the best few made to sum to one.

use super::keys::Keys;
pub(super) use super::lfm2::Model;
use super::lfm2::conv_layers;
use super::routing::expert_width;
use super::{HParams, Routing};
use crate::backend::Gating;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.n_ff_exp = expert_width(k)?;
    hp.routing = Routing {
        norm_topk: true,
        ..Routing::read(k, hp, Gating::Sigmoid)?
    };
    conv_layers(k, hp)
}
