//! `q8_1`: 8 bits, a scale and the block's sum. Activations only, for the formats with a minimum.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..4 | `s` | `d` times the sum of the quants, binary16 |
//! | 4..36 | `qs` | 32 signed bytes in order |
//!
//! 32 values in 36 bytes, 9 bits per value. `x = d * q`. Specified by ggml (`block_q8_1`).
//!
//! The sum is rounded to half precision, which costs products with `q4_1` and `q5_1` up to 1.3e-4 of the sum of
//! the magnitudes. That is the format, not a fault of a kernel.

use crate::block::{Block, Quantize};
use crate::num::F16;
use crate::q8_0::scale_and_quants;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q8_1`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ8_1 {
    /// Scale.
    pub d: F16,
    /// Scale times the sum of the quants.
    pub s: F16,
    /// Quants.
    pub qs: [i8; 32],
}

impl Block for BlockQ8_1 {
    const TYPE: GgmlType = GgmlType::Q8_1;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, &q) in y.iter_mut().zip(&self.qs) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockQ8_1 {
    fn quantize(x: &[f32]) -> Self {
        let (d, qs) = scale_and_quants(x);
        let sum: i32 = qs.iter().map(|&q| i32::from(q)).sum();
        Self {
            d: F16::from_f32(d),
            s: F16::from_f32(sum as f32 * d),
            qs,
        }
    }
}
