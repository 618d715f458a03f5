//! `olmo`: OLMo (arXiv 2402.00838). Llama whose norms take the mean off and have no weights; some keep queries, keys and values within a bound.

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.centered_norms();
    hp.norms_plain = true;
    bounded(k, hp)?;
    k.no_experts(hp)
}

/// Queries, keys and values within a bound, where a file has one; zero and what is below stand for none.
pub(super) fn bounded(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    let name = "attention.clamp_kqv";
    match k.float(name)? {
        None => {}
        Some(x) if x.is_nan() => return Err(k.bad(name, x, "a number".to_owned())),
        Some(most) if most > 0.0 => {
            hp.clamp_kqv = Some(most);
            hp.cpu_only = Some("queries and keys within a bound");
        }
        Some(_) => {}
    }
    Ok(())
}
