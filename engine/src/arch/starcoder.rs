//! `starcoder`: StarCoder and SantaCoder (arXiv 2305.06161). Nothing rotates: positions have embeddings, which are added to those of tokens. Norms
//! take the mean off and add something, as every matrix does; feed-forward blocks have no gate, and GELU. All heads share a key and value head.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use crate::backend::Activation;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    if hp.n_ctx_train > MAX_DIM {
        return Err(k.bad(
            "context_length",
            hp.n_ctx_train,
            format!("at most {MAX_DIM}"),
        ));
    }
    hp.learns_positions = true;
    hp.cpu_only = Some("embeddings of positions");
    for l in &mut hp.layers {
        l.rope = None;
    }
    hp.without_gates(vec![Activation::Gelu; hp.n_layer]);
    hp.centered_norms();
    k.no_experts(hp)
}
