//! Matrices in device memory.

use lemma_quant::GgmlType;

use crate::args::Repack;
use crate::gpu::{Buffer, CudaError, Gpu, Launch, Pinned, Result, View};
use crate::types::{chunk_blocks, planes, row_bytes};

/// Bytes that travel to the device at once.
const CHUNK: usize = 8 << 20;

/// A matrix as a file holds it.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its format.
    pub ty: GgmlType,
    /// Elements of a row.
    pub n_in: usize,
    /// Rows; those of all experts where there are several.
    pub n_row: usize,
    /// Rows of whole blocks.
    pub data: &'a [u8],
}

/// A matrix in device memory, in the layout of `kernels/types.cuh`.
#[derive(Debug)]
pub struct Weight {
    ty: GgmlType,
    n_in: usize,
    n_row: usize,
    row_bytes: usize,
    data: Buffer,
}

/// Copies matrices to the device through two pieces of page-locked memory, one of which is filled while the other travels.
pub struct Uploader {
    gpu: Gpu,
    pinned: [Pinned; 2],
    /// Chunks on the device, as in the file, before they are unpacked.
    staging: [Buffer; 2],
    turn: usize,
}

impl Uploader {
    /// Allocates the memory that chunks travel through.
    ///
    /// # Errors
    /// When there is none.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        Self::with(gpu, CHUNK)
    }

    fn with(gpu: &Gpu, bytes: usize) -> Result<Self> {
        Ok(Self {
            pinned: [gpu.pinned(bytes)?, gpu.pinned(bytes)?],
            staging: [gpu.alloc(bytes)?, gpu.alloc(bytes)?],
            gpu: gpu.clone(),
            turn: 0,
        })
    }

    /// Copies a matrix to the device. Formats without kernels become f16.
    ///
    /// # Errors
    /// When the device has no room; those of the driver.
    pub fn upload(&mut self, source: Source<'_>) -> Result<Weight> {
        let Source {
            ty,
            n_in,
            n_row,
            data,
        } = source;
        let raw = ty
            .row_size(n_in)
            .filter(|r| r.checked_mul(n_row) == Some(data.len()) && *r > 0);
        let Some(raw) = raw else {
            let (ty, n) = (ty.name(), data.len());
            return Err(CudaError(format!(
                "a matrix of {n_row} rows of {n_in} {ty} has {n} bytes"
            )));
        };
        let Some(bytes) = row_bytes(ty, n_in) else {
            return self.upload_as_f16(source);
        };
        let room = self.staging[0].view().bytes();
        if raw > room {
            *self = Self::with(&self.gpu, raw)?;
        }
        let buffer = self.gpu.alloc(bytes * n_row)?;
        let parts: &[(u32, u32)] = match planes(ty) {
            // Rows that end off alignment are padded; a block that is aligned stays in one piece.
            Some([]) if raw != bytes => &[(0, 0)],
            Some(p) => p,
            None => &[],
        };
        let rows = (self.staging[0].view().bytes() / raw).max(1);
        for (i, chunk) in data.chunks(rows * raw).enumerate() {
            self.turn ^= 1;
            let pinned = &mut self.pinned[self.turn];
            let staging = self.staging[self.turn].view().slice(0, chunk.len());
            let n = chunk.len() / raw;
            let to = buffer.view().slice(i * rows * bytes, n * bytes);
            pinned.bytes_mut()?[..chunk.len()].copy_from_slice(chunk);
            if parts.is_empty() {
                pinned.upload(0, to)?;
            } else {
                pinned.upload(0, staging)?;
                repack(&self.gpu, ty, n_in, n, parts, staging, to)?;
            }
        }
        Ok(Weight {
            ty,
            n_in,
            n_row,
            row_bytes: bytes,
            data: buffer,
        })
    }

    fn upload_as_f16(&mut self, s: Source<'_>) -> Result<Weight> {
        let raw = s.ty.row_size(s.n_in).unwrap_or(0);
        let Some(to_f16) = GgmlType::F16.traits().quantize_row else {
            return Err(CudaError("f16 cannot be written".to_owned()));
        };
        let mut row = vec![0.0; s.n_in];
        let mut data = vec![0; s.n_in * 2 * s.n_row];
        for (from, to) in s
            .data
            .chunks_exact(raw.max(1))
            .zip(data.chunks_exact_mut(s.n_in * 2))
        {
            (s.ty.traits().dequantize_row)(from, &mut row);
            to_f16(&row, to);
        }
        log::debug!("{} rows of {} become f16", s.n_row, s.ty.name());
        self.upload(Source {
            ty: GgmlType::F16,
            data: &data,
            ..s
        })
    }
}

impl Weight {
    /// Its format in device memory.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Elements of a row.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Rows, of all experts.
    pub fn n_row(&self) -> usize {
        self.n_row
    }

    /// Bytes of a row in device memory.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Its bytes.
    pub fn view(&self) -> View {
        self.data.view()
    }

    /// Whether products with it want quantized activations.
    pub fn wants_q8(&self) -> bool {
        !matches!(self.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
    }
}

fn repack(
    gpu: &Gpu,
    ty: GgmlType,
    n_in: usize,
    n_row: usize,
    parts: &[(u32, u32)],
    from: View,
    to: View,
) -> Result<()> {
    let mut args = Repack {
        src: from.at,
        dst: to.at,
        n_row: n_row as u64,
        n_block: (n_in / ty.block_size()) as u32,
        block_bytes: ty.type_size() as u32,
        row_bytes: (to.bytes() / n_row) as u32,
        n_plane: parts.len() as u32,
        // Rows that are padded and nothing else are one chunk.
        chunk: if parts[0].1 == 0 {
            n_in / ty.block_size()
        } else {
            chunk_blocks(ty)
        } as u32,
        ..Repack::default()
    };
    for (i, &(offset, length)) in parts.iter().enumerate() {
        args.offset[i] = offset;
        // A part of length 0 stands for the whole block.
        args.length[i] = if length == 0 {
            ty.type_size() as u32
        } else {
            length
        };
    }
    let blocks = to.bytes().div_ceil(256 * 8).clamp(1, 1 << 16) as u32;
    gpu.launch(
        Launch {
            grid: [blocks, 1, 1],
            block: 256,
            shared: 0,
            together: false,
        },
        &args,
    )
}
