//! How the next token will be chosen, said before its logits are known, so that a device can work ahead of the host.

/// The longest list of candidates that stands for all logits.
pub const MAX_TOP: usize = 128;

/// How the token behind a step will be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Choice {
    /// In a way that wants all logits, or is not known yet.
    #[default]
    Open,
    /// It is the token with the largest logit ([`best`](super::best)).
    Best,
    /// It is drawn from a few of the largest.
    Draw(Draw),
}

/// A draw from the `top_k` largest logits, behind top-p and min-p. A device that makes it itself makes a guess: rounding may differ. What counts is
/// [`Sampler::sample_top`](super::Sampler::sample_top) over the same candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Candidates, from 1 to [`MAX_TOP`].
    pub top_k: usize,
    /// The likeliest of them that have this share of their probability stay.
    pub top_p: f32,
    /// Candidates less likely than this times the likeliest go.
    pub min_p: f32,
    /// Temperature, above 0.
    pub temp: f32,
    /// Where the draw falls among what is left, the likeliest first: `0.0..1.0`.
    pub lot: f64,
}
