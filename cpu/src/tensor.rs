//! Names of weights, as they lie in the mapped file.

use crate::Shared;
use lemma_quant::GgmlType;

/// A weight matrix in GGUF layout: `n_out` rows of `n_in` values.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    /// How values are encoded.
    pub ty: GgmlType,
    /// Values in a row: the width of the input. A multiple of the block size.
    pub n_in: usize,
    /// Rows: the width of the output.
    pub n_out: usize,
    /// The rows, one after the other; any alignment.
    pub data: &'a [u8],
}

/// A stack of matrices of the same shape and type, one for each expert.
#[derive(Clone, Copy)]
pub struct Experts<'a> {
    /// How values are encoded.
    pub ty: GgmlType,
    /// Values in a row.
    pub n_in: usize,
    /// Rows of an expert.
    pub n_out: usize,
    /// Matrices.
    pub n_expert: usize,
    /// The first row of the first of them.
    pub first: usize,
    /// Rows from the first of one to the first of the next.
    pub stride: usize,
    /// The matrices, one after the other, and what lies between them.
    pub data: &'a [u8],
}

/// One product of [`Pass::mul_mats`](crate::Pass::mul_mats).
#[derive(Clone, Copy)]
pub struct MulMat<'a> {
    /// `[n_tokens, w.n_out]`
    pub out: &'a Shared<f32>,
    /// Whether the product is added to what is in `out` (a residual), or replaces it.
    pub out_add: bool,
    /// The matrix.
    pub w: Mat<'a>,
    /// `[w.n_out]`, added to every token's product.
    pub bias: Option<&'a [f32]>,
}

impl<'a> Mat<'a> {
    /// A matrix of `n_out` rows of `n_in` values in `data`.
    ///
    /// # Panics
    /// If `data` has another size than the shape and type say.
    pub fn new(ty: GgmlType, n_in: usize, n_out: usize, data: &'a [u8]) -> Self {
        let mat = Self {
            ty,
            n_in,
            n_out,
            data,
        };
        assert_eq!(
            data.len(),
            n_out * mat.row_size(),
            "bytes of a {} matrix",
            ty.name()
        );
        mat
    }

    /// Bytes of a row.
    pub fn row_size(&self) -> usize {
        row_size(self.ty, self.n_in)
    }

    /// The bytes of row `i`.
    pub fn row(&self, i: usize) -> &'a [u8] {
        let size = self.row_size();
        &self.data[i * size..(i + 1) * size]
    }
}

impl<'a> Experts<'a> {
    /// The matrix of expert `i`.
    pub fn expert(&self, i: usize) -> Mat<'a> {
        let row = row_size(self.ty, self.n_in);
        let at = (self.first + i * self.stride) * row;
        let data = &self.data[at..at + self.n_out * row];
        Mat::new(self.ty, self.n_in, self.n_out, data)
    }

    /// The first or the second half of the rows of each expert.
    pub fn half(self, i: usize) -> Self {
        let n_out = self.n_out / 2;
        Self {
            n_out,
            first: self.first + i * n_out,
            ..self
        }
    }
}

/// Bytes of `n` values.
///
/// # Panics
/// If `n` is not a multiple of the block size.
pub(crate) fn row_size(ty: GgmlType, n: usize) -> usize {
    let traits = ty.traits();
    assert!(
        n.is_multiple_of(traits.block_size),
        "rows of {} hold whole blocks",
        traits.name
    );
    n / traits.block_size * traits.type_size
}
