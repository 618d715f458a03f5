//! `q5_0`: 5 bits and a scale.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..6 | `qh` | little-endian 32 bits: bit `j` is the fifth bit of value `j` |
//! | 6..22 | `qs` | byte `j`: low bits of value `j` in the low nibble, of value `j + 16` in the high one |
//!
//! 32 values in 22 bytes, 5.5 bits per weight. `x = d * (q - 16)`. Specified by ggml (`block_q5_0`).

use crate::bits::{dot_i8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero};
use crate::q8_0::BlockQ8_0;
use crate::search::{symmetric, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q5_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ5_0 {
    /// Scale.
    pub d: F16,
    /// Fifth bits.
    pub qh: [u8; 4],
    /// Low four bits.
    pub qs: [u8; 16],
}

impl BlockQ5_0 {
    /// The quants, -16..=15.
    #[inline]
    pub fn quants(&self) -> [i8; 32] {
        unpack(self.qh, &self.qs).map(|q| q as i8 - 16)
    }
}

/// Joins nibbles and fifth bits; `q5_1` has the same layout.
#[inline]
pub(crate) fn unpack(qh: [u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let mut q = [0; 32];
    unpack_nibbles(qs, 16, &mut q);
    let qh = u32::from_le_bytes(qh);
    for (j, q) in q.iter_mut().enumerate() {
        *q |= ((qh >> j & 1) << 4) as u8;
    }
    q
}

/// The inverse of [`unpack`].
#[inline]
pub(crate) fn pack(l: &[u8; 32]) -> ([u8; 4], [u8; 16]) {
    let mut qs = [0; 16];
    pack_nibbles(l, 16, &mut qs);
    let qh = l
        .iter()
        .enumerate()
        .fold(0u32, |qh, (j, &l)| qh | u32::from(l >> 4) << j);
    (qh.to_le_bytes(), qs)
}

impl Block for BlockQ5_0 {
    const TYPE: GgmlType = GgmlType::Q5_0;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockQ5_0 {
    fn quantize(x: &[f32]) -> Self {
        // As in q4_0, the value of largest magnitude becomes the code without a counterpart.
        let d = max_by_abs(x) / -16.0;
        let id = recip_or_zero(d);
        let mut l = [0; 32];
        for (l, &x) in l.iter_mut().zip(x) {
            *l = ((x * id + 16.5) as i32).clamp(0, 31) as u8;
        }
        let (qh, qs) = pack(&l);
        Self {
            d: F16::from_f32(d),
            qh,
            qs,
        }
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], mean_square: f32) -> Self {
        let w: [f32; 32] = weigh(x, importance, mean_square);
        let mut l = [0; 32];
        let [d] = symmetric::<32, 1>(16, x, &w, &mut l);
        let (qh, qs) = pack(&l);
        Self {
            d: F16::from_f32(d),
            qh,
            qs,
        }
    }
}

impl Dot for BlockQ5_0 {
    type Partner = BlockQ8_0;

    fn dot(&self, y: &[BlockQ8_0]) -> f32 {
        (self.d.to_f32() * y[0].d.to_f32()) * dot_i8(&self.quants(), &y[0].qs) as f32
    }
}
