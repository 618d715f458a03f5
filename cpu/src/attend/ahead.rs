//! Asking the pool for what comes next.

use crate::simd::Simd;

/// What is to be read next. It is asked for a little at a time: what is in use comes through the same few buffers from the second-level
/// cache, and would wait behind a burst. Loops over vectors of eight are too short to do it in each turn.
pub(super) struct Ahead<'a> {
    rest: &'a [u8],
    /// Cache lines of a step.
    lines: usize,
}

impl<'a> Ahead<'a> {
    /// All of `next` in so many steps.
    #[inline(always)]
    pub(super) fn new(next: &'a [u8], steps: usize) -> Self {
        Self {
            rest: next,
            lines: (next.len() / 64).div_ceil(steps),
        }
    }

    /// Begins to read another part.
    #[inline(always)]
    pub(super) fn step<S: Simd>(&mut self) {
        for _ in 0..self.lines {
            if let Some((line, rest)) = self.rest.split_at_checked(64) {
                S::prefetch(line.as_ptr());
                self.rest = rest;
            }
        }
    }
}
