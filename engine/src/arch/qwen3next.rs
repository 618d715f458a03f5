//! `qwen3next`: Qwen3-Next, which Qwen3.5 came after. The layers of `qwen35moe`, with a plain rotation; value heads of a delta net lie beside
//! those that share their key head, and what makes its gates is one matrix.

use super::HParams;
use super::keys::{Keys, MAX_DIM};
pub(super) use super::qwen35::Model;
use super::qwen35::delta_layers;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    let n_ff = hp.n_ff;
    hp.n_ff = k.expert_width(hp)?;
    let name = "expert_shared_feed_forward_length";
    hp.n_ff_shexp = match k.optional(name)? {
        None | Some(0) if n_ff > 0 => n_ff,
        _ => k.count(name, MAX_DIM)?,
    };
    hp.routing.gates_shared = true;
    delta_layers(k, hp)?;
    if let Some(d) = &mut hp.delta {
        d.side_by_side = true;
    }
    Ok(())
}
