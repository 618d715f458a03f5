//! Rows of weights with tokens, in each of the ways there are.

use super::Pass;
use super::matmul::{COLUMNS, MAX_UNIT, Plan, Scratch, TILES, Way, X_TYPES, block};
use crate::activations::{G32, G256, GROUP, X32, X256};
use crate::kernels::{Form, Kernel, MAX_ROWS, Rows, Tile};
use crate::tensor::row_size;
use crate::{MulMat, Shared, float, lanes};
use std::ops::Range;

impl Pass<'_> {
    /// Some rows of weights, which are this worker's, with all tokens. `next` is read after them, if it is not null.
    pub(super) fn mul_rows(
        &self,
        plan: &Plan,
        mat: &MulMat<'_>,
        x: &Shared<f32>,
        rows: Range<usize>,
        n_tokens: usize,
        next: *const u8,
    ) {
        match (plan.way, plan.kernel) {
            (Way::Rows(form), Some(kernel)) => {
                self.mul_few(mat, form, kernel, rows, n_tokens, next);
            }
            (Way::Tiles(form), Some(kernel)) => self.mul_tiles(mat, form, kernel, rows, n_tokens),
            (Way::Float, _) => self.mul_float(mat, x, rows, n_tokens),
            (Way::Scalar(i), _) => {
                let n_in = mat.w.n_in;
                let size = row_size(X_TYPES[i], n_in);
                let vec_dot = mat.w.ty.traits().vec_dot.expect("checked by `way`");
                for row in rows {
                    for t in 0..n_tokens {
                        let x = &self.scratch.matmul.x_types[i];
                        // SAFETY: written before the last barrier.
                        let x = unsafe { x.slice(t * size..(t + 1) * size) };
                        self.store(mat, t, row, &[vec_dot(n_in, mat.w.row(row), x)]);
                    }
                }
            }
            _ => {
                let n_in = mat.w.n_in;
                let start = self.ith() * Scratch::width(self.limits);
                // SAFETY: every worker has its own row.
                let decoded = unsafe { self.scratch.matmul.row.slice_mut(start..start + n_in) };
                for row in rows {
                    (mat.w.ty.traits().dequantize_row)(mat.w.row(row), decoded);
                    for t in 0..n_tokens {
                        // SAFETY: `x` is only read.
                        let x = unsafe { x.slice(t * n_in..(t + 1) * n_in) };
                        self.store(mat, t, row, &[lanes::dot(self.isa, decoded, x)]);
                    }
                }
            }
        }
    }

    /// Weights that are numbers.
    fn mul_float(&self, mat: &MulMat<'_>, x: &Shared<f32>, rows: Range<usize>, n_tokens: usize) {
        let (n_in, size) = (mat.w.n_in, mat.w.row_size());
        for t in (0..n_tokens).step_by(float::TOKENS) {
            let n = (n_tokens - t).min(float::TOKENS);
            // SAFETY: `x` is only read.
            let x = unsafe { x.slice(t * n_in..(t + n) * n_in) };
            for row in rows.clone().step_by(float::ROWS) {
                let n_rows = (rows.end - row).min(float::ROWS);
                let w = &mat.w.data[row * size..(row + n_rows) * size];
                let mut sums = [[0.0; float::ROWS]; float::TOKENS];
                // SAFETY: the instruction set is available.
                unsafe {
                    float::mul(
                        self.isa,
                        float::Tile {
                            ty: mat.w.ty,
                            w,
                            x,
                            n_in,
                        },
                        &mut sums,
                    )
                };
                for (t, sums) in (t..t + n).zip(&sums) {
                    self.store(mat, t, row, &sums[..n_rows]);
                }
            }
        }
    }

    /// Some rows with one token after the other.
    fn mul_few(
        &self,
        mat: &MulMat<'_>,
        form: Form,
        kernel: Kernel,
        rows: Range<usize>,
        n_tokens: usize,
        next: *const u8,
    ) {
        let scratch = &self.scratch.matmul;
        let row_size = mat.w.row_size();
        let (x, len, bytes) = match form {
            Form::X32 => (&scratch.x32, 32, size_of::<X32>()),
            Form::X256 => (&scratch.x256, 256, size_of::<X256>()),
        };
        let n_blocks = mat.w.n_in / len;
        let w = &mat.w.data[rows.start * row_size..rows.end * row_size];
        let mut sums = [0.0; MAX_UNIT];
        let sums = &mut sums[..rows.len()];
        for t in 0..n_tokens {
            // SAFETY: the activations were written before the last barrier and not since; `w` has as many rows; the
            // instruction set is available.
            unsafe {
                let x = x
                    .slice(t * n_blocks * bytes..(t + 1) * n_blocks * bytes)
                    .as_ptr();
                (kernel.rows)(
                    &Rows {
                        w,
                        row_size,
                        x,
                        n_blocks,
                        next,
                    },
                    sums,
                );
            }
            self.store(mat, t, rows.start, sums);
        }
    }

    /// Tiles of rows with groups of tokens.
    fn mul_tiles(
        &self,
        mat: &MulMat<'_>,
        form: Form,
        kernel: Kernel,
        rows: Range<usize>,
        n_tokens: usize,
    ) {
        let (unpack, mul) = kernel.gemm.expect("checked by `way`");
        let scratch = &self.scratch.matmul;
        let groups = n_tokens.div_ceil(GROUP);
        let n_acc = groups * TILES * GROUP * MAX_ROWS;
        let max_acc = scratch.acc.len() / self.nth();
        let tiles_size = TILES * size_of::<Tile>();
        // SAFETY: every worker has its own sums and tiles; they are aligned and any bytes are one.
        let (acc, tiles) = unsafe {
            let tiles = self.ith() * tiles_size;
            let tiles = scratch.tiles.slice_mut(tiles..tiles + tiles_size);
            let acc = self.ith() * max_acc;
            let acc = scratch.acc.slice_mut(acc..acc + n_acc);
            (
                acc.as_chunks_mut::<MAX_ROWS>().0.as_chunks_mut::<GROUP>().0,
                std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast::<Tile>(), TILES),
            )
        };
        acc.as_flattened_mut().as_flattened_mut().fill(0.0);
        let (size, ty) = (mat.w.row_size(), mat.w.ty.traits());
        let data = &mat.w.data[rows.start * size..rows.end * size];
        let n_tiles = rows.len().div_ceil(MAX_ROWS);
        let in_tile = |i: usize| (rows.len() - i * MAX_ROWS).min(MAX_ROWS);
        for column in (0..mat.w.n_in).step_by(COLUMNS) {
            let n32 = (mat.w.n_in - column).min(COLUMNS) / 32;
            let offset = column / ty.block_size * ty.type_size;
            for (i, tile) in tiles.iter_mut().enumerate().take(n_tiles) {
                let w = &data[i * MAX_ROWS * size + offset..];
                // SAFETY: `w` begins a block of the tile's first row; the instruction set is available.
                unsafe { unpack(w.as_ptr(), size, in_tile(i), n32, tile) };
            }
            for g in 0..groups {
                let n = (n_tokens - g * GROUP).min(GROUP);
                // SAFETY: the activations were written before the last barrier and not since. Blocks of 32 columns are
                // `groups` apart.
                unsafe {
                    for (i, tile) in tiles.iter().enumerate().take(n_tiles) {
                        let acc = &mut acc[g * TILES + i];
                        match form {
                            Form::X256 => {
                                let x = block::<G256>(&scratch.x256, column / 256 * groups + g);
                                mul(tile, x.cast(), n, n32, groups, acc);
                            }
                            Form::X32 => {
                                let x = block::<G32>(&scratch.x32, column / 32 * groups + g);
                                mul(tile, x.cast(), n, n32, groups, acc);
                            }
                        }
                    }
                }
            }
        }
        let n_out = mat.w.n_out;
        for g in 0..groups {
            let n = (n_tokens - g * GROUP).min(GROUP);
            for i in 0..n_tiles {
                let (t, row) = (g * GROUP, rows.start + i * MAX_ROWS);
                let sums = &acc[g * TILES + i][..n];
                if in_tile(i) == MAX_ROWS {
                    let at = t * n_out + row;
                    assert!(
                        at + (n - 1) * n_out + MAX_ROWS <= mat.out.len(),
                        "rows of the output"
                    );
                    // SAFETY: within the output, and the columns are this worker's.
                    let to = unsafe { lanes::Columns::new(mat.out.as_ptr().add(at), n_out, n) };
                    let bias = mat
                        .bias
                        .map(|b| b[row..].first_chunk().expect("a tile of rows"));
                    lanes::store_tile(self.isa, to, sums, bias, mat.out_add);
                } else {
                    for (t, sums) in (t..).zip(sums) {
                        self.store(mat, t, row, &sums[..in_tile(i)]);
                    }
                }
            }
        }
    }

    /// Results for a token and some rows, which are this worker's.
    #[inline]
    fn store(&self, mat: &MulMat<'_>, t: usize, row: usize, sums: &[f32]) {
        let at = t * mat.w.n_out + row;
        // SAFETY: the rows are this worker's.
        let out = unsafe { mat.out.slice_mut(at..at + sums.len()) };
        match (mat.bias.map(|b| &b[row..row + sums.len()]), mat.out_add) {
            (None, false) => out.copy_from_slice(sums),
            (None, true) => out.iter_mut().zip(sums).for_each(|(o, s)| *o += s),
            (Some(b), false) => {
                out.iter_mut()
                    .zip(sums)
                    .zip(b)
                    .for_each(|((o, s), b)| *o = s + b);
            }
            (Some(b), true) => {
                out.iter_mut()
                    .zip(sums)
                    .zip(b)
                    .for_each(|((o, s), b)| *o += s + b);
            }
        }
    }
}
