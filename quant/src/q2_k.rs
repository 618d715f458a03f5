//! `q2_K`: 2 bits, with 4-bit scales and minimums for every 16 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..16 | `scales` | sub-block `j` of 16 values: scale in the low nibble, minimum in the high one |
//! | 16..80 | `qs` | each 32 bytes are 128 values: bits `2k`, `2k + 1` of byte `j` are value `32 k + j` |
//! | 80..82 | `d` | scale of the scales, binary16 |
//! | 82..84 | `dmin` | scale of the minimums, binary16 |
//!
//! 256 values in 84 bytes, 2.625 bits per weight. `x = d * scale * q - dmin * min`. Specified by ggml (`block_q2_K`).

use crate::bits::{dot_u8, pack_crumbs, unpack_crumbs};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, nearest_int};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::search::{
    AffineSearch, Groups, affine, code, mean_square, positive, side_by_side, thorough, weigh,
};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q2_K`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ2K {
    /// Scales (low nibbles) and minimums (high nibbles) of 16 values each.
    pub scales: [u8; QK_K / 16],
    /// Quants.
    pub qs: [u8; QK_K / 4],
    /// Scale of the scales.
    pub d: F16,
    /// Scale of the minimums.
    pub dmin: F16,
}

impl BlockQ2K {
    /// The quants, 0..=3.
    #[inline]
    pub fn quants(&self) -> [u8; QK_K] {
        unpack_crumbs(&self.qs)
    }
}

impl Block for BlockQ2K {
    const TYPE: GgmlType = GgmlType::Q2_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let q = self.quants();
        let subs = self.scales.iter().zip(q.chunks_exact(16));
        for ((&sc, q), y) in subs.zip(y.chunks_exact_mut(16)) {
            let (dl, ml) = (d * f32::from(sc & 0xf), dmin * f32::from(sc >> 4));
            for (y, &q) in y.iter_mut().zip(q) {
                *y = dl * f32::from(q) - ml;
            }
        }
    }
}

impl Quantize for BlockQ2K {
    fn quantize(x: &[f32]) -> Self {
        const SEARCH: AffineSearch = AffineSearch {
            nmax: 3,
            first: -0.5,
            step: 0.1,
            steps: 15,
        };
        let mut l = [0; QK_K];
        let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
        for (half, x) in x.chunks_exact(128).enumerate() {
            let groups: Groups<16, 8> = side_by_side(x);
            let w = groups.map(|x| x.map(f32::abs));
            let found = affine::<_, _, true>(&SEARCH, &groups, &w, &mut l[128 * half..][..128]);
            scales[8 * half..][..8].copy_from_slice(&found.0);
            mins[8 * half..][..8].copy_from_slice(&found.1);
        }
        Self::assemble(x, l, quantize_nibbles(&scales), quantize_nibbles(&mins))
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        let floor = mean_square(x);
        let mut l = [0; QK_K];
        let w: [f32; QK_K] = weigh(x, importance, floor);
        let weights: [f32; 16] = std::array::from_fn(|j| w[16 * j..][..16].iter().sum());
        let (groups, w): (Groups<16, 16>, _) = (side_by_side(x), side_by_side(&w));
        let (scales, mins) = affine::<_, _, false>(&thorough(3), &groups, &w, &mut l);
        let (mut ls, mut lm) = ([0; 16], [0; 16]);
        let d = F16::from_f32(positive(15, &scales, &weights, &mut ls));
        let dmin = F16::from_f32(positive(15, &mins, &weights, &mut lm));
        Self::assemble(x, l, (d, ls), (dmin, lm))
    }
}

impl BlockQ2K {
    /// The block with these scales and minimums. `l` are quants from the search, which remain where a scale is zero.
    fn assemble(
        x: &[f32],
        mut l: [u8; QK_K],
        (d, ls): (F16, [u8; 16]),
        (dmin, lm): (F16, [u8; 16]),
    ) -> Self {
        let packed: [u8; 16] = std::array::from_fn(|j| ls[j] | (lm[j] << 4));

        // The scales have been rounded: choose the quants anew for what they have become.
        for ((x, l), sc) in x.chunks_exact(16).zip(l.chunks_exact_mut(16)).zip(packed) {
            let dl = d.to_f32() * f32::from(sc & 0xf);
            if dl == 0.0 {
                continue;
            }
            let ml = dmin.to_f32() * f32::from(sc >> 4);
            for (l, &x) in l.iter_mut().zip(x) {
                *l = code((x + ml) / dl, 0.0, 3.0);
            }
        }
        Self {
            scales: packed,
            qs: pack_crumbs(&l),
            d,
            dmin,
        }
    }
}

/// Sixteen non-negative numbers as 4-bit multiples of a common scale.
fn quantize_nibbles(v: &[f32; 16]) -> (F16, [u8; 16]) {
    let max = v.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    if max == 0.0 {
        return (F16::default(), [0; 16]);
    }
    let iscale = 15.0 / max;
    (
        F16::from_f32(max / 15.0),
        v.map(|v| nearest_int(iscale * v).clamp(0, 15) as u8),
    )
}

impl Dot for BlockQ2K {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let y = &y[0];
        let q = self.quants();
        let (mut sum, mut sum_min) = (0, 0);
        for (((&sc, q), a), bsum) in self
            .scales
            .iter()
            .zip(q.chunks_exact(16))
            .zip(y.runs::<16>())
            .zip(y.sums())
        {
            sum += i32::from(sc & 0xf) * dot_u8(q, a);
            sum_min += i32::from(sc >> 4) * bsum;
        }
        let d = y.d.get() * self.d.to_f32();
        let dmin = y.d.get() * self.dmin.to_f32();
        d * sum as f32 - dmin * sum_min as f32
    }
}
