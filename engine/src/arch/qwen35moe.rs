//! `qwen35moe`: the layers of `qwen35` with mixtures of experts: softmax over all of them, the best few made to sum to one, and one that
//! every token is sent to, of which a gate says how much is taken.

use super::HParams;
use super::keys::{Keys, MAX_DIM};
pub(super) use super::qwen35::Model;
use super::qwen35::delta_layers;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.n_ff = k.expert_width(hp)?;
    hp.n_ff_shexp = k.count("expert_shared_feed_forward_length", MAX_DIM)?;
    hp.routing.gates_shared = true;
    hp.rope_sections = Some(k.rope_sections()?);
    delta_layers(k, hp)
}
