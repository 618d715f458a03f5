//! `tq2_0`: ternary values in two bits each.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..64 | `qs` | each 32 bytes are 128 values: bits `2k`, `2k + 1` of byte `j` are value `32 k + j` |
//! | 64..66 | `d` | scale, binary16 |
//!
//! 256 values in 66 bytes, 2.0625 bits per weight. `x = d * (q - 1)`. Specified by ggml (`block_tq2_0`).

use crate::bits::{dot_i8, pack_crumbs, unpack_crumbs};
use crate::block::{Block, Dot, Quantize};
use crate::num::{F16, max_by_abs, recip_or_zero};
use crate::q8_k::{BlockQ8K, QK_K};
use crate::tq1_0::digit;
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// A block of `tq2_0`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockTQ2_0 {
    /// Quants, offset by 1.
    pub qs: [u8; QK_K / 4],
    /// Scale.
    pub d: F16,
}

impl BlockTQ2_0 {
    /// The quants, -1, 0 and 1; 2 can be stored too.
    #[inline]
    pub fn quants(&self) -> [i8; QK_K] {
        unpack_crumbs(&self.qs).map(|q| q as i8 - 1)
    }
}

impl Block for BlockTQ2_0 {
    const TYPE: GgmlType = GgmlType::TQ2_0;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.to_f32();
        for (y, q) in y.iter_mut().zip(self.quants()) {
            *y = f32::from(q) * d;
        }
    }
}

impl Quantize for BlockTQ2_0 {
    fn quantize(x: &[f32]) -> Self {
        let d = max_by_abs(x).abs();
        let id = recip_or_zero(d);
        Self {
            qs: pack_crumbs(&std::array::from_fn(|i| digit(x[i], id))),
            d: F16::from_f32(d),
        }
    }
}

impl Dot for BlockTQ2_0 {
    type Partner = BlockQ8K;

    fn dot(&self, y: &[BlockQ8K]) -> f32 {
        dot_i8(&self.quants(), &y[0].qs) as f32 * (self.d.to_f32() * y[0].d.get())
    }
}
