//! `qwen2moe`: Qwen1.5-MoE, Qwen2-57B-A14B. As `qwen2`, and in every layer a mixture of experts: softmax over all of them, the best few count
//! as much as it says, and one that every token is sent to, of which a gate says how much is taken.

pub(super) use super::decoder::Model;
use super::keys::{Keys, MAX_DIM};
use super::{HParams, Routing};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    let n_ff = hp.n_ff;
    hp.n_ff = k.expert_width(hp)?;
    hp.n_ff_shexp = match k.optional_count("expert_shared_feed_forward_length", MAX_DIM)? {
        Some(n) => n,
        None => n_ff,
    };
    hp.routing = Routing {
        norm_topk: false,
        gates_shared: true,
        ..Routing::SOFTMAX
    };
    Ok(())
}
