//! `phimoe`: Phi-3.5-MoE. Norms add something, all products have biases, and every layer is a mixture of experts: softmax over all of them,
//! the best few made to sum to one; divisors of the frequencies depend on the size of the context (longrope).

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    k.only_experts(hp)?;
    hp.n_ff_exp = hp.n_ff;
    hp.norms_add = true;
    Ok(())
}
