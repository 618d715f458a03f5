//! GGUF files: opened in place, checked before use.
//!
//! [`GgufFile::open`] maps the file, lets [`guard`] check every length, count, type and offset of the header, and has
//! gguf-rs decode the tensor directory of a header that passed. Tensor data is never copied: a [`TensorView`] points into
//! the mapping. Models in parts (`-00001-of-0000N.gguf`) open through their first part.
//!
//! Nothing in a file can cause a panic, a hang, or memory use out of proportion to its header: that is what the guard is
//! for, and what the fuzz target checks.

mod decode;
mod enter;
pub mod guard;
mod meta;
mod source;
mod split;
#[cfg(test)]
mod tests;
mod value;
pub mod write;

use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

pub use lemma_quant::GgmlType;

pub(crate) use enter::Entering;
pub use meta::Meta;
pub use source::{Bytes, Use};
pub use value::{Array, Strings, Value, ValueKind};

use crate::error::{Error, NAME_MAX, Result, escape};
use guard::Header;
use source::Source;

/// A tensor of a file: what it is and where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, such as `blk.0.attn_q.weight`.
    pub name: Arc<str>,
    /// Element type.
    pub ty: GgmlType,
    /// Shape in ggml's order: `dims[0]` is the row length. Unused dimensions are 1.
    pub dims: [u64; 4],
    /// Number of dimensions the file spells out, 1 to 4.
    pub n_dims: u32,
    /// Which part of a split model holds the data.
    part: usize,
    /// Where in that part.
    range: Range<usize>,
}

impl TensorInfo {
    /// The dimensions the file spells out, row length first.
    pub fn shape(&self) -> &[u64] {
        &self.dims[..self.n_dims as usize]
    }

    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Number of rows: the product of all dimensions but the first.
    pub fn n_rows(&self) -> u64 {
        self.dims[1..].iter().product()
    }

    /// Size of the data in bytes.
    pub fn n_bytes(&self) -> usize {
        self.range.len()
    }
}

/// A tensor with its data.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Description; also reachable by dereferencing.
    pub info: &'a TensorInfo,
    /// Blocks of type `ty`, rows back to back. Aligned as [`GgufFile::data_alignment`] says.
    pub data: &'a [u8],
}

impl Deref for TensorView<'_> {
    type Target = TensorInfo;

    fn deref(&self) -> &TensorInfo {
        self.info
    }
}

/// One file of a model.
#[derive(Debug)]
struct Part {
    name: String,
    source: Source,
    header: Header,
}

/// An open GGUF model: one file or all parts of a split one.
#[derive(Debug)]
pub struct GgufFile {
    /// At least one; metadata is that of the first.
    parts: Vec<Part>,
    /// Indices into the first header's pairs, sorted by key.
    sorted: Vec<u32>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<Arc<str>, u32>,
}

impl GgufFile {
    /// Opens the model at `path`: a GGUF file, or the first part of a split model.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Unreadable`] for the file itself or a missing part, [`Error::Malformed`] and
    /// [`Error::Unsupported`] for its content.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.to_string_lossy().into_owned();
        let first = Part::new(name, Source::open(path)?)?;
        let parts = split::complete(path, first)?;
        Self::new(parts)
    }

    /// Opens a model that is part of the program; `name` stands for it in errors.
    ///
    /// Any alignment works. For the data to be as aligned as in a mapped file (and so usable by vector loads that ask
    /// for it), embed the bytes at a multiple of the file's `general.alignment`, 32 if it has none: for instance
    /// `#[repr(align(64))] struct Aligned<B: ?Sized>(B); static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!(…));`.
    ///
    /// # Errors
    /// [`Error::Malformed`] and [`Error::Unsupported`]; also for a part of a split model.
    pub fn from_static(bytes: &'static [u8], name: &str) -> Result<Self> {
        Self::whole(name, Source::Static(bytes))
    }

    /// Opens a model held in memory; like [`GgufFile::from_static`] otherwise.
    ///
    /// # Errors
    /// Those of [`GgufFile::from_static`].
    pub fn from_bytes(bytes: impl Into<Arc<[u8]>>, name: &str) -> Result<Self> {
        Self::whole(name, Source::Owned(bytes.into()))
    }

    fn whole(name: &str, source: Source) -> Result<Self> {
        let part = Part::new(name.to_owned(), source)?;
        if split::count(&part)? > 1 {
            return Err(Error::unsupported_in(
                name,
                "is one part of a split model, expected a whole model",
            ));
        }
        Self::new(vec![part])
    }

    fn new(parts: Vec<Part>) -> Result<Self> {
        let mut tensors = Vec::new();
        for (p, part) in parts.iter().enumerate() {
            part.directory(p, &mut tensors)?;
        }
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            if by_name.insert(t.name.clone(), i as u32).is_some() {
                return Err(Error::malformed_in(
                    &parts[t.part].name,
                    format!(
                        "tensor '{}' is also in another part, expected it once",
                        escape(&*t.name, NAME_MAX)
                    ),
                ));
            }
        }
        let (bytes, kv) = (parts[0].source.bytes(), &parts[0].header.kv);
        let mut sorted: Vec<u32> = (0..kv.len() as u32).collect();
        sorted.sort_unstable_by_key(|i| &bytes[kv[*i as usize].key.clone()]);
        Ok(Self {
            parts,
            sorted,
            tensors,
            by_name,
        })
    }

    /// Name of the (first) file, as it was given.
    pub fn name(&self) -> &str {
        &self.parts[0].name
    }

    /// Names of all files of the model, the first part first.
    pub fn part_names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|p| &*p.name)
    }

    /// `general.alignment` of the (first) file, in bytes; 32 if it does not say.
    pub fn alignment(&self) -> u64 {
        self.parts[0].header.alignment
    }

    /// Format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].header.version
    }

    /// Metadata; of a split model, that of the first part.
    pub fn meta(&self) -> Meta<'_> {
        let part = &self.parts[0];
        Meta {
            file: &part.name,
            bytes: part.source.bytes(),
            header: &part.header,
            sorted: &self.sorted,
        }
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.tensors.iter().map(|info| self.view(info))
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.by_name
            .get(name)
            .map(|i| self.view(&self.tensors[*i as usize]))
    }

    /// The data of a tensor of this file, keeping the file mapped for as long as the result lives.
    pub fn bytes_of(&self, info: &TensorInfo) -> Bytes {
        Bytes {
            source: self.parts[info.part].source.clone(),
            range: info.range.clone(),
        }
    }

    /// Tells the kernel how the data of `info` will be used.
    pub fn advise(&self, info: &TensorInfo, use_: Use) {
        self.parts[info.part]
            .source
            .advise(info.range.clone(), use_);
    }

    /// Bytes of tensor data in all parts.
    pub fn n_tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.n_bytes() as u64).sum()
    }

    /// Bytes of metadata and tensor directory of the (first) file.
    pub fn n_header_bytes(&self) -> u64 {
        self.parts[0].header.data_start
    }

    /// Bytes of all files.
    pub fn n_file_bytes(&self) -> u64 {
        self.parts
            .iter()
            .map(|p| p.source.bytes().len() as u64)
            .sum()
    }

    /// A power of two, at most 4096, that the address of every tensor's data is a multiple of: `general.alignment` for
    /// mapped files, what the embedding gives otherwise.
    pub fn data_alignment(&self) -> usize {
        let all = self
            .tensors
            .iter()
            .map(|t| self.view(t).data.as_ptr().addr())
            .fold(4096, |a, b| a | b);
        1 << all.trailing_zeros()
    }

    fn view<'a>(&'a self, info: &'a TensorInfo) -> TensorView<'a> {
        TensorView {
            info,
            data: &self.parts[info.part].source.bytes()[info.range.clone()],
        }
    }
}

impl Part {
    fn new(name: String, source: Source) -> Result<Self> {
        let header = guard::check(source.bytes(), &name)?;
        Ok(Self {
            name,
            source,
            header,
        })
    }

    /// Appends this part's tensors: as gguf-rs decodes them, or by the guard's table where it cannot.
    fn directory(&self, part: usize, tensors: &mut Vec<TensorInfo>) -> Result<()> {
        let bytes = self.source.bytes();
        let decoded = decode::decode(bytes, &self.header, &self.name)?;
        for (i, span) in self.header.tensors.iter().enumerate() {
            let (name, ty, shape, offset) = match &decoded {
                Some(d) => (
                    d[i].name.as_str(),
                    d[i].kind,
                    d[i].shape.as_slice(),
                    d[i].offset,
                ),
                None => {
                    let name = std::str::from_utf8(&bytes[span.name.clone()]).unwrap_or("");
                    (
                        name,
                        span.ty.id(),
                        &span.dims[..span.n_dims as usize],
                        span.offset,
                    )
                }
            };
            let mut dims = [1; 4];
            dims[..shape.len()].copy_from_slice(shape);
            // Sizes are ours: gguf-rs has them wrong for several types.
            let start = (self.header.data_start + offset) as usize;
            tensors.push(TensorInfo {
                name: name.into(),
                ty: GgmlType::from_id(ty).unwrap_or(span.ty),
                dims,
                n_dims: shape.len() as u32,
                part,
                range: start..start + span.n_bytes as usize,
            });
        }
        Ok(())
    }
}
