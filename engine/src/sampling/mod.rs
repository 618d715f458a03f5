//! From logits to the next token.
//!
//! One [`Sampler`] belongs to one sequence. It remembers the tokens it was told about ([`Sampler::accept`]), owns
//! the random stream, and turns one row of logits into one token ([`Sampler::sample`]):
//!
//! ```text
//! logits ─ logit bias ─ penalties ─ DRY ─ top-n-sigma ─ top-k ─ typical ─ top-p ─ min-p ─ XTC ─ temperature ─ draw
//! ```
//!
//! The order, the defaults and the arithmetic of each stage are llama.cpp's, because its numbers are in people's
//! fingers. What differs is the work: a row has up to 260,000 entries and only a handful can be drawn, so nothing
//! here sorts the row. Top-k is one scan against a rising threshold; top-p and typical find their cut by weighted
//! quickselect; min-p and XTC need only a maximum and a minimum. After construction nothing is allocated, except
//! that an unlimited penalty window grows with the text.
//!
//! The same parameters, seed and logits give the same tokens on every machine: the generator is PCG32, and `exp`
//! is computed here instead of by the platform's libm (see `math`).

mod choice;
mod dry;
mod filter;
mod history;
mod math;
mod mirostat;
mod params;
mod sampler;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub use choice::{Choice, Draw, MAX_TOP};
pub use filter::top;
pub use math::{best, log_prob, top_log_probs};
pub use params::{ParamSource, ParamSources, SamplerOverrides, SamplerParams};
pub use sampler::{Sampled, Sampler, random_seed};

/// What can go wrong while setting up or using a sampler.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A parameter lies outside what it may be.
    #[error("sampling parameter {name} is {found}, expected {expected}")]
    BadValue {
        /// Name of the parameter, as in [`SamplerParams`].
        name: &'static str,
        /// The value, as text.
        found: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// [`SamplerOverrides::set`] was given a name that no parameter has.
    #[error("unknown sampling parameter {0:?}")]
    UnknownName(String),
    /// The row of logits is not as long as the vocabulary.
    #[error("got {found} logits, expected {expected} (the size of the vocabulary)")]
    WrongLength {
        /// Entries in the row.
        found: usize,
        /// Size of the vocabulary.
        expected: usize,
    },
    /// No token can be drawn: every logit is NaN or minus infinity.
    #[error("no token can be sampled: all {0} logits are NaN or -inf")]
    NoCandidate(usize),
}

/// One token that may still be drawn.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// Adjusted logit; finite.
    pub logit: f32,
    /// Probability or weight; only valid right after the stage that fills it in.
    p: f32,
}

impl Candidate {
    /// A token with its logit, which is a number; plus infinity becomes the largest finite one, minus zero becomes zero.
    pub fn new(id: u32, logit: f32) -> Self {
        Self {
            id,
            logit: logit.min(f32::MAX) + 0.0,
            p: 0.0,
        }
    }
}

/// The order "most probable first"; equal logits in order of id, so that every result is unique.
fn best_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl From<SamplingError> for crate::error::Error {
    fn from(e: SamplingError) -> Self {
        match e {
            SamplingError::BadValue { .. } | SamplingError::UnknownName(_) => Self::usage(e),
            SamplingError::WrongLength { .. } | SamplingError::NoCandidate(_) => Self::runtime(e),
        }
    }
}
