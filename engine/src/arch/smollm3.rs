//! `smollm3`: SmolLM3. Llama with every fourth layer left as it is where the others rotate (arXiv 2501.18795).

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    for l in hp.layers.iter_mut().skip(3).step_by(4) {
        l.rope = None;
    }
    k.no_experts(hp)
}
