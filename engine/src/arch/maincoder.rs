//! `maincoder`: Maincoder. Llama with a norm over each head of queries and keys, after they have rotated.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.qk_norm = QkNorm::RotatedHeads;
    k.no_experts(hp)
}
