//! `iq2_xxs`: eight values are one of 256 patterns with signs, 4-bit scales for every 32 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..66 | `qs` | each 8 bytes are 32 values: four pattern indices, then 32 bits: four sign indices of 7 bits, and a 4-bit scale on top |
//!
//! 256 values in 66 bytes, 2.0625 bits per weight. `x = d * (scale + 1/2) / 4 * pattern * sign`. Specified by ggml
//! (`block_iq2_xxs`).

use crate::block::{Block, Dot};
use crate::grids::{IQ2XXS_GRID, KSIGNS};
use crate::iq::{apply_signs, dot_odd_scales, groups_of_8, scale_quants};
use crate::num::F16;
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `iq2_xxs`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ2XXS {
    /// Scale.
    pub d: F16,
    /// Pattern indices, signs and scales.
    pub qs: [u8; QK_K / 4],
}

impl BlockIQ2XXS {
    /// Signs and scale of the 32 values of sub-block `ib`.
    #[inline]
    fn signs_and_scale(&self, ib: usize) -> u32 {
        let p = 8 * ib + 4;
        u32::from_le_bytes([self.qs[p], self.qs[p + 1], self.qs[p + 2], self.qs[p + 3]])
    }

    /// The patterns with their signs.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        groups_of_8(|g| {
            let (ib, l) = (g / 4, g % 4);
            let signs = KSIGNS[(self.signs_and_scale(ib) >> (7 * l) & 127) as usize];
            apply_signs(IQ2XXS_GRID[usize::from(self.qs[8 * ib + l])], signs)
        })
    }

    /// The scales of 32 values each, 0..=15.
    #[inline]
    pub fn sub_scales(&self) -> [u8; 8] {
        std::array::from_fn(|ib| (self.signs_and_scale(ib) >> 28) as u8)
    }
}

impl Block for BlockIQ2XXS {
    const TYPE: GgmlType = GgmlType::IQ2_XXS;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.sub_scales().map(|s| d * (0.5 + f32::from(s)) * 0.25);
        scale_quants(scales, &self.quants(), y);
    }
}

impl Dot for BlockIQ2XXS {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let sum = dot_odd_scales(self.sub_scales(), &self.quants(), &y[0]);
        0.125 * (self.d.to_f32() * y[0].d.get() * sum as f32)
    }
}
