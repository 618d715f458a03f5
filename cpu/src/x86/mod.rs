//! Kernels for x86-64.
//!
//! One file per format has what is special to it: how a block is multiplied with activations, and how it is unpacked
//! for batches. What formats share is in `rows`, `twos`, `fours` and `runs` (a few rows with one token: memory-bound) and `gemm` (a
//! tile of rows with many tokens: compute-bound).
//!
//! # One order of sums
//!
//! Sums within a block are integers and exact. A row's blocks are added up one after the other, by the same fused
//! operations in every kernel; so the result for a row and a token does not depend on how many of them were computed
//! together, nor on the instruction set.

pub(crate) mod ahead;
pub(crate) mod amx;
pub(crate) mod bf16;
mod bytes;
mod dots;
mod fours;
mod gemm;
mod gemm_256;
mod gemm_amx;
mod gemm_avx512;
mod gemm_words;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod patterns;
mod patterns_512;
pub(crate) mod peak;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_k;
mod q5_0;
mod q5_k;
mod q6_k;
mod q8_0;
mod quantize;
mod rows;
mod runs;
mod sixteens;
mod ternary;
mod twos;
mod unpack;
mod util;
mod vectors;
mod words;

pub(crate) use bytes::ROWS;
pub(crate) use quantize::{quantize_32, quantize_256};
pub(crate) use unpack::Tile;
pub(crate) use vectors::{Avx2, Avx512};
pub(crate) use words::{Words512, WordsAvx2, WordsAvxVnni};

use crate::Isa;
use crate::kernels::Next;
use lemma_quant::GgmlType;

/// The form of activations that a kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `X32`.
    X32,
    /// `X256`.
    X256,
}

/// Some rows to multiply with one token.
pub(crate) struct Rows<'a> {
    /// The rows.
    pub(crate) w: &'a [u8],
    /// Bytes of a row.
    pub(crate) row_size: usize,
    /// Blocks of activations.
    pub(crate) x: *const u8,
    /// How many there are.
    pub(crate) n_blocks: usize,
    /// What will be read after these rows, if that is known.
    pub(crate) next: Next,
}

/// Multiplies rows with one token: as many as `out` is long.
///
/// # Safety
/// The instruction set is available; `w` has that many rows, and `x` is valid for `n_blocks`.
pub(crate) type RowsFn = unsafe fn(&Rows<'_>, out: &mut [f32]);

/// Unpacks up to 256 columns (`n32` times 32) of `n` rows (1 to 16) that are `row_size` bytes apart; meanwhile begins to read as
/// many bytes from `next` on, which may be anywhere.
///
/// # Safety
/// The instruction set is available; pointers are valid for what the sizes say.
pub(crate) type UnpackFn = unsafe fn(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    next: *const u8,
    tile: &mut Tile,
);

/// Adds products of tiles with `n` tokens to `acc`, `[tiles, n]`. Activations are `[n32 / blocks of 32][n]`.
///
/// # Safety
/// As for [`UnpackFn`].
pub(crate) type TilesFn =
    unsafe fn(&[Tile], x: *const u8, n: usize, n32: usize, acc: &mut [[f32; ROWS]]);

/// What there is for a type and instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) form: Form,
    /// Columns are a multiple of this.
    pub(crate) columns: usize,
    pub(crate) rows: RowsFn,
    /// For batches.
    pub(crate) gemm: (UnpackFn, TilesFn),
    /// For batches of so many tokens and more, where there is something better.
    pub(crate) wide: Option<(usize, UnpackFn, TilesFn)>,
}

/// The kernel for a type; `None` where the scalar path serves it.
pub(crate) fn kernel(ty: GgmlType, isa: Isa) -> Option<Kernel> {
    if let Some((form, rows, gemm)) = sixteens::kernel(ty, isa) {
        return Some(Kernel {
            form,
            columns: sixteens::LEN,
            rows,
            gemm,
            wide: None,
        });
    }
    let (form, rows) = match isa {
        Isa::Scalar => None,
        Isa::Avx2 => twos::avx2::kernel(ty),
        Isa::AvxVnni => twos::avx_vnni::kernel(ty),
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => fours::kernel(ty),
    }?;
    Some(Kernel {
        form,
        columns: ty.block_size(),
        rows,
        gemm: gemm::kernel(ty, isa)?,
        wide: gemm_amx::kernel(ty).filter(|_| isa == Isa::Amx),
    })
}
