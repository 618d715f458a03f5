//! Rows of weights with tokens, in each of the ways there are.

use super::Pass;
use super::matmul::{
    COLUMNS, FLOAT_BATCH, MAX_UNIT, Plan, Scratch, TILES, Way, X_TYPES, block, first_block,
};
use crate::activations::{X32, X256};
use crate::kernels::{
    Form, Kernel, MAX_ROWS, Next, Rows, Tile, TilesFn, UnpackFn, bf16, first_rows, run,
};
use crate::shared::Plain;
use crate::tensor::row_size;
use crate::{MulMat, Shared, float, lanes};
use std::ops::Range;

impl Pass<'_> {
    /// Some rows of weights, which are this worker's, with all tokens: those of `tokens` among all inputs and outputs. `next` is read
    /// after them.
    pub(super) fn mul_rows(
        &self,
        plan: &Plan,
        mat: &MulMat<'_>,
        x: &Shared<f32>,
        rows: Range<usize>,
        tokens: Range<usize>,
        next: Next,
    ) {
        match (plan.way, plan.kernel) {
            (Way::Rows(form), Some(kernel)) => {
                self.mul_one(mat, form, kernel, rows, tokens.start, next);
            }
            (Way::Tiles(form), Some(kernel)) => {
                let gemm = match kernel.wide {
                    Some((from, unpack, mul)) if tokens.len() >= from => (unpack, mul),
                    _ => kernel.gemm,
                };
                self.mul_tiles(mat, form, gemm, rows, tokens, next.at);
            }
            (Way::Float | Way::Bf16, _) => self.mul_float(plan.way, mat, x, rows, tokens, next.at),
            (Way::Scalar(i), _) => {
                let n_in = mat.w.n_in;
                let size = row_size(X_TYPES[i], n_in);
                let vec_dot = mat.w.ty.traits().vec_dot.expect("checked by `way`");
                for row in rows {
                    for t in tokens.clone() {
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
                    for t in tokens.clone() {
                        // SAFETY: `x` is only read.
                        let x = unsafe { x.slice(t * n_in..(t + 1) * n_in) };
                        self.store(mat, t, row, &[lanes::dot(self.isa, decoded, x)]);
                    }
                }
            }
        }
    }

    /// Weights that are numbers.
    fn mul_float(
        &self,
        way: Way,
        mat: &MulMat<'_>,
        x: &Shared<f32>,
        rows: Range<usize>,
        tokens: Range<usize>,
        next: *const u8,
    ) {
        let (n_in, size, n_tokens) = (mat.w.n_in, mat.w.row_size(), tokens.len());
        let rounded = |tokens: Range<usize>| {
            let size = bf16::token_size(n_in);
            let rounded = &self.scratch.matmul.bf16;
            // SAFETY: written before the last barrier and not since.
            unsafe { rounded.slice(tokens.start * size..tokens.end * size) }
        };
        if n_tokens >= FLOAT_BATCH {
            let scratch = &self.scratch.matmul;
            let block = match way {
                Way::Bf16 => float::BLOCK,
                _ => float::block_rows(self.isa, n_tokens),
            };
            for row in rows.clone().step_by(block) {
                let end = (row + block).min(rows.end);
                let w = &mat.w.data[row * size..end * size];
                // SAFETY: every worker has its own room, any bytes are numbers, and `x` is only read; the instruction set is
                // available.
                unsafe {
                    let next = if end < rows.end {
                        w.as_ptr_range().end
                    } else {
                        next
                    };
                    let sums = self.own(&scratch.acc, n_tokens * float::SUMS);
                    let store = |t: usize, sums: &[f32]| {
                        self.store(mat, tokens.start + t, row, sums);
                    };
                    if way == Way::Bf16 {
                        let block = float::RoundedBlock {
                            w,
                            x: rounded(tokens.clone()),
                            n_in,
                            next,
                            sums,
                        };
                        bf16::mul_many(block, &store);
                    } else {
                        let block = float::Block {
                            ty: mat.w.ty,
                            w,
                            x: x.slice(tokens.start * n_in..tokens.end * n_in),
                            n_in,
                            next,
                            plain: self.own(&scratch.tiles, float::PLAIN),
                            sums,
                        };
                        float::mul_many(self.isa, block, &store);
                    }
                }
            }
            return;
        }
        for t in tokens.clone().step_by(float::TOKENS) {
            let n = (tokens.end - t).min(float::TOKENS);
            // SAFETY: `x` is only read.
            let x = unsafe { x.slice(t * n_in..(t + n) * n_in) };
            let first = first_rows(rows.len());
            // Runs may overlap, but a result is stored once.
            let mut results = [[0.0; MAX_UNIT]; float::TOKENS];
            for i in 0..run(rows.len()) {
                let mut sums = [[0.0; float::ROWS]; float::TOKENS];
                let w = first.map(|row| mat.w.row(rows.start + row + i));
                // SAFETY: the instruction set is available.
                unsafe {
                    if way == Way::Bf16 {
                        let x = rounded(t..t + n);
                        bf16::mul(float::RoundedTile { w, x, n_in }, &mut sums);
                    } else {
                        let ty = mat.w.ty;
                        float::mul(self.isa, float::Tile { ty, w, x, n_in }, &mut sums);
                    }
                }
                for (results, sums) in results.iter_mut().zip(&sums).take(n) {
                    for (row, sum) in first.into_iter().zip(sums) {
                        results[row + i] = *sum;
                    }
                }
            }
            for (t, results) in (t..t + n).zip(&results) {
                self.store(mat, t, rows.start, &results[..rows.len()]);
            }
        }
    }

    /// Some rows with one token, which is number `t`.
    fn mul_one(
        &self,
        mat: &MulMat<'_>,
        form: Form,
        kernel: Kernel,
        rows: Range<usize>,
        t: usize,
        next: Next,
    ) {
        let row_size = mat.w.row_size();
        let scratch = &self.scratch.matmul;
        let at = first_block(form, t, 1, mat.w.n_in);
        let (x, n_blocks): (*const u8, _) = match form {
            Form::X32 => (block::<X32>(&scratch.x32, at).cast(), mat.w.n_in / 32),
            Form::X256 => (block::<X256>(&scratch.x256, at).cast(), mat.w.n_in / 256),
        };
        let w = &mat.w.data[rows.start * row_size..rows.end * row_size];
        let mut sums = [0.0; MAX_UNIT];
        let sums = &mut sums[..rows.len()];
        // SAFETY: the activations were written before the last barrier and not since; `w` has as many rows; the
        // instruction set is available.
        unsafe {
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

    /// Tiles of rows with all tokens.
    fn mul_tiles(
        &self,
        mat: &MulMat<'_>,
        form: Form,
        (unpack, mul): (UnpackFn, TilesFn),
        rows: Range<usize>,
        tokens: Range<usize>,
        next: *const u8,
    ) {
        let n_tokens = tokens.len();
        let scratch = &self.scratch.matmul;
        // Rows of a tile are found by offsets of 32 bits.
        assert!(
            mat.w.row_size() <= i32::MAX as usize / MAX_ROWS,
            "rows that long"
        );
        // SAFETY: every worker has its own; any bytes are sums or tiles.
        let (acc, tiles) = unsafe {
            (
                self.own::<_, [f32; MAX_ROWS]>(&scratch.acc, n_tokens * TILES),
                self.own::<_, Tile>(&scratch.tiles, TILES),
            )
        };
        let n_tiles = rows.len().div_ceil(MAX_ROWS);
        let acc = &mut acc[..n_tiles * n_tokens];
        acc.as_flattened_mut().fill(0.0);
        for column in (0..mat.w.n_in).step_by(COLUMNS) {
            let n32 = self.unpack(mat, &rows, column, next, unpack, &mut tiles[..n_tiles]);
            let at = first_block(form, tokens.start, n_tokens, mat.w.n_in);
            let x: *const u8 = match form {
                Form::X256 => block::<X256>(&scratch.x256, at + column / 256 * n_tokens).cast(),
                Form::X32 => block::<X32>(&scratch.x32, at + column / 32 * n_tokens).cast(),
            };
            // SAFETY: the activations were written before the last barrier and not since; the instruction set is
            // available.
            unsafe { mul(&tiles[..n_tiles], x, n_tokens, n32, acc) };
        }
        for (i, acc) in acc.chunks(n_tokens).enumerate() {
            let n = (rows.len() - i * MAX_ROWS).min(MAX_ROWS);
            self.store_tile(mat, tokens.start, rows.start + i * MAX_ROWS, n, acc);
        }
    }

    /// Unpacks columns from `column` on of some rows, [`MAX_ROWS`] of them to each of `to`; returns how many there are, in 32.
    fn unpack(
        &self,
        mat: &MulMat<'_>,
        rows: &Range<usize>,
        column: usize,
        next: *const u8,
        unpack: UnpackFn,
        to: &mut [Tile],
    ) -> usize {
        let (n_in, size, ty) = (mat.w.n_in, mat.w.row_size(), mat.w.ty.traits());
        let data = &mat.w.data[rows.start * size..rows.end * size];
        let n32 = (n_in - column).min(COLUMNS) / 32;
        let offset = column / ty.block_size * ty.type_size;
        let width = n32 * 32 / ty.block_size * ty.type_size;
        for (i, to) in to.iter_mut().enumerate() {
            let n = (rows.len() - i * MAX_ROWS).min(MAX_ROWS);
            let w = data[i * MAX_ROWS * size + offset..].as_ptr();
            // What comes next lies in one piece, but a block of each row is read at a time, which the processor does not see
            // coming. So a part of it is asked for with every part of these columns.
            let next = match next.is_null() {
                true => w,
                false => next.wrapping_add(rows.len() * offset + i * MAX_ROWS * width),
            };
            // SAFETY: `w` begins a block of the first of the rows; the instruction set is available.
            unsafe { unpack(w, size, n, n32, next, to) };
        }
        n32
    }

    /// The first `n` values of this worker's part of a buffer.
    ///
    /// # Safety
    /// Bytes of `T` are a `U`, parts begin where one may, and the worker has not got another reference to its part.
    #[allow(clippy::mut_from_ref, reason = "every worker has its own")]
    unsafe fn own<T: Plain, U>(&self, buffer: &Shared<T>, n: usize) -> &mut [U] {
        let len = buffer.len() / self.nth();
        assert!(
            n * size_of::<U>() <= len * size_of::<T>(),
            "room for the worker"
        );
        let start = buffer.as_ptr().wrapping_add(self.ith() * len).cast::<U>();
        assert!(start.is_aligned());
        // SAFETY: within the buffer; the rest is by the caller.
        unsafe { std::slice::from_raw_parts_mut(start, n) }
    }

    /// Sums of tokens from `first` on and of `n` rows from `row` on.
    fn store_tile(
        &self,
        mat: &MulMat<'_>,
        first: usize,
        row: usize,
        n: usize,
        sums: &[[f32; MAX_ROWS]],
    ) {
        if n < MAX_ROWS {
            for (t, sums) in sums.iter().enumerate() {
                self.store(mat, first + t, row, &sums[..n]);
            }
            return;
        }
        let stride = mat.w.n_out;
        let at = first * stride + row;
        assert!(
            at + (sums.len() - 1) * stride + MAX_ROWS <= mat.out.len(),
            "rows of the output"
        );
        // SAFETY: within the output, and the columns are this worker's.
        let to = unsafe { lanes::Columns::new(mat.out.as_ptr().add(at), stride, sums.len()) };
        let bias = mat
            .bias
            .map(|b| b[row..].first_chunk().expect("a tile of rows"));
        lanes::store_tile(self.isa, to, sums, bias, mat.out_add);
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
