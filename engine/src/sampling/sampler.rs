//! The chain of stages.

use std::hash::{BuildHasher, Hasher};

use rand_core::Rng;
use rand_pcg::Pcg32;

use super::dry::Dry;
use super::filter::{self, Ranked};
use super::history::History;
use super::mirostat::Mirostat;
use super::{Candidate, Choice, Draw, MAX_TOP, SamplerParams, SamplingError, best_first, math};

/// PCG32 has 2^63 streams; any fixed one will do.
const STREAM: u64 = 0x006c_656d_6d61;

/// Up to this many candidates are put in order before the draw; above it they are drawn from in order of id.
const SORT_UP_TO: usize = 4096;

/// A token that was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability in the distribution it was drawn from, that is after penalties,
    /// truncation and temperature; 0 when greedy. For the model's own opinion see [`log_prob`](super::log_prob).
    pub logprob: f32,
}

/// Draws tokens for one sequence. See the [module](super) for the stages.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplerParams,
    n_vocab: usize,
    seed: u64,
    rng: Pcg32,
    history: History,
    dry: Option<Dry>,
    mirostat: Option<Mirostat>,
    /// The row being worked on, [n_vocab].
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
    ranked: Vec<Ranked>,
}

impl Sampler {
    /// A sampler for rows of `n_vocab` logits.
    ///
    /// `token_text` gives the bytes a token stands for; it is called only here, and only if DRY is on, to find the
    /// sequence breakers.
    ///
    /// # Errors
    /// [`SamplingError::BadValue`] if a parameter makes no sense.
    pub fn new(
        params: SamplerParams,
        n_vocab: usize,
        token_text: impl Fn(u32) -> Vec<u8>,
    ) -> Result<Self, SamplingError> {
        params.validate()?;
        // Negative is everything.
        let window = |n: i32| usize::try_from(n).unwrap_or(usize::MAX);
        let mirostat = (params.mirostat > 0)
            .then(|| Mirostat::new(params.mirostat, params.mirostat_tau, params.mirostat_eta));
        let dry_on = params.dry_multiplier != 0.0
            && params.dry_base >= 1.0
            && params.dry_penalty_last_n != 0
            && mirostat.is_none();
        let dry_window = if dry_on {
            window(params.dry_penalty_last_n)
        } else {
            0
        };
        let penalties_on = (
            params.repeat_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        ) != (1.0, 0.0, 0.0)
            && mirostat.is_none();
        let dry = dry_on.then(|| {
            Dry::new(
                (params.dry_multiplier, params.dry_base),
                params.dry_allowed_length as usize,
                dry_window,
                &params.dry_sequence_breakers,
                n_vocab,
                &token_text,
            )
        });
        let seed = params.seed.unwrap_or_else(random_seed);
        Ok(Self {
            n_vocab,
            seed,
            rng: Pcg32::new(seed, STREAM),
            history: History::new(
                n_vocab,
                if penalties_on {
                    window(params.repeat_last_n)
                } else {
                    0
                },
                dry_window,
            ),
            dry,
            mirostat,
            logits: vec![0.0; n_vocab],
            // The scan for the top k lets the list run over by up to one block and its own length.
            candidates: Vec::with_capacity(n_vocab + 64),
            ranked: Vec::with_capacity(n_vocab),
            params,
        })
    }

    /// The parameters it was made with.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// How the next token will be chosen, if that does not hang on the text.
    pub fn choice(&self) -> Choice {
        let p = &self.params;
        let off = (1.0, 0.0, 0.0);
        let plain = p.logit_bias.is_empty()
            && (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) == off
            && self.dry.is_none()
            && self.mirostat.is_none()
            && p.top_n_sigma <= 0.0;
        if !plain {
            return Choice::Open;
        }
        if p.temp <= 0.0 {
            return Choice::Best;
        }
        let only = p.typical >= 1.0 && p.xtc_probability <= 0.0 && p.dynatemp_range <= 0.0;
        match self.top_k() {
            Some(top_k) if only && top_k <= MAX_TOP => Choice::Draw(Draw {
                top_k,
                top_p: p.top_p,
                min_p: p.min_p,
                temp: p.temp,
                lot: uniform(&mut self.rng.clone()),
            }),
            _ => Choice::Open,
        }
    }

    /// The candidates that top-k leaves; `None` if that is all of them.
    fn top_k(&self) -> Option<usize> {
        let k = usize::try_from(self.params.top_k).ok().filter(|&k| k > 0);
        let k = k.map(|k| k.max(self.params.min_keep));
        k.filter(|&k| k < self.n_vocab)
    }

    /// The seed in use, also when none was given.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Tells the sampler that `token` is now part of the text, prompt or reply. Ids outside the vocabulary are
    /// ignored.
    pub fn accept(&mut self, token: u32) {
        if (token as usize) < self.n_vocab {
            self.history.push(token);
            if let Some(dry) = &mut self.dry {
                dry.accept(token);
            }
        }
    }

    /// Forgets the text and starts the random stream again.
    pub fn reset(&mut self) {
        self.history.clear();
        if let Some(dry) = &mut self.dry {
            dry.clear();
        }
        if let Some(mirostat) = &mut self.mirostat {
            mirostat.reset();
        }
        self.rng = Pcg32::new(self.seed, STREAM);
    }

    /// Draws a token from `logits`, shape `[n_vocab]`. NaN counts as minus infinity. Does not call
    /// [`accept`](Self::accept).
    ///
    /// # Errors
    /// [`SamplingError::WrongLength`], and [`SamplingError::NoCandidate`] if no logit is a number.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, SamplingError> {
        self.sample_masked(logits, |_| {})
    }

    /// As [`sample`](Self::sample), with a chance to forbid tokens (a grammar does): `mask` may set entries of the
    /// sampler's own copy of the row to minus infinity, before any other stage.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn sample_masked(
        &mut self,
        logits: &[f32],
        mask: impl FnOnce(&mut [f32]),
    ) -> Result<Sampled, SamplingError> {
        if logits.len() != self.n_vocab {
            return Err(SamplingError::WrongLength {
                found: logits.len(),
                expected: self.n_vocab,
            });
        }
        math::copy_sane(&mut self.logits, logits);
        mask(&mut self.logits);
        self.adjust();
        if self.params.temp <= 0.0 {
            return self.greedy();
        }
        if self.mirostat.is_some() {
            return self.sample_mirostat();
        }
        self.truncate()?;
        let temp = self.temperature();
        if temp <= 0.0 {
            return self.greedy();
        }
        self.draw(temp)
    }

    /// As [`sample`](Self::sample) where [`choice`](Self::choice) is a draw: `fill` puts the `top_k` candidates with the largest logits into an
    /// empty list, best first ([`top`](super::top)).
    ///
    /// # Errors
    /// [`SamplingError::NoCandidate`] if there is none.
    pub fn sample_top(
        &mut self,
        fill: impl FnOnce(&mut Vec<Candidate>),
    ) -> Result<Sampled, SamplingError> {
        self.candidates.clear();
        fill(&mut self.candidates);
        self.shorten(false)?;
        self.draw(self.params.temp)
    }

    /// Stages that change logits.
    fn adjust(&mut self) {
        for &(id, bias) in &self.params.logit_bias {
            if let Some(x) = self.logits.get_mut(id as usize) {
                // Forbidden stays forbidden, and -inf + inf would be NaN.
                *x = if *x == f32::NEG_INFINITY {
                    *x
                } else {
                    (*x + bias).min(f32::MAX)
                };
            }
        }
        if self.mirostat.is_some() {
            return;
        }
        let p = &self.params;
        self.history.penalize(
            &mut self.logits,
            p.repeat_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        );
        if let Some(dry) = &mut self.dry {
            dry.apply(self.history.tokens(), &mut self.logits);
        }
        filter::top_n_sigma(&mut self.logits, p.top_n_sigma);
    }

    fn greedy(&self) -> Result<Sampled, SamplingError> {
        let id = math::argmax(&self.logits).ok_or(SamplingError::NoCandidate(self.n_vocab))?;
        Ok(Sampled { id, logprob: 0.0 })
    }

    /// Stages that make a list of candidates and shorten it.
    fn truncate(&mut self) -> Result<(), SamplingError> {
        let (top_k, candidates) = (self.top_k(), &mut self.candidates);
        let mut have_p = false;
        match top_k {
            Some(k) if k <= SORT_UP_TO => filter::top(&self.logits, k, candidates),
            Some(k) => filter::top_k(&self.logits, k, candidates),
            None => have_p = gather(&self.params, &self.logits, candidates),
        }
        self.shorten(have_p)
    }

    /// Stages that shorten the list of candidates; `have_p`: their probabilities are there.
    fn shorten(&mut self, have_p: bool) -> Result<(), SamplingError> {
        let Self {
            params: p,
            candidates,
            ranked,
            rng,
            n_vocab,
            ..
        } = self;
        if candidates.is_empty() {
            return Err(SamplingError::NoCandidate(*n_vocab));
        }
        filter::typical(candidates, ranked, p.typical, p.min_keep);
        if p.top_p < 1.0 {
            if !have_p {
                math::softmax(candidates);
            }
            filter::top_p(candidates, ranked, p.top_p, p.min_keep);
        }
        filter::min_p(candidates, ranked, p.min_p, p.min_keep);
        // The lot is drawn only when XTC is on, so that turning it off gives the stream without it.
        if p.xtc_probability > 0.0
            && candidates.len() >= 2
            && uniform(rng) <= f64::from(p.xtc_probability)
        {
            filter::xtc(candidates, p.xtc_threshold, p.min_keep);
        }
        Ok(())
    }

    /// The temperature for the present candidates. Dynamic temperature: Zhu et al. 2023 (arXiv 2309.02772) in the
    /// form of koboldcpp, which maps the normalised entropy to a range.
    fn temperature(&mut self) -> f32 {
        let p = &self.params;
        if p.dynatemp_range <= 0.0 || self.candidates.len() <= 1 {
            return p.temp;
        }
        math::softmax(&mut self.candidates);
        let entropy: f64 = self
            .candidates
            .iter()
            .filter(|c| c.p > 0.0)
            .map(|c| -f64::from(c.p) * f64::from(c.p).ln())
            .sum();
        let normalized = (entropy / (self.candidates.len() as f64).ln()) as f32;
        let (low, high) = (
            (p.temp - p.dynatemp_range).max(0.0),
            p.temp + p.dynatemp_range,
        );
        low + (high - low) * normalized.powf(p.dynatemp_exponent)
    }

    fn sample_mirostat(&mut self) -> Result<Sampled, SamplingError> {
        filter::at_least(&self.logits, f32::MIN, &mut self.candidates);
        if self.candidates.is_empty() {
            return Err(SamplingError::NoCandidate(self.n_vocab));
        }
        let max = math::max(&self.logits);
        for c in &mut self.candidates {
            // The difference first: a quotient alone may overflow.
            c.logit = ((c.logit - max) / self.params.temp).max(f32::MIN);
        }
        if let Some(m) = &self.mirostat {
            m.truncate(&mut self.candidates, self.n_vocab);
        }
        let sampled = self.draw(1.0)?;
        if let Some(m) = &mut self.mirostat {
            m.observe(sampled.logprob.exp());
        }
        Ok(sampled)
    }

    /// Puts the candidates in their final order and fills in their weights at `temp`; returns the sum of the weights.
    fn weigh(&mut self, temp: f32) -> f64 {
        let cands = &mut self.candidates;
        if cands.len() <= SORT_UP_TO {
            cands.sort_unstable_by(best_first);
        } else {
            cands.sort_unstable_by_key(|c| c.id);
        }
        let max = cands.iter().fold(
            f32::NEG_INFINITY,
            |m, c| if c.logit > m { c.logit } else { m },
        );
        let mut sum = 0.0_f64;
        for c in cands.iter_mut() {
            c.p = math::exp_nonpositive((c.logit - max) / temp);
            sum += f64::from(c.p);
        }
        sum
    }

    fn draw(&mut self, temp: f32) -> Result<Sampled, SamplingError> {
        let sum = self.weigh(temp);
        let target = uniform(&mut self.rng) * sum;
        let mut below = 0.0_f64;
        let mut chosen = None;
        for c in self.candidates.iter().filter(|c| c.p > 0.0) {
            chosen = Some(c);
            below += f64::from(c.p);
            if below > target {
                break;
            }
        }
        let c = chosen.ok_or(SamplingError::NoCandidate(self.n_vocab))?;
        Ok(Sampled {
            id: c.id,
            logprob: (f64::from(c.p) / sum).ln() as f32,
        })
    }

    /// The distribution that `sample` would draw from: (id, probability), most probable first.
    #[cfg(test)]
    pub(super) fn distribution(
        &mut self,
        logits: &[f32],
    ) -> Result<Vec<(u32, f64)>, SamplingError> {
        math::copy_sane(&mut self.logits, logits);
        self.adjust();
        if self.params.temp <= 0.0 {
            return self.greedy().map(|s| vec![(s.id, 1.0)]);
        }
        self.truncate()?;
        let temp = self.temperature();
        let sum = self.weigh(temp);
        self.candidates.sort_unstable_by(best_first);
        Ok(self
            .candidates
            .iter()
            .map(|c| (c.id, f64::from(c.p) / sum))
            .collect())
    }
}

/// Candidates without top-k, in order of id: only those that the following stages can possibly keep, found by one
/// comparison each. True if `p` has been filled in with the softmax over the whole row.
fn gather(p: &SamplerParams, logits: &[f32], out: &mut Vec<Candidate>) -> bool {
    let max = math::max(logits);
    if p.typical < 1.0 || max == f32::NEG_INFINITY {
        filter::at_least(logits, f32::MIN, out);
        return false;
    }
    if p.top_p < 1.0 {
        let sum = math::sum_exp(logits, max);
        // All tokens below (1 - p) / n together have less than 1 - p; half of that leaves room for rounding.
        let floor = (0.5 * (1.0 - f64::from(p.top_p)) / logits.len() as f64 * sum).ln() as f32;
        filter::at_least(logits, max + floor, out);
        if out.len() < p.min_keep {
            filter::at_least(logits, f32::MIN, out);
        }
        for c in out.iter_mut() {
            c.p = (f64::from(math::exp_nonpositive(c.logit - max)) / sum) as f32;
        }
        return true;
    }
    if p.min_p > 0.0 {
        filter::at_least(logits, max + p.min_p.min(1.0).ln(), out);
        if out.len() >= p.min_keep {
            return false;
        }
    }
    filter::at_least(logits, f32::MIN, out);
    false
}

/// Uniform in [0, 1), 53 bits.
fn uniform(rng: &mut Pcg32) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}

/// A seed from the operating system's entropy. Below 2^32, so that people can read it back and JSON keeps it.
pub fn random_seed() -> u64 {
    // The standard library keys its hash maps from the operating system and offers no other way to its entropy.
    let key = std::hash::RandomState::new();
    let mut hasher = key.build_hasher();
    hasher.write_u64(
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64),
    );
    hasher.finish() >> 32
}
