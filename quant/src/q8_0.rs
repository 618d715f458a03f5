//! `q8_0`: 8 bits and a scale. A weight format, and the activations' format for the formats of 32 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..34 | `qs` | 32 signed bytes in order |
//!
//! 32 values in 34 bytes, 8.5 bits per weight. `x = d * q`. Specified by ggml (`block_q8_0`).

use crate::bits::dot_i8;
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero, round_away};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q8_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: F16,
    /// Quants, -127..=127 when made by a quantizer.
    pub qs: [i8; 32],
}

/// The scale before it is rounded to half precision, and the quants; `q8_1` shares them.
///
/// The quants are taken with the unrounded scale, which is what makes the result that of ggml, byte for byte.
pub(crate) fn scale_and_quants(x: &[f32]) -> (f32, [i8; 32]) {
    let d = max_by_abs(x).abs() / 127.0;
    let id = recip_or_zero(d);
    let mut qs = [0; 32];
    for (q, &x) in qs.iter_mut().zip(x) {
        *q = round_away(x * id).clamp(-127, 127) as i8;
    }
    (d, qs)
}

impl Block for BlockQ8_0 {
    const TYPE: GgmlType = GgmlType::Q8_0;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, &q) in y.iter_mut().zip(&self.qs) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockQ8_0 {
    fn quantize(x: &[f32]) -> Self {
        let (d, qs) = scale_and_quants(x);
        Self {
            d: F16::from_f32(d),
            qs,
        }
    }
}

impl Dot for BlockQ8_0 {
    type Partner = Self;

    fn dot(&self, y: &[Self]) -> f32 {
        dot_i8(&self.qs, &y[0].qs) as f32 * (self.d.to_f32() * y[0].d.to_f32())
    }
}
