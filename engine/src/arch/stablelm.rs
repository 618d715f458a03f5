//! `stablelm`: StableLM 3B and 2-1.6B. Norms take the mean off and add something; a part of each head rotates.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.centered_norms();
    // The model of 12 billion parameters norms each head by weights of its own.
    k.no_qk_norms()?;
    k.no_experts(hp)
}
