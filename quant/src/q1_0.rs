//! `q1_0`: signs and a scale.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..18 | `qs` | bit `b` of byte `j` belongs to value `8 j + b`: set if it is not negative |
//!
//! 128 values in 18 bytes, 1.125 bits per weight. `x = d` or `-d`. Specified by ggml (`block_q1_0`).

use crate::bits::dot_i8;
use crate::block::{Block, Dot, Quantize};
use crate::num::F16;
use crate::q8_0::BlockQ8_0;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q1_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ1_0 {
    /// Scale.
    pub d: F16,
    /// Signs.
    pub qs: [u8; 16],
}

impl BlockQ1_0 {
    /// The quants, -1 and 1.
    #[inline]
    pub fn quants(&self) -> [i8; 128] {
        std::array::from_fn(|i| (self.qs[i / 8] >> (i % 8) & 1) as i8 * 2 - 1)
    }
}

impl Block for BlockQ1_0 {
    const TYPE: GgmlType = GgmlType::Q1_0;
    const LEN: usize = 128;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockQ1_0 {
    fn quantize(x: &[f32]) -> Self {
        // The mean magnitude has the least squared error.
        let d = x.iter().map(|x| x.abs()).sum::<f32>() / 128.0;
        let mut qs = [0; 16];
        for (q, x) in qs.iter_mut().zip(x.chunks_exact(8)) {
            for (b, &x) in x.iter().enumerate() {
                *q |= u8::from(x >= 0.0) << b;
            }
        }
        Self {
            d: F16::from_f32(d),
            qs,
        }
    }
}

impl Dot for BlockQ1_0 {
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
