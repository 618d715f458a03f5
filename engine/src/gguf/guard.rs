//! Checks a GGUF header before anything else looks at it.
//!
//! The rules are those of the GGUF specification, and where it is silent those of ggml, because files that ggml refuses
//! are not models anybody can use. The checker walks the bytes once and keeps spans, never copies of values: a header of
//! n bytes costs O(n) time and, whatever counts it announces, memory in proportion to entries that are really there.
//! An error names the culprit: the key or tensor, the byte offset, what was found and what was expected.

use std::collections::HashSet;
use std::ops::Range;

use lemma_quant::GgmlType;

use super::value::ValueKind;
use crate::error::{Error, NAME_MAX, Result, escape};

/// `general.alignment` where a file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// The only dimension counts a ggml tensor can have are 1 to this.
pub const MAX_DIMS: u32 = 4;
/// Longest key in bytes (GGUF specification).
const MAX_KEY: usize = 65_535;
/// Longest tensor name in bytes (GGUF specification).
const MAX_TENSOR_NAME: usize = 64;
/// Deepest array in an array; the specification allows nesting, no known file uses it.
const MAX_NESTING: u32 = 4;
/// Fewest bytes a key-value pair takes: key length, value type, one byte of value.
const MIN_KV_BYTES: u64 = 8 + 4 + 1;
/// Fewest bytes a tensor info takes: name length, n_dims, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// One key-value pair, as byte spans of the file.
#[derive(Debug, Clone)]
pub struct KvSpan {
    /// The key; valid UTF-8.
    pub key: Range<usize>,
    /// Type of the value.
    pub kind: ValueKind,
    /// The value's bytes. Of a string: its text without the length. Of an array: its elements, strings with their lengths.
    pub value: Range<usize>,
    /// Of an array: element type and number of elements.
    pub array: Option<(ValueKind, u64)>,
    /// The whole pair, from the length of the key to the end of the value.
    pub entry: Range<usize>,
}

/// One tensor info, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpan {
    /// The name's bytes in the file; valid UTF-8.
    pub name: Range<usize>,
    /// Element type.
    pub ty: GgmlType,
    /// Row length first; unused dimensions are 1.
    pub dims: [u64; 4],
    /// How many dimensions the file spells out, 1 to 4.
    pub n_dims: u32,
    /// Offset from the start of the data section, as the file gives it.
    pub offset: u64,
    /// Size of the data in bytes, computed from type and dimensions.
    pub n_bytes: u64,
}

/// What the guard knows of a header it has accepted.
#[derive(Debug, Clone)]
pub struct Header {
    /// 2 or 3; the layouts are the same.
    pub version: u32,
    /// All key-value pairs in file order; keys are unique and not empty.
    pub kv: Vec<KvSpan>,
    /// All tensors in file order; names are unique, data contiguous and inside the file.
    pub tensors: Vec<TensorSpan>,
    /// Where the tensor infos begin.
    pub tensors_start: usize,
    /// Where the tensor infos end.
    pub end: usize,
    /// Where the data section begins: `end` rounded up to `alignment`.
    pub data_start: u64,
    /// A power of two, at least 8.
    pub alignment: u64,
}

/// Checks the header of the GGUF file `bytes`; `file` is its name in errors.
///
/// # Errors
/// [`Error::Malformed`] or [`Error::Unsupported`], naming what is wrong and where.
pub fn check(bytes: &[u8], file: &str) -> Result<Header> {
    Guard { bytes, at: 0 }.run().map_err(|e| e.in_file(file))
}

/// A name from the file, quoted for an error.
fn quoted(name: &[u8]) -> String {
    format!("'{}'", escape(name, NAME_MAX))
}

struct Guard<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Guard<'a> {
    fn run(mut self) -> Result<Header> {
        let version = self.preamble()?;
        let n_tensors = self.u64("the tensor count")?;
        let n_kv = self.u64("the key-value count")?;
        self.fits(n_kv, MIN_KV_BYTES, "key-value pairs")?;
        self.fits(n_tensors, MIN_TENSOR_BYTES, "tensors")?;
        // The counts are only claims: the vectors grow with the entries that are read.
        let mut kv = Vec::new();
        let mut seen = HashSet::new();
        for i in 0..n_kv {
            let pair = self.pair(i, n_kv)?;
            let key = &self.bytes[pair.key.clone()];
            if !seen.insert(key) {
                return Err(Error::malformed(format!(
                    "metadata key {} is given twice, expected once",
                    quoted(key)
                )));
            }
            kv.push(pair);
        }
        let alignment = self.alignment(&kv)?;
        let tensors_start = self.at;
        let mut tensors = Vec::new();
        let mut seen = HashSet::new();
        for i in 0..n_tensors {
            let tensor = self.tensor(i, n_tensors)?;
            let name = &self.bytes[tensor.name.clone()];
            if !seen.insert(name) {
                return Err(Error::malformed(format!(
                    "tensor {} is given twice, expected once",
                    quoted(name)
                )));
            }
            tensors.push(tensor);
        }
        let end = self.at;
        let data_start = (end as u64).next_multiple_of(alignment);
        self.layout(&tensors, data_start, alignment)?;
        Ok(Header {
            version,
            kv,
            tensors,
            tensors_start,
            end,
            data_start,
            alignment,
        })
    }

    /// Magic and version.
    fn preamble(&mut self) -> Result<u32> {
        if self.bytes.is_empty() {
            return Err(
                Error::malformed("the file is empty, expected the magic 'GGUF'")
                    .with_hint("the download may have failed; fetch the file again"),
            );
        }
        let magic = &self.bytes[..self.bytes.len().min(4)];
        if magic != b"GGUF" {
            return Err(self.wrong_magic(magic));
        }
        self.at = 4;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => Ok(version),
            1 => Err(
                Error::unsupported("GGUF version 1, expected 2 or 3").with_hint(
                    "version 1 was in use for a few weeks of 2023; convert the model again",
                ),
            ),
            v if matches!(v.swap_bytes(), 1..=3) => Err(Error::unsupported(format!(
                "a big-endian GGUF file (version {}), expected little-endian",
                v.swap_bytes()
            ))),
            v => Err(Error::unsupported(format!(
                "GGUF version {v}, expected 2 or 3"
            ))),
        }
    }

    /// Says what the file is instead, where the first bytes tell.
    fn wrong_magic(&self, magic: &[u8]) -> Error {
        let e = Error::malformed(format!(
            "the magic is '{}' ({} bytes in the file), expected 'GGUF'",
            escape(magic, 16),
            self.bytes.len()
        ));
        let head = &self.bytes[..self.bytes.len().min(64)];
        let hint = if head.starts_with(b"version https://git-lfs") {
            "this is a git-lfs pointer, not the model; fetch it with `git lfs pull`"
        } else if head.starts_with(b"PK\x03\x04") {
            "this looks like a zip archive or a PyTorch checkpoint; convert it to GGUF first"
        } else if head.len() > 9 && head[8] == b'{' {
            "this looks like a safetensors file; convert it to GGUF first"
        } else if head.starts_with(b"<") {
            "this looks like a web page; the download probably answered with an error"
        } else if [b"lmgg", b"fmgg", b"tjgg", b"algg"]
            .iter()
            .any(|m| head.starts_with(*m))
        {
            "this is a GGML file from before GGUF; convert it or get a GGUF version of the model"
        } else {
            return e;
        };
        e.with_hint(hint)
    }

    /// Refuses a count that cannot be true for a file of this size.
    fn fits(&self, n: u64, each: u64, what: &str) -> Result<()> {
        let room = (self.bytes.len() - self.at) as u64 / each;
        if n > room {
            return Err(Error::malformed(format!(
                "the header announces {n} {what}, expected at most {room} in a file of {} bytes (end of file before the last)",
                self.bytes.len()
            )));
        }
        Ok(())
    }

    fn pair(&mut self, i: u64, n: u64) -> Result<KvSpan> {
        let start = self.at;
        let nth = || format!("metadata key {} of {n} at byte {start}", i + 1);
        let len = self.u64(&format!("the length of {}", nth()))?;
        let key = self.span(len, || format!("{}: a key of {len} bytes", nth()))?;
        if key.is_empty() {
            return Err(Error::malformed(format!(
                "{} is empty, expected a name",
                nth()
            )));
        }
        let text = &self.bytes[key.clone()];
        if key.len() > MAX_KEY {
            return Err(Error::malformed(format!(
                "{} is {} bytes long, expected at most {MAX_KEY}: {}",
                nth(),
                key.len(),
                quoted(text)
            )));
        }
        if std::str::from_utf8(text).is_err() {
            return Err(Error::malformed(format!(
                "{} is {}, expected UTF-8",
                nth(),
                quoted(text)
            )));
        }
        let name = || format!("metadata key {}", quoted(text));
        let kind = self.kind(&name)?;
        let (value, array) = match kind {
            ValueKind::Array => {
                let (elem, n, elements) = self.array(&name, 1)?;
                (elements, Some((elem, n)))
            }
            ValueKind::String => (self.string(&name)?, None),
            ValueKind::Bool => (self.bools(1, &name)?, None),
            scalar => (self.scalars(scalar, 1, &name)?, None),
        };
        Ok(KvSpan {
            key,
            kind,
            value,
            array,
            entry: start..self.at,
        })
    }

    fn kind(&mut self, name: &dyn Fn() -> String) -> Result<ValueKind> {
        let at = self.at;
        let id = self.u32_of(|| format!("the value type of {}", name()))?;
        ValueKind::from_id(id).ok_or_else(|| {
            Error::malformed(format!(
                "{} has value type {id} at byte {at}, expected a type from 0 to 12",
                name()
            ))
        })
    }

    /// Element type, number of elements, and their bytes.
    fn array(
        &mut self,
        name: &dyn Fn() -> String,
        depth: u32,
    ) -> Result<(ValueKind, u64, Range<usize>)> {
        let elem = self.kind(&|| format!("{} (array elements)", name()))?;
        let n = self.u64_of(|| format!("the array length of {}", name()))?;
        let start = self.at;
        let left = (self.bytes.len() - start) as u64;
        let min = elem.min_bytes();
        if n > left / min {
            return Err(Error::malformed(format!(
                "{} is an array of length {n} ({}), but the file ends {left} bytes later",
                name(),
                elem.name()
            )));
        }
        match elem {
            ValueKind::Array => {
                if depth >= MAX_NESTING {
                    return Err(Error::malformed(format!(
                        "{} nests arrays deeper than {MAX_NESTING} at byte {start}, expected less",
                        name()
                    )));
                }
                for _ in 0..n {
                    self.array(name, depth + 1)?;
                }
            }
            ValueKind::String => {
                for _ in 0..n {
                    self.string(name)?;
                }
            }
            ValueKind::Bool => {
                self.bools(n, name)?;
            }
            scalar => {
                self.scalars(scalar, n, name)?;
            }
        }
        Ok((elem, n, start..self.at))
    }

    /// A length and as many bytes; the span is that of the text. Values may be any bytes: tokens often are.
    fn string(&mut self, name: &dyn Fn() -> String) -> Result<Range<usize>> {
        let at = self.at;
        let len = self.u64_of(|| format!("the string length of {}", name()))?;
        self.span(len, || {
            format!("{} at byte {at}: a string of {len} bytes", name())
        })
    }

    fn bools(&mut self, n: u64, name: &dyn Fn() -> String) -> Result<Range<usize>> {
        let span = self.scalars(ValueKind::Bool, n, name)?;
        if let Some(bad) = self.bytes[span.clone()].iter().find(|b| **b > 1) {
            return Err(Error::malformed(format!(
                "{} is a bool stored as {bad}, expected 0 or 1",
                name()
            )));
        }
        Ok(span)
    }

    fn scalars(
        &mut self,
        kind: ValueKind,
        n: u64,
        name: &dyn Fn() -> String,
    ) -> Result<Range<usize>> {
        self.span(n.saturating_mul(kind.min_bytes()), || {
            format!("{}: {n} values of type {}", name(), kind.name())
        })
    }

    fn alignment(&self, kv: &[KvSpan]) -> Result<u64> {
        let Some(pair) = kv
            .iter()
            .find(|p| &self.bytes[p.key.clone()] == b"general.alignment")
        else {
            return Ok(DEFAULT_ALIGNMENT);
        };
        if pair.kind != ValueKind::U32 {
            return Err(Error::malformed(format!(
                "general.alignment is of type {}, expected u32",
                pair.kind.name()
            )));
        }
        let value = u64::from(le_u32(&self.bytes[pair.value.clone()]));
        if value < 8 || !value.is_power_of_two() {
            return Err(Error::malformed(format!(
                "general.alignment is {value}, expected a power of two that is a multiple of 8"
            )));
        }
        Ok(value)
    }

    fn tensor(&mut self, i: u64, n: u64) -> Result<TensorSpan> {
        let start = self.at;
        let nth = || format!("the name of tensor {} of {n} at byte {start}", i + 1);
        let len = self.u64_of(|| format!("the length of {}", nth()))?;
        let name = self.span(len, || format!("{}: a name of {len} bytes", nth()))?;
        let text = &self.bytes[name.clone()];
        if text.is_empty() {
            return Err(Error::malformed(format!("{} is empty", nth())));
        }
        if text.len() > MAX_TENSOR_NAME {
            return Err(Error::malformed(format!(
                "{} is {} bytes long, expected at most {MAX_TENSOR_NAME}: {}",
                nth(),
                text.len(),
                quoted(text)
            )));
        }
        if std::str::from_utf8(text).is_err() {
            return Err(Error::malformed(format!(
                "{} is {}, expected UTF-8",
                nth(),
                quoted(text)
            )));
        }
        let tensor = || format!("tensor {}", quoted(text));
        let n_dims = self.u32_of(|| format!("the number of dimensions of {}", tensor()))?;
        if n_dims == 0 || n_dims > MAX_DIMS {
            return Err(Error::malformed(format!(
                "{} has {n_dims} dimensions, expected 1 to {MAX_DIMS}",
                tensor()
            )));
        }
        let mut dims = [1_u64; 4];
        for d in &mut dims[..n_dims as usize] {
            *d = self.u64_of(|| format!("the dimensions of {}", tensor()))?;
        }
        let shape = &dims[..n_dims as usize];
        let id = self.u32_of(|| format!("the type of {}", tensor()))?;
        let offset = self.u64_of(|| format!("the offset of {}", tensor()))?;
        if shape.contains(&0) {
            return Err(Error::malformed(format!(
                "{} has shape {shape:?}, expected no zero dimension",
                tensor()
            )));
        }
        let overflow = || {
            Error::malformed(format!(
                "{} has shape {shape:?}, its size overflows 63 bits",
                tensor()
            ))
        };
        let elements = dims
            .iter()
            .try_fold(1_u64, |n, d| n.checked_mul(*d))
            .filter(|n| *n <= i64::MAX as u64)
            .ok_or_else(overflow)?;
        let ty = GgmlType::from_id(id).ok_or_else(|| unknown_type(&tensor(), id))?;
        let (block, block_bytes) = (ty.block_size() as u64, ty.type_size() as u64);
        if !dims[0].is_multiple_of(block) {
            return Err(Error::malformed(format!(
                "{} of type {} has rows of {} elements, expected a multiple of its block of {block}",
                tensor(),
                ty.name(),
                dims[0]
            )));
        }
        let n_bytes = (elements / block)
            .checked_mul(block_bytes)
            .filter(|n| *n <= i64::MAX as u64)
            .ok_or_else(overflow)?;
        Ok(TensorSpan {
            name,
            ty,
            dims,
            n_dims,
            offset,
            n_bytes,
        })
    }

    /// Data must lie back to back, aligned, in the order of the infos, and inside the file.
    fn layout(&self, tensors: &[TensorSpan], data_start: u64, alignment: u64) -> Result<()> {
        let size = self.bytes.len() as u64;
        let mut expected = 0_u64;
        for t in tensors {
            let name = || format!("tensor {}", quoted(&self.bytes[t.name.clone()]));
            if t.offset != expected {
                let aligned = if t.offset.is_multiple_of(alignment) {
                    ""
                } else {
                    ", and not aligned"
                };
                return Err(Error::malformed(format!(
                    "{} has offset {}{aligned}, expected {expected} (end of the tensor before it, aligned to {alignment})",
                    name(),
                    t.offset
                )));
            }
            // Both sums stay far below 2^64: n_bytes < 2^63 and expected is checked against the file size below.
            let (start, end) = (data_start + t.offset, data_start + t.offset + t.n_bytes);
            if end > size {
                return Err(Error::malformed(format!(
                    "{} has its data at bytes {start} to {end}, but the file ends at {size} (truncated)",
                    name()
                ))
                .with_hint("the download may be incomplete; compare the file's size with its source"));
            }
            expected = (t.offset + t.n_bytes).next_multiple_of(alignment);
        }
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.u32_of(|| what.to_owned())
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.u64_of(|| what.to_owned())
    }

    fn u32_of(&mut self, what: impl Fn() -> String) -> Result<u32> {
        Ok(le_u32(&self.bytes[self.span(4, what)?]))
    }

    fn u64_of(&mut self, what: impl Fn() -> String) -> Result<u64> {
        Ok(le_u64(&self.bytes[self.span(8, what)?]))
    }

    /// The next `len` bytes; an error if the file ends before.
    fn span(&mut self, len: u64, what: impl Fn() -> String) -> Result<Range<usize>> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(len) {
            Ok(n) if n <= left => {
                self.at += n;
                Ok(self.at - n..self.at)
            }
            _ => Err(Error::malformed(format!(
                "the file ends at byte {} within {}, expected {len} bytes from byte {} (truncated or corrupt)",
                self.bytes.len(),
                what(),
                self.at
            ))),
        }
    }
}

/// The error for a type id without a format, with the name of formats that existed once.
fn unknown_type(tensor: &str, id: u32) -> Error {
    let removed = match id {
        4 => "Q4_2",
        5 => "Q4_3",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        _ => {
            return Error::unsupported(format!(
                "{tensor} has unknown type id {id}, expected a ggml type"
            ))
            .with_hint("the file may be newer than this program, or corrupt");
        }
    };
    Error::unsupported(format!(
        "{tensor} has type {removed} (id {id}), which GGUF no longer has"
    ))
    .with_hint("get the model as Q4_0 or IQ4_NL, which need no special layout")
}

/// Little-endian number at the start of `b`, which holds at least 4 bytes.
pub(super) fn le_u32(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Little-endian number at the start of `b`, which holds at least 8 bytes.
pub(super) fn le_u64(b: &[u8]) -> u64 {
    u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
}
