//! `glm4moe`: GLM-4.5, GLM-4.6 and Air. A part of each head rotates, larger models norm queries and keys head by head. A few dense layers,
//! then mixtures of experts: a sigmoid of each, something added to it where they are chosen, and some that every token is sent to.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::routing::{expert_width, shared_width};
use super::{HParams, QkNorm, Routing};
use crate::backend::{Gating, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    // Models that see pictures rotate sections of a head by other positions, which are all the same in text but for the fourth.
    let sections = "rope.dimension_sections";
    if k.has(sections) {
        let s = k.rope_sections()?.pairs;
        if s[3] != 0 || s.iter().sum::<usize>() < hp.n_rot / 2 {
            let expected = format!("three sections of {} pairs", hp.n_rot / 2);
            return Err(k.bad(sections, format!("{s:?}"), expected));
        }
    }
    if k.has_tensor(0, "attn_q_norm.weight") {
        hp.qk_norm = QkNorm::Heads;
    }
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = shared_width(k, hp.n_ff_exp)?;
    hp.routing = Routing::read(k, hp, Gating::Sigmoid)?;
    Ok(())
}
