//! `iq2_xs`: eight values are one of 512 patterns with signs, 4-bit scales for every 16 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..66 | `qs` | 32 little-endian 16-bit numbers of eight values each: pattern index (9 bits), sign index (7 bits) |
//! | 66..74 | `scales` | scales of 16 values each, the earlier in the low nibble |
//!
//! 256 values in 74 bytes, 2.3125 bits per weight. `x = d * (scale + 1/2) / 4 * pattern * sign`. Specified by ggml
//! (`block_iq2_xs`).

use crate::block::{Block, Dot};
use crate::grids::{IQ2XS_GRID, KSIGNS};
use crate::iq::{apply_signs, dot_odd_scales, groups_of_8, nibbles, scale_quants};
use crate::num::{F16, U16Le};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `iq2_xs`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ2XS {
    /// Scale.
    pub d: F16,
    /// Pattern and sign indices.
    pub qs: [U16Le; QK_K / 8],
    /// Scales of 16 values each.
    pub scales: [u8; QK_K / 32],
}

impl BlockIQ2XS {
    /// The patterns with their signs.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        groups_of_8(|g| {
            let q = usize::from(self.qs[g].get());
            apply_signs(IQ2XS_GRID[q & 511], KSIGNS[q >> 9])
        })
    }

    /// The scales of 16 values each, 0..=15.
    #[inline]
    pub fn sub_scales(&self) -> [u8; 16] {
        nibbles(&self.scales)
    }
}

impl Block for BlockIQ2XS {
    const TYPE: GgmlType = GgmlType::IQ2_XS;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.sub_scales().map(|s| d * (0.5 + f32::from(s)) * 0.25);
        scale_quants(scales, &self.quants(), y);
    }
}

impl Dot for BlockIQ2XS {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let sum = dot_odd_scales(self.sub_scales(), &self.quants(), &y[0]);
        0.125 * (self.d.to_f32() * y[0].d.get() * sum as f32)
    }
}
