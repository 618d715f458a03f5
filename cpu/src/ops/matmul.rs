//! Products of weights and activations.
//!
//! An operation has two stages. First the activations are brought into the forms that the kernels read, which
//! depends on the types of the weights and on whether there are few tokens or many. Then the rows of all matrices
//! are cut into units, which workers take as they get to them.

use super::{Limits, Pass, id};
use crate::activations::{G32, G256, GROUP, X32, X256, quantize_32, quantize_256};
use crate::kernels::{self, Form, Kernel, MAX_ROWS, Tile};
use crate::tensor::row_size;
use crate::{Mat, MulMat, Shared, float, lanes};
use lemma_quant::GgmlType;
use std::ops::Range;

/// From so many tokens on, weights are unpacked for all of them; below, it does not pay.
const BATCH: usize = 3;
/// Columns that are unpacked at a time.
const COLUMNS: usize = 256;
/// Bytes of weights that a worker takes at a time with few tokens.
const UNIT_BYTES: usize = 48 << 10;
/// Tiles of rows that share a read of the activations.
const TILES: usize = 2;

/// The forms of activations that the scalar code of quantized weights reads.
const X_TYPES: [GgmlType; 3] = [GgmlType::Q8_0, GgmlType::Q8_1, GgmlType::Q8_K];

/// Activations in the forms that kernels read, and room for each worker's weights and sums.
pub(crate) struct Scratch {
    /// In each of the `X_TYPES`: `[n_tokens, n_in]`.
    x_types: [Shared<u8>; 3],
    /// `[n_tokens, n_in / 32]` of `X32`, or `[n_in / 32, n_tokens / 8]` of `G32`.
    x32: Shared<u8>,
    /// `[n_tokens, n_in / 256]` of `X256`, or `[n_in / 256, n_tokens / 8]` of `G256`.
    x256: Shared<u8>,
    /// A decoded row of weights for each worker: `[nth, max_width]`.
    row: Shared<f32>,
    /// Sums for each worker: `[nth, n_tokens / 8, TILES, 8, MAX_ROWS]`.
    acc: Shared<f32>,
    /// `[nth, TILES]`
    tiles: Shared<u8>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits, nth: usize) -> Self {
        let [t0, t1, t2, x32, x256, row, acc, tiles] = Self::lens(limits, nth);
        Self {
            x_types: [t0, t1, t2].map(Shared::zeroed),
            x32: Shared::zeroed(x32),
            x256: Shared::zeroed(x256),
            row: Shared::zeroed(row),
            acc: Shared::zeroed(acc),
            tiles: Shared::zeroed(tiles),
        }
    }

    pub(crate) fn size(limits: &Limits, nth: usize) -> usize {
        let [t0, t1, t2, x32, x256, row, acc, tiles] = Self::lens(limits, nth);
        t0 + t1 + t2 + x32 + x256 + (row + acc) * size_of::<f32>() + tiles
    }

    fn lens(limits: &Limits, nth: usize) -> [usize; 8] {
        let width = Self::width(limits);
        let groups = limits.max_tokens.div_ceil(GROUP);
        let values = |ty| row_size(ty, limits.max_tokens * width);
        let x32 = (limits.max_tokens * size_of::<X32>()).max(groups * size_of::<G32>());
        let x256 = (limits.max_tokens * size_of::<X256>()).max(groups * size_of::<G256>());
        [
            values(X_TYPES[0]),
            values(X_TYPES[1]),
            values(X_TYPES[2]),
            width / 32 * x32,
            width / 256 * x256,
            nth * width,
            nth * groups * TILES * GROUP * MAX_ROWS,
            nth * TILES * size_of::<Tile>(),
        ]
    }

    fn width(limits: &Limits) -> usize {
        limits.max_width.next_multiple_of(COLUMNS)
    }
}

/// How a matrix is multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Numbers, with the activations as they are.
    Float,
    /// Decoded, with the activations as they are.
    Plain,
    /// By the scalar code of its type, with activations in one of the `X_TYPES`.
    Scalar(usize),
    /// A few rows with one token at a time.
    Rows(Form),
    /// Tiles of rows with groups of tokens.
    Tiles(Form),
}

impl Pass<'_> {
    /// `out = x w^T (+ bias)` for several matrices with the same input `x`, `[n_tokens, n_in]`.
    ///
    /// Activations are quantized once for each form that the types of the weights ask for. No `out` may be `x`, nor
    /// another product's `out`.
    pub fn mul_mats(&self, mats: &[MulMat<'_>], x: &Shared<f32>, n_tokens: usize) {
        self.check("mul_mats", &[id(x), n_tokens, mats.len()]);
        let Some(first) = mats.first() else { return };
        let n_in = first.w.n_in;
        assert!(n_tokens <= self.limits.max_tokens && n_in <= Scratch::width(self.limits));
        for (i, mat) in mats.iter().enumerate() {
            assert!(
                mat.w.n_in == n_in && !mat.out.is(x),
                "products of one input"
            );
            assert!(
                mats[..i].iter().all(|m| !m.out.is(mat.out)),
                "products have their own outputs"
            );
            assert!(mat.bias.is_none_or(|b| b.len() == mat.w.n_out));
            assert!(
                mat.w.data.len() == mat.w.n_out * mat.w.row_size(),
                "bytes of the matrix"
            );
        }
        let needs = |way| mats.iter().any(|m| self.way(m.w.ty, n_tokens).0 == way);
        let mut prepared = false;
        for (i, ty) in X_TYPES.iter().enumerate() {
            if needs(Way::Scalar(i)) {
                self.quantize(*ty, &self.scratch.matmul.x_types[i], x, n_tokens * n_in);
                prepared = true;
            }
        }
        for form in [Form::X32, Form::X256] {
            if needs(Way::Rows(form)) {
                self.arrange(form, x, n_tokens * n_in);
                prepared = true;
            }
            if needs(Way::Tiles(form)) {
                self.interleave(form, x, n_tokens, n_in);
                prepared = true;
            }
        }
        if prepared {
            self.barrier();
        }
        let units = |mat: &MulMat<'_>| mat.w.n_out.div_ceil(self.unit(&mat.w, n_tokens));
        let n_units: usize = mats.iter().map(units).sum();
        for claimed in self.w.claim(n_units, 1) {
            let mut u = claimed.start;
            let mut mats = mats.iter();
            let mat = loop {
                let mat = mats.next().expect("the unit is one of them");
                match u.checked_sub(units(mat)) {
                    Some(rest) => u = rest,
                    None => break mat,
                }
            };
            let size = self.unit(&mat.w, n_tokens);
            let rows = u * size..((u + 1) * size).min(mat.w.n_out);
            self.mul_rows(mat, x, rows, n_tokens);
        }
        self.barrier();
    }

    /// One product; see [`Pass::mul_mats`].
    pub fn mul_mat(&self, mat: MulMat<'_>, x: &Shared<f32>, n_tokens: usize) {
        self.mul_mats(&[mat], x, n_tokens);
    }

    fn way(&self, ty: GgmlType, n_tokens: usize) -> (Way, Option<Kernel>) {
        if let Some(kernel) = kernels::kernel(ty, self.isa) {
            let way = match kernel.gemm {
                Some(_) if n_tokens >= BATCH => Way::Tiles(kernel.form),
                _ => Way::Rows(kernel.form),
            };
            return (way, Some(kernel));
        }
        if float::is_float(ty) {
            return (Way::Float, None);
        }
        let traits = ty.traits();
        let x_type = X_TYPES.iter().position(|x| *x == traits.vec_dot_type);
        match x_type.filter(|_| traits.vec_dot.is_some()) {
            Some(i) => (Way::Scalar(i), None),
            None => (Way::Plain, None),
        }
    }

    /// Rows that a worker takes at a time.
    fn unit(&self, w: &Mat<'_>, n_tokens: usize) -> usize {
        match self.way(w.ty, n_tokens).0 {
            Way::Tiles(_) => TILES * MAX_ROWS,
            _ => {
                // Not more than leaves several units for every worker.
                let fair = w.n_out.div_ceil(4 * self.nth());
                (UNIT_BYTES / w.row_size().max(1))
                    .clamp(1, fair.max(1))
                    .next_multiple_of(4)
            }
        }
    }

    /// This worker's share of `n` activations, to the blocks of `ty`.
    fn quantize(&self, ty: GgmlType, to: &Shared<u8>, x: &Shared<f32>, n: usize) {
        let traits = ty.traits();
        let quantize_row = traits.quantize_row.expect("activations can be quantized");
        let (values, bytes) = (traits.block_size, traits.type_size);
        for i in self.w.range(n / values, 1) {
            // SAFETY: `x` is only read, the block is this worker's.
            unsafe {
                quantize_row(
                    x.slice(i * values..(i + 1) * values),
                    to.slice_mut(i * bytes..(i + 1) * bytes),
                );
            }
        }
    }

    /// This worker's share of `n` activations, to `X32` or `X256`.
    fn arrange(&self, form: Form, x: &Shared<f32>, n: usize) {
        let scratch = &self.scratch.matmul;
        match form {
            Form::X32 => {
                for i in self.w.range(n / 32, 4) {
                    // SAFETY: `x` is only read, the block is this worker's; blocks are aligned and any bytes are one.
                    unsafe {
                        let x = x.slice(i * 32..(i + 1) * 32);
                        let to = &mut *block::<X32>(&scratch.x32, i);
                        quantize_32(self.isa, x.try_into().expect("32 values"), to);
                    }
                }
            }
            Form::X256 => {
                for i in self.w.range(n / 256, 1) {
                    // SAFETY: as above.
                    unsafe {
                        let x = x.slice(i * 256..(i + 1) * 256);
                        let to = &mut *block::<X256>(&scratch.x256, i);
                        quantize_256(self.isa, x.try_into().expect("256 values"), to);
                        to.swap();
                    }
                }
            }
        }
    }

    /// This worker's share of the activations of all tokens, to `G32` or `G256`.
    fn interleave(&self, form: Form, x: &Shared<f32>, n_tokens: usize, n_in: usize) {
        let scratch = &self.scratch.matmul;
        let groups = n_tokens.div_ceil(GROUP);
        let len = if form == Form::X32 { 32 } else { 256 };
        for i in self.w.range(groups * n_in / len, 1) {
            let (column, group) = (i / groups * len, i % groups);
            let tokens = group * GROUP..((group + 1) * GROUP).min(n_tokens);
            // SAFETY: `x` is only read, the block is this worker's; blocks are aligned and any bytes are one.
            unsafe {
                let x = |t: usize| x.slice(t * n_in + column..t * n_in + column + len);
                match form {
                    Form::X32 => {
                        let mut blocks = [X32::ZERO; GROUP];
                        for (t, block) in tokens.zip(&mut blocks) {
                            quantize_32(self.isa, x(t).try_into().expect("32 values"), block);
                        }
                        (*block::<G32>(&scratch.x32, i)).interleave(&blocks);
                    }
                    Form::X256 => {
                        let mut blocks = [X256::ZERO; GROUP];
                        for (t, block) in tokens.zip(&mut blocks) {
                            quantize_256(self.isa, x(t).try_into().expect("256 values"), block);
                        }
                        (*block::<G256>(&scratch.x256, i)).interleave(&blocks);
                    }
                }
            }
        }
    }

    /// Some rows of weights, which are this worker's, with all tokens.
    fn mul_rows(&self, mat: &MulMat<'_>, x: &Shared<f32>, rows: Range<usize>, n_tokens: usize) {
        let (way, kernel) = self.way(mat.w.ty, n_tokens);
        match (way, kernel) {
            (Way::Rows(form), Some(kernel)) => self.mul_few(mat, form, kernel, rows, n_tokens),
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

    /// Up to four rows at a time, with one token after the other.
    fn mul_few(
        &self,
        mat: &MulMat<'_>,
        form: Form,
        kernel: Kernel,
        rows: Range<usize>,
        n_tokens: usize,
    ) {
        let scratch = &self.scratch.matmul;
        let size = mat.w.row_size();
        let (x, len, bytes) = match form {
            Form::X32 => (&scratch.x32, 32, size_of::<X32>()),
            Form::X256 => (&scratch.x256, 256, size_of::<X256>()),
        };
        let n_blocks = mat.w.n_in / len;
        for row in rows.clone().step_by(4) {
            let n = (rows.end - row).min(4);
            let w = &mat.w.data[row * size..(row + n) * size];
            for t in 0..n_tokens {
                // SAFETY: the activations were written before the last barrier and not since; `w` has `n` rows; the
                // instruction set is available.
                let sums = unsafe {
                    let x = x.slice(t * n_blocks * bytes..(t + 1) * n_blocks * bytes);
                    (kernel.rows)(w.as_ptr(), size, n, x.as_ptr(), n_blocks)
                };
                self.store(mat, t, row, &sums[..n]);
            }
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

/// Block `i` of a buffer of blocks.
fn block<T>(buffer: &Shared<u8>, i: usize) -> *mut T {
    assert!(
        (i + 1) * size_of::<T>() <= buffer.len(),
        "the block is in the buffer"
    );
    // Buffers begin at a multiple of 64, which is more than blocks ask for.
    buffer.as_ptr().wrapping_add(i * size_of::<T>()).cast()
}
