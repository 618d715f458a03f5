//! `seed_oss`: Seed-OSS. As `qwen2` with heads whose width is their own; the norm of the feed-forward block is called `post_attention_norm`.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    k.no_experts(hp)
}
