//! `iq1_s`: eight values are one of 2048 patterns of -1, 0 and 1, moved by an eighth up or down; 3-bit scales for
//! every 32 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..34 | `qs` | low eight bits of the pattern indices, one for eight values |
//! | 34..50 | `qh` | eight little-endian 16-bit numbers for 32 values each: four times the upper three bits of an index, a 3-bit scale, and a bit that is set if the shift is down |
//!
//! 256 values in 50 bytes, 1.5625 bits per weight. `x = d * (2 scale + 1) * (pattern + shift)`. Specified by ggml
//! (`block_iq1_s`).

use crate::bits::dot_i8;
use crate::block::{Block, Dot};
use crate::grids::IQ1S_GRID;
use crate::iq::groups_of_8;
use crate::num::{F16, U16Le};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// How far patterns are moved, in `iq1_s` and `iq1_m`.
pub const IQ1_DELTA: f32 = 0.125;

/// A block of `iq1_s`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ1S {
    /// Scale.
    pub d: F16,
    /// Low bits of the pattern indices.
    pub qs: [u8; QK_K / 8],
    /// Upper bits of the pattern indices, scales and shifts.
    pub qh: [U16Le; QK_K / 32],
}

impl BlockIQ1S {
    /// The patterns, -1, 0 and 1.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        groups_of_8(|g| {
            let high = usize::from(self.qh[g / 4].get() >> (3 * (g % 4)) & 7);
            IQ1S_GRID[usize::from(self.qs[g]) | high << 8]
        })
    }

    /// Scale (odd, 1..=15) and direction of the shift (1 or -1) of 32 values each.
    #[inline]
    pub fn scales_and_shifts(&self) -> [(i8, i8); 8] {
        self.qh.map(|qh| {
            let qh = qh.get();
            let shift = if qh & 0x8000 != 0 { -1 } else { 1 };
            ((2 * (qh >> 12 & 7) + 1) as i8, shift)
        })
    }
}

impl Block for BlockIQ1S {
    const TYPE: GgmlType = GgmlType::IQ1_S;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let q = self.quants();
        let subs = self.scales_and_shifts().into_iter().zip(q.chunks_exact(32));
        for (((scale, shift), q), y) in subs.zip(y.chunks_exact_mut(32)) {
            let (dl, delta) = (d * f32::from(scale), f32::from(shift) * IQ1_DELTA);
            for (y, &q) in y.iter_mut().zip(q) {
                *y = dl * (f32::from(q) + delta);
            }
        }
    }
}

impl Dot for BlockIQ1S {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let y = &y[0];
        let (q, bsums) = (self.quants(), y.sums());
        let (mut sum, mut sum_shift) = (0, 0);
        let subs = q.chunks_exact(32).zip(y.runs::<32>());
        for (j, ((q, a), (scale, shift))) in subs.zip(self.scales_and_shifts()).enumerate() {
            sum += i32::from(scale) * dot_i8(q, a);
            sum_shift += i32::from(scale) * i32::from(shift) * (bsums[2 * j] + bsums[2 * j + 1]);
        }
        self.d.to_f32() * y.d.get() * (sum as f32 + IQ1_DELTA * sum_shift as f32)
    }
}
