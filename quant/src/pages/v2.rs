//! `v2`: values of a page in 2 bits, a scale and a zero for 32 of them.
//!
//! A page is tiles of all its tokens and 32 channels, one after the other:
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `qs` | of 4 tokens each, the first in the lowest bits: the two bits of every channel |
//! | 128..144 | `d` | scale of every token, see [`scale`](super::scale) |
//! | 144..160 | `zero` | zero of every token, in eighths of a step |
//!
//! 32 values of a token in 10 bytes, 2.5 bits per value. `x = d / 8 * (8 * q + zero)`.

use super::{PAGE, TILE, Tile, fit, scale};
use bytemuck::{Pod, Zeroable};

const TOP: u8 = 3;
/// Parts of a step that zeros are counted in.
const PARTS: u8 = 8;
/// Smaller scales that are tried; each is 6 to 12 % below the one before.
const TRIES: u8 = 5;

/// A tile of `v2`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct TileV2 {
    /// Quants.
    pub qs: [[u8; TILE]; PAGE / 4],
    /// Scales.
    pub d: [u8; PAGE],
    /// Zeros.
    pub zero: [i8; PAGE],
}

impl TileV2 {
    /// Stores values.
    pub fn encode(values: &Tile) -> Self {
        let mut tile = Self::zeroed();
        for (t, row) in values.iter().enumerate() {
            let (d, zero, quants) = fit::<TILE, TOP, PARTS, TRIES>(row);
            (tile.d[t], tile.zero[t]) = (d, zero);
            for (qs, q) in tile.qs[t / 4].iter_mut().zip(quants) {
                *qs |= q << (2 * (t % 4));
            }
        }
        tile
    }

    /// Reads the values to rows of `to`, `[PAGE, dim]`, from channel `first` on.
    #[inline(always)]
    pub fn decode(&self, to: &mut [f32], dim: usize, first: usize) {
        let d = self.d.map(scale);
        for (g, qs) in self.qs.iter().enumerate() {
            for t in 0..4 {
                let d = d[4 * g + t];
                let zero = f32::from(self.zero[4 * g + t]) * (d / f32::from(PARTS));
                let row = &mut to[(4 * g + t) * dim + first..][..TILE];
                for c in 0..TILE {
                    row[c] = f32::from(qs[c] >> (2 * t) & 3) * d + zero;
                }
            }
        }
    }
}
