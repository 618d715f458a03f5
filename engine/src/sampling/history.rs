//! The tokens a sampler has been told about, and the penalties for repeating them.

use std::collections::VecDeque;

/// How much is reserved up front for a window without a limit, in tokens.
const RESERVE: usize = 8192;

/// Recent tokens, newest last, with a count for each that lies in the penalty window.
#[derive(Debug, Clone)]
pub(super) struct History {
    tokens: VecDeque<u32>,
    /// Longest window that anyone looks at.
    keep: usize,
    /// Length of the penalty window.
    window: usize,
    /// How often each token occurs in the penalty window; empty if nobody asks.
    counts: Vec<u32>,
}

/// Set in a count while `penalize` has already dealt with the token.
const DONE: u32 = 1 << 31;

impl History {
    /// `window` is the penalty window and `other` the longest other one, in tokens; `usize::MAX` is everything.
    pub(super) fn new(n_vocab: usize, window: usize, other: usize) -> Self {
        let keep = window.max(other);
        Self {
            tokens: VecDeque::with_capacity(keep.min(RESERVE)),
            keep,
            window,
            counts: if window > 0 {
                vec![0; n_vocab]
            } else {
                Vec::new()
            },
        }
    }

    pub(super) fn push(&mut self, token: u32) {
        if self.keep == 0 {
            return;
        }
        if self.window > 0 {
            if self.tokens.len() >= self.window {
                let leaving = self.tokens[self.tokens.len() - self.window];
                self.counts[leaving as usize] -= 1;
            }
            self.counts[token as usize] += 1;
        }
        if self.tokens.len() == self.keep {
            self.tokens.pop_front();
        }
        self.tokens.push_back(token);
    }

    pub(super) fn clear(&mut self) {
        self.tokens.clear();
        self.counts.fill(0);
    }

    pub(super) fn tokens(&self) -> &VecDeque<u32> {
        &self.tokens
    }

    /// Repetition penalty (Keskar et al. 2019, arXiv 1909.05858, with the usual correction that a negative logit is
    /// multiplied instead of divided), frequency and presence penalty (as OpenAI's API defines them).
    pub(super) fn penalize(
        &mut self,
        logits: &mut [f32],
        repeat: f32,
        frequency: f32,
        presence: f32,
    ) {
        if self.window == 0 || (repeat == 1.0 && frequency == 0.0 && presence == 0.0) {
            return;
        }
        let start = self.tokens.len().saturating_sub(self.window);
        for &token in self.tokens.range(start..) {
            let count = &mut self.counts[token as usize];
            if *count & DONE != 0 {
                continue;
            }
            let x = &mut logits[token as usize];
            if *x != f32::NEG_INFINITY {
                *x = if *x <= 0.0 {
                    *x * repeat
                } else {
                    (*x / repeat).min(f32::MAX)
                };
                *x = (*x - (*count as f32 * frequency + presence)).min(f32::MAX);
            }
            *count |= DONE;
        }
        for &token in self.tokens.range(start..) {
            self.counts[token as usize] &= !DONE;
        }
    }
}
