//! `granite_swa`: Granite 4 with windows. The factors and layers of `granite`, with or without experts; layers have sinks, some of them a
//! window, and a file may say which of them rotate.

use super::HParams;
pub(super) use super::granite::Model;
use super::granite::factors;
use super::granitemoe::shared_expert;
use super::keys::Keys;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    factors(k, hp, [0.0, 0.0], None)?;
    if hp.n_expert > 0 {
        shared_expert(k, hp)?;
    }
    let name = "attention.sliding_window_pattern";
    let Some(windows) = k.layer_flags(name, hp.n_layer)? else {
        return Err(k.missing(name));
    };
    let window = k.window()?;
    let rotates = k.layer_flags("attention.rope_pattern", hp.n_layer)?;
    for (il, l) in hp.layers.iter_mut().enumerate() {
        if windows[il] {
            l.window = Some(window);
        }
        if rotates.as_ref().is_some_and(|r| !r[il]) {
            l.rope = None;
        }
    }
    Ok(())
}
