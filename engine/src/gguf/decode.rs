//! The tensor directory as gguf-rs decodes it.
//!
//! gguf-rs sees only headers the guard has accepted, and only the parts it can be trusted with. It is given a copy of the
//! header in which long and nested arrays are empty: it would turn each element into a JSON value (the vocabulary of a
//! 150 k token model alone costs it tens of milliseconds and as many allocations), and it cannot read arrays of arrays
//! at all. Arrays are read from their place in the file instead. What remains is a few kilobytes.

use std::io::Cursor;

use gguf_rs::{ByteOrder, GGUFContainer};

use super::guard::{Header, TensorSpan};
use super::value::ValueKind;
use crate::error::{Error, Result};

/// Longest array that stays in the copy.
const KEEP_ARRAY: u64 = 512;
/// The last ggml type that gguf-rs 0.1.8 decodes; the next one makes it panic, later ones fail the file.
const LAST_TYPE: u32 = 39;

/// A tensor as gguf-rs describes it.
pub(super) struct Decoded {
    pub(super) name: String,
    pub(super) kind: u32,
    pub(super) shape: Vec<u64>,
    pub(super) offset: u64,
}

/// Decodes the tensor directory; `None` if the file has a type that gguf-rs does not know, so that the guard's own
/// table has to serve.
pub(super) fn decode(bytes: &[u8], header: &Header, file: &str) -> Result<Option<Vec<Decoded>>> {
    if header.tensors.iter().any(|t| t.ty.id() > LAST_TYPE) {
        return Ok(None);
    }
    let failed = |e: &dyn std::fmt::Display| {
        Error::runtime_in(file, format!("the decoder refuses a checked header: {e}"))
    };
    // The container is created behind the magic, which its own opener would have consumed.
    let reader = Cursor::new(small_header(bytes, header).split_off(4));
    let model = GGUFContainer::new(ByteOrder::LE, Box::new(reader), 0)
        .decode()
        .map_err(|e| failed(&e))?;
    let decoded: Vec<_> = model
        .tensors()
        .iter()
        .map(|t| Decoded {
            name: t.name.clone(),
            kind: t.kind,
            shape: t.shape.clone(),
            offset: t.offset,
        })
        .collect();
    let agree = decoded.len() == header.tensors.len()
        && decoded
            .iter()
            .zip(&header.tensors)
            .all(|(d, t)| same(d, t, bytes));
    debug_assert!(agree, "guard and decoder disagree on {file}");
    if !agree {
        return Err(failed(&"it reads other tensors than the header check"));
    }
    Ok(Some(decoded))
}

fn same(d: &Decoded, t: &TensorSpan, bytes: &[u8]) -> bool {
    d.name.as_bytes() == &bytes[t.name.clone()]
        && d.kind == t.ty.id()
        && d.shape == t.dims[..t.n_dims as usize]
        && d.offset == t.offset
}

/// The header with long and nested arrays made empty.
fn small_header(bytes: &[u8], header: &Header) -> Vec<u8> {
    let mut small = bytes[..24].to_vec();
    for pair in &header.kv {
        match pair.array {
            Some((elem, n)) if n > KEEP_ARRAY || elem == ValueKind::Array => {
                // Length and text of the key and the value type stay; then comes an array of no u8.
                small.extend_from_slice(&bytes[pair.entry.start..pair.key.end + 4]);
                small.extend_from_slice(&ValueKind::U8.id().to_le_bytes());
                small.extend_from_slice(&0_u64.to_le_bytes());
            }
            _ => small.extend_from_slice(&bytes[pair.entry.clone()]),
        }
    }
    small.extend_from_slice(&bytes[header.tensors_start..header.end]);
    small
}
