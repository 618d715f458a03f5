//! `gptneox`: GPT-NeoX (arXiv 2204.06745), Pythia, StableLM alpha. Attention and feed-forward block read the stream side by side, by a norm each,
//! or one after the other. Norms take the mean off and add something; a part of each head rotates; feed-forward blocks have no gate, and GELU.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{FfnReads, HParams};
use crate::backend::{Activation, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.without_gates(vec![Activation::Gelu; hp.n_layer]);
    hp.centered_norms();
    let name = "use_parallel_residual";
    hp.ffn_reads = match k.flag(name)? {
        Some(true) => FfnReads::Beside,
        Some(false) => FfnReads::After,
        None => return Err(k.missing(name)),
    };
    k.no_experts(hp)
}
