//! `minicpm3`: MiniCPM3. The latent attention of `deepseek2` in dense layers, with the factors of `minicpm`, which files do not state; the context
//! may be extended by divisors of the frequencies (longrope).

use super::HParams;
use super::deepseek2::latent_heads;
pub(super) use super::granite::Model;
use super::keys::{Keys, MAX_DIM};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    k.no_experts(hp)?;
    k.count("attention.q_lora_rank", MAX_DIM)?;
    let head_dim = latent_heads(k, hp)?.head_dim;
    hp.attn_scale = 1.0 / (head_dim as f32).sqrt();
    hp.embedding_scale = 12.0;
    hp.residual_scale = 1.4 / (hp.n_layer as f32).sqrt();
    hp.logit_scale = 256.0 / hp.n_embd as f32;
    Ok(())
}
