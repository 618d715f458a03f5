//! `v2`: values of a page in 2 bits, a scale and a zero for 32 of them.
//!
//! A page is tiles of all its tokens and 32 channels, one after the other:
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `qs` | of every channel 32 bits: two of each token, the first in the lowest ones |
//! | 128..144 | `d` | scale of every token, see [`scale`](super::scale) |
//! | 144..160 | `zero` | zero of every token, in eighths of a step |
//!
//! 32 values of a token in 10 bytes, 2.5 bits per value. `x = d / 8 * (8 * q + zero)`.

use super::{PAGE, TILE, Tile, fit, scales};
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
    /// Quants; little-endian.
    pub qs: [[u8; 4]; TILE],
    /// Scales.
    pub d: [u8; PAGE],
    /// Zeros.
    pub zero: [i8; PAGE],
}

impl TileV2 {
    /// Stores values.
    pub fn encode(values: &Tile) -> Self {
        let mut tile = Self::zeroed();
        let mut bits = [0u32; TILE];
        for (t, row) in values.iter().enumerate() {
            let (d, zero, quants) = fit::<TILE, TOP, PARTS, TRIES>(row);
            (tile.d[t], tile.zero[t]) = (d, zero);
            for (bits, q) in bits.iter_mut().zip(quants) {
                *bits |= u32::from(q) << (2 * t);
            }
        }
        tile.qs = bits.map(u32::to_le_bytes);
        tile
    }

    /// The scale and the zero of every token, as `x = d * q + zero`.
    #[inline(always)]
    pub fn scales(&self) -> [[f32; PAGE]; 2] {
        scales::<_, PARTS>(&self.d, &self.zero)
    }

    /// The values.
    pub fn decode(&self) -> Tile {
        let [d, zero] = self.scales();
        let mut values = [[0.0; TILE]; PAGE];
        for (t, row) in values.iter_mut().enumerate() {
            for (x, qs) in row.iter_mut().zip(self.qs) {
                let q = u32::from_le_bytes(qs) >> (2 * t) & 3;
                *x = q as f32 * d[t] + zero[t];
            }
        }
        values
    }
}
