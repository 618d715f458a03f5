//! `qwen3vlmoe`: the text model of Qwen3-VL with mixtures of experts: `qwen3moe` whose heads rotate as in `qwen3vl`.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_sections = Some(k.rope_sections()?);
    super::qwen3moe::hparams(k, hp)
}
