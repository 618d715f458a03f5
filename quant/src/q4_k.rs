//! `q4_K`: 4 bits, with 6-bit scales and minimums for every 32 values. The work-horse of published models.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the scales, binary16 |
//! | 2..4 | `dmin` | scale of the minimums, binary16 |
//! | 4..16 | `scales` | eight 6-bit scales and minimums, see [`unpack_k_scales`] |
//! | 16..144 | `qs` | each 32 bytes are 64 values: byte `j` has value `j` in the low nibble, value `j + 32` in the high one |
//!
//! 256 values in 144 bytes, 4.5 bits per weight. `x = d * scale * q - dmin * min`. Specified by ggml (`block_q4_K`).

use crate::bits::{dot_u8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::k_scales::{pack_k_scales, unpack_k_scales};
use crate::num::{F16, nearest_int};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::search::{
    AffineSearch, Groups, affine, code, mean_square, positive, side_by_side, thorough, weigh,
};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q4_K`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ4K {
    /// Scale of the scales.
    pub d: F16,
    /// Scale of the minimums.
    pub dmin: F16,
    /// Scales and minimums, six bits each.
    pub scales: [u8; 12],
    /// Quants.
    pub qs: [u8; QK_K / 2],
}

impl BlockQ4K {
    fn unpacked(&self) -> Affine {
        Affine {
            d: self.d,
            dmin: self.dmin,
            scales: self.scales,
            quants: self.quants(),
        }
    }

    fn packed(a: &Affine) -> Self {
        let mut qs = [0; QK_K / 2];
        pack_nibbles(&a.quants, 32, &mut qs);
        Self {
            d: a.d,
            dmin: a.dmin,
            scales: a.scales,
            qs,
        }
    }

    /// The quants, 0..=15.
    #[inline]
    pub fn quants(&self) -> [u8; QK_K] {
        let mut q = [0; QK_K];
        unpack_nibbles(&self.qs, 32, &mut q);
        q
    }
}

impl Block for BlockQ4K {
    const TYPE: GgmlType = GgmlType::Q4_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        self.unpacked().dequantize(y);
    }
}

impl Quantize for BlockQ4K {
    fn quantize(x: &[f32]) -> Self {
        let search = AffineSearch {
            nmax: 15,
            first: -1.0,
            step: 0.1,
            steps: 20,
        };
        Self::packed(&Affine::quantize(&search, x))
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        Self::packed(&Affine::quantize_weighted(15, x, importance))
    }
}

impl Dot for BlockQ4K {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        self.unpacked().dot(&y[0])
    }
}

/// A block of `q4_K` or `q5_K` with its quants unpacked: from here on the two are the same.
pub(crate) struct Affine {
    pub d: F16,
    pub dmin: F16,
    pub scales: [u8; 12],
    pub quants: [u8; QK_K],
}

impl Affine {
    pub(crate) fn dequantize(&self, y: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (scales, mins) = unpack_k_scales(&self.scales);
        let subs = scales
            .into_iter()
            .zip(mins)
            .zip(self.quants.chunks_exact(32));
        for (((sc, m), q), y) in subs.zip(y.chunks_exact_mut(32)) {
            let (dl, ml) = (d * f32::from(sc), dmin * f32::from(m));
            for (y, &q) in y.iter_mut().zip(q) {
                *y = dl * f32::from(q) - ml;
            }
        }
    }

    pub(crate) fn dot(&self, y: &BlockQ8K) -> f32 {
        let (scales, mins) = unpack_k_scales(&self.scales);
        let bsums = y.sums();
        let (mut sum, mut sum_min) = (0, 0);
        for (j, (q, a)) in self.quants.chunks_exact(32).zip(y.runs::<32>()).enumerate() {
            sum += i32::from(scales[j]) * dot_u8(q, a);
            sum_min += i32::from(mins[j]) * (bsums[2 * j] + bsums[2 * j + 1]);
        }
        let d = self.d.to_f32() * y.d.get();
        let dmin = self.dmin.to_f32() * y.d.get();
        d * sum as f32 - dmin * sum_min as f32
    }

    pub(crate) fn quantize(search: &AffineSearch, x: &[f32]) -> Self {
        let groups: Groups<32, 8> = side_by_side(x);
        let mut rms = [0.0; 8];
        for x in &groups {
            (0..8).for_each(|j| rms[j] += x[j] * x[j]);
        }
        let rms = rms.map(|sum| (sum / 32.0).sqrt());
        // Large values matter more, but small ones are not to be forgotten.
        let w = groups.map(|x| std::array::from_fn(|j| rms[j] + x[j].abs()));
        let mut l = [0; QK_K];
        let (scales, mins) = affine::<_, _, false>(search, &groups, &w, &mut l);
        let (scales, mins) = (quantize_six_bits(&scales), quantize_six_bits(&mins));
        Self::assemble(search.nmax, x, l, scales, mins)
    }

    pub(crate) fn quantize_weighted(nmax: i32, x: &[f32], importance: &[f32]) -> Self {
        let floor = 2.0 * mean_square(x);
        let w: [f32; QK_K] = weigh(x, importance, floor);
        let weights: [f32; 8] = std::array::from_fn(|j| w[32 * j..][..32].iter().sum());
        let (groups, w): (Groups<32, 8>, _) = (side_by_side(x), side_by_side(&w));
        let mut l = [0; QK_K];
        let (scales, mins) = affine::<_, _, false>(&thorough(nmax), &groups, &w, &mut l);
        let (mut ls, mut lm) = ([0; 8], [0; 8]);
        let d = F16::from_f32(positive(63, &scales, &weights, &mut ls));
        let dmin = F16::from_f32(positive(63, &mins, &weights, &mut lm));
        Self::assemble(nmax, x, l, (d, ls), (dmin, lm))
    }

    /// The block with these scales and minimums. `l` are quants from the search, which remain where a scale is zero.
    fn assemble(
        nmax: i32,
        x: &[f32],
        mut l: [u8; QK_K],
        (d, ls): (F16, [u8; 8]),
        (dmin, lm): (F16, [u8; 8]),
    ) -> Self {
        // The scales have been rounded: choose the quants anew for what they have become.
        for (j, (x, l)) in x.chunks_exact(32).zip(l.chunks_exact_mut(32)).enumerate() {
            let dl = d.to_f32() * f32::from(ls[j]);
            if dl == 0.0 {
                continue;
            }
            let ml = dmin.to_f32() * f32::from(lm[j]);
            for (l, &x) in l.iter_mut().zip(x) {
                *l = code((x + ml) / dl, 0.0, nmax as f32);
            }
        }
        Self {
            d,
            dmin,
            scales: pack_k_scales(&ls, &lm),
            quants: l,
        }
    }
}

/// Eight non-negative numbers as 6-bit multiples of a common scale.
fn quantize_six_bits(v: &[f32; 8]) -> (F16, [u8; 8]) {
    let max = v.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    let inv = if max > 0.0 { 63.0 / max } else { 0.0 };
    (
        F16::from_f32(max / 63.0),
        v.map(|v| nearest_int(inv * v).clamp(0, 63) as u8),
    )
}
