//! Activations in the forms that vector kernels read.
//!
//! Numbers are those of ggml's `q8_0`, `q8_1` and `q8_K`, bit for bit; only where they lie differs. Kernels want the
//! quants aligned, sums that several formats need computed once, and for batches the same four columns of eight tokens
//! beside each other.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use crate::lanes::multiversion;
use lemma_quant::F16;

/// Tokens that lie interleaved in a group.
pub(crate) const GROUP: usize = 8;

/// 32 values: `q8_0` and `q8_1` at once.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub(crate) struct X32 {
    pub(crate) q: [i8; 32],
    /// Scale, rounded to half precision.
    pub(crate) d: f32,
    /// Scale times the sum of quants, as `q8_1` has it, rounded to half precision.
    pub(crate) s: f32,
    /// Sum of the quants.
    pub(crate) sum: i32,
    pub(crate) unused: u32,
}

/// 256 values: `q8_K`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct X256 {
    pub(crate) q: [i8; 256],
    /// Sums of 16 quants.
    pub(crate) sum16: [i16; 16],
    /// Sums of 32 quants.
    pub(crate) sum32: [i16; 8],
    /// Scale.
    pub(crate) d: f32,
    pub(crate) unused: [u32; 3],
}

/// 32 values of each of eight tokens.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub(crate) struct G32 {
    /// `[columns / 4][token][4 columns]`
    pub(crate) q: [[[i8; 4]; GROUP]; 8],
    pub(crate) d: [f32; GROUP],
    pub(crate) s: [f32; GROUP],
    /// Sums of the quants, negated.
    pub(crate) minus_sum: [i32; GROUP],
}

/// 256 values of each of eight tokens.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct G256 {
    /// `[columns / 4][token][4 columns]`
    pub(crate) q: [[[i8; 4]; GROUP]; 64],
    /// Sums of 16 quants, negated.
    pub(crate) minus_sum16: [[i32; GROUP]; 16],
    /// Sums of 32 quants, negated.
    pub(crate) minus_sum32: [[i32; GROUP]; 8],
    /// Sums of 16 quants, two neighbours for each token.
    pub(crate) pairs16: [[[i16; 2]; GROUP]; 8],
    /// Sums of 32 quants, two neighbours for each token.
    pub(crate) pairs32: [[[i16; 2]; GROUP]; 4],
    pub(crate) d: [f32; GROUP],
}

impl X32 {
    pub(crate) const ZERO: Self = Self {
        q: [0; 32],
        d: 0.0,
        s: 0.0,
        sum: 0,
        unused: 0,
    };
}

impl X256 {
    pub(crate) const ZERO: Self = Self {
        q: [0; 256],
        sum16: [0; 16],
        sum32: [0; 8],
        d: 0.0,
        unused: [0; 3],
    };
}

impl G32 {
    pub(crate) fn interleave(&mut self, x: &[X32; GROUP]) {
        for (t, x) in x.iter().enumerate() {
            for (to, from) in self.q.iter_mut().zip(x.q.as_chunks::<4>().0) {
                to[t] = *from;
            }
            self.d[t] = x.d;
            self.s[t] = x.s;
            self.minus_sum[t] = -x.sum;
        }
    }
}

impl G256 {
    pub(crate) fn interleave(&mut self, x: &[X256; GROUP]) {
        for (t, x) in x.iter().enumerate() {
            for (to, from) in self.q.iter_mut().zip(x.q.as_chunks::<4>().0) {
                to[t] = *from;
            }
            for (to, from) in self.minus_sum16.iter_mut().zip(x.sum16) {
                to[t] = -i32::from(from);
            }
            for (to, from) in self.minus_sum32.iter_mut().zip(x.sum32) {
                to[t] = -i32::from(from);
            }
            for (to, from) in self.pairs16.iter_mut().zip(x.sum16.as_chunks::<2>().0) {
                to[t] = *from;
            }
            for (to, from) in self.pairs32.iter_mut().zip(x.sum32.as_chunks::<2>().0) {
                to[t] = *from;
            }
            self.d[t] = x.d;
        }
    }
}

/// Lanes of the largest magnitude; NaN counts as nothing.
#[inline(always)]
fn max_magnitude<const N: usize>(x: &[f32; N]) -> f32 {
    let mut max = [0.0f32; 16];
    for x in x.as_chunks::<16>().0 {
        for i in 0..16 {
            let a = x[i].abs();
            max[i] = if a > max[i] { a } else { max[i] };
        }
    }
    let mut half = 8;
    while half > 0 {
        for i in 0..half {
            max[i] = if max[i + half] > max[i] {
                max[i + half]
            } else {
                max[i]
            };
        }
        half /= 2;
    }
    max[0]
}

multiversion! {
    /// Quantizes as `q8_0` and `q8_1` do.
    pub(crate) fn quantize_32(x: &[f32; 32], y: &mut X32) {
        let d = max_magnitude(x) / 127.0;
        let id = if d == 0.0 { 0.0 } else { 1.0 / d };
        let mut sum = 0;
        for i in 0..32 {
            // Half away from zero; a product that is not a number becomes zero.
            let v = x[i] * id;
            let v = v + 0.499_999_97_f32.copysign(v);
            let v = if v >= -127.0 { v } else { -127.0 };
            let v = if v <= 127.0 { v } else { 127.0 };
            // SAFETY: between -127 and 127.
            let q = unsafe { v.to_int_unchecked::<i32>() };
            y.q[i] = q as i8;
            sum += q;
        }
        y.sum = sum;
        y.d = F16::from_f32(d).to_f32();
        y.s = F16::from_f32(sum as f32 * d).to_f32();
    }

    /// Quantizes as `q8_K` does.
    pub(crate) fn quantize_256(x: &[f32; 256], y: &mut X256) {
        const MAGIC: f32 = 12_582_912.0;
        let magnitude = max_magnitude(x);
        if magnitude == 0.0 {
            *y = X256::ZERO;
            return;
        }
        // The first value of that magnitude decides on the sign.
        let mut max = magnitude;
        for x in x {
            if x.abs() == magnitude {
                max = *x;
                break;
            }
        }
        let iscale = -127.0 / max;
        y.d = 1.0 / iscale;
        for (x, q) in x.as_chunks::<16>().0.iter().zip(y.q.as_chunks_mut::<16>().0) {
            for i in 0..16 {
                // Adding the magic number rounds, ties to even, and leaves the integer in the low bits.
                let v = iscale * x[i];
                let v = if v >= -128.0 { v } else { -128.0 };
                let v = if v <= 127.0 { v } else { 127.0 };
                q[i] = (v + MAGIC).to_bits() as i8;
            }
        }
        for (sum, q) in y.sum16.iter_mut().zip(y.q.as_chunks::<16>().0) {
            *sum = 0;
            for q in q {
                *sum += i16::from(*q);
            }
        }
        for (sum, pair) in y.sum32.iter_mut().zip(y.sum16.as_chunks::<2>().0) {
            *sum = pair[0] + pair[1];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use lemma_quant::{BlockQ8_0, BlockQ8_1, BlockQ8K, Quantize};

    fn inputs() -> Vec<[f32; 256]> {
        let mut state = 1u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        let mut all: Vec<[f32; 256]> = (0..if cfg!(miri) { 2 } else { 300 })
            .map(|i| std::array::from_fn(|_| random() * 10f32.powi(i % 17 - 8)))
            .collect();
        all.push([0.0; 256]);
        all.push(std::array::from_fn(|i| (i as f32 - 127.0) * 0.5));
        all.push(std::array::from_fn(|i| if i % 2 == 0 { -3.0 } else { 3.0 }));
        all.push(std::array::from_fn(|i| if i == 77 { 1e30 } else { 1e-30 }));
        all.push([1e-40; 256]);
        all
    }

    #[test]
    fn numbers_are_those_of_the_formats() {
        for isa in Isa::available() {
            for x in inputs() {
                let want = BlockQ8K::quantize(&x);
                let mut got = X256::ZERO;
                quantize_256(isa, &x, &mut got);
                assert_eq!(got.q, want.qs, "{isa}");
                assert_eq!(got.d.to_bits(), want.d.get().to_bits());
                assert_eq!(got.sum16, want.bsums.map(|s| s.get()));
                for x in x.as_chunks::<32>().0 {
                    let (want, with_sum) = (BlockQ8_0::quantize(x), BlockQ8_1::quantize(x));
                    let mut got = X32::ZERO;
                    quantize_32(isa, x, &mut got);
                    assert_eq!(got.q, want.qs, "{isa}");
                    assert_eq!(got.d.to_bits(), want.d.to_f32().to_bits());
                    assert_eq!(got.s.to_bits(), with_sum.s.to_f32().to_bits());
                    assert_eq!(got.sum, got.q.iter().map(|q| i32::from(*q)).sum::<i32>());
                }
            }
        }
    }
}
