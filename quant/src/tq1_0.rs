//! `tq1_0`: ternary values, five to a byte.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `qs[..32]` | digit `n` of byte `m` is value `32 n + m`, five digits |
//! | 32..48 | `qs[32..]` | digit `n` of byte `m` is value `160 + 16 n + m`, five digits |
//! | 48..52 | `qh` | digit `n` of byte `m` is value `240 + 4 n + m`, four digits |
//! | 52..54 | `d` | scale, binary16 |
//!
//! 256 values in 54 bytes, 1.6875 bits per weight. `x = d * (digit - 1)`. Specified by ggml (`block_tq1_0`).
//!
//! A byte is the fraction `0.d0 d1 d2 d3 d4` in base three, scaled to 256 and rounded up: multiplying it by `3^n` modulo 256
//! and then by three pushes digit `n` out at the top, without a division.

use crate::bits::dot_i8;
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero, round_away};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `tq1_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockTQ1_0 {
    /// Five digits to a byte.
    pub qs: [u8; 48],
    /// Four digits to a byte.
    pub qh: [u8; 4],
    /// Scale.
    pub d: F16,
}

/// First value and digits of the three areas.
const AREAS: [(usize, usize); 3] = [(0, 5), (160, 5), (240, 4)];

impl BlockTQ1_0 {
    /// The quants, -1, 0 and 1.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        let mut out = [0; QK_K];
        let areas = [&self.qs[..32], &self.qs[32..], &self.qh[..]];
        for (bytes, (first, digits)) in areas.into_iter().zip(AREAS) {
            let mut power = 1u8;
            let values = &mut out[first..][..digits * bytes.len()];
            for values in values.chunks_exact_mut(bytes.len()) {
                for (v, &b) in values.iter_mut().zip(bytes) {
                    *v = ((u16::from(b.wrapping_mul(power)) * 3) >> 8) as i8 - 1;
                }
                power = power.wrapping_mul(3);
            }
        }
        out
    }
}

/// The ternary digit (0, 1, 2) of `x` in units of `1 / id`.
#[inline]
pub(crate) fn digit(x: f32, id: f32) -> u8 {
    (round_away(x * id).clamp(-1, 1) + 1) as u8
}

impl Block for BlockTQ1_0 {
    const TYPE: GgmlType = GgmlType::TQ1_0;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockTQ1_0 {
    fn quantize(x: &[f32]) -> Self {
        let d = max_by_abs(x).abs();
        let id = recip_or_zero(d);
        let mut block = Self::zeroed();
        block.d = F16::from_f32(d);
        let (a, b) = block.qs.split_at_mut(32);
        for (bytes, (first, digits)) in [a, b, &mut block.qh].into_iter().zip(AREAS) {
            let stride = bytes.len();
            for (m, byte) in bytes.iter_mut().enumerate() {
                let number = (0..5).fold(0, |number, n| {
                    let digit = if n < digits {
                        digit(x[first + n * stride + m], id)
                    } else {
                        0
                    };
                    number * 3 + u16::from(digit)
                });
                *byte = (number * 256).div_ceil(243) as u8;
            }
        }
        block
    }
}

impl Dot for BlockTQ1_0 {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        dot_i8(&self.quants(), &y[0].qs) as f32 * (self.d.to_f32() * y[0].d.get())
    }
}
