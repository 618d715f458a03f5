//! `qwen2vl`: Qwen2-VL and Qwen2.5-VL, the text model of them: `qwen2` whose heads rotate by sections that follow one another (in text all of
//! them by the position). What pictures would add comes from another file.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, Sections};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_sections = Some(Sections {
        take_turns: false,
        ..k.rope_sections()?
    });
    super::qwen2::hparams(k, hp)
}
