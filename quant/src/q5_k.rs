//! `q5_K`: 5 bits, with 6-bit scales and minimums for every 32 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the scales, binary16 |
//! | 2..4 | `dmin` | scale of the minimums, binary16 |
//! | 4..16 | `scales` | eight 6-bit scales and minimums, see [`unpack_k_scales`](crate::unpack_k_scales) |
//! | 16..48 | `qh` | bit `k` of byte `j`: fifth bit of value `32 k + j` |
//! | 48..176 | `qs` | each 32 bytes are 64 values: byte `j` has the low bits of value `j` in the low nibble, of value `j + 32` in the high one |
//!
//! 256 values in 176 bytes, 5.5 bits per weight. `x = d * scale * q - dmin * min`. Specified by ggml (`block_q5_K`).

use crate::bits::{bit_plane, or_bit_plane, pack_nibbles, unpack_nibbles};
use crate::block::{Block, Dot, Quantize};
use crate::num::F16;
use crate::q4_k::Affine;
use crate::q8_k::{BlockQ8K, QK_K};
use crate::search::AffineSearch;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `q5_K`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ5K {
    /// Scale of the scales.
    pub d: F16,
    /// Scale of the minimums.
    pub dmin: F16,
    /// Scales and minimums, six bits each.
    pub scales: [u8; 12],
    /// Fifth bits of the quants.
    pub qh: [u8; QK_K / 8],
    /// Low four bits of the quants.
    pub qs: [u8; QK_K / 2],
}

impl BlockQ5K {
    /// The quants, 0..=31.
    #[inline]
    pub fn quants(&self) -> [u8; QK_K] {
        let mut q = [0; QK_K];
        unpack_nibbles(&self.qs, 32, &mut q);
        or_bit_plane(&self.qh, 4, &mut q);
        q
    }

    fn packed(a: &Affine) -> Self {
        let mut qs = [0; QK_K / 2];
        pack_nibbles(&a.quants, 32, &mut qs);
        Self {
            d: a.d,
            dmin: a.dmin,
            scales: a.scales,
            qh: bit_plane(&a.quants, 4),
            qs,
        }
    }

    fn unpacked(&self) -> Affine {
        Affine {
            d: self.d,
            dmin: self.dmin,
            scales: self.scales,
            quants: self.quants(),
        }
    }
}

impl Block for BlockQ5K {
    const TYPE: GgmlType = GgmlType::Q5_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        self.unpacked().dequantize(y);
    }
}

impl Quantize for BlockQ5K {
    fn quantize(x: &[f32]) -> Self {
        let search = AffineSearch {
            nmax: 31,
            first: -0.5,
            step: 0.1,
            steps: 15,
        };
        Self::packed(&Affine::quantize(&search, x))
    }

    fn quantize_weighted(x: &[f32], importance: &[f32], _: f32) -> Self {
        Self::packed(&Affine::quantize_weighted(31, x, importance))
    }
}

impl Dot for BlockQ5K {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        self.unpacked().dot(&y[0])
    }
}
