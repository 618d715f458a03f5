//! `mellum`: Mellum 2. The layers of `qwen3moe`, three of four with a window; these rotate without the scaling of the others.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, RopeParams};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    if let Some(window) = k.optional_window()? {
        let local = RopeParams::plain(hp.ropes[0].freq_base);
        hp.windows(window, &k.window_pattern(hp.n_layer, 4)?, local);
    }
    super::qwen3moe::hparams(k, hp)
}
