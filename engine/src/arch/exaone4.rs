//! `exaone4`: EXAONE 4. Blocks are normed behind and not before, as in `olmo2`, queries and keys head by head. The larger models have a
//! window in three of four layers, and only those rotate.

use super::keys::Keys;
pub(super) use super::olmo2::Model;
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

/// Layers of the model of 32 billion parameters, which has windows.
const LAYERS_32B: usize = 64;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    k.no_experts(hp)?;
    if hp.n_layer == LAYERS_32B {
        let window = k.optional_window()?.unwrap_or(4096);
        hp.rotate_in_windows(window, &k.window_pattern(hp.n_layer, 4)?);
    }
    Ok(())
}
