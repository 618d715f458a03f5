//! `iq2_s`: eight values are one of 1024 patterns with free signs, 4-bit scales for every 16 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..34 | `qs[..32]` | low eight bits of the pattern indices, one for eight values |
//! | 34..66 | `qs[32..]` | signs of eight values each, bit `j` negates value `j` |
//! | 66..74 | `qh` | bits `2l`, `2l + 1` of byte `i`: upper bits of index `4 i + l` |
//! | 74..82 | `scales` | scales of 16 values each, the earlier in the low nibble |
//!
//! 256 values in 82 bytes, 2.5625 bits per weight. `x = d * (scale + 1/2) / 4 * pattern * sign`. Specified by ggml
//! (`block_iq2_s`).

use crate::block::{Block, Dot};
use crate::grids::IQ2S_GRID;
use crate::iq::{apply_signs, dot_odd_scales, groups_of_8, nibbles, scale_quants};
use crate::num::F16;
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `iq2_s`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ2S {
    /// Scale.
    pub d: F16,
    /// Low bits of the pattern indices, then signs.
    pub qs: [u8; QK_K / 4],
    /// Upper bits of the pattern indices.
    pub qh: [u8; QK_K / 32],
    /// Scales of 16 values each.
    pub scales: [u8; QK_K / 32],
}

impl BlockIQ2S {
    /// The patterns with their signs.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        let (low, signs) = self.qs.split_at(QK_K / 8);
        groups_of_8(|g| {
            let high = usize::from(self.qh[g / 4] >> (2 * (g % 4)) & 3);
            apply_signs(IQ2S_GRID[usize::from(low[g]) | high << 8], signs[g])
        })
    }

    /// The scales of 16 values each, 0..=15.
    #[inline]
    pub fn sub_scales(&self) -> [u8; 16] {
        nibbles(&self.scales)
    }
}

impl Block for BlockIQ2S {
    const TYPE: GgmlType = GgmlType::IQ2_S;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.sub_scales().map(|s| d * (0.5 + f32::from(s)) * 0.25);
        scale_quants(scales, &self.quants(), y);
    }
}

impl Dot for BlockIQ2S {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let sum = dot_odd_scales(self.sub_scales(), &self.quants(), &y[0]);
        0.125 * (self.d.to_f32() * y[0].d.get() * sum as f32)
    }
}
