//! Memory whose address stays while there is more of it, or less.

use crate::gpu::{Buffer, Gpu, Result, View};

/// Pieces that a stretch comes in at most, unless they become smaller than devices can.
const PIECES: usize = 256;

/// A range of addresses with memory from its beginning on, as much as is asked for.
///
/// Where a device cannot do that, and where it is [fixed](Stretch::fixed), all of it is there from the beginning.
#[derive(Debug)]
pub struct Stretch {
    gpu: Gpu,
    view: View,
    /// Bytes of a piece.
    piece: usize,
    /// The pieces there are, by the device's names.
    pieces: Vec<u64>,
    /// All of it.
    fixed: Option<Buffer>,
}

impl Stretch {
    /// A range of `bytes` without any memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let grain = gpu.device.grain();
        if grain == 0 || bytes == 0 {
            return Self::fixed(gpu, bytes);
        }
        let piece = bytes.div_ceil(PIECES).next_multiple_of(grain);
        let at = gpu.device.reserve(bytes.next_multiple_of(piece))?;
        Ok(Self {
            gpu: gpu.clone(),
            view: View { at, bytes },
            piece,
            pieces: Vec::new(),
            fixed: None,
        })
    }

    /// One of zeros that stays as it is.
    ///
    /// # Errors
    /// As [`Gpu::alloc`].
    pub fn fixed(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let buffer = gpu.alloc(bytes)?;
        Ok(Self {
            gpu: gpu.clone(),
            view: buffer.view(),
            piece: 0,
            pieces: Vec::new(),
            fixed: Some(buffer),
        })
    }

    /// All of its addresses. Kernels must not touch those that have no memory.
    pub fn view(&self) -> View {
        self.view
    }

    /// What there is memory for.
    pub fn backed(&self) -> View {
        let bytes = match self.fixed {
            Some(_) => self.view.bytes(),
            None => self.view.bytes().min(self.pieces.len() * self.piece),
        };
        self.view.slice(0, bytes)
    }

    /// Sees to it that there is memory for the first `bytes`, zeros where it is new, and hardly any beyond. What is given back has to be out of
    /// use but for what has been asked of the device before.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn back(&mut self, bytes: usize) -> Result<()> {
        assert!(bytes <= self.view.bytes());
        if self.fixed.is_some() {
            return Ok(());
        }
        let n = bytes.div_ceil(self.piece);
        if n < self.pieces.len() {
            self.gpu.synchronize()?;
            self.drop_from(n);
        }
        while self.pieces.len() < n {
            let at = self.view.at + (self.pieces.len() * self.piece) as u64;
            // SAFETY: inside the reserved range, where there is no memory yet.
            let piece = unsafe { self.gpu.device.back(at, self.piece) }?;
            self.pieces.push(piece);
        }
        Ok(())
    }

    /// Gives pieces back.
    fn drop_from(&mut self, n: usize) {
        for (i, piece) in self.pieces.drain(n..).enumerate() {
            let at = self.view.at + ((n + i) * self.piece) as u64;
            // SAFETY: the piece that is there, which nothing uses any more.
            unsafe { self.gpu.device.unback(at, self.piece, piece) };
        }
    }
}

impl Drop for Stretch {
    fn drop(&mut self) {
        if self.fixed.is_some() {
            return;
        }
        // Launches that use it may still be under way.
        let _ = self.gpu.bind();
        let _ = self.gpu.synchronize();
        self.drop_from(0);
        let bytes = self.view.bytes().next_multiple_of(self.piece);
        // SAFETY: from `reserve`, without memory, and this is its owner.
        unsafe { self.gpu.device.unreserve(self.view.at, bytes) };
    }
}
