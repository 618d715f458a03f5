//! `starcoder2`: StarCoder2. Norms take the mean off and add something, as every matrix does; feed-forward blocks have no gate, and GELU.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::{Activation, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.without_gates(vec![Activation::Gelu; hp.n_layer]);
    hp.centered_norms();
    k.no_experts(hp)
}
