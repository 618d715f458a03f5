//! `q5_1`: 5 bits, a scale and a minimum.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..4 | `m` | minimum, binary16 |
//! | 4..8 | `qh` | little-endian 32 bits: bit `j` is the fifth bit of value `j` |
//! | 8..24 | `qs` | byte `j`: low bits of value `j` in the low nibble, of value `j + 16` in the high one |
//!
//! 32 values in 24 bytes, 6 bits per weight. `x = d * q + m`. Specified by ggml (`block_q5_1`).

use crate::bits::dot_u8;
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, recip_or_zero};
use crate::q5_0;
use crate::q8_1::BlockQ8_1;
use crate::search::{Groups, affine, min_max, side_by_side, thorough, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q5_1`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ5_1 {
    /// Scale.
    pub d: F16,
    /// Minimum.
    pub m: F16,
    /// Fifth bits.
    pub qh: [u8; 4],
    /// Low four bits.
    pub qs: [u8; 16],
}

impl BlockQ5_1 {
    /// The quants, 0..=31.
    #[inline]
    pub fn quants(&self) -> [u8; 32] {
        q5_0::unpack(self.qh, &self.qs)
    }
}

impl Block for BlockQ5_1 {
    const TYPE: GgmlType = GgmlType::Q5_1;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d + m;
        }
    }
}

impl Quantize for BlockQ5_1 {
    fn quantize(x: &[f32]) -> Self {
        let (min, max) = min_max(x);
        let d = (max - min) / 31.0;
        let id = recip_or_zero(d);
        let mut l = [0; 32];
        for (l, &x) in l.iter_mut().zip(x) {
            *l = (((x - min) * id + 0.5) as i32).clamp(0, 31) as u8;
        }
        let (qh, qs) = q5_0::pack(&l);
        Self {
            d: F16::from_f32(d),
            m: F16::from_f32(min),
            qh,
            qs,
        }
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], mean_square: f32) -> Self {
        let w: [f32; 32] = weigh(x, importance, mean_square);
        let mut l = [0; 32];
        let (x, w): (Groups<32, 1>, _) = (side_by_side(x), side_by_side(&w));
        let ([d], [min]) = affine::<_, _, false>(&thorough(31), &x, &w, &mut l);
        let (qh, qs) = q5_0::pack(&l);
        Self {
            d: F16::from_f32(d),
            m: F16::from_f32(-min),
            qh,
            qs,
        }
    }
}

impl Dot for BlockQ5_1 {
    type Partner = BlockQ8_1;

    fn dot(&self, y: &[BlockQ8_1]) -> f32 {
        let y = &y[0];
        let sum = dot_u8(&self.quants(), &y.qs) as f32;
        (self.d.to_f32() * y.d.to_f32()) * sum + self.m.to_f32() * y.s.to_f32()
    }
}
