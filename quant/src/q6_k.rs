//! `q6_K`: 6 bits, with 8-bit signed scales for every 16 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `ql` | each 64 bytes are 128 values: byte `j` has the low bits of value `j` in the low nibble, of value `j + 64` in the high one |
//! | 128..192 | `qh` | each 32 bytes are 128 values: bits `2k`, `2k + 1` of byte `j` are the upper bits of value `32 k + j` |
//! | 192..208 | `scales` | signed scales of 16 values each |
//! | 208..210 | `d` | scale of the scales, binary16 |
//!
//! 256 values in 210 bytes, 6.5625 bits per weight. `x = d * scale * (q - 32)`. Specified by ggml (`block_q6_K`).

use crate::bits::{dot_i8, pack_crumbs, pack_nibbles, unpack_crumbs, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, nearest_int};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::search::{GROUP_MAX_EPS, code, symmetric};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q6_K`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ6K {
    /// Low four bits of the quants.
    pub ql: [u8; QK_K / 2],
    /// Upper two bits of the quants.
    pub qh: [u8; QK_K / 4],
    /// Scales of 16 values each.
    pub scales: [i8; QK_K / 16],
    /// Scale of the scales.
    pub d: F16,
}

impl BlockQ6K {
    /// The quants, -32..=31.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        let mut q = [0; QK_K];
        unpack_nibbles(&self.ql, 64, &mut q);
        for (q, h) in q.iter_mut().zip(unpack_crumbs(&self.qh)) {
            *q |= h << 4;
        }
        q.map(|q| q as i8 - 32)
    }
}

impl Block for BlockQ6K {
    const TYPE: GgmlType = GgmlType::Q6_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let q = self.quants();
        let subs = self.scales.iter().zip(q.chunks_exact(16));
        for ((&sc, q), y) in subs.zip(y.chunks_exact_mut(16)) {
            let dl = d * f32::from(sc);
            for (y, &q) in y.iter_mut().zip(q) {
                *y = dl * f32::from(q);
            }
        }
    }
}

impl Quantize for BlockQ6K {
    fn quantize(x: &[f32]) -> Self {
        let w: [f32; QK_K] = std::array::from_fn(|i| x[i] * x[i]);
        Self::quantize_with(x, &w)
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        Self::quantize_with(x, importance)
    }
}

impl BlockQ6K {
    /// Encodes `x`, with errors weighted by `w`.
    fn quantize_with(x: &[f32], w: &[f32]) -> Self {
        let mut l = [0; QK_K];
        let mut sub = [0.0; 16];
        for (half, sub) in sub.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let [x, w] = [x, w].map(|v| &v[128 * half..][..128]);
            *sub = symmetric::<16, 8>(32, x, w, &mut l[128 * half..][..128]);
        }
        let max = max_by_abs(&sub);
        if max.abs() < GROUP_MAX_EPS {
            return Self::zeroed();
        }
        let iscale = -128.0 / max;
        let d = F16::from_f32(1.0 / iscale);
        let scales = sub.map(|s| nearest_int(iscale * s).clamp(-128, 127) as i8);

        // The scales have been rounded: choose the quants anew for what they have become.
        for ((x, l), sc) in x.chunks_exact(16).zip(l.chunks_exact_mut(16)).zip(scales) {
            let dl = d.to_f32() * f32::from(sc);
            if dl == 0.0 {
                continue;
            }
            for (l, &x) in l.iter_mut().zip(x) {
                *l = code(x / dl, -32.0, 31.0).wrapping_add(32);
            }
        }
        let mut ql = [0; QK_K / 2];
        pack_nibbles(&l, 64, &mut ql);
        Self {
            ql,
            qh: pack_crumbs(&l.map(|l| l >> 4)),
            scales,
            d,
        }
    }
}

impl Dot for BlockQ6K {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let y = &y[0];
        let q = self.quants();
        let sum: i32 = self
            .scales
            .iter()
            .zip(q.chunks_exact(16))
            .zip(y.runs::<16>())
            .map(|((&sc, q), a)| i32::from(sc) * dot_i8(q, a))
            .sum();
        self.d.to_f32() * y.d.get() * sum as f32
    }
}
