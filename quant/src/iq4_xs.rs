//! `iq4_xs`: the table of `iq4_nl` in super-blocks, with 6-bit signed scales for every 32 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, binary16 |
//! | 2..4 | `scales_h` | little-endian 16 bits: bits `2k`, `2k + 1` are the upper bits of scale `k` |
//! | 4..8 | `scales_l` | low nibbles of the scales, the earlier in the low nibble |
//! | 8..136 | `qs` | each 16 bytes are 32 values: byte `j` has the index of value `j` in the low nibble, of value `j + 16` in the high one |
//!
//! 256 values in 136 bytes, 4.25 bits per weight. `x = d * (scale - 32) * table[q]`. Specified by ggml
//! (`block_iq4_xs`).

use crate::bits::{dot_i8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::iq::{nibbles, scale_quants};
use crate::iq4_nl::{KVALUES_IQ4NL, nearest_index, search_scales};
use crate::num::{F16, U16Le, max_by_abs, nearest_int, recip_or_zero};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::search::{mean_square, weigh};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `iq4_xs`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockIQ4XS {
    /// Scale of the scales.
    pub d: F16,
    /// Upper two bits of the scales.
    pub scales_h: U16Le,
    /// Low four bits of the scales.
    pub scales_l: [u8; QK_K / 64],
    /// Indices.
    pub qs: [u8; QK_K / 2],
}

impl BlockIQ4XS {
    /// The table values of the indices.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        let mut q = [0; QK_K];
        unpack_nibbles(&self.qs, 16, &mut q);
        q.map(|q| KVALUES_IQ4NL[usize::from(q)])
    }

    /// The scales of 32 values each, -32..=31.
    #[inline]
    pub fn sub_scales(&self) -> [i8; 8] {
        let (low, high) = (nibbles::<8>(&self.scales_l), self.scales_h.get());
        std::array::from_fn(|k| (low[k] | ((high >> (2 * k) & 3) << 4) as u8) as i8 - 32)
    }
}

impl Block for BlockIQ4XS {
    const TYPE: GgmlType = GgmlType::IQ4_XS;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.sub_scales().map(|s| d * f32::from(s));
        scale_quants(scales, &self.quants(), y);
    }
}

impl Quantize for BlockIQ4XS {
    fn quantize(x: &[f32]) -> Self {
        let w: [f32; QK_K] = std::array::from_fn(|i| x[i] * x[i]);
        Self::assemble(x, search_scales(x, &w))
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        let w: [f32; QK_K] = weigh(x, importance, 2.0 * mean_square(x));
        Self::assemble(x, search_scales(x, &w))
    }
}

impl BlockIQ4XS {
    /// The block with scales as near to these as can be stored.
    fn assemble(x: &[f32], sub: [f32; 8]) -> Self {
        let d = -max_by_abs(&sub) / 32.0;
        let id = recip_or_zero(d);

        let mut l = [0; QK_K];
        let mut scales_l = [0; 4];
        let mut scales_h = 0;
        let parts = x.chunks_exact(32).zip(l.chunks_exact_mut(32));
        for (k, ((x, l), sub)) in parts.zip(sub).enumerate() {
            let scale = nearest_int(id * sub).clamp(-32, 31);
            let idl = recip_or_zero(d * scale as f32);
            for (l, &x) in l.iter_mut().zip(x) {
                *l = nearest_index(idl * x);
            }
            let code = (scale + 32) as u8;
            scales_l[k / 2] |= (code & 0xf) << (4 * (k % 2));
            scales_h |= u16::from(code >> 4) << (2 * k);
        }
        let mut qs = [0; QK_K / 2];
        pack_nibbles(&l, 16, &mut qs);
        Self {
            d: F16::from_f32(d),
            scales_h: U16Le::new(scales_h),
            scales_l,
            qs,
        }
    }
}

impl Dot for BlockIQ4XS {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        let y = &y[0];
        let q = self.quants();
        let sum: i32 = self
            .sub_scales()
            .into_iter()
            .zip(q.chunks_exact(32))
            .zip(y.runs::<32>())
            .map(|((sc, q), a)| i32::from(sc) * dot_i8(q, a))
            .sum();
        self.d.to_f32() * y.d.get() * sum as f32
    }
}
