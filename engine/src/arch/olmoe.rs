//! `olmoe`: OLMoE. Queries and keys are normed over all heads together; in every layer a mixture of experts: softmax over all of them, the
//! best few count as much as it says.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm, Routing};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Whole;
    // Experts are as wide as the block says, not that wide together.
    hp.n_ff_exp = hp.n_ff;
    hp.routing = Routing {
        norm_topk: false,
        ..Routing::SOFTMAX
    };
    k.only_experts(hp)
}
