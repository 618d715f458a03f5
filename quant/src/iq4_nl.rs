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
use crate::num::{F16, recip_or_zero};
use crate::q8_0::BlockQ8_0;
use crate::search::{GROUP_MAX_EPS, Lanes, max_by_abs_of, mean_square, side_by_side, weigh};
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

/// Halfway from each value to the next: from there on the next is as near. These numbers are exact, and so are the differences to
/// them nearby, so a comparison is all it takes.
const BETWEEN: [f32; 15] = {
    let mut between = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        between[i] = (KVALUES_IQ4NL[i] as f32 + KVALUES_IQ4NL[i + 1] as f32) / 2.0;
        i += 1;
    }
    between
};

/// Index of the table value nearest to `x`.
#[inline(always)]
pub(crate) fn nearest_index(x: f32) -> u8 {
    BETWEEN.iter().map(|&b| u8::from(x >= b)).sum()
}

/// The table value nearest to `x`.
#[inline(always)]
fn nearest_value(x: f32) -> f32 {
    let mut value = f32::from(KVALUES_IQ4NL[0]);
    for (i, &b) in BETWEEN.iter().enumerate() {
        let step = f32::from(KVALUES_IQ4NL[i + 1]) - f32::from(KVALUES_IQ4NL[i]);
        value += if x >= b { step } else { 0.0 };
    }
    value
}

/// The best scales for `L` groups of 32 values, with errors weighted by `w`.
pub(crate) fn search_scales<const L: usize>(x: &[f32], w: &[f32]) -> Lanes<L> {
    let (x, w) = (&side_by_side::<32, L>(x), &side_by_side::<32, L>(w));
    let max = max_by_abs_of(x);
    let sums = |id: Lanes<L>| {
        let (mut sum_qx, mut sum_q2) = ([0.0; L], [0.0; L]);
        for (x, w) in x.iter().zip(w) {
            for j in 0..L {
                let q = nearest_value(id[j] * x[j]);
                sum_qx[j] += w[j] * q * x[j];
                sum_q2[j] += w[j] * q * q;
            }
        }
        (sum_qx, sum_q2)
    };
    let lowest = f32::from(KVALUES_IQ4NL[0]);
    let (sum_qx, sum_q2) = sums(max.map(|max| 1.0 / (-max / lowest)));
    let mut d: Lanes<L> = std::array::from_fn(|j| match sum_q2[j] > 0.0 {
        true => sum_qx[j] / sum_q2[j],
        false => 0.0,
    });
    let mut best: Lanes<L> = std::array::from_fn(|j| d[j] * sum_qx[j]);
    for step in -7..=7 {
        let (sum_qx, sum_q2) = sums(max.map(|max| (step as f32 + lowest) / max));
        for j in 0..L {
            let (qx, q2) = (sum_qx[j], sum_q2[j]);
            if q2 > 0.0 && qx * qx > best[j] * q2 {
                d[j] = qx / q2;
                best[j] = d[j] * qx;
            }
        }
    }
    std::array::from_fn(|j| match max[j].abs() < GROUP_MAX_EPS {
        true => 0.0,
        false => d[j],
    })
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
        let [d] = search_scales::<1>(x, w);
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
