//! `minicpm`: MiniCPM 1 to 4. The factors and layers of `granite`; the context of some was extended by divisors of the frequencies (longrope).

use super::HParams;
pub(super) use super::granite::Model;
use super::granite::factors;
use super::keys::Keys;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.no_experts(hp)?;
    // What the first of these models have, whose files do not say.
    let residual = 1.4 / (hp.n_layer as f32).sqrt();
    let divisor = 256.0 / hp.n_embd as f32;
    factors(k, hp, [12.0, residual], Some(divisor))
}
