//! `q3_K`: 3 bits, with 6-bit signed scales for every 16 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `hmask` | bit `k` of byte `j`: third bit of value `32 k + j` |
//! | 32..96 | `qs` | each 32 bytes are 128 values: bits `2k`, `2k + 1` of byte `j` are the low bits of value `32 k + j` |
//! | 96..108 | `scales` | bytes 0..8: low nibbles of scales 0..8 (low) and 8..16 (high); bits `2k`, `2k + 1` of byte `8 + j`: upper bits of scale `4 k + j` |
//! | 108..110 | `d` | scale of the scales, binary16 |
//!
//! 256 values in 110 bytes, 3.4375 bits per weight. `x = d * (scale - 32) * (q - 4)`. Specified by ggml (`block_q3_K`).

use crate::bits::{bit_plane, dot_i8, or_bit_plane, pack_crumbs, unpack_crumbs};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, nearest_int};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::search::{code, mean_square, symmetric, symmetric_by_descent, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q3_K`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ3K {
    /// Third bits of the quants.
    pub hmask: [u8; QK_K / 8],
    /// Low two bits of the quants.
    pub qs: [u8; QK_K / 4],
    /// Scales, six bits each, offset by 32.
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: F16,
}

impl BlockQ3K {
    /// The quants, -4..=3.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        let mut q = unpack_crumbs(&self.qs);
        or_bit_plane(&self.hmask, 2, &mut q);
        q.map(|q| q as i8 - 4)
    }

    /// The scales of the sub-blocks, -32..=31.
    #[inline]
    pub fn sub_scales(&self) -> [i8; 16] {
        std::array::from_fn(|j| {
            let low = self.scales[j % 8] >> (4 * (j / 8)) & 0xf;
            let high = self.scales[8 + j % 4] >> (2 * (j / 4)) & 3;
            (low | high << 4) as i8 - 32
        })
    }
}

impl Block for BlockQ3K {
    const TYPE: GgmlType = GgmlType::Q3_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let q = self.quants();
        let subs = self.sub_scales().into_iter().zip(q.chunks_exact(16));
        for ((sc, q), y) in subs.zip(y.chunks_exact_mut(16)) {
            let dl = d * f32::from(sc);
            for (y, &q) in y.iter_mut().zip(q) {
                *y = dl * f32::from(q);
            }
        }
    }
}

impl Quantize for BlockQ3K {
    fn quantize(x: &[f32]) -> Self {
        let mut l = [0; QK_K];
        let mut sub = [0.0; 16];
        for ((sub, x), l) in sub
            .iter_mut()
            .zip(x.chunks_exact(16))
            .zip(l.chunks_exact_mut(16))
        {
            *sub = symmetric_by_descent(4, x, l);
        }

        let max = max_by_abs(&sub);
        if max == 0.0 {
            return Self::assemble(x, l, F16::default(), &[0; 16]);
        }
        let iscale = -32.0 / max;
        let codes = sub.map(|s| (nearest_int(iscale * s).clamp(-32, 31) + 32) as u8);
        Self::assemble(x, l, F16::from_f32(1.0 / iscale), &codes)
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        let floor = 2.0 * mean_square(x);
        let mut l = [0; QK_K];
        let w: [f32; QK_K] = weigh(x, importance, floor);
        let weights: [f32; 16] = std::array::from_fn(|j| w[16 * j..][..16].iter().sum());
        let sub = symmetric::<16, 16>(4, x, &w, &mut l);
        let mut codes = [0; 16];
        let [d] = symmetric::<16, 1>(32, &sub, &weights, &mut codes);
        Self::assemble(x, l, F16::from_f32(d), &codes)
    }
}

impl BlockQ3K {
    /// The block with these scales (offset by 32). `l` are quants from the search, which remain where a scale is zero.
    fn assemble(x: &[f32], mut l: [u8; QK_K], d: F16, codes: &[u8; 16]) -> Self {
        let mut block = Self::zeroed();
        block.d = d;
        for (j, code) in codes.iter().enumerate() {
            block.scales[j % 8] |= (code & 0xf) << (4 * (j / 8));
            block.scales[8 + j % 4] |= (code >> 4) << (2 * (j / 4));
        }

        // The scales have been rounded: choose the quants anew for what they have become.
        let subs = x.chunks_exact(16).zip(l.chunks_exact_mut(16));
        for ((x, l), sc) in subs.zip(block.sub_scales()) {
            let dl = block.d.to_f32() * f32::from(sc);
            if dl == 0.0 {
                continue;
            }
            for (l, &x) in l.iter_mut().zip(x) {
                *l = code(x / dl, -4.0, 3.0).wrapping_add(4);
            }
        }
        block.hmask = bit_plane(&l, 2);
        block.qs = pack_crumbs(&l);
        block
    }
}

impl Dot for BlockQ3K {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let y = &y[0];
        let q = self.quants();
        let sum: i32 = self
            .sub_scales()
            .into_iter()
            .zip(q.chunks_exact(16))
            .zip(y.runs::<16>())
            .map(|((sc, q), a)| i32::from(sc) * dot_i8(q, a))
            .sum();
        self.d.to_f32() * y.d.get() * sum as f32
    }
}
