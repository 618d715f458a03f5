//! DRY, "don't repeat yourself" (P. E. Weidmann 2024, text-generation-webui pull request 5677).
//!
//! If the text ends in a sequence that occurred before, the token that followed it then is penalised by
//! `multiplier * base^(length - allowed_length)`. Sequences do not reach across a *breaker*, by default line ends,
//! colons, quotes and asterisks, so that the fixed parts of lists and dialogues may repeat.
//!
//! Breakers are strings. They are looked for in the text of the tokens as they arrive, so a breaker may start in
//! the middle of one token and end in another.

use std::collections::VecDeque;

/// Breakers longer than this are cut, in bytes.
const MAX_BREAKER: usize = 40;

/// Parameters and state of the DRY penalty.
#[derive(Debug, Clone)]
pub(super) struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    window: usize,
    breakers: Vec<Breaker>,
    /// Whether the text of a token contains a whole breaker, [n_vocab].
    breaks: Vec<bool>,
    /// Text of all tokens and where each begins, [n_vocab + 1]; empty if every breaker is one byte long.
    text: Vec<u8>,
    text_start: Vec<u32>,
    /// Tokens since the end of the last breaker.
    since_break: usize,
    /// For each position of the reversed window: length of the suffix of the text that also ends there.
    matches: Vec<u32>,
    /// Longest repetition that each token would continue, [n_vocab]; zero between calls.
    longest: Vec<u32>,
}

/// A string being searched for, with its Knuth–Morris–Pratt failure table.
#[derive(Debug, Clone)]
struct Breaker {
    bytes: Vec<u8>,
    fail: Vec<usize>,
    state: usize,
}

impl Breaker {
    fn new(text: &str) -> Option<Self> {
        let bytes = text.as_bytes()[..text.len().min(MAX_BREAKER)].to_vec();
        if bytes.is_empty() {
            return None;
        }
        let mut fail = vec![0; bytes.len()];
        let mut k = 0;
        for i in 1..bytes.len() {
            while k > 0 && bytes[k] != bytes[i] {
                k = fail[k - 1];
            }
            if bytes[k] == bytes[i] {
                k += 1;
            }
            fail[i] = k;
        }
        Some(Self {
            bytes,
            fail,
            state: 0,
        })
    }

    /// Advances over `text`; true if the breaker was completed in it.
    fn feed(&mut self, text: &[u8]) -> bool {
        let mut found = false;
        for &b in text {
            while self.state > 0 && self.bytes[self.state] != b {
                self.state = self.fail[self.state - 1];
            }
            if self.bytes[self.state] == b {
                self.state += 1;
            }
            if self.state == self.bytes.len() {
                found = true;
                self.state = self.fail[self.state - 1];
            }
        }
        found
    }
}

impl Dry {
    /// `window` in tokens, `usize::MAX` for everything. `token_text` gives the bytes that a token stands for.
    pub(super) fn new(
        (multiplier, base): (f32, f32),
        allowed_length: usize,
        window: usize,
        breakers: &[String],
        n_vocab: usize,
        token_text: &dyn Fn(u32) -> Vec<u8>,
    ) -> Self {
        let mut breakers: Vec<Breaker> = breakers.iter().filter_map(|b| Breaker::new(b)).collect();
        let keep_text = breakers.iter().any(|b| b.bytes.len() > 1);
        let (mut breaks, mut text, mut text_start) = (vec![false; n_vocab], Vec::new(), Vec::new());
        if !breakers.is_empty() {
            for id in 0..n_vocab as u32 {
                let t = token_text(id);
                for b in &mut breakers {
                    b.state = 0;
                    breaks[id as usize] |= b.feed(&t);
                    b.state = 0;
                }
                if keep_text {
                    text_start.push(text.len() as u32);
                    text.extend_from_slice(&t);
                }
            }
            text_start.push(text.len() as u32);
        }
        Self {
            multiplier,
            base,
            allowed_length,
            window,
            breakers,
            breaks,
            text,
            text_start: if keep_text { text_start } else { Vec::new() },
            since_break: 0,
            matches: Vec::with_capacity(window.min(8192)),
            longest: vec![0; n_vocab],
        }
    }

    pub(super) fn accept(&mut self, token: u32) {
        let broken = if self.text_start.is_empty() {
            self.breaks[token as usize]
        } else {
            let i = token as usize;
            let text = &self.text[self.text_start[i] as usize..self.text_start[i + 1] as usize];
            self.breakers
                .iter_mut()
                .fold(false, |any, b| b.feed(text) | any)
        };
        self.since_break = if broken {
            0
        } else {
            self.since_break.saturating_add(1)
        };
    }

    pub(super) fn clear(&mut self) {
        self.since_break = 0;
        self.breakers.iter_mut().for_each(|b| b.state = 0);
    }

    pub(super) fn apply(&mut self, history: &VecDeque<u32>, logits: &mut [f32]) {
        let n = history.len().min(self.window);
        let longest_match = n.min(self.since_break);
        if n <= self.allowed_length || longest_match < self.allowed_length {
            return;
        }
        // at(0) is the newest token.
        let newest = history.len() - 1;
        let at = |i: usize| history[newest - i];

        // Z-function of the reversed window (Gusfield 1997, section 1.3): matches[k] is how many of the newest
        // tokens are also the ones that end k tokens earlier. O(n).
        self.matches.clear();
        self.matches.resize(n, 0);
        let (mut left, mut right) = (0, 0); // the match that reaches farthest covers left..right
        for k in 1..n {
            let mut len = 0;
            if k < right {
                len = (self.matches[k - left] as usize).min(right - k);
            }
            while k + len < n && at(len) == at(k + len) {
                len += 1;
            }
            self.matches[k] = len as u32;
            if k + len > right {
                (left, right) = (k, k + len);
            }
        }

        for k in 1..n {
            let len = (self.matches[k] as usize).min(longest_match);
            if len >= self.allowed_length {
                let next = &mut self.longest[at(k - 1) as usize];
                // Stored plus one: an allowed length of 0 makes a repetition of length 0 count too.
                *next = (*next).max(len as u32 + 1);
            }
        }
        // Beyond this exponent an f32 would overflow.
        let max_exponent = if self.base > 1.000_001 {
            (f32::MAX.ln() / self.base.ln()) as usize
        } else {
            usize::MAX
        };
        for k in 1..n {
            let token = at(k - 1) as usize;
            let stored = std::mem::take(&mut self.longest[token]);
            if stored > 0 && !self.breaks[token] && logits[token] != f32::NEG_INFINITY {
                let exponent = (stored as usize - 1 - self.allowed_length).min(max_exponent);
                let penalty =
                    self.multiplier * self.base.powi(exponent.min(i32::MAX as usize) as i32);
                logits[token] = (logits[token] - penalty).min(f32::MAX);
            }
        }
    }
}
