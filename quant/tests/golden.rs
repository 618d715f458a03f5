//! The scalar code against reference data made with llama.cpp: bit-exact reading, activations quantized to the same
//! bytes, quantizers no worse, dot products.
//!
//! Every test walks the manifest, so a type that is in the data and not in the registry fails. The data is that of the project, or what
//! `LEMMA_FIXTURES` has of the same kind.

use lemma_quant::{GgmlType, TypeTraits};
use serde_json::Value;
use std::path::PathBuf;

const ROWS: usize = 12;
const COLS: usize = 1024;

fn bytes(file: &Value) -> Vec<u8> {
    // Manifests have the name alone, or with what is in the file.
    let name = file.as_str().or_else(|| file["file"].as_str());
    let file = name.expect("a file name");
    let own = || {
        [env!("CARGO_MANIFEST_DIR"), "../tests/data"]
            .iter()
            .collect()
    };
    let other = std::env::var_os("LEMMA_FIXTURES").filter(|v| !v.is_empty());
    let folder = other.map_or_else(own, PathBuf::from);
    std::fs::read(folder.join("quant").join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn floats(file: &Value) -> Vec<f32> {
    let bytes = bytes(file);
    let (chunks, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    chunks.iter().map(|&c| f32::from_le_bytes(c)).collect()
}

fn manifest() -> Value {
    serde_json::from_slice(&bytes(&"manifest.json".into())).expect("a JSON manifest")
}

/// Runs `f` on each type of the manifest, its entry there, and the manifest.
fn for_each_type(mut f: impl FnMut(&'static TypeTraits, &Value, &Value)) {
    let m = manifest();
    let types = m["types"].as_array().expect("types");
    assert_eq!(types.len(), 29);
    for entry in types {
        let name = entry["name"].as_str().expect("name");
        let id = entry["id"].as_u64().expect("id") as u32;
        let ty = GgmlType::from_id(id).unwrap_or_else(|| panic!("{name} is not in the registry"));
        let t = ty.traits();
        assert_eq!(t.name, name);
        assert_eq!(Some(t.block_size as u64), entry["block"].as_u64(), "{name}");
        assert_eq!(
            Some(t.type_size as u64),
            entry["bytes_per_block"].as_u64(),
            "{name}"
        );
        f(t, entry, &m);
    }
}

fn dequantize(t: &TypeTraits, bytes: &[u8], n: usize) -> Vec<f32> {
    let mut y = vec![0.0; n];
    let size = t.ty.row_size(n).expect("whole blocks");
    (t.dequantize_row)(&bytes[..size], &mut y);
    y
}

#[test]
fn reads_bit_exactly() {
    for_each_type(|t, entry, _| {
        let pairs = [
            (&entry["quantized"], &entry["dequantized"]),
            (
                &entry["random_bytes"]["file"],
                &entry["random_bytes"]["dequantized"],
            ),
            (
                &entry["extreme_scales"]["file"],
                &entry["extreme_scales"]["dequantized"],
            ),
        ];
        for (file, expected) in pairs {
            if expected.is_null() {
                continue;
            }
            let mut expected = floats(&expected["file"]);
            if cfg!(miri) {
                expected.truncate(2 * t.block_size);
            }
            let y = dequantize(t, &bytes(file), expected.len());
            for (i, (&y, &e)) in y.iter().zip(&expected).enumerate() {
                let same = y.to_bits() == e.to_bits() || (y.is_nan() && e.is_nan());
                assert!(same, "{} {file} value {i}: {y:e}, expected {e:e}", t.name);
            }
        }
    });
}

#[test]
#[cfg_attr(miri, ignore = "slow, and reads no bytes in another way")]
fn activations_get_the_same_bytes() {
    let m = manifest();
    for (name, input, file) in [
        ("q8_0", "source_f32", "q8_0.q.bin"),
        ("q8_1", "source_f32", "q8_1.q.bin"),
        ("q8_K", "source_f32", "q8_K.q.bin"),
        ("q8_0", "activations_f32", "activations.q8_0.bin"),
        ("q8_1", "activations_f32", "activations.q8_1.bin"),
        ("q8_K", "activations_f32", "activations.q8_K.bin"),
        ("f16", "activations_f32", "activations.f16.bin"),
        ("bf16", "activations_f32", "activations.bf16.bin"),
    ] {
        let t = name.parse::<GgmlType>().expect(name).traits();
        let x = floats(&m[input]["file"]);
        let expected = bytes(&file.into());
        let mut y = vec![0; expected.len()];
        t.quantize_row.expect(name)(&x, &mut y);
        let differ: Vec<_> = (0..y.len()).filter(|&i| y[i] != expected[i]).collect();
        assert!(
            differ.is_empty(),
            "{file}: {} bytes differ, first in block {} byte {}: {} instead of {}",
            differ.len(),
            differ[0] / t.type_size,
            differ[0] % t.type_size,
            y[differ[0]],
            expected[differ[0]]
        );
    }
}

fn rmse(a: &[f32], b: &[f32]) -> f64 {
    let squares = a
        .iter()
        .zip(b)
        .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
    (squares.sum::<f64>() / a.len() as f64).sqrt()
}

#[test]
#[cfg_attr(miri, ignore = "slow, and reads no bytes in another way")]
#[allow(clippy::print_stderr, reason = "shown by --nocapture")]
fn quantizers_are_no_worse() {
    for_each_type(|t, entry, m| {
        let (Some(quantize), Some(expected)) = (t.quantize_row, entry["rmse_per_row"].as_array())
        else {
            return;
        };
        let source = floats(&m["source_f32"]["file"]);
        let reference = bytes(&entry["quantized"]);
        let mut y = vec![0; reference.len()];
        quantize(&source, &mut y);
        // That a quantizer gives the very bytes of ggml is not required, but worth knowing.
        let differ = y.iter().zip(&reference).filter(|(a, b)| a != b).count();
        eprintln!("{}: {differ} of {} bytes differ", t.name, y.len());

        let read = dequantize(t, &y, ROWS * COLS);
        for (row, expected) in expected.iter().enumerate() {
            let span = row * COLS..(row + 1) * COLS;
            let got = rmse(&source[span.clone()], &read[span]);
            let expected = expected.as_f64().expect("a number");
            assert!(
                got <= expected * (1.0 + 1e-6),
                "{} row {row}: {got:e}, expected {expected:e}",
                t.name
            );
        }
    });
}

#[test]
#[cfg_attr(miri, ignore = "slow, and reads no bytes in another way")]
#[allow(clippy::print_stderr, reason = "shown by --nocapture")]
fn dot_products() {
    for_each_type(|t, entry, _| {
        let dot = &entry["vec_dot"];
        if dot.is_null() {
            return;
        }
        let vec_dot = t.vec_dot.unwrap_or_else(|| panic!("{} has no dot", t.name));
        let partner = t.vec_dot_type.traits();
        assert_eq!(Some(partner.name), dot["with"].as_str(), "{}", t.name);
        let w = bytes(&entry["quantized"]);
        let x = bytes(&dot["activations"]);
        let expected = floats(&dot["result"]);
        let w_values = dequantize(t, &w, ROWS * COLS);
        let x_values = dequantize(partner, &x, ROWS * COLS);
        let mut worst = 0.0f64;
        for (i, w) in w.chunks_exact(w.len() / ROWS).enumerate() {
            for (k, x) in x.chunks_exact(x.len() / ROWS).enumerate() {
                let magnitudes: f64 = w_values[i * COLS..][..COLS]
                    .iter()
                    .zip(&x_values[k * COLS..][..COLS])
                    .map(|(&w, &x)| (f64::from(w) * f64::from(x)).abs())
                    .sum();
                let got = vec_dot(COLS, w, x);
                let want = expected[i * ROWS + k];
                let diff = (f64::from(got) - f64::from(want)).abs();
                assert!(
                    diff <= 1e-6 * magnitudes,
                    "{} row {i} with {k}: {got:e}, expected {want:e}, magnitudes {magnitudes:e}",
                    t.name
                );
                worst = worst.max(diff / magnitudes.max(f64::MIN_POSITIVE));
            }
        }
        eprintln!("{}: {worst:.1e} of the sum of magnitudes", t.name);
    });
}

#[test]
#[cfg_attr(miri, ignore = "slow, and reads no bytes in another way")]
#[allow(clippy::print_stderr, reason = "shown by --nocapture")]
fn importance_is_heeded() {
    const MEASURED: usize = 3;
    for_each_type(|t, entry, m| {
        let (Some(quantize), Some(expected)) = (
            t.quantize_row_weighted,
            entry["weighted_rmse_with_imatrix"].as_f64(),
        ) else {
            return;
        };
        let source = floats(&m["source_f32"]["file"]);
        let importance = floats(&m["imatrix_f32"]["file"]);
        let weighted_rmse = |y: &[u8]| {
            let read = dequantize(t, y, MEASURED * COLS);
            let errors = source.iter().zip(&read).zip(importance.iter().cycle());
            let sum: f64 = errors
                .map(|((&x, &y), &w)| f64::from(w) * (f64::from(x) - f64::from(y)).powi(2))
                .sum();
            (sum / read.len() as f64).sqrt()
        };
        let size = t.ty.row_size(COLS).expect("whole blocks");
        let mut y = vec![0; MEASURED * size];
        for (x, y) in source.chunks_exact(COLS).zip(y.chunks_exact_mut(size)) {
            quantize(x, &importance, y);
        }
        let got = weighted_rmse(&y);
        let differ = (got - expected).abs() / expected;
        eprintln!("{}: {got:e}, relative difference {differ:.1e}", t.name);
        assert!(
            got <= expected * (1.0 + 1e-6),
            "{}: {got:e}, expected {expected:e}",
            t.name
        );
    });
}
