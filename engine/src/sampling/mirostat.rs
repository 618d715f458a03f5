//! Mirostat: truncation under feedback, so that the observed surprise stays near a target (Basu et al. 2020,
//! arXiv 2007.14966; version 2 is the authors' simplification without the estimate of the Zipf exponent).

use super::{Candidate, best_first, math};

/// Candidates from which version 1 estimates the exponent of Zipf's law.
const M: usize = 100;

/// State of the controller.
#[derive(Debug, Clone)]
pub(super) struct Mirostat {
    version: u32,
    tau: f32,
    eta: f32,
    /// Largest surprise allowed at present, in bits.
    mu: f32,
}

impl Mirostat {
    pub(super) fn new(version: u32, tau: f32, eta: f32) -> Self {
        Self {
            version,
            tau,
            eta,
            mu: 2.0 * tau,
        }
    }

    pub(super) fn reset(&mut self) {
        self.mu = 2.0 * self.tau;
    }

    /// Shortens the candidates; temperature has been applied to their logits.
    pub(super) fn truncate(&self, cands: &mut Vec<Candidate>, n_vocab: usize) {
        math::softmax(cands);
        if self.version == 1 {
            let k = self.k(cands, n_vocab).min(cands.len());
            if k < cands.len() {
                cands.select_nth_unstable_by(k - 1, best_first);
                cands.truncate(k);
            }
        } else {
            let best = cands.iter().min_by(|a, b| best_first(a, b)).copied();
            cands.retain(|c| -c.p.log2() <= self.mu);
            if let (true, Some(best)) = (cands.is_empty(), best) {
                cands.push(best);
            }
        }
    }

    /// Feeds back the probability, after truncation, of the token that was drawn.
    pub(super) fn observe(&mut self, p: f32) {
        let surprise = -p.log2();
        if surprise.is_finite() {
            self.mu -= self.eta * (surprise - self.tau);
        }
    }

    /// Equations 5 and 12 of the paper: the exponent by least squares over the best `M`, then k for the target.
    fn k(&self, cands: &mut [Candidate], n_vocab: usize) -> usize {
        let m = M.min(cands.len());
        if m < cands.len() {
            cands.select_nth_unstable_by(m - 1, best_first);
        }
        cands[..m].sort_unstable_by(best_first);
        let (mut sum_tb, mut sum_tt) = (0.0_f32, 0.0_f32);
        for (i, pair) in cands[..m].windows(2).enumerate() {
            let t = ((i + 2) as f32 / (i + 1) as f32).ln();
            let b = (pair[0].p / pair[1].p).ln();
            sum_tb += t * b;
            sum_tt += t * t;
        }
        let s = sum_tb / sum_tt;
        let epsilon = s - 1.0;
        let k =
            ((epsilon * self.mu.exp2()) / (1.0 - (n_vocab as f32).powf(-epsilon))).powf(1.0 / s);
        // NaN becomes 0, infinity the largest integer.
        (k as usize).max(1)
    }
}
