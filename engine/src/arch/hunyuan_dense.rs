//! `hunyuan-dense`: the dense models of Hunyuan. Llama with a norm over each head of queries and keys after they have rotated; a context
//! that was extended by a larger base of the frequencies.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::RotatedHeads;
    // Some files say that the dense block is the only expert.
    if hp.n_expert == 1 {
        (hp.n_expert, hp.n_expert_used) = (0, 0);
    }
    k.no_experts(hp)?;
    let name = "rope.scaling.alpha";
    match k.float(name)?.unwrap_or(0.0) {
        0.0 => {}
        alpha if alpha.is_finite() && alpha > 0.0 && hp.head_dim > 2 => {
            let d = hp.head_dim as f32;
            let base = hp.ropes[0].freq_base * alpha.powf(d / (d - 2.0));
            if !base.is_finite() || base <= 0.0 {
                return Err(k.bad(name, alpha, "a smaller number".to_owned()));
            }
            hp.ropes[0].freq_base = base;
        }
        alpha => return Err(k.bad(name, alpha, "a positive number".to_owned())),
    }
    Ok(())
}
