//! `k4`: keys of a page in 4 bits, a scale and a zero for each channel.
//!
//! A page is tiles of all its tokens and 32 channels, one after the other:
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `a` | of every channel 32 bits: four of each of tokens 0 to 7, the first in the lowest ones |
//! | 128..256 | `b` | the same of tokens 8 to 15 |
//! | 256..288 | `d` | scale of every channel, see [`scale`](super::scale) |
//! | 288..320 | `zero` | zero of every channel, in steps |
//!
//! 16 values of a channel in 10 bytes, 5 bits per value. `x = d * (q + zero)`.

use super::{PAGE, TILE, Tile, fit, scales};
use bytemuck::{Pod, Zeroable};

const TOP: u8 = 15;
/// Parts of a step that zeros are counted in.
const PARTS: u8 = 1;
/// Smaller scales that are tried; each is 6 to 12 % below the one before.
const TRIES: u8 = 2;

/// A tile of `k4`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct TileK4 {
    /// Quants of tokens 0 to 7; little-endian.
    pub a: [[u8; 4]; TILE],
    /// Quants of tokens 8 to 15; little-endian.
    pub b: [[u8; 4]; TILE],
    /// Scales.
    pub d: [u8; TILE],
    /// Zeros.
    pub zero: [i8; TILE],
}

impl TileK4 {
    /// Stores keys.
    pub fn encode(values: &Tile) -> Self {
        let mut tile = Self::zeroed();
        for c in 0..TILE {
            let (d, zero, q) = fit::<PAGE, TOP, PARTS, TRIES>(&values.each_ref().map(|row| row[c]));
            (tile.d[c], tile.zero[c]) = (d, zero);
            let word = |q: &[u8]| q.iter().rfold(0, |word, &q| word << 4 | u32::from(q));
            let (a, b) = q.split_at(PAGE / 2);
            (tile.a[c], tile.b[c]) = (word(a).to_le_bytes(), word(b).to_le_bytes());
        }
        tile
    }

    /// The scale and the zero of every channel, as `x = d * q + zero`.
    #[inline(always)]
    pub fn scales(&self) -> [[f32; TILE]; 2] {
        scales::<_, PARTS>(&self.d, &self.zero)
    }

    /// The keys.
    pub fn decode(&self) -> Tile {
        let [d, zero] = self.scales();
        let mut values = [[0.0; TILE]; PAGE];
        for c in 0..TILE {
            let words = [self.a[c], self.b[c]].map(u32::from_le_bytes);
            for (t, row) in values.iter_mut().enumerate() {
                let q = words[t / 8] >> (4 * (t % 8)) & 15;
                row[c] = q as f32 * d[c] + zero[c];
            }
        }
        values
    }
}
