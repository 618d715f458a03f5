//! Properties that hold for any input, checked on random ones.

use lemma_quant::{GgmlType, TypeTraits};
use proptest::collection::vec;
use proptest::prelude::*;

/// One super-block, or several of the smaller ones.
const N: usize = 256;

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 200 },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn all() -> impl Iterator<Item = &'static TypeTraits> {
    GgmlType::ALL.iter().map(|t| t.traits())
}

fn quantize(t: &TypeTraits, x: &[f32]) -> Vec<u8> {
    let mut y = vec![0; t.ty.row_size(x.len()).expect("whole blocks")];
    t.quantize_row.expect("a quantizer")(x, &mut y);
    y
}

fn dequantize(t: &TypeTraits, x: &[u8]) -> Vec<f32> {
    let mut y = vec![0.0; N];
    (t.dequantize_row)(x, &mut y);
    y
}

/// The largest error as part of the largest magnitude in the row.
///
/// For formats without a search it follows from the layout: half a step, or a whole one where the largest
/// magnitude takes the one code that has no counterpart of the other sign. Searches may clip single values for the good of
/// the rest; there it is a limit that no input has come near.
fn error_bound(ty: GgmlType) -> Option<f32> {
    Some(match ty {
        GgmlType::F32 => 0.0,
        GgmlType::F16 => 0.0005,
        GgmlType::BF16 => 0.004,
        GgmlType::Q8_0 | GgmlType::Q8_1 | GgmlType::Q8_K => 0.0045,
        GgmlType::Q4_0 => 0.126,
        GgmlType::Q4_1 => 0.068,
        GgmlType::Q5_0 => 0.063,
        GgmlType::Q5_1 => 0.034,
        GgmlType::Q2_K => 0.6,
        GgmlType::Q3_K => 0.4,
        GgmlType::Q4_K => 0.15,
        GgmlType::Q5_K => 0.08,
        GgmlType::Q6_K => 0.06,
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => 0.2,
        GgmlType::MXFP4 | GgmlType::NVFP4 => 0.26,
        GgmlType::TQ1_0 | GgmlType::TQ2_0 | GgmlType::Q2_0 => 0.501,
        _ => return None,
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn errors_stay_in_bounds(x in vec(-1.0f32..1.0, N), exponent in 0i32..4) {
        let x: Vec<f32> = x.iter().map(|x| x * 10f32.powi(exponent)).collect();
        let max = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        // Of small values the scales become subnormal, and coarse.
        prop_assume!(max > 0.5);
        for t in all().filter(|t| t.quantize_row.is_some()) {
            let Some(bound) = error_bound(t.ty) else { continue };
            for (x, y) in x.iter().zip(dequantize(t, &quantize(t, &x))) {
                prop_assert!((x - y).abs() <= bound * max, "{}: {} became {}, largest {}", t.ty, x, y, max);
            }
        }
    }

    /// Any bits at all, so with NaNs, infinities and subnormal numbers.
    #[test]
    fn quantizers_take_anything(bits in vec(any::<u32>(), N), calm in any::<bool>()) {
        let x: Vec<f32> = bits
            .iter()
            .enumerate()
            // Also with only a few odd values among ordinary ones.
            .map(|(i, &b)| if calm && i % 50 != 0 { b as f32 * 1e-9 } else { f32::from_bits(b) })
            .collect();
        for t in all().filter(|t| t.quantize_row.is_some()) {
            let mut y = quantize(t, &x);
            dequantize(t, &y);
            if let Some(weighted) = t.quantize_row_weighted {
                let importance: Vec<f32> = x.iter().rev().copied().collect();
                weighted(&x, &importance, &mut y);
                dequantize(t, &y);
            }
        }
    }

    /// Blocks of any bytes can be read, and their dot product is that of the values read.
    #[test]
    fn dots_agree_with_the_values(bytes in vec(any::<u8>(), 1024), x in vec(-1.0f32..1.0, N)) {
        for t in all() {
            let w = &bytes[..t.ty.row_size(N).expect("whole blocks").min(bytes.len())];
            if w.len() < t.ty.row_size(N).expect("whole blocks") {
                continue;
            }
            let values = dequantize(t, w);
            let Some(dot) = t.vec_dot else { continue };
            let partner = t.vec_dot_type.traits();
            let x = quantize(partner, &x);
            let got = f64::from(dot(N, w, &x));
            let products = || values.iter().zip(dequantize(partner, &x)).map(|(&w, x)| f64::from(w) * f64::from(x));
            let (want, sum) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
            // Half precision sums of q8_1 cost more; and near f32's limits a block's product overflows.
            let tolerance = if t.vec_dot_type == GgmlType::Q8_1 { 1e-3 } else { 1e-6 };
            if sum < 1e30 {
                let minimums = f64::from(values.iter().fold(0.0f32, |m, v| m.max(v.abs())));
                let limit = tolerance * (sum + minimums * N as f64) + 1e-30;
                prop_assert!((got - want).abs() <= limit, "{}: {} instead of {}, limit {}", t.ty, got, want, limit);
            }
        }
    }
}
