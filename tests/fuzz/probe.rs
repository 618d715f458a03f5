//! What the fuzz target and its replay test do with bytes: open them as a GGUF file and touch everything in it.

use lemma_engine::gguf::{GgufFile, Value};

/// Opens `bytes`; of a file that opens, reads every key, value and array element and the ends of every tensor.
/// Returns whether it opened. Must not panic for any bytes.
pub(crate) fn probe(bytes: &[u8]) -> bool {
    let file = match GgufFile::from_bytes(bytes, "fuzz.gguf") {
        Ok(file) => file,
        Err(e) => {
            let line = e.to_string();
            assert!(
                !line.chars().any(char::is_control),
                "control character in {line:?}"
            );
            assert!(line.len() < 8192 && e.exit_code() == 4, "{line}");
            return false;
        }
    };
    let meta = file.meta();
    for (key, value) in meta.iter() {
        assert!(meta.get(key).is_some());
        if let Value::Array(a) = value {
            let n = a.values().count();
            assert!(n == a.len() || n == 0);
        }
        let _ = (
            meta.opt_u32(key),
            meta.opt_f32(key),
            meta.opt_bool(key),
            meta.opt_str(key),
            meta.opt_strings(key),
        );
        let _ = (
            meta.opt_u32_per_layer(key, 4),
            meta.opt_i32s(key).is_ok(),
            meta.opt_f32s(key).is_ok(),
        );
    }
    for t in file.tensors() {
        assert_eq!(t.data.len(), t.n_bytes());
        std::hint::black_box((t.data.first(), t.data.last(), t.n_rows(), t.n_elements()));
        assert_eq!(
            file.tensor(&t.name).map(|u| u.data.as_ptr()),
            Some(t.data.as_ptr())
        );
        assert_eq!(file.bytes_of(t.info).len(), t.data.len());
    }
    file.data_alignment().is_power_of_two()
}
