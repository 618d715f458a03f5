//! `qwen3vl`: Qwen3-VL, the text model of it: `qwen3` whose heads rotate by interleaved sections (in text all of them by the position).
//! What pictures would add to the first layers comes from another file.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_sections = Some(k.rope_sections()?);
    super::qwen3::hparams(k, hp)
}
