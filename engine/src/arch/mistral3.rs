//! `mistral3`: Ministral 3. Llama whose context was extended by YaRN, and whose queries grow with their position beyond the original
//! context, so that scores stay sharp over more tokens.

use super::HParams;
pub(super) use super::decoder::Model;
use super::hparams::Temperature;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    let name = "attention.temperature_scale";
    match k.float(name)?.unwrap_or(0.0) {
        0.0 => {}
        scale if scale.is_finite() => {
            hp.temperature = Some(Temperature {
                scale,
                n_floor: hp.n_ctx_orig,
                offset: 0,
            });
        }
        scale => return Err(k.bad(name, scale, "a number".to_owned())),
    }
    Ok(())
}
