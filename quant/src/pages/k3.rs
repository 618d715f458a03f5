//! `k3`: keys of a page in 3 bits, a scale and a zero for each channel.
//!
//! A page is tiles of all its tokens and 32 channels, one after the other:
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `a` | of every channel 32 bits: tokens 0 to 9, three bits each from the lowest on, and the lower two bits of token 15 |
//! | 128..192 | `b` | of every channel 16 bits: tokens 10 to 14, and the upper bit of token 15 |
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
    /// Tokens 0 to 9, and most of 15; little-endian.
    pub a: [[u8; 4]; TILE],
    /// Tokens 10 to 14, and the rest of 15; little-endian.
    pub b: [[u8; 2]; TILE],
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
            // Token 15 lies where the others leave room, in one piece if both parts are put together.
            let bits = (0..15).fold(0u64, |bits, t| bits | u64::from(q[t]) << place(t));
            let last = u64::from(q[15]);
            let bits = bits | (last & 3) << 30 | (last >> 2) << 47;
            let [a @ .., _, _, _, _] = bits.to_le_bytes();
            let [_, _, _, _, b @ .., _, _] = bits.to_le_bytes();
            (tile.a[c], tile.b[c]) = (a, b);
        }
        tile
    }

    /// The scale and the zero of every channel, as `x = d * q + zero`.
    #[inline(always)]
    pub fn scales(&self) -> [[f32; TILE]; 2] {
        let d = self.d.map(scale);
        let mut zero = [0.0; TILE];
        for c in 0..TILE {
            zero[c] = f32::from(self.zero[c]) * (d[c] / f32::from(PARTS));
        }
        [d, zero]
    }

    /// The keys.
    pub fn decode(&self) -> Tile {
        let [d, zero] = self.scales();
        let mut values = [[0.0; TILE]; PAGE];
        for c in 0..TILE {
            let (a, b) = (u32::from_le_bytes(self.a[c]), u16::from_le_bytes(self.b[c]));
            let bits = u64::from(b) << 32 | u64::from(a);
            for (t, row) in values.iter_mut().enumerate() {
                let q = match t {
                    15 => bits >> 30 & 3 | (bits >> 47) << 2,
                    _ => bits >> place(t) & 7,
                };
                row[c] = q as f32 * d[c] + zero[c];
            }
        }
        values
    }
}

/// Where the bits of a token begin, of `a` and `b` together.
fn place(t: usize) -> usize {
    if t < 10 { 3 * t } else { 32 + 3 * (t - 10) }
}
