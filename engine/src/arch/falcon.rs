//! `falcon`: Falcon 7B, 40B and 180B (arXiv 2311.16867). Attention and feed-forward block read the stream side by side: the same norm in the small
//! model, one each in the others. Norms take the mean off and add something; feed-forward blocks have no gate, and GELU.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{FfnReads, HParams};
use crate::backend::{Activation, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.without_gates(vec![Activation::Gelu; hp.n_layer]);
    hp.centered_norms();
    hp.ffn_reads = FfnReads::Same;
    if k.has_tensor(0, "attn_norm_2.weight") {
        hp.ffn_reads = FfnReads::Beside;
        hp.norm_names = ["attn_norm_2", "attn_norm"];
    }
    k.no_experts(hp)
}
