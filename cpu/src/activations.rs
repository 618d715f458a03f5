//! Activations in the forms that vector kernels read.
//!
//! Numbers are those of ggml's `q8_0`, `q8_1` and `q8_K`, bit for bit; only where they lie differs. Kernels want the
//! quants aligned, and sums that several formats need computed once.

use crate::Isa;
use lemma_quant::F16;

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
    /// The same times -128.
    pub(crate) minus_sum: i32,
}

/// 256 values: `q8_K`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct X256 {
    pub(crate) q: [i8; 256],
    /// The quants with the second and third run of 32 of every 128 swapped, as 64 bytes of nibbles have them. Not
    /// filled in by the quantizer.
    pub(crate) swapped: [i8; 256],
    /// The first of every eight quants, then the second, and so on. Not filled in by the quantizer.
    pub(crate) grouped: [[i8; 32]; 8],
    /// Sums of 16 quants.
    pub(crate) sum16: [i16; 16],
    /// Sums of 32 quants.
    pub(crate) sum32: [i16; 8],
    /// Scale.
    pub(crate) d: f32,
    pub(crate) unused: [u32; 3],
}

/// Four neighbours of 32 values each, in the order in which those of one token are read.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct X32x4 {
    /// The first 16 quants of each.
    pub(crate) low: [[i8; 16]; 4],
    /// The others.
    pub(crate) high: [[i8; 16]; 4],
    pub(crate) d: [f32; 4],
    pub(crate) s: [f32; 4],
    pub(crate) sum: [i32; 4],
    pub(crate) unused: [u32; 4],
}

impl X32x4 {
    pub(crate) fn new(x: &[X32; 4]) -> Self {
        let half = |i: usize| x.map(|x| x.q.as_chunks().0[i]);
        Self {
            low: half(0),
            high: half(1),
            d: x.map(|x| x.d),
            s: x.map(|x| x.s),
            sum: x.map(|x| x.sum),
            unused: [0; 4],
        }
    }
}

impl X32 {
    #[cfg(test)]
    pub(crate) const ZERO: Self = Self {
        q: [0; 32],
        d: 0.0,
        s: 0.0,
        sum: 0,
        minus_sum: 0,
    };
}

impl X256 {
    pub(crate) const ZERO: Self = Self {
        q: [0; 256],
        swapped: [0; 256],
        grouped: [[0; 32]; 8],
        sum16: [0; 16],
        sum32: [0; 8],
        d: 0.0,
        unused: [0; 3],
    };

    /// Fills in `swapped` and `grouped`.
    pub(crate) fn arrange(&mut self) {
        for (k, to) in self.grouped.iter_mut().enumerate() {
            for (to, group) in to.iter_mut().zip(self.q.as_chunks::<8>().0) {
                *to = group[k];
            }
        }
        for (to, q) in self
            .swapped
            .as_chunks_mut::<128>()
            .0
            .iter_mut()
            .zip(self.q.as_chunks().0)
        {
            let q: &[i8; 128] = q;
            to[..32].copy_from_slice(&q[..32]);
            to[32..64].copy_from_slice(&q[64..96]);
            to[64..96].copy_from_slice(&q[32..64]);
            to[96..].copy_from_slice(&q[96..]);
        }
    }
}

/// The value of largest magnitude, the first one of equals, given the largest and the smallest (or zero).
#[inline]
pub(crate) fn extreme(x: &[f32; 256], max: f32, min: f32) -> f32 {
    if max > -min {
        max
    } else if max < -min || max == 0.0 {
        min
    } else {
        // Both signs have it.
        x.iter()
            .copied()
            .find(|x| *x == max || *x == min)
            .unwrap_or(max)
    }
}

/// The largest and the smallest value, or zero; NaN counts as nothing.
fn max_and_min(x: &[f32]) -> (f32, f32) {
    x.iter().fold((0.0, 0.0), |(max, min), x| {
        (
            if *x > max { *x } else { max },
            if *x < min { *x } else { min },
        )
    })
}

/// Quantizes as `q8_0` and `q8_1` do.
pub(crate) fn quantize_32(isa: Isa, x: &[f32; 32], y: &mut X32) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        // SAFETY: a set is only chosen where it is available; `Ops::new` has checked.
        return unsafe { crate::x86::quantize_32(x, y) };
    }
    let _ = isa;
    let (max, min) = max_and_min(x);
    let d = (if -min > max { -min } else { max }) / 127.0;
    let id = if d == 0.0 { 0.0 } else { 1.0 / d };
    y.sum = 0;
    for (q, x) in y.q.iter_mut().zip(x) {
        // Half away from zero; with 0.5 itself, the number below it would become 1.
        let v = x * id;
        *q = (v + 0.499_999_97_f32.copysign(v)).clamp(-127.0, 127.0) as i8;
        y.sum += i32::from(*q);
    }
    y.minus_sum = -128 * y.sum;
    y.d = F16::from_f32(d).to_f32();
    y.s = F16::from_f32(y.sum as f32 * d).to_f32();
}

/// Quantizes as `q8_K` does.
pub(crate) fn quantize_256(isa: Isa, x: &[f32; 256], y: &mut X256) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx2 {
        // SAFETY: a set is only chosen where it is available; `Ops::new` has checked.
        return unsafe { crate::x86::quantize_256(x, y) };
    }
    let _ = isa;
    let (max, min) = max_and_min(x);
    let extreme = extreme(x, max, min);
    *y = X256::ZERO;
    if extreme == 0.0 {
        return;
    }
    let iscale = -127.0 / extreme;
    y.d = 1.0 / iscale;
    for (i, (q, x)) in y.q.iter_mut().zip(x).enumerate() {
        *q = (iscale * x).round_ties_even().clamp(-128.0, 127.0) as i8;
        y.sum16[i / 16] += i16::from(*q);
        y.sum32[i / 32] += i16::from(*q);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                    assert_eq!(got.minus_sum, -128 * got.sum);
                }
            }
        }
    }
}
