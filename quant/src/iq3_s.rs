//! `iq3_s`: four values are one of 512 patterns with free signs, 4-bit scales for every 32 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..66 | `qs` | low eight bits of the pattern indices, one for four values |
//! | 66..74 | `qh` | bit `l` of byte `i`: ninth bit of index `8 i + l` |
//! | 74..106 | `signs` | signs of eight values each, bit `j` negates value `j` |
//! | 106..110 | `scales` | scales of 32 values each, the earlier in the low nibble |
//!
//! 256 values in 110 bytes, 3.4375 bits per weight. `x = d * (2 scale + 1) * pattern * sign`. Specified by ggml
//! (`block_iq3_s`).

use crate::block::{Block, Dot};
use crate::grids::IQ3S_GRID;
use crate::iq::{apply_signs, dot_odd_scales, groups_of_8, join, nibbles, scale_quants};
use crate::num::F16;
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `iq3_s`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ3S {
    /// Scale.
    pub d: F16,
    /// Low bits of the pattern indices.
    pub qs: [u8; QK_K / 4],
    /// Ninth bits of the pattern indices.
    pub qh: [u8; QK_K / 32],
    /// Signs.
    pub signs: [u8; QK_K / 8],
    /// Scales of 32 values each.
    pub scales: [u8; QK_K / 64],
}

impl BlockIQ3S {
    /// The patterns with their signs.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        let pattern = |i: usize| {
            let high = usize::from(self.qh[i / 8] >> (i % 8) & 1);
            IQ3S_GRID[usize::from(self.qs[i]) | high << 8]
        };
        groups_of_8(|g| apply_signs(join(pattern(2 * g), pattern(2 * g + 1)), self.signs[g]))
    }

    /// The scales of 32 values each, 0..=15.
    #[inline]
    pub fn sub_scales(&self) -> [u8; 8] {
        nibbles(&self.scales)
    }
}

impl Block for BlockIQ3S {
    const TYPE: GgmlType = GgmlType::IQ3_S;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.sub_scales().map(|s| d * f32::from(2 * s + 1));
        scale_quants(scales, &self.quants(), y);
    }
}

impl Dot for BlockIQ3S {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let sum = dot_odd_scales(self.sub_scales(), &self.quants(), &y[0]);
        self.d.to_f32() * y[0].d.get() * sum as f32
    }
}
