//! `command-r`: Command R and R+. The layers of `cohere2` without windows, and all of them rotate; R+ norms each head of queries and keys by
//! weights of its own.

pub(super) use super::cohere2::Model;
use super::keys::Keys;
use super::{HParams, QkNorm};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.logit_scale = match k.float("logit_scale")?.unwrap_or(0.0) {
        0.0 => 1.0,
        x if x.is_finite() => x,
        x => return Err(k.bad("logit_scale", x, "a number".to_owned())),
    };
    apart(k, hp);
    k.no_experts(hp)
}

/// Norms of queries and keys over each head, by weights of its own, where a file has them.
pub(super) fn apart(k: &Keys<'_>, hp: &mut HParams) {
    if k.has_tensor(0, "attn_q_norm.weight") {
        hp.qk_norm = QkNorm::Apart;
        hp.cpu_only = Some("norms of heads by weights of their own");
    }
}
