//! `minicpm`: MiniCPM 1 to 4. The factors and layers of `granite`; the context of some was extended by divisors of the frequencies (longrope).

use super::HParams;
pub(super) use super::granite::Model;
use super::granite::factors;
use super::keys::Keys;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.no_experts(hp)?;
    factors(k, hp)?;
    // What says in Granite's files that nothing rotates says nothing here.
    for l in &mut hp.layers {
        l.rope = Some(0);
    }
    Ok(())
}
