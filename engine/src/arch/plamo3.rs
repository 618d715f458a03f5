//! `plamo3`: PLaMo 3. The layers of `glm4`, in which all of a head rotates; queries and keys are normed over each head, and seven of eight layers
//! have a window, whose rotation is plain.

pub(super) use super::glm4::Model;
use super::keys::Keys;
use super::{HParams, QkNorm, RopeParams};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.attn_scale = 1.0 / (hp.head_dim as f32).sqrt();
    k.no_experts(hp)?;
    if let Some(window) = k.optional_window()? {
        let base = k.positive("rope.freq_base_swa", Some(10_000.0))?;
        let windows = k.window_pattern(hp.n_layer, 8)?;
        hp.windows(window, &windows, RopeParams::plain(base));
    }
    Ok(())
}
