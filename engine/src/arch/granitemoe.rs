//! `granitemoe`: Granite 3 with a mixture of experts in every layer: softmax over all of them, the best few made to sum to one; some models
//! have one that every token is sent to.

use super::HParams;
pub(super) use super::granite::Model;
use super::granite::factors;
use super::keys::{Keys, MAX_DIM};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    factors(k, hp, [0.0, 0.0], None)?;
    k.only_experts(hp)?;
    shared_expert(k, hp)
}

/// Widths of experts, and of the one that every token is sent to where there is one.
pub(super) fn shared_expert(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    // Experts are as wide as the block says, not that wide together.
    hp.n_ff_exp = hp.n_ff;
    let name = "expert_shared_feed_forward_length";
    if k.optional(name)?.is_some_and(|n| n > 0) {
        hp.n_ff_shexp = k.count(name, MAX_DIM)?;
    }
    Ok(())
}
