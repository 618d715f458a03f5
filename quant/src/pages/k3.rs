//! `k3`: keys of a page in 3 bits, a scale and a zero for each channel.
//!
//! A page is tiles of all its tokens and 32 channels, one after the other:
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `low` | of 4 tokens each, the first in the lowest bits: the lower two bits of every channel |
//! | 128..192 | `high` | of 8 tokens each: the upper bit of every channel |
//! | 192..224 | `d` | scale of every channel, see [`scale`](super::scale) |
//! | 224..256 | `zero` | zero of every channel, in halves of a step |
//!
//! 16 values of a channel in 8 bytes, 4 bits per value. `x = d / 2 * (2 * q + zero)`.

use super::{PAGE, TILE, Tile, fit, scale};
use bytemuck::{Pod, Zeroable};

const TOP: u8 = 7;
/// Parts of a step that zeros are counted in.
const PARTS: u8 = 2;
/// Smaller scales that are tried; each is 6 to 12 % below the one before.
const TRIES: u8 = 2;

/// A tile of `k3`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct TileK3 {
    /// Lower bits.
    pub low: [[u8; TILE]; PAGE / 4],
    /// Upper bits.
    pub high: [[u8; TILE]; PAGE / 8],
    /// Scales.
    pub d: [u8; TILE],
    /// Zeros.
    pub zero: [i8; TILE],
}

impl TileK3 {
    /// Stores keys.
    pub fn encode(values: &Tile) -> Self {
        let mut tile = Self::zeroed();
        for c in 0..TILE {
            let (d, zero, q) = fit::<PAGE, TOP, PARTS, TRIES>(&values.each_ref().map(|row| row[c]));
            (tile.d[c], tile.zero[c]) = (d, zero);
            for (t, q) in q.into_iter().enumerate() {
                tile.low[t / 4][c] |= (q & 3) << (2 * (t % 4));
                tile.high[t / 8][c] |= (q >> 2) << (t % 8);
            }
        }
        tile
    }

    /// Reads the keys to rows of `to`, `[PAGE, dim]`, from channel `first` on.
    #[inline(always)]
    pub fn decode(&self, to: &mut [f32], dim: usize, first: usize) {
        let d = self.d.map(scale);
        let mut zero = [0.0; TILE];
        for c in 0..TILE {
            zero[c] = f32::from(self.zero[c]) * (d[c] / f32::from(PARTS));
        }
        for g in 0..PAGE / 4 {
            let (low, high) = (&self.low[g], self.high[g / 2].map(|h| h >> (g % 2 * 4)));
            for t in 0..4 {
                let row = &mut to[(4 * g + t) * dim + first..][..TILE];
                for c in 0..TILE {
                    let q = low[c] >> (2 * t) & 3 | (high[c] >> t & 1) << 2;
                    row[c] = f32::from(q) * d[c] + zero[c];
                }
            }
        }
    }
}
