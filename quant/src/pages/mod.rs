//! Formats of whole pages of keys and values, for what a cache keeps long.
//!
//! Rows of a cache are written token by token, each in blocks of its own, as ggml's types are. A page that is not written any more
//! can be stored anew as a whole, and then the tokens of a page may share a scale. Keys ask for that: some of their channels are
//! far larger than the others, in all tokens alike, so a scale for each channel takes far fewer bits than one for each token. Values
//! have no such channels (KIVI, arXiv 2402.02750, section 3).
//!
//! | type | what | bits a value |
//! |---|---|---|
//! | [`k4`] | keys, 4 bits, a scale for each channel of a page | 5 |
//! | [`v2`] | values, 2 bits, a scale for 32 values of a token | 2.5 |
//!
//! Both keep a scale and a zero in a byte each: `x = d / n * (n * q + zero)`, where `n` is a power of two. Products and sums have so few
//! bits that every way of computing them gives the same value.

pub mod k4;
pub mod v2;

pub use k4::TileK4;
pub use v2::TileV2;

use crate::types::{GgmlType, TypeTraits};
use bytemuck::AnyBitPattern;

/// Tokens in a page.
pub const PAGE: usize = 16;

/// Channels of a tile.
pub const TILE: usize = 32;

/// Some channels of all tokens of a page.
pub type Tile = [[f32; TILE]; PAGE];

/// How the keys or the values of a page are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// Row after row.
    Rows(GgmlType),
    /// Keys in 4 bits.
    K4,
    /// Values in 2 bits.
    V2,
}

impl KvType {
    /// The name: that of ggml, or that of the module.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rows(ty) => ty.name(),
            Self::K4 => "k4",
            Self::V2 => "v2",
        }
    }

    /// Values that a row has to be a multiple of.
    pub fn block_size(self) -> usize {
        self.rows().map_or(TILE, |t| t.block_size)
    }

    /// Bytes of a page of [`PAGE`] rows of `dim` values, if they are whole blocks.
    pub fn page_size(self, dim: usize) -> Option<usize> {
        let tiles = || dim.is_multiple_of(TILE).then_some(dim / TILE);
        match self {
            Self::Rows(ty) => ty.row_size(dim).map(|row| PAGE * row),
            Self::K4 => tiles().map(|n| n * size_of::<TileK4>()),
            Self::V2 => tiles().map(|n| n * size_of::<TileV2>()),
        }
    }

    /// The traits of the type of rows.
    pub fn rows(self) -> Option<&'static TypeTraits> {
        match self {
            Self::Rows(ty) => Some(ty.traits()),
            Self::K4 | Self::V2 => None,
        }
    }

    /// Reads tile number `i` of a page.
    ///
    /// # Panics
    /// If there is none, or tiles are not whole blocks of rows.
    pub fn read_tile(self, page: &[u8], i: usize, to: &mut Tile) {
        match self {
            Self::Rows(ty) => {
                let (size, row) = (tile_row(ty), page.len() / PAGE);
                for (page, to) in page.chunks_exact(row).zip(to) {
                    (ty.traits().dequantize_row)(&page[i * size..][..size], to);
                }
            }
            Self::K4 => *to = tiles::<TileK4>(page)[i].decode(),
            Self::V2 => *to = tiles::<TileV2>(page)[i].decode(),
        }
    }

    /// Stores tile number `i` of a page. What is not a number becomes zero in formats of pages, infinities the largest number of half
    /// precision.
    ///
    /// # Panics
    /// If there is none, tiles are not whole blocks of rows, or the type cannot be written.
    pub fn write_tile(self, from: &Tile, page: &mut [u8], i: usize) {
        match self {
            Self::Rows(ty) => {
                let (size, row) = (tile_row(ty), page.len() / PAGE);
                let quantize = ty.traits().quantize_row.expect("a type that is written");
                for (page, from) in page.chunks_exact_mut(row).zip(from) {
                    quantize(from, &mut page[i * size..][..size]);
                }
            }
            Self::K4 => bytemuck::cast_slice_mut(page)[i] = TileK4::encode(from),
            Self::V2 => bytemuck::cast_slice_mut(page)[i] = TileV2::encode(from),
        }
    }
}

/// Bytes of a row of a tile.
fn tile_row(ty: GgmlType) -> usize {
    ty.row_size(TILE).expect("tiles are whole blocks")
}

/// The tiles of a page. Panics if they are not whole.
pub fn tiles<T: AnyBitPattern>(page: &[u8]) -> &[T] {
    bytemuck::cast_slice(page)
}

impl From<GgmlType> for KvType {
    fn from(ty: GgmlType) -> Self {
        Self::Rows(ty)
    }
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The scale that a byte stands for: 0, or three bits of mantissa and five of exponent, from 2^-16 to 1.875 * 2^15.
#[inline(always)]
pub fn scale(byte: u8) -> f32 {
    if byte == 0 {
        0.0
    } else {
        f32::from_bits((u32::from(byte) + ((127 - 16) << 3)) << 20)
    }
}

/// Scales and zeros of which a tile has a byte each, zeros in parts of a step, as `x = d * q + zero`.
#[inline(always)]
fn scales<const N: usize, const PARTS: u8>(d: &[u8; N], zero: &[i8; N]) -> [[f32; N]; 2] {
    // A loop, since `map` is a call that is not compiled for the caller's instruction set.
    let (mut scales, mut zeros) = ([0.0; N], [0.0; N]);
    for i in 0..N {
        scales[i] = scale(d[i]);
        zeros[i] = f32::from(zero[i]) * (scales[i] / f32::from(PARTS));
    }
    [scales, zeros]
}

/// The byte of the least scale that is not below `d`; the largest one if there is none.
fn byte_of(d: f32) -> u8 {
    let above = d
        .to_bits()
        .div_ceil(1 << 20)
        .saturating_sub((127 - 16) << 3);
    // The pattern of 2^-16 is that of zero.
    let byte = above.min(255) as u8;
    if byte == 0 && d > 0.0 { 1 } else { byte }
}

/// The largest half-precision number, which pools may hold.
const LARGEST: f32 = 65504.0;

/// The scale, zero and quants of `0..=TOP` that stand for `N` values with the least squared error, of those tried: scales that reach from
/// the least to the greatest value, and up to `TRIES` smaller ones, which cut both off. Zeros are counted in parts of a step.
#[inline(always)]
fn fit<const N: usize, const TOP: u8, const PARTS: u8, const TRIES: u8>(
    x: &[f32; N],
) -> (u8, i8, [u8; N]) {
    let (top, parts) = (f32::from(TOP), f32::from(PARTS));
    let x = x.map(|x| {
        if x.is_nan() {
            0.0
        } else {
            x.clamp(-LARGEST, LARGEST)
        }
    });
    let lo = x.iter().copied().fold(f32::INFINITY, f32::min);
    let hi = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let middle = (lo + hi) / 2.0;
    // Zeros have 7 bits and a sign: farther away, steps have to be larger.
    let farthest = f32::from(i8::MAX) / parts - top / 2.0;
    let reach = byte_of(middle.abs() / farthest);
    let first = byte_of((hi - lo) / top).max(reach);
    let mut best = (f32::INFINITY, 0, 0);
    for byte in first.saturating_sub(TRIES).max(reach).max(1)..=first {
        let d = scale(byte);
        let zero = (parts * (middle / d - top / 2.0)).round_ties_even();
        let zero = zero.clamp(-127.0, 127.0);
        let mut errors = [0.0; N];
        for (e, &x) in errors.iter_mut().zip(&x) {
            let q = quant::<TOP>(x / d - zero / parts);
            let off = (q + zero / parts) * d - x;
            *e = off * off;
        }
        let error = errors.iter().sum();
        if error < best.0 {
            best = (error, byte, zero as i8);
        }
    }
    let (_, byte, zero) = best;
    let d = scale(byte);
    let at = f32::from(zero) / parts;
    let quants = match byte {
        0 => [0; N],
        _ => x.map(|x| quant::<TOP>(x / d - at) as u8),
    };
    (byte, zero, quants)
}

/// The nearest of `0..=TOP`.
#[inline(always)]
fn quant<const TOP: u8>(steps: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves no room for a fraction.
    const SHIFT: f32 = 12_582_912.0;
    (steps.clamp(0.0, f32::from(TOP)) + SHIFT) - SHIFT
}

#[cfg(test)]
mod tests;
