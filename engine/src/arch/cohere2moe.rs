//! `cohere2moe`: the layers of `cohere2` with mixtures of experts after the first few: a sigmoid of each, and some that every token is sent to,
//! of which with the others half is taken. The dense layers rotate whether they have a window or not.

pub(super) use super::cohere2::Model;
use super::keys::{Keys, MAX_DIM};
use super::routing::{expert_width, shared_width};
use super::{HParams, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.logit_scale = match k.float("logit_scale")? {
        None => return Err(k.missing("logit_scale")),
        Some(0.0) => 1.0,
        Some(x) if x.is_finite() => x,
        Some(x) => return Err(k.bad("logit_scale", x, "a number".to_owned())),
    };
    // Such a model would not take the mean off.
    k.absent("attention.layer_norm_rms_epsilon")?;
    k.only_experts(hp)?;
    let name = "attention.sliding_window_pattern";
    let windows = match k.layer_flags(name, hp.n_layer)? {
        Some(all) => all,
        None => {
            let period = k.optional_count(name, u32::MAX)?.unwrap_or(4);
            (0..hp.n_layer).map(|il| il % period != 0).collect()
        }
    };
    hp.rotate_in_windows(k.window()?, &windows);
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = shared_width(k, hp.n_ff_exp)?;
    let name = "expert_shared_feed_forward_length";
    if hp.n_ff_shexp > 0 && k.optional(name)?.is_some_and(|n| n > 0) {
        hp.n_ff_shexp = k.count(name, MAX_DIM)?;
    }
    let routing = Routing::read(k, hp, Gating::Sigmoid)?;
    let share = if hp.n_ff_shexp > 0 { 0.5 } else { 1.0 };
    hp.routing = Routing {
        is_biased: false,
        weights_scale: share * routing.weights_scale,
        shared_scale: share,
        ..routing
    };
    for l in hp.layers.iter_mut().take(hp.routing.n_dense) {
        l.rope = Some(0);
    }
    Ok(())
}
