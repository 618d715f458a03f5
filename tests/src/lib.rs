//! Helpers shared by the cross-crate tests.

#[cfg(any(feature = "cuda", feature = "cuda-emulate"))]
pub mod cuda;
pub mod made;

use std::path::{Path, PathBuf};

use lemma_engine::gguf::{self, write::Builder};
use serde_json::Value;

/// Folder of the test data that the project carries.
pub fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// The folders to take `name` from: that of the project, and the larger one that `LEMMA_FIXTURES` names, if it is set.
pub fn folders(name: &str) -> Vec<PathBuf> {
    let more = std::env::var_os("LEMMA_FIXTURES")
        .filter(|v| !v.is_empty())
        .map(|p| PathBuf::from(p).join(name));
    std::iter::once(data().join(name))
        .chain(more)
        .filter(|p| p.is_dir())
        .collect()
}

/// Writes a key as another file has it; numbers of any width as 32 bits.
pub fn copy_key(b: &mut Builder, key: &str, value: gguf::Value<'_>) {
    match value {
        gguf::Value::Str(s) => b.str(key, std::str::from_utf8(s).unwrap()),
        gguf::Value::F32(x) => b.f32(key, x),
        gguf::Value::Bool(x) => b.bool(key, x),
        gguf::Value::Int { value, .. } => b.u32(key, u32::try_from(value).unwrap()),
        gguf::Value::Array(a) => match (a.strings(), a.f32s(), a.ints()) {
            (Some(s), ..) => b.strings(key, s.collect::<Vec<_>>().into_iter()),
            (_, Some(f), _) => b.f32s(key, f),
            (.., Some(i)) => b.i32s(key, i.map(|i| i as i32)),
            // Flags as numbers, which are read as well.
            _ => match a.bools() {
                Some(all) => {
                    let all: Vec<i32> = all.map(i32::from).collect();
                    b.i32s(key, all.into_iter())
                }
                None => panic!("{key}"),
            },
        },
        other => panic!("{key}: {other:?}"),
    };
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A file of little-endian f32.
pub fn floats(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Normalised mean squared error: the sum of squared differences over the sum of squares of the reference.
pub fn nmse(got: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(got.len(), reference.len());
    let square = |x: f64| x * x;
    let error: f64 = got
        .iter()
        .zip(reference)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let size: f64 = reference.iter().map(|b| square(f64::from(*b))).sum();
    error / size
}

/// Index of the largest element, the first of equals.
pub fn argmax(x: &[f32]) -> u32 {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best }) as u32
}
