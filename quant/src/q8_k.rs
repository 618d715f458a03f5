//! `q8_K`: 8 bits, a scale and sums of 16. Activations only, for the formats of 256 values.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..4 | `d` | scale, binary32 |
//! | 4..260 | `qs` | 256 signed bytes in order |
//! | 260..292 | `bsums` | 16 signed 16-bit sums of 16 quants each |
//!
//! 256 values in 292 bytes, 9.125 bits per value. `x = d * q`. Specified by ggml (`block_q8_K`).

use crate::block::{Block, Quantize};
use crate::num::{F32Le, I16Le, max_by_abs, nearest_int};
use crate::types::GgmlType;
use bytemuck::{Pod, Zeroable};

/// Values in a super-block of the formats that have one.
pub const QK_K: usize = 256;

/// A block of `q8_K`; the module describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockQ8K {
    /// Scale.
    pub d: F32Le,
    /// Quants, -127..=127 when made by a quantizer.
    pub qs: [i8; QK_K],
    /// Sums of 16 consecutive quants.
    pub bsums: [I16Le; QK_K / 16],
}

impl BlockQ8K {
    /// The quants in runs of `N` and nothing else.
    #[inline]
    pub(crate) fn runs<const N: usize>(&self) -> impl Iterator<Item = &[i8; N]> {
        self.qs.as_chunks::<N>().0.iter()
    }

    /// `bsums` as integers.
    #[inline]
    pub(crate) fn sums(&self) -> [i32; QK_K / 16] {
        self.bsums.map(|s| i32::from(s.get()))
    }
}

impl Block for BlockQ8K {
    const TYPE: GgmlType = GgmlType::Q8_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, y: &mut [f32]) {
        let d = self.d.get();
        for (y, &q) in y.iter_mut().zip(&self.qs) {
            *y = d * f32::from(q);
        }
    }
}

impl Quantize for BlockQ8K {
    fn quantize(x: &[f32]) -> Self {
        let max = max_by_abs(x);
        if max == 0.0 {
            return Self::zeroed();
        }
        // The value of largest magnitude becomes -127, whatever its sign: the scale may be negative.
        let iscale = -127.0 / max;
        let mut y = Self::zeroed();
        y.d = F32Le::new(1.0 / iscale);
        for (q, &x) in y.qs.iter_mut().zip(x) {
            *q = nearest_int(iscale * x).clamp(-128, 127) as i8;
        }
        for (sum, q) in y.bsums.iter_mut().zip(y.qs.as_chunks::<16>().0) {
            *sum = I16Le::new(q.iter().map(|&q| i16::from(q)).sum());
        }
        y
    }
}
