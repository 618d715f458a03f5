//! `mistral4`: Mistral Small 4 and Mistral Large 3. The layers of `deepseek2`; queries grow with their position, as in `mistral3`.

pub(super) use super::deepseek2::Model;
use super::hparams::Temperature;
use super::keys::Keys;
use super::{HParams, RopeScaling};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    super::deepseek2::latent_layers(k, hp)?;
    magnitudes(k, hp)?;
    let name = "attention.temperature_scale";
    match k.float(name)?.unwrap_or(0.0) {
        0.0 => Ok(()),
        scale if scale.is_finite() => {
            let n_floor = k.count("attention.temperature_length", u32::MAX)? as u32;
            hp.heat = Some(Temperature {
                scale,
                n_floor,
                offset: 0,
            });
            hp.cpu_only = Some("latent queries that grow with their position");
            Ok(())
        }
        scale => Err(k.bad(name, scale, "a number".to_owned())),
    }
}

/// Where YaRN stretches the context, rotation has the ratio of the plain magnitude to the one that files state for scores. In `deepseek2` both are
/// the same, as they are in published files of this.
fn magnitudes(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    let RopeScaling::Yarn {
        factor, ext_factor, ..
    } = hp.ropes[0].scaling
    else {
        return Ok(());
    };
    let name = "rope.scaling.yarn_log_multiplier";
    let log_mul = k.float(name)?.unwrap_or(0.0);
    if ext_factor == 0.0 || log_mul == 0.0 {
        return Ok(());
    }
    let ln = factor.max(1.0).ln();
    let ratio = (1.0 + 0.1 * ln) / (1.0 + log_mul * ln);
    if !ratio.is_finite() || !(ratio * ratio * hp.attn_scale).is_finite() {
        return Err(k.bad(name, log_mul, "a number above zero".to_owned()));
    }
    hp.ropes[0].magnitude *= ratio;
    hp.attn_scale *= ratio * ratio;
    Ok(())
}
