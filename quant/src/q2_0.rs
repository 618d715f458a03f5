//! `q2_0`: 2 bits and a scale.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..18 | `qs` | bits `2b`, `2b + 1` of byte `j` are value `4 j + b` |
//!
//! 64 values in 18 bytes, 2.25 bits per weight. `x = d * (q - 1)`. Specified by ggml (`block_q2_0`).

use crate::bits::dot_i8;
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero, round_away};
use crate::q8_0::BlockQ8_0;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q2_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ2_0 {
    /// Scale.
    pub d: F16,
    /// Quants, offset by 1.
    pub qs: [u8; 16],
}

impl BlockQ2_0 {
    /// The quants, -1..=2.
    #[inline]
    pub fn quants(&self) -> [i8; 64] {
        std::array::from_fn(|i| (self.qs[i / 4] >> (2 * (i % 4)) & 3) as i8 - 1)
    }
}

impl Block for BlockQ2_0 {
    const TYPE: GgmlType = GgmlType::Q2_0;
    const LEN: usize = 64;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockQ2_0 {
    fn quantize(x: &[f32]) -> Self {
        let d = max_by_abs(x).abs();
        let id = recip_or_zero(d);
        let mut qs = [0; 16];
        for (q, x) in qs.iter_mut().zip(x.chunks_exact(4)) {
            for (b, &x) in x.iter().enumerate() {
                *q |= ((round_away(x * id).clamp(-1, 2) + 1) as u8) << (2 * b);
            }
        }
        Self {
            d: F16::from_f32(d),
            qs,
        }
    }
}

impl Dot for BlockQ2_0 {
    type Partner = BlockQ8_0;

    fn dot(&self, y: &[BlockQ8_0]) -> f32 {
        let q = self.quants();
        let parts = y.iter().zip(q.chunks_exact(32));
        let sum: f32 = parts
            .map(|(y, q)| y.d.to_f32() * dot_i8(q, &y.qs) as f32)
            .sum();
        self.d.to_f32() * sum
    }
}
