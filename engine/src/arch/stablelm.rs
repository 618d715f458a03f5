//! `stablelm`: StableLM 3B and 2. Norms take the mean off and add something; a part of each head rotates. In the model of 12 billion
//! parameters feed-forward blocks read what attention reads, and each head of queries and keys is normed by weights of its own.

pub(super) use super::decoder::Model;
use super::keys::Keys;
use super::{FfnReads, HParams};
use crate::backend::RopeMode;
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.centered_norms();
    if !k.has_tensor(0, "ffn_norm.weight") {
        hp.ffn_reads = FfnReads::Same;
    }
    super::command_r::apart(k, hp);
    k.no_experts(hp)
}
