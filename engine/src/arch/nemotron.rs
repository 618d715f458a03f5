//! `nemotron`: Nemotron-4 and Minitron. Norms take the mean off and add something; a part of each head rotates; feed-forward blocks have no
//! gate, and what is positive is squared.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::{Activation, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.without_gates(vec![Activation::ReluSqr; hp.n_layer]);
    hp.centered_norms();
    k.no_experts(hp)
}
