//! `nemotron_h_moe`: Nemotron 3 Nano and Super. The layers of `nemotron_h` with mixtures of experts without gates: a sigmoid of each, something added where
//! they are chosen, and one that every token is sent to. Those of Super read and give a narrower vector, with a matrix before and behind them.

use super::keys::{Keys, MAX_DIM};
pub(super) use super::nemotron_h::Model;
use super::nemotron_h::mixed_layers;
use super::{HParams, Past, Routing};
use crate::backend::Gating;
use crate::error::Error;
use crate::report;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.only_experts(hp)?;
    if k.optional("moe_latent_size")?.is_some_and(|n| n > 0) {
        hp.n_expert_latent = Some(k.count("moe_latent_size", MAX_DIM)?);
        hp.routes_apart = true;
    }
    hp.n_ff_exp = match k.count_where_any("expert_feed_forward_length", MAX_DIM)? {
        Some(n) => n,
        // Together the experts of a token are as wide as the block says.
        None => (hp.n_ff / hp.n_expert_used).max(1),
    };
    hp.n_ff_shexp = k.count("expert_shared_feed_forward_length", MAX_DIM)?;
    hp.routing = Routing {
        is_biased: true,
        ..Routing::read(k, hp, Gating::Sigmoid)?
    };
    mixed_layers(k, hp)?;
    // What is added where experts are chosen is not left out.
    for (il, _) in (hp.layers.iter().enumerate()).filter(|(_, l)| l.past == Past::Nothing) {
        let names = ["exp_probs_b.bias", "exp_probs_b"];
        if names.iter().all(|name| !k.has_tensor(il, name)) {
            let found = format!("tensor blk.{il}.exp_probs_b.bias is missing");
            let expected = format!("a tensor of shape [{}]", hp.n_expert);
            return Err(report::malformed(k.file.name(), found, expected));
        }
    }
    Ok(())
}
