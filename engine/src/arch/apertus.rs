//! `apertus`: Apertus. Attention as in `qwen3`; feed-forward blocks have no gate but an activation whose shape every layer has learned (xIELU,
//! arXiv 2411.13010).

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{HParams, QkNorm};
use crate::backend::{Activation, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    let number = |name| k.layer_floats(name, hp.n_layer);
    let [alpha_n, alpha_p] = [number("xielu.alpha_n")?, number("xielu.alpha_p")?];
    let [beta, eps] = [number("xielu.beta")?, number("xielu.eps")?];
    // Files have the alphas before they are made positive.
    let softplus = |x: f32| if x > 20.0 { x } else { x.exp().ln_1p() };
    let of_layer = |il: usize| Activation::Xielu {
        alpha_n: beta[il] + softplus(alpha_n[il]),
        alpha_p: softplus(alpha_p[il]),
        beta: beta[il],
        eps: eps[il],
    };
    hp.without_gates((0..hp.n_layer).map(of_layer).collect());
    k.no_experts(hp)
}
