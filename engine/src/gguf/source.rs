//! Where the bytes of a GGUF file are: a read-only mapping, or memory of the program.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::{Advice, Mmap, MmapOptions, UncheckedAdvice};

use crate::error::{Error, Result};

/// The bytes of one file. Cloning shares them.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// A private read-only mapping.
    Map(Arc<Mapping>),
    /// Bytes that are part of the program.
    Static(&'static [u8]),
    /// Bytes in memory.
    Owned(Arc<[u8]>),
}

/// A mapping that two threads take down: to leave the small pages of a gigabyte takes one as long as half a pass takes two.
#[derive(Debug)]
pub(super) struct Mapping(Mmap);

/// Mappings below this many bytes are gone at once.
const LARGE: usize = 64 << 20;

impl Deref for Mapping {
    type Target = Mmap;

    fn deref(&self) -> &Mmap {
        &self.0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.0.len() < LARGE {
            return;
        }
        // At a multiple of the largest pages and of all tables of pages, so that the two do not meet.
        let half = (self.0.len() / 2).next_multiple_of(2 << 20);
        let leave = |at, len| {
            // SAFETY: nobody has a slice of the mapping any more.
            let _ = unsafe { (self.0).unchecked_advise_range(UncheckedAdvice::DontNeed, at, len) };
        };
        std::thread::scope(|scope| {
            let other = || leave(half, self.0.len() - half);
            // Without a thread the system takes down that half at the end.
            let _ = std::thread::Builder::new().spawn_scoped(scope, other);
            leave(0, half);
        });
    }
}

impl Source {
    /// Maps `path`; only regular files are opened, so a pipe or a device cannot make the program wait.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let name = path.to_string_lossy();
        let failed = |e: std::io::Error| match e.kind() {
            ErrorKind::NotFound => {
                Error::not_found_in(&name, "no such file, expected a GGUF model")
            }
            ErrorKind::PermissionDenied => {
                Error::unreadable_in(&name, "permission denied, expected a readable file")
            }
            _ => Error::unreadable_in(
                &name,
                format!("cannot be read ({e}), expected a GGUF model"),
            ),
        };
        let regular = |meta: &fs::Metadata| {
            if meta.is_dir() {
                Err(Error::unreadable_in(
                    &name,
                    "is a directory, expected a regular file",
                ))
            } else if meta.is_file() {
                Ok(meta.len())
            } else {
                Err(Error::unreadable_in(
                    &name,
                    "is not a regular file (a pipe, socket or device), expected a regular file",
                ))
            }
        };
        regular(&fs::metadata(path).map_err(failed)?)?;
        let file = File::open(path).map_err(failed)?;
        // Asked again of what was opened: the name may point elsewhere by now.
        let len = regular(&file.metadata().map_err(failed)?)?;
        if len == 0 {
            return Ok(Source::Static(&[])); // an empty mapping is an error of the system; let the header check speak
        }
        let len = usize::try_from(len).map_err(|_| {
            Error::memory_in(
                &name,
                format!("{len} bytes do not fit in the address space"),
            )
        })?;
        // SAFETY: the mapping is private and read-only and lives as long as every slice of it (they borrow from the
        // `Arc`). What no program can rule out is that another process changes the file meanwhile: overwritten bytes may
        // be seen, which is harmless because each value read later is checked by its reader and numbers have no invalid
        // bit patterns; a file cut shorter ends the process with SIGBUS on access. The manual says to replace model
        // files by renaming, never to write into them while they are in use.
        let map =
            unsafe { MmapOptions::new().len(len).map_copy_read_only(&file) }.map_err(|e| {
                let found = format!("cannot be mapped into memory ({e})");
                match e.kind() {
                    ErrorKind::OutOfMemory => Error::memory_in(&name, found),
                    _ => Error::unreadable_in(&name, found),
                }
            })?;
        // Reading a file that is not in memory yet then fills pages of two megabytes, where the file system has them, and with
        // those a pass need not look up half a million addresses. Only a hint, and nothing for pages that are there already.
        #[cfg(target_os = "linux")]
        let _ = map.advise(Advice::HugePage);
        Ok(Source::Map(Arc::new(Mapping(map))))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Source::Map(map) => map,
            Source::Static(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        }
    }

    /// Tells the kernel how `range` will be used; only a hint, so failure is ignored.
    pub(super) fn advise(&self, range: Range<usize>, use_: Use) {
        if let Source::Map(map) = self {
            let (at, len) = (range.start, range.len());
            let _ = match use_ {
                Use::Soon => map.advise_range(Advice::WillNeed, at, len),
                Use::Sequential => map.advise_range(Advice::Sequential, at, len),
                Use::Random => map.advise_range(Advice::Random, at, len),
                // SAFETY: nothing is ever written through this private read-only mapping, so dropped pages come back
                // from the file with the same content; slices of them stay valid.
                Use::Done => unsafe {
                    map.unchecked_advise_range(UncheckedAdvice::DontNeed, at, len)
                },
            };
        }
    }
}

/// How a range of a mapped file is about to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Soon: start reading it from disk.
    Soon,
    /// Once, from front to back: read ahead generously.
    Sequential,
    /// Here and there: do not read ahead.
    Random,
    /// Not any more: its pages leave the process (the next access reads them again).
    Done,
}

/// Bytes of a model that keep their file mapped: an owning slice, cheap to clone and to send to other threads.
#[derive(Debug, Clone)]
pub struct Bytes {
    pub(super) source: Source,
    pub(super) range: Range<usize>,
}

impl Bytes {
    /// Bytes that no file has.
    pub(crate) fn owned(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        let source = Source::Owned(bytes.into());
        Self { source, range }
    }

    /// A part of these bytes; `range` lies within them.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        let at = self.range.start;
        assert!(range.start <= range.end && range.end <= self.range.len());
        Self {
            source: self.source.clone(),
            range: at + range.start..at + range.end,
        }
    }

    /// Tells the kernel how these bytes will be used.
    pub fn advise(&self, use_: Use) {
        self.source.advise(self.range.clone(), use_);
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.source.bytes()[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
