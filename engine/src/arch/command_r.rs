//! `command-r`: Command R. The layers of `cohere2` without windows, and all of them rotate.

use super::HParams;
pub(super) use super::cohere2::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.logit_scale = match k.float("logit_scale")?.unwrap_or(0.0) {
        0.0 => 1.0,
        x if x.is_finite() => x,
        x => return Err(k.bad("logit_scale", x, "a number".to_owned())),
    };
    // Command R+ norms each head by weights of its own.
    k.no_qk_norms()?;
    k.no_experts(hp)
}
