//! `exaone`: EXAONE 3 and Deep. Llama whose heads rotate by halves.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    k.no_experts(hp)
}
