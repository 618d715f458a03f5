//! `iq1_m`: as `iq1_s`, with a shift for every eight values and 3-bit scales for every 16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `qs` | low eight bits of the pattern indices, one for eight values |
//! | 32..48 | `qh` | a nibble for eight values, the earlier low: upper three bits of the index, and a bit that is set if the shift is down |
//! | 48..56 | `scales` | four little-endian 16-bit numbers for 64 values each: four 3-bit scales, and on top a nibble of the binary16 scale of all, lowest first |
//!
//! 256 values in 56 bytes, 1.75 bits per weight. `x = d * (2 scale + 1) * (pattern + shift)`. Specified by ggml
//! (`block_iq1_m`).

use crate::bits::dot_i8;
use crate::block::{Block, Dot};
use crate::grids::IQ1S_GRID;
use crate::iq::groups_of_8;
use crate::iq1_s::IQ1_DELTA;
use crate::num::{F16, U16Le};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `iq1_m`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ1M {
    /// Low bits of the pattern indices.
    pub qs: [u8; QK_K / 8],
    /// Upper bits of the pattern indices, and shifts.
    pub qh: [u8; QK_K / 16],
    /// Scales, and in pieces the scale of the scales.
    pub scales: [U16Le; QK_K / 64],
}

impl BlockIQ1M {
    /// The scale of the block, put together from its four pieces.
    #[inline]
    pub fn d(&self) -> F16 {
        let pieces = self.scales.iter().enumerate();
        F16::from_bits(pieces.fold(0, |d, (i, s)| d | (s.get() >> 12) << (4 * i)))
    }

    /// The nibble of the eight values of group `g`.
    #[inline]
    fn high(&self, g: usize) -> u8 {
        self.qh[g / 2] >> (4 * (g % 2)) & 0xf
    }

    /// The patterns, -1, 0 and 1.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        groups_of_8(|g| IQ1S_GRID[usize::from(self.qs[g]) | usize::from(self.high(g) & 7) << 8])
    }

    /// Scales of 16 values each, odd, 1..=15.
    #[inline]
    pub fn sub_scales(&self) -> [i8; 16] {
        std::array::from_fn(|j| (2 * (self.scales[j / 4].get() >> (3 * (j % 4)) & 7) + 1) as i8)
    }

    /// Directions of the shifts of eight values each, 1 or -1.
    #[inline]
    pub fn shifts(&self) -> [i8; 32] {
        std::array::from_fn(|g| if self.high(g) & 8 != 0 { -1 } else { 1 })
    }
}

impl Block for BlockIQ1M {
    const TYPE: GgmlType = GgmlType::IQ1_M;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d().to_f32();
        let (q, scales) = (self.quants(), self.sub_scales());
        let groups = q.chunks_exact(8).zip(self.shifts());
        for (g, ((q, shift), y)) in groups.zip(y.chunks_exact_mut(8)).enumerate() {
            let dl = d * f32::from(scales[g / 2]);
            let delta = f32::from(shift) * IQ1_DELTA;
            for (y, &q) in y.iter_mut().zip(q) {
                *y = dl * (f32::from(q) + delta);
            }
        }
    }
}

impl Dot for BlockIQ1M {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let y = &y[0];
        let (q, scales) = (self.quants(), self.sub_scales());
        let (mut sum, mut sum_shift) = (0, 0);
        let groups = q.chunks_exact(8).zip(y.runs::<8>());
        for (g, ((q, a), shift)) in groups.zip(self.shifts()).enumerate() {
            let scale = i32::from(scales[g / 2]);
            let sum_a: i32 = a.iter().map(|&a| i32::from(a)).sum();
            sum += scale * dot_i8(q, a);
            sum_shift += scale * i32::from(shift) * sum_a;
        }
        self.d().to_f32() * y.d.get() * (sum as f32 + IQ1_DELTA * sum_shift as f32)
    }
}
