//! `q4_1`: 4 bits, a scale and a minimum.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..4 | `m` | minimum, binary16 |
//! | 4..20 | `qs` | byte `j`: value `j` in the low nibble, value `j + 16` in the high one |
//!
//! 32 values in 20 bytes, 5 bits per weight. `x = d * q + m`. Specified by ggml (`block_q4_1`).

use crate::bits::{dot_u8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, recip_or_zero};
use crate::q8_1::BlockQ8_1;
use crate::search::{Groups, affine, min_max, side_by_side, thorough, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q4_1`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ4_1 {
    /// Scale.
    pub d: F16,
    /// Minimum.
    pub m: F16,
    /// Quants.
    pub qs: [u8; 16],
}

impl BlockQ4_1 {
    /// The quants, 0..=15.
    #[inline]
    pub fn quants(&self) -> [u8; 32] {
        let mut q = [0; 32];
        unpack_nibbles(&self.qs, 16, &mut q);
        q
    }
}

impl Block for BlockQ4_1 {
    const TYPE: GgmlType = GgmlType::Q4_1;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d + m;
        }
    }
}

impl Quantize for BlockQ4_1 {
    fn quantize(x: &[f32]) -> Self {
        let (min, max) = min_max(x);
        let d = (max - min) / 15.0;
        let id = recip_or_zero(d);
        let mut l = [0; 32];
        for (l, &x) in l.iter_mut().zip(x) {
            *l = (((x - min) * id + 0.5) as i32).clamp(0, 15) as u8;
        }
        let mut qs = [0; 16];
        pack_nibbles(&l, 16, &mut qs);
        Self {
            d: F16::from_f32(d),
            m: F16::from_f32(min),
            qs,
        }
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], mean_square: f32) -> Self {
        let w: [f32; 32] = weigh(x, importance, mean_square);
        let mut l = [0; 32];
        let (x, w): (Groups<32, 1>, _) = (side_by_side(x), side_by_side(&w));
        let ([d], [min]) = affine::<_, _, false>(&thorough(15), &x, &w, &mut l);
        let mut qs = [0; 16];
        pack_nibbles(&l, 16, &mut qs);
        Self {
            d: F16::from_f32(d),
            m: F16::from_f32(-min),
            qs,
        }
    }
}

impl Dot for BlockQ4_1 {
    type Partner = BlockQ8_1;

    fn dot(&self, y: &[BlockQ8_1]) -> f32 {
        let y = &y[0];
        let sum = dot_u8(&self.quants(), &y.qs) as f32;
        // The minimum meets the sum of the activations, which they carry with them.
        (self.d.to_f32() * y.d.to_f32()) * sum + self.m.to_f32() * y.s.to_f32()
    }
}
