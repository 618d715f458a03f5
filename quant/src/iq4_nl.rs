//! `iq4_nl`: 4 bits that index a table of unevenly spaced values, and a scale.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..18 | `qs` | byte `j`: index of value `j` in the low nibble, of value `j + 16` in the high one |
//!
//! 32 values in 18 bytes, 4.5 bits per weight. `x = d * table[q]`. Specified by ggml (`block_iq4_nl`).

use crate::bits::{dot_i8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero};
use crate::q8_0::BlockQ8_0;
use crate::search::{GROUP_MAX_EPS, fit, mean_square, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// The values that indices stand for in `iq4_nl` and `iq4_xs`: denser near zero, where weights are.
pub const KVALUES_IQ4NL: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// A block of `iq4_nl`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ4NL {
    /// Scale.
    pub d: F16,
    /// Indices.
    pub qs: [u8; 16],
}

impl BlockIQ4NL {
    /// The table values of the indices.
    #[inline]
    pub fn quants(&self) -> [i8; 32] {
        let mut q = [0; 32];
        unpack_nibbles(&self.qs, 16, &mut q);
        q.map(|q| KVALUES_IQ4NL[usize::from(q)])
    }
}

/// Index of the table value nearest to `x`.
#[inline]
pub(crate) fn nearest_index(x: f32) -> u8 {
    let value = |i: usize| f32::from(KVALUES_IQ4NL[i]);
    let above = KVALUES_IQ4NL.partition_point(|&v| f32::from(v) <= x);
    let index = match above {
        0 => 0,
        16 => 15,
        i if x - value(i - 1) < value(i) - x => i - 1,
        i => i,
    };
    index as u8
}

/// The best scale for 32 values, with errors weighted by `w`.
pub(crate) fn search_scale(x: &[f32], w: &[f32; 32]) -> f32 {
    let max = max_by_abs(x);
    if max.abs() < GROUP_MAX_EPS {
        return 0.0;
    }
    let try_inverse = |id: f32| {
        fit(x, w, |x| {
            i32::from(KVALUES_IQ4NL[usize::from(nearest_index(id * x))])
        })
    };
    let lowest = f32::from(KVALUES_IQ4NL[0]);
    let (sum_qx, sum_q2) = try_inverse(1.0 / (-max / lowest));
    let mut d = if sum_q2 > 0.0 { sum_qx / sum_q2 } else { 0.0 };
    let mut best = d * sum_qx;
    for step in -7..=7 {
        let (sum_qx, sum_q2) = try_inverse((step as f32 + lowest) / max);
        if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
            d = sum_qx / sum_q2;
            best = d * sum_qx;
        }
    }
    d
}

impl Block for BlockIQ4NL {
    const TYPE: GgmlType = GgmlType::IQ4_NL;
    const LEN: usize = 32;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = d * f32::from(q);
        }
    }
}

impl Quantize for BlockIQ4NL {
    fn quantize(x: &[f32]) -> Self {
        Self::quantize_with(x, &std::array::from_fn(|i| x[i] * x[i]))
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        Self::quantize_with(x, &weigh(x, importance, 2.0 * mean_square(x)))
    }
}

impl BlockIQ4NL {
    /// Encodes `x`, with errors weighted by `w`.
    fn quantize_with(x: &[f32], w: &[f32; 32]) -> Self {
        let d = search_scale(x, w);
        let id = recip_or_zero(d);
        let l: [u8; 32] = std::array::from_fn(|i| nearest_index(id * x[i]));
        let mut qs = [0; 16];
        pack_nibbles(&l, 16, &mut qs);
        Self {
            d: F16::from_f32(d),
            qs,
        }
    }
}

impl Dot for BlockIQ4NL {
    type Partner = BlockQ8_0;

    fn dot(&self, y: &[BlockQ8_0]) -> f32 {
        (y[0].d.to_f32() * self.d.to_f32()) * dot_i8(&self.quants(), &y[0].qs) as f32
    }
}
