//! `dbrx`: DBRX. Mixtures of experts in every layer; norms take the mean off; queries, keys and values are kept within a bound.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.centered_norms();
    hp.norm_names = ["attn_norm", "attn_output_norm"];
    k.only_experts(hp)?;
    super::olmo::bounded(k, hp)
}
