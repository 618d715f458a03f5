//! Writes GGUF version 3 files.
//!
//! A [`Builder`] collects metadata and the tensor directory, both small; [`Builder::begin`] writes them as the header and
//! gives a [`Body`] that takes the data of the tensors in order, streamed in pieces of any size.
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use lemma_engine::gguf::{GgmlType, write::Builder};
//! let mut b = Builder::new();
//! b.str("general.architecture", "llama").u32("llama.block_count", 1);
//! b.tensor("output_norm.weight", GgmlType::F32, &[8]);
//! let mut body = b.begin(std::fs::File::create("x.gguf")?)?;
//! body.write(&[0; 32])?;
//! body.finish()?;
//! # Ok(()) }
//! ```

use std::fs::File;
use std::io::{self, Error, ErrorKind, Write};
use std::path::{Path, PathBuf};

use lemma_quant::GgmlType;

use super::guard::DEFAULT_ALIGNMENT;
use super::value::ValueKind;
use crate::error;

/// Metadata and tensor directory of a file to be written.
#[derive(Debug, Clone)]
pub struct Builder {
    kv: Vec<u8>,
    n_kv: u64,
    infos: Vec<u8>,
    /// Size of each tensor's data in bytes.
    sizes: Vec<u64>,
    /// Where the next tensor's data will begin, relative to the data section.
    next: u64,
    alignment: u64,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

/// Generates the setters of scalar values.
macro_rules! scalars {
    ($($(#[$doc:meta])* $name:ident: $ty:ty => $kind:ident;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&mut self, key: &str, value: $ty) -> &mut Self {
                self.key(key, ValueKind::$kind);
                self.kv.extend_from_slice(&value.to_le_bytes());
                self
            }
        )*
    };
}

impl Builder {
    /// An empty file with the default alignment of 32 bytes.
    pub fn new() -> Self {
        Self {
            kv: Vec::new(),
            n_kv: 0,
            infos: Vec::new(),
            sizes: Vec::new(),
            next: 0,
            alignment: DEFAULT_ALIGNMENT,
        }
    }

    /// Sets `general.alignment` of the tensor data, in bytes; call it before the first tensor.
    ///
    /// # Panics
    /// If `alignment` is not a power of two of at least 8, or tensors were added.
    pub fn alignment(&mut self, alignment: u32) -> &mut Self {
        assert!(
            alignment.is_power_of_two() && alignment >= 8 && self.sizes.is_empty(),
            "alignment {alignment}"
        );
        self.alignment = u64::from(alignment);
        self.u32("general.alignment", alignment)
    }

    scalars! {
        /// Adds a u16.
        u16: u16 => U16;
        /// Adds a u32.
        u32: u32 => U32;
        /// Adds an i32.
        i32: i32 => I32;
        /// Adds a u64.
        u64: u64 => U64;
        /// Adds an f32.
        f32: f32 => F32;
    }

    /// Adds a bool.
    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.key(key, ValueKind::Bool);
        self.kv.push(u8::from(value));
        self
    }

    /// Adds a string.
    pub fn str(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key, ValueKind::String);
        push_str(&mut self.kv, value.as_bytes());
        self
    }

    /// Adds an array of strings.
    pub fn strings<S: AsRef<[u8]>>(
        &mut self,
        key: &str,
        values: impl ExactSizeIterator<Item = S>,
    ) -> &mut Self {
        self.array(key, ValueKind::String, values.len());
        values.for_each(|v| push_str(&mut self.kv, v.as_ref()));
        self
    }

    /// Adds an array of i32.
    pub fn i32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) -> &mut Self {
        self.array(key, ValueKind::I32, values.len());
        values.for_each(|v| self.kv.extend_from_slice(&v.to_le_bytes()));
        self
    }

    /// Adds an array of f32.
    pub fn f32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = f32>) -> &mut Self {
        self.array(key, ValueKind::F32, values.len());
        values.for_each(|v| self.kv.extend_from_slice(&v.to_le_bytes()));
        self
    }

    /// Adds a pair as it lies in another file ([`Meta::entries`](super::Meta::entries)).
    pub fn entry(&mut self, pair: &[u8]) -> &mut Self {
        self.n_kv += 1;
        self.kv.extend_from_slice(pair);
        self
    }

    /// Adds a tensor; `shape` has the row length first.
    ///
    /// # Panics
    /// If the shape is empty, has more than 4 dimensions, or rows that are not whole blocks of `ty`.
    pub fn tensor(&mut self, name: &str, ty: GgmlType, shape: &[u64]) -> &mut Self {
        assert!(
            (1..=4).contains(&shape.len()),
            "{name}: {} dimensions",
            shape.len()
        );
        let block = ty.block_size() as u64;
        assert!(
            shape[0].is_multiple_of(block),
            "{name}: rows of {} are not whole blocks of {}",
            shape[0],
            ty.name()
        );
        push_str(&mut self.infos, name.as_bytes());
        self.infos
            .extend_from_slice(&(shape.len() as u32).to_le_bytes());
        shape
            .iter()
            .for_each(|d| self.infos.extend_from_slice(&d.to_le_bytes()));
        self.infos.extend_from_slice(&ty.id().to_le_bytes());
        self.infos.extend_from_slice(&self.next.to_le_bytes());
        let size = shape.iter().product::<u64>() / block * ty.type_size() as u64;
        self.sizes.push(size);
        self.next = (self.next + size).next_multiple_of(self.alignment);
        self
    }

    /// Size of the file to be written, in bytes.
    pub fn n_bytes(&self) -> u64 {
        let header = (24 + self.kv.len() + self.infos.len()) as u64;
        header.next_multiple_of(self.alignment) + self.next
    }

    /// Writes the header to `out`, which should be buffered, and waits for the data.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn begin<W: Write>(self, mut out: W) -> io::Result<Body<W>> {
        out.write_all(b"GGUF")?;
        out.write_all(&3_u32.to_le_bytes())?;
        out.write_all(&(self.sizes.len() as u64).to_le_bytes())?;
        out.write_all(&self.n_kv.to_le_bytes())?;
        out.write_all(&self.kv)?;
        out.write_all(&self.infos)?;
        let header = (24 + self.kv.len() + self.infos.len()) as u64;
        pad(&mut out, header, self.alignment)?;
        let mut body = Body {
            out,
            sizes: self.sizes.into_iter(),
            left: 0,
            size: 0,
            alignment: self.alignment,
        };
        body.next_tensor()?;
        Ok(body)
    }

    fn key(&mut self, key: &str, kind: ValueKind) {
        self.n_kv += 1;
        push_str(&mut self.kv, key.as_bytes());
        self.kv.extend_from_slice(&kind.id().to_le_bytes());
    }

    fn array(&mut self, key: &str, elem: ValueKind, len: usize) {
        self.key(key, ValueKind::Array);
        self.kv.extend_from_slice(&elem.id().to_le_bytes());
        self.kv.extend_from_slice(&(len as u64).to_le_bytes());
    }
}

/// The data section of a file being written.
#[derive(Debug)]
pub struct Body<W: Write> {
    out: W,
    sizes: std::vec::IntoIter<u64>,
    /// Bytes missing of the current tensor.
    left: u64,
    /// Size of the current tensor.
    size: u64,
    alignment: u64,
}

impl<W: Write> Body<W> {
    /// Appends data of the current tensor; a full tensor is padded and the next one begins. A piece may span tensors.
    ///
    /// # Errors
    /// Those of the output, and `InvalidInput` for data beyond the last tensor.
    pub fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            if self.left == 0 {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "data beyond the last tensor",
                ));
            }
            let n = self.left.min(data.len() as u64) as usize;
            self.out.write_all(&data[..n])?;
            self.left -= n as u64;
            data = &data[n..];
            if self.left == 0 {
                pad(&mut self.out, self.size, self.alignment)?;
                self.next_tensor()?;
            }
        }
        Ok(())
    }

    /// Flushes and gives the output back.
    ///
    /// # Errors
    /// Those of the output, and `InvalidInput` if data is missing.
    pub fn finish(mut self) -> io::Result<W> {
        if self.left > 0 || self.sizes.len() > 0 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "tensor data is missing",
            ));
        }
        self.out.flush()?;
        Ok(self.out)
    }

    fn next_tensor(&mut self) -> io::Result<()> {
        self.size = self.sizes.next().unwrap_or(0);
        self.left = self.size;
        Ok(())
    }
}

/// The name that [`to_file`] gives the file `path` until it is complete: one of its own in the same folder. `None` for what is
/// written into and never replaced, and for what is no name of a file.
pub fn temporary(path: &Path) -> Option<PathBuf> {
    if path.metadata().is_ok_and(|meta| !meta.is_file()) {
        return None;
    }
    let mut name = path.file_name()?.to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    Some(path.with_file_name(name))
}

/// Lets `write` fill the file `path`, which appears only when it is complete: when `write` returns true. What is there and not a
/// regular file (a pipe, a device) is written into, never replaced. Returns what `write` did.
///
/// # Errors
/// Those of `write`, and [`error::Error::Runtime`] if the file cannot be made, naming the file.
pub fn to_file(
    path: &Path,
    write: impl FnOnce(File) -> error::Result<bool>,
) -> error::Result<bool> {
    let name = path.to_string_lossy().into_owned();
    let failed = |e: io::Error| error::Error::runtime_in(&name, error::plain(&e));
    if path.metadata().is_ok_and(|meta| !meta.is_file()) {
        let file = File::options().write(true).open(path).map_err(failed)?;
        return write(file).map_err(|e| e.in_file(&name));
    }
    let tmp = temporary(path).ok_or_else(|| error::Error::usage_in(&name, "is not a file name"))?;
    // Never a name that is there: that may be what is being read.
    let file = File::create_new(&tmp).map_err(failed)?;
    let result = write(file).map_err(|e| e.in_file(&name));
    let result = match result {
        Ok(true) => std::fs::rename(&tmp, path).map(|()| true).map_err(failed),
        other => other,
    };
    if !matches!(result, Ok(true)) {
        let _ = std::fs::remove_file(&tmp);
    }
    result
}

fn push_str(out: &mut Vec<u8>, s: &[u8]) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s);
}

/// Zeros from `at` to the next multiple of `alignment`.
fn pad(out: &mut impl Write, at: u64, alignment: u64) -> io::Result<()> {
    let mut n = (at.next_multiple_of(alignment) - at) as usize;
    while n > 0 {
        let zeros = [0_u8; 64];
        out.write_all(&zeros[..n.min(64)])?;
        n -= n.min(64);
    }
    Ok(())
}
