//! `mxfp4`: 4-bit floats (E2M1) with a power of two as scale, the OCP microscaling format. gpt-oss is published in it.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0 | `e` | scale `2^(e - 127)` (E8M0) |
//! | 1..17 | `qs` | byte `j`: value `j` in the low nibble, value `j + 16` in the high one |
//!
//! 32 values in 17 bytes, 4.25 bits per weight. Specified by the OCP Microscaling Formats specification 1.0; the order
//! of the nibbles is ggml's (`block_mxfp4`).

use crate::bits::{dot_i8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::{e8m0_half_to_f32, max_by_abs};
use crate::q8_0::BlockQ8_0;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// Twice the values of the E2M1 codes, which makes them integers. Scales are halved to match.
pub const KVALUES_FP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A block of `mxfp4`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockMXFP4 {
    /// Exponent of the scale, plus 127.
    pub e: u8,
    /// E2M1 codes.
    pub qs: [u8; 16],
}

impl BlockMXFP4 {
    /// The values, doubled.
    #[inline]
    pub fn quants(&self) -> [i8; 32] {
        let mut q = [0; 32];
        unpack_nibbles(&self.qs, 16, &mut q);
        q.map(|q| KVALUES_FP4[usize::from(q)])
    }
}

/// The E2M1 code whose doubled value times `d` is nearest to `x`; the first one of equals.
#[inline]
pub(crate) fn nearest_fp4(x: f32, d: f32) -> u8 {
    let error = |i: usize| (f32::from(KVALUES_FP4[i]) * d - x).abs();
    (1..16).fold(0, |best, i| if error(i) < error(best) { i } else { best }) as u8
}

impl Block for BlockMXFP4 {
    const TYPE: GgmlType = GgmlType::MXFP4;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let d = e8m0_half_to_f32(self.e);
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockMXFP4 {
    fn quantize(x: &[f32]) -> Self {
        // The largest code is 6 = 1.5 * 2^2, so the scale's exponent lies two below that of the largest value.
        let exponent = (max_by_abs(x).abs().to_bits() >> 23) as u8;
        let e = exponent.saturating_sub(2);
        let d = e8m0_half_to_f32(e);
        let l: [u8; 32] = std::array::from_fn(|i| nearest_fp4(x[i], d));
        let mut qs = [0; 16];
        pack_nibbles(&l, 16, &mut qs);
        Self { e, qs }
    }
}

impl Dot for BlockMXFP4 {
    type Partner = BlockQ8_0;

    fn dot(&self, y: &[BlockQ8_0]) -> f32 {
        (y[0].d.to_f32() * e8m0_half_to_f32(self.e)) * dot_i8(&self.quants(), &y[0].qs) as f32
    }
}
