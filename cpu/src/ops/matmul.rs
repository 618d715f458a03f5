//! Products of weights and activations.
//!
//! An operation has two stages. First the activations are brought into the forms that the kernels read, which
//! depends on the types of the weights and on whether there are few tokens or many. Then the rows of all matrices
//! are cut into units, which workers take as they get to them.

use super::{Limits, Pass, id};
use crate::activations::{X32, X32x4, X256, quantize_32, quantize_256};
use crate::kernels::{self, Form, Kernel, MAX_ROWS, Next, Tile, bf16, run};
use crate::tensor::row_size;
use crate::{Isa, Mat, MulMat, Shared, float};
use lemma_quant::GgmlType;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicPtr, AtomicUsize};

/// From so many tokens on, weights that are numbers are converted for all of them.
pub(super) const FLOAT_BATCH: usize = 4;
/// Columns that are unpacked at a time.
pub(super) const COLUMNS: usize = 256;
/// Bytes of weights that a worker takes at a time with few tokens.
const UNIT_BYTES: usize = 256 << 10;
/// Rows that a worker takes at most, other than tiles.
pub(super) const MAX_UNIT: usize = 512;
/// Bytes that a worker reads ahead for the next product.
const LEAD: usize = 16 << 10;
/// Where nobody knows what is next.
const NOWHERE: Next = Next {
    at: std::ptr::null(),
    stride: 0,
};
/// Products with one input.
const MAX_PRODUCTS: usize = 8;
/// Products of a step whose order is remembered.
const MAX_PLACES: usize = 1024;
/// Tiles of rows that share a read of the activations.
pub(super) const TILES: usize = 4;

/// Activations that are rounded at a time.
const PART: usize = 256;

/// The forms of activations that the scalar code of quantized weights reads.
pub(super) const X_TYPES: [GgmlType; 3] = [GgmlType::Q8_0, GgmlType::Q8_1, GgmlType::Q8_K];

/// Activations in the forms that kernels read, and room for each worker's weights and sums.
pub(crate) struct Scratch {
    /// In each of the `X_TYPES`: `[n_tokens, n_in]`.
    pub(super) x_types: [Shared<u8>; 3],
    /// `[n_in / 32, n_tokens]` of `X32`.
    pub(super) x32: Shared<u8>,
    /// `[n_in / 256, n_tokens]` of `X256`.
    pub(super) x256: Shared<u8>,
    /// Tokens rounded to bfloat16: `[n_tokens, token_size(n_in)]`.
    pub(super) bf16: Shared<u8>,
    /// A decoded row of weights for each worker: `[nth, max_width]`.
    pub(super) row: Shared<f32>,
    /// Sums for each worker: `[nth, TILES, n_tokens, MAX_ROWS]`, or `[nth, n_tokens, float::SUMS]`.
    pub(super) acc: Shared<f32>,
    /// `Tile`s: `[nth, TILES]`, or numbers: `[nth, float::PLAIN]`.
    pub(super) tiles: Shared<u8>,
    /// Where workers began to read in the last step, to read ahead from one product to the next: `[MAX_PLACES, nth]`.
    places: Vec<(AtomicPtr<u8>, AtomicUsize)>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits, nth: usize) -> Self {
        let [t0, t1, t2, x32, x256, bf16, row, acc, tiles] = Self::lens(limits, nth);
        Self {
            x_types: [t0, t1, t2].map(Shared::zeroed),
            x32: Shared::zeroed(x32),
            x256: Shared::zeroed(x256),
            bf16: Shared::zeroed(bf16),
            row: Shared::zeroed(row),
            acc: Shared::zeroed(acc),
            tiles: Shared::zeroed(tiles),
            places: (0..MAX_PLACES * nth).map(|_| Default::default()).collect(),
        }
    }

    pub(crate) fn size(limits: &Limits, nth: usize) -> usize {
        let [t0, t1, t2, x32, x256, bf16, row, acc, tiles] = Self::lens(limits, nth);
        t0 + t1 + t2 + x32 + x256 + bf16 + (row + acc) * size_of::<f32>() + tiles
    }

    fn lens(limits: &Limits, nth: usize) -> [usize; 9] {
        let width = Self::width(limits);
        let values = |ty| row_size(ty, limits.max_tokens * width);
        [
            values(X_TYPES[0]),
            values(X_TYPES[1]),
            values(X_TYPES[2]),
            width / 32 * limits.max_tokens * size_of::<X32>(),
            width / 256 * limits.max_tokens * size_of::<X256>(),
            bf16::token_size(width) * limits.max_tokens,
            nth * width,
            nth * limits.max_tokens * (TILES * MAX_ROWS).max(float::SUMS),
            nth * (TILES * size_of::<Tile>())
                .max(float::PLAIN * size_of::<f32>())
                .next_multiple_of(64),
        ]
    }

    pub(super) fn width(limits: &Limits) -> usize {
        limits.max_width.next_multiple_of(COLUMNS)
    }
}

/// How one matrix of a product is multiplied.
pub(super) struct Plan {
    pub(super) way: Way,
    pub(super) kernel: Option<Kernel>,
    /// Rows that a worker takes at a time.
    unit: usize,
}

/// The ways there are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Numbers, with the activations as they are.
    Float,
    /// Numbers in bfloat16, with activations rounded to that.
    Bf16,
    /// Decoded, with the activations as they are.
    Plain,
    /// By the scalar code of its type, with activations in one of the `X_TYPES`.
    Scalar(usize),
    /// A few rows with one token.
    Rows(Form),
    /// Tiles of rows with some tokens.
    Tiles(Form),
}

impl Pass<'_> {
    /// `out = x w^T (+ bias)` for several matrices with the same input `x`, `[n_tokens, n_in]`.
    ///
    /// Activations are quantized once for each form that the types of the weights ask for. No `out` may be `x`, nor
    /// another product's `out`.
    pub fn mul_mats(&self, mats: &[MulMat<'_>], x: &Shared<f32>, n_tokens: usize) {
        self.check("mul_mats", &[id(x), n_tokens, mats.len()]);
        for (i, mat) in mats.iter().enumerate() {
            assert!(
                mats[..i].iter().all(|m| !m.out.is(mat.out)),
                "products have their own outputs"
            );
        }
        self.products(mats, x, n_tokens, false);
    }

    /// The products of [`Pass::mul_mats`]; or, if they are `apart`, each with an input of its own, `[mats, n_tokens, n_in]`, all to parts
    /// of one output, `[mats, n_tokens, n_out]`.
    pub(super) fn products(
        &self,
        mats: &[MulMat<'_>],
        x: &Shared<f32>,
        n_tokens: usize,
        apart: bool,
    ) {
        let Some(first) = mats.first() else { return };
        let n_in = first.w.n_in;
        let n_inputs = if apart { mats.len() } else { 1 };
        assert!(mats.len() <= MAX_PRODUCTS, "that many products at once");
        assert!(n_tokens <= self.limits.max_tokens && n_in <= Scratch::width(self.limits));
        assert!(n_inputs <= self.inputs(n_tokens, n_in).max(1));
        for mat in mats {
            assert!(
                mat.w.n_in == n_in && !mat.out.is(x),
                "products of inputs of one width"
            );
            assert!(mat.bias.is_none_or(|b| b.len() == mat.w.n_out));
            assert!(
                mat.w.data.len() == mat.w.n_out * mat.w.row_size(),
                "bytes of the matrix"
            );
        }
        let mut plans = [const { None }; MAX_PRODUCTS];
        for (plan, mat) in plans.iter_mut().zip(mats) {
            *plan = Some(self.plan(&mat.w, n_tokens));
        }
        let plans = || plans.iter().flatten().zip(mats);
        let needs = |way| plans().any(|(plan, _)| plan.way == way);
        let mut prepared = false;
        for (i, ty) in X_TYPES.iter().enumerate() {
            if needs(Way::Scalar(i)) {
                let n = n_inputs * n_tokens * n_in;
                self.quantize(*ty, &self.scratch.matmul.x_types[i], x, n);
                prepared = true;
            }
        }
        for form in [Form::X32, Form::X256] {
            if needs(Way::Rows(form)) || needs(Way::Tiles(form)) {
                for i in 0..n_inputs {
                    self.arrange(form, x, i * n_tokens, n_tokens, n_in);
                }
                prepared = true;
            }
        }
        if needs(Way::Bf16) {
            self.round(x, n_inputs * n_tokens, n_in);
            prepared = true;
        }
        if prepared {
            self.barrier();
        }
        let n_units: usize = plans()
            .map(|(plan, mat)| mat.w.n_out.div_ceil(plan.unit))
            .sum();
        let locate = |mut u: usize| {
            for (i, (plan, mat)) in plans().enumerate() {
                let n = mat.w.n_out.div_ceil(plan.unit);
                if u < n {
                    let rows = u * plan.unit..((u + 1) * plan.unit).min(mat.w.n_out);
                    let first = if apart { i * n_tokens } else { 0 };
                    return (plan, mat, rows, first);
                }
                u -= n;
            }
            unreachable!("the unit is one of them");
        };
        let address = |u: usize| {
            let (_, mat, rows, _) = locate(u);
            let size = mat.w.row_size();
            Next {
                at: mat.w.data[rows.start * size..].as_ptr(),
                stride: run(rows.len()) * size,
            }
        };
        let first = if self.ith() < n_units {
            address(self.ith())
        } else {
            NOWHERE
        };
        let follows = self.follow(first);
        let mut units = self.w.claim(n_units, 1).map(|u| u.start).peekable();
        while let Some(u) = units.next() {
            let next = units.peek().map_or(follows, |u| address(*u));
            let (plan, mat, rows, first) = locate(u);
            self.mul_rows(plan, mat, x, rows, first..first + n_tokens, next);
        }
        if n_tokens == 1 && !follows.at.is_null() {
            // Memory has nothing to do until the next product.
            for r in 0..4 {
                let at = follows.at.wrapping_add(r * follows.stride);
                kernels::prefetch(self.isa, at, LEAD / 4);
            }
        }
        self.barrier();
    }

    /// Inputs of so many tokens and numbers that products apart have room for; none, if it is less than one.
    pub(super) fn inputs(&self, n_tokens: usize, n_in: usize) -> usize {
        let room = self.limits.max_tokens * Scratch::width(self.limits);
        // Each begins with a group of four blocks.
        (room / (n_tokens * n_in.next_multiple_of(128)).max(1)).min(MAX_PRODUCTS)
    }

    /// One product; see [`Pass::mul_mats`].
    pub fn mul_mat(&self, mat: MulMat<'_>, x: &Shared<f32>, n_tokens: usize) {
        self.mul_mats(&[mat], x, n_tokens);
    }

    fn plan(&self, w: &Mat<'_>, n_tokens: usize) -> Plan {
        let traits = w.ty.traits();
        let kernel = kernels::kernel(w.ty, self.isa).filter(|k| w.n_in.is_multiple_of(k.columns));
        let x_type = X_TYPES.iter().position(|x| *x == traits.vec_dot_type);
        let way = match (&kernel, x_type.filter(|_| traits.vec_dot.is_some())) {
            (Some(k), _) if n_tokens > 1 => Way::Tiles(k.form),
            (Some(k), _) => Way::Rows(k.form),
            _ if w.ty == GgmlType::BF16 && self.isa >= Isa::Avx512Bf16 => Way::Bf16,
            _ if float::is_float(w.ty) => Way::Float,
            (_, Some(i)) => Way::Scalar(i),
            _ => Way::Plain,
        };
        let unit = match way {
            // Not more than leaves some units for every worker.
            Way::Tiles(_) => MAX_ROWS * (w.n_out / (3 * MAX_ROWS * self.nth())).clamp(1, TILES),
            Way::Float | Way::Bf16 if n_tokens >= FLOAT_BATCH => {
                float::BLOCK * (w.n_out / (3 * float::BLOCK * self.nth())).clamp(1, TILES)
            }
            _ => {
                let fair = w.n_out.div_ceil(8 * self.nth());
                (UNIT_BYTES / w.row_size().max(1))
                    .clamp(1, fair.clamp(1, MAX_UNIT))
                    .next_multiple_of(4)
            }
        };
        Plan { way, kernel, unit }
    }

    /// Notes where this worker begins to read for this product, and says where it will for the next one, if the last
    /// step is anything to go by.
    fn follow(&self, first: Next) -> Next {
        let n = self.n_products.get();
        self.n_products.set(n + 1);
        let places = &self.scratch.matmul.places;
        let place = |n: usize| places.get(n * self.nth() + self.ith());
        if let Some((at, stride)) = place(n) {
            at.store(first.at.cast_mut(), Relaxed);
            stride.store(first.stride, Relaxed);
        }
        place(n + 1).map_or(NOWHERE, |(at, stride)| Next {
            at: at.load(Relaxed).cast_const(),
            stride: stride.load(Relaxed),
        })
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

    /// This worker's share of the activations, to bfloat16.
    fn round(&self, x: &Shared<f32>, n_tokens: usize, n_in: usize) {
        let size = bf16::token_size(n_in);
        // A token is divided among workers: there may be only one.
        for i in self.w.range(n_tokens * n_in.div_ceil(PART), 1) {
            let (t, start) = (i / n_in.div_ceil(PART), i % n_in.div_ceil(PART) * PART);
            let end = (start + PART).min(n_in);
            let to = t * size + 2 * start..t * size + bf16::token_size(end);
            // SAFETY: `x` is only read, the part is this worker's; the instruction set is available.
            unsafe {
                let x = x.slice(t * n_in + start..t * n_in + end);
                bf16::round(x, self.scratch.matmul.bf16.slice_mut(to));
            }
        }
    }

    /// This worker's share of the activations of tokens from `first` on, to `X32` (of one token to `X32x4` as far as they go)
    /// or `X256`.
    fn arrange(&self, form: Form, x: &Shared<f32>, first: usize, n_tokens: usize, n_in: usize) {
        let scratch = &self.scratch.matmul;
        let (len, align) = match form {
            Form::X32 => (32, 4),
            Form::X256 => (256, 1),
        };
        let range = self.w.range(n_tokens * n_in / len, align);
        let start = first_block(form, first, n_tokens, n_in);
        for i in range.clone() {
            let at = (first + i % n_tokens) * n_in + i / n_tokens * len;
            // SAFETY: `x` is only read, the block is this worker's; blocks are aligned and any bytes are one.
            unsafe {
                let x = x.slice(at..at + len);
                match form {
                    Form::X32 => {
                        let to = &mut *block::<X32>(&scratch.x32, start + i);
                        quantize_32(self.isa, x.try_into().expect("32 values"), to);
                    }
                    Form::X256 => {
                        let to = &mut *block::<X256>(&scratch.x256, start + i);
                        quantize_256(self.isa, x.try_into().expect("256 values"), to);
                        if n_tokens == 1 {
                            to.arrange();
                        }
                    }
                }
            }
        }
        if form == Form::X32 && n_tokens == 1 {
            for i in range.clone().step_by(4).filter(|i| i + 4 <= range.end) {
                let four: *mut [X32; 4] = block::<X32>(&scratch.x32, start + i).cast();
                // SAFETY: the four blocks were written above, and take as many bytes in the other form.
                unsafe { four.cast::<X32x4>().write(X32x4::new(&*four)) };
            }
        }
    }
}

/// The block that an input begins with, which has `first` tokens of `n_in` numbers before it. A token alone begins with a group of
/// four, for [`X32x4`].
pub(super) fn first_block(form: Form, first: usize, n_tokens: usize, n_in: usize) -> usize {
    match form {
        Form::X256 => first * n_in / 256,
        Form::X32 if n_tokens == 1 => first * (n_in / 32).next_multiple_of(4),
        Form::X32 => first * n_in / 32,
    }
}

/// Block `i` of a buffer of blocks.
pub(super) fn block<T>(buffer: &Shared<u8>, i: usize) -> *mut T {
    assert!(
        (i + 1) * size_of::<T>() <= buffer.len(),
        "the block is in the buffer"
    );
    // Buffers begin at a multiple of 64, which is more than blocks ask for.
    buffer.as_ptr().wrapping_add(i * size_of::<T>()).cast()
}
