//! The largest logits, and a draw among them.

use super::{args, check, launch};
use crate::gpu::{Gpu, Pinned, Result, View};

/// The longest list.
pub const MAX_TOP: usize = 128;
/// Threads of the block.
const BLOCK: u32 = 1024;

/// A draw from the `top_k` largest logits, behind top-p and min-p.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// From 1 to [`MAX_TOP`].
    pub top_k: usize,
    /// Share of the probability that stays.
    pub top_p: f32,
    /// The least probability that stays, of the largest.
    pub min_p: f32,
    /// Temperature, above 0.
    pub temp: f32,
    /// Where the draw falls among what is left, the likeliest first: `0.0..1.0`.
    pub lot: f32,
}

/// Where draws leave their lists for the host.
pub struct Shortlist {
    /// `[1 + MAX_TOP]` u64
    out: Pinned,
}

impl Shortlist {
    /// An empty one.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self {
            out: gpu.pinned((1 + MAX_TOP) * 8)?,
        })
    }

    /// Draws one of `logits`, `[n_vocab]`, and leaves it in `next`, `[1]` u32, which stays as it is if [`Shortlist::drawn`] says nobody. The caller
    /// sees to it that this is done ([`Mark`](crate::Mark)) before it looks at the list.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn draw(
        &self,
        gpu: &Gpu,
        next: View,
        logits: View,
        n_vocab: usize,
        d: &Draw,
    ) -> Result<()> {
        check(logits, n_vocab);
        check(next, 1);
        assert!((1..=MAX_TOP).contains(&d.top_k) && d.temp > 0.0);
        let a = args::Draw {
            logits: logits.at,
            next: next.at,
            out: self.out.view().at,
            n_vocab: n_vocab as u32,
            top_k: d.top_k as u32,
            top_p: d.top_p,
            min_p: d.min_p,
            inv_temp: 1.0 / d.temp,
            lot: d.lot,
        };
        gpu.launch(launch([1, 1, 1], BLOCK, 0), &a)
    }

    /// The token that was drawn: none if no logit is a number, or if there is no list.
    pub fn drawn(&self) -> Option<u32> {
        Some(self.out.word(1)).filter(|&token| token != u32::MAX)
    }

    /// Tokens and logits, the largest first, lower tokens first among equals. There is no list if too many logits are too much alike.
    pub fn list(&self) -> Option<impl Iterator<Item = (u32, f32)>> {
        let n = self.out.word(0) as usize;
        let entry = |i| {
            let (low, high) = (self.out.word(2 + 2 * i), self.out.word(3 + 2 * i));
            // As in `common.cuh`: the order of whole numbers is that of the logits.
            let bits = match high & 1 << 31 {
                0 => !high,
                sign => high ^ sign,
            };
            (u32::MAX - low, f32::from_bits(bits))
        };
        (n <= MAX_TOP).then(|| (0..n).map(entry))
    }
}
