//! `nanbeige`: Nanbeige. Llama whose layers may be gone through several times, each time with keys and values of their own; what a round leaves is
//! normed as the output is, unless a file says otherwise.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_LAYERS};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    let most = MAX_LAYERS / hp.n_layer as u32;
    let n = k.optional_count("num_loops", most)?.unwrap_or(1);
    hp.repeat_layers(n);
    hp.norms_rounds = !k.flag("skip_loop_final_norm")?.unwrap_or(false);
    k.no_experts(hp)
}
