//! `arcee`: AFM. Llama whose feed-forward blocks have no gate: what is positive is squared, the rest is zero.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::{Activation, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.without_gates(vec![Activation::ReluSqr; hp.n_layer]);
    k.no_experts(hp)
}
