//! `llama`: Llama 1 to 3, Mistral, Mixtral and what was built like them. Optional biases everywhere, optional rope factors
//! (`rope_freqs`), dense or mixture-of-experts feed-forward (Mixtral's router: softmax over all experts, the best few made to sum to one).

use super::HParams;
pub(super) use super::decoder::Model;
use super::keys::Keys;
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(_: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    Ok(())
}
