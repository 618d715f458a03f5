//! `granitehybrid`: Granite 4. The layers of `granite` and `granitemoe`, but most have a state space (Mamba-2) in place of attention, and in the others
//! nothing rotates as a rule.

pub(super) use super::granite::Model;
use super::granite::{factors, rotates_if_it_says_so};
use super::granitemoe::shared_expert;
use super::keys::Keys;
use super::{HParams, StateSpace};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    factors(k, hp, [0.0, 0.0], Some(1.0))?;
    rotates_if_it_says_so(k, hp)?;
    // Bamba rotates half of its heads.
    hp.partial_rotary = true;
    if hp.n_expert > 0 {
        shared_expert(k, hp)?;
    }
    hp.ssm = Some(StateSpace::read(k)?);
    hp.keep_by_heads(k)
}
