//! `hunyuan-moe`: Hunyuan-A13B. Attention as in `hunyuan-dense`; in every layer a mixture of experts (softmax over all of them, the best few
//! made to sum to one) and one that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::RotatedHeads;
    hp.n_ff = k.expert_width(hp)?;
    hp.n_ff_shexp = match k.optional("expert_shared_feed_forward_length")? {
        None | Some(0) => hp.n_ff,
        Some(_) => k.count("expert_shared_feed_forward_length", MAX_DIM)?,
    };
    Ok(())
}
