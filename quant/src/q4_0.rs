//! `q4_0`: 4 bits and a scale, the oldest of the formats in use.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..18 | `qs` | byte `j`: value `j` in the low nibble, value `j + 16` in the high one |
//!
//! 32 values in 18 bytes, 4.5 bits per weight. `x = d * (q - 8)`. Specified by ggml (`block_q4_0`).

use crate::bits::{dot_i8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero};
use crate::q8_0::BlockQ8_0;
use crate::search::{symmetric, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q4_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ4_0 {
    /// Scale.
    pub d: F16,
    /// Quants, offset by 8.
    pub qs: [u8; 16],
}

impl BlockQ4_0 {
    /// The quants, -8..=7.
    #[inline]
    pub fn quants(&self) -> [i8; 32] {
        let mut q = [0; 32];
        unpack_nibbles(&self.qs, 16, &mut q);
        q.map(|q| q as i8 - 8)
    }
}

impl Block for BlockQ4_0 {
    const TYPE: GgmlType = GgmlType::Q4_0;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockQ4_0 {
    fn quantize(x: &[f32]) -> Self {
        // The value of largest magnitude becomes -8, the one code without a counterpart, hence the sign.
        let d = max_by_abs(x) / -8.0;
        let id = recip_or_zero(d);
        let mut l = [0; 32];
        for (l, &x) in l.iter_mut().zip(x) {
            *l = ((x * id + 8.5) as i32).clamp(0, 15) as u8;
        }
        let mut qs = [0; 16];
        pack_nibbles(&l, 16, &mut qs);
        Self {
            d: F16::from_f32(d),
            qs,
        }
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], mean_square: f32) -> Self {
        let w: [f32; 32] = weigh(x, importance, mean_square);
        let mut l = [0; 32];
        let [d] = symmetric::<32, 1>(8, x, &w, &mut l);
        let mut qs = [0; 16];
        pack_nibbles(&l, 16, &mut qs);
        Self {
            d: F16::from_f32(d),
            qs,
        }
    }
}

impl Dot for BlockQ4_0 {
    type Partner = BlockQ8_0;

    fn dot(&self, y: &[BlockQ8_0]) -> f32 {
        dot_i8(&self.quants(), &y[0].qs) as f32 * self.d.to_f32() * y[0].d.to_f32()
    }
}
