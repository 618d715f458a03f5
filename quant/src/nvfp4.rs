//! `nvfp4`: 4-bit floats (E2M1) with an 8-bit float as scale for every 16 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..4 | `d` | scales of 16 values each, unsigned E4M3 |
//! | 4..36 | `qs` | each 8 bytes are 16 values: byte `j` has value `j` in the low nibble, value `j + 8` in the high one |
//!
//! 64 values in 36 bytes, 4.5 bits per weight. The number formats are NVIDIA's, the arrangement is ggml's
//! (`block_nvfp4`). A scale for the whole tensor is kept outside the blocks.

use crate::bits::{dot_i8, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::mxfp4::{KVALUES_FP4, nearest_fp4};
use crate::num::{f32_to_ue4m3, max_by_abs, ue4m3_half_to_f32};
use crate::q8_0::BlockQ8_0;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `nvfp4`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockNVFP4 {
    /// Scales of 16 values each.
    pub d: [u8; 4],
    /// E2M1 codes.
    pub qs: [u8; 32],
}

impl BlockNVFP4 {
    /// The values, doubled.
    #[inline]
    pub fn quants(&self) -> [i8; 64] {
        let mut q = [0; 64];
        unpack_nibbles(&self.qs, 8, &mut q);
        q.map(|q| KVALUES_FP4[usize::from(q)])
    }
}

impl Block for BlockNVFP4 {
    const TYPE: GgmlType = GgmlType::NVFP4;
    const LEN: usize = 64;

    fn dequantize(&self, y: &mut [f32]) {
        let q = self.quants();
        let subs = self.d.iter().zip(q.chunks_exact(16));
        for ((&d, q), y) in subs.zip(y.chunks_exact_mut(16)) {
            let d = ue4m3_half_to_f32(d);
            for (y, &q) in y.iter_mut().zip(q) {
                *y = f32::from(q) * d;
            }
        }
    }
}

impl Quantize for BlockNVFP4 {
    fn quantize(x: &[f32]) -> Self {
        let mut block = Self::zeroed();
        let mut l = [0; 64];
        let parts = x.chunks_exact(16).zip(l.chunks_exact_mut(16));
        for ((x, l), code) in parts.zip(&mut block.d) {
            // The largest code is 6.
            *code = f32_to_ue4m3(max_by_abs(x).abs() / 6.0);
            let d = ue4m3_half_to_f32(*code);
            for (l, &x) in l.iter_mut().zip(x) {
                *l = nearest_fp4(x, d);
            }
        }
        pack_nibbles(&l, 8, &mut block.qs);
        block
    }
}

impl Dot for BlockNVFP4 {
    type Partner = BlockQ8_0;

    fn dot(&self, y: &[BlockQ8_0]) -> f32 {
        let q = self.quants();
        let activations = y
            .iter()
            .flat_map(|y| y.qs.chunks_exact(16).map(|a| (y.d.to_f32(), a)));
        self.d
            .iter()
            .zip(q.chunks_exact(16))
            .zip(activations)
            .map(|((&d, q), (dy, a))| dy * ue4m3_half_to_f32(d) * dot_i8(q, a) as f32)
            .sum()
    }
}
