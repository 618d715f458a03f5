//! Weights that are plain numbers: a tile of rows and tokens at a time.
//!
//! Activations stay as they are, and weights are converted on the way, for more than a few tokens a block of them for all.
//! Each row and token has one vector of sums that runs along the row, so results do not depend on how large the tile is.

use crate::Isa;
use crate::kernels::read_ahead;
use crate::simd::{Simd, for_isa};
use lemma_quant::GgmlType;

/// Rows of a tile.
pub(crate) const ROWS: usize = 4;
/// Tokens of a tile.
pub(crate) const TOKENS: usize = 6;
/// How far rows of a tile are read ahead, in bytes.
const AHEAD: usize = 1 << 10;
/// Rows of a block: for these, activations are read once.
pub(crate) const BLOCK: usize = 8;
/// Columns of a block that are converted at a time: together with as many of the activations of a tile they fit the first-level
/// cache.
const COLUMNS: usize = 512;
/// Rows of a large block.
const LARGE: usize = 32;
/// Columns of a large block that are converted at a time, at most: those of a tile fit the first-level cache, and all the second.
const LARGE_COLUMNS: usize = 768;
/// From so many tokens on, blocks are large: with fewer, it takes too long to get what was converted back from the second-level
/// cache.
const MANY: usize = 64;
/// Numbers of a block that are converted at a time, at most.
pub(crate) const PLAIN: usize = LARGE * LARGE_COLUMNS;
/// Numbers of a token in the sums of a block, at most.
pub(crate) const SUMS: usize = if LARGE * 8 > BLOCK * LANES {
    LARGE * 8
} else {
    BLOCK * LANES
};
/// Lanes of the widest vectors.
pub(crate) const LANES: usize = 16;

/// A tile of a product.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// `F32`, `F16` or `BF16`.
    pub(crate) ty: GgmlType,
    /// Rows, each of which belongs to a run that is read to its end.
    pub(crate) w: [&'a [u8]; ROWS],
    /// `[n_tokens, n_in]`: 1 to `TOKENS`.
    pub(crate) x: &'a [f32],
    pub(crate) n_in: usize,
}

/// A tile of a product of weights in bfloat16 with rounded tokens (`x86/bf16.rs`).
#[derive(Clone, Copy)]
pub(crate) struct RoundedTile<'a> {
    /// Rows, each of which belongs to a run that is read to its end.
    pub(crate) w: [&'a [u8]; ROWS],
    /// 1 to `TOKENS` rounded tokens.
    pub(crate) x: &'a [u8],
    pub(crate) n_in: usize,
}

/// A block of such a product of many tokens.
pub(crate) struct RoundedBlock<'a> {
    /// 1 to `BLOCK` rows.
    pub(crate) w: &'a [u8],
    /// Rounded tokens.
    pub(crate) x: &'a [u8],
    pub(crate) n_in: usize,
    /// What is read next, which may be anywhere.
    pub(crate) next: *const u8,
    /// Room for sums: `[n_tokens, BLOCK, LANES]`.
    pub(crate) sums: &'a mut [f32],
}

/// A block of a product of many tokens.
pub(crate) struct Block<'a> {
    /// `F32`, `F16` or `BF16`.
    pub(crate) ty: GgmlType,
    /// `n_rows` rows: 1 to `block_rows`.
    pub(crate) w: &'a [u8],
    /// `[n_tokens, n_in]`
    pub(crate) x: &'a [f32],
    pub(crate) n_in: usize,
    /// What is read next, which may be anywhere.
    pub(crate) next: *const u8,
    /// Room for converted weights: `PLAIN`.
    pub(crate) plain: &'a mut [f32],
    /// Room for sums: `[n_tokens, SUMS]`.
    pub(crate) sums: &'a mut [f32],
}

/// Rows of a block of a product of so many tokens, at most.
pub(crate) fn block_rows(isa: Isa, n_tokens: usize) -> usize {
    match isa {
        Isa::Avx2 | Isa::AvxVnni if n_tokens >= MANY => LARGE,
        _ => BLOCK,
    }
}

/// Whether weights of the type are plain numbers.
pub(crate) fn is_float(ty: GgmlType) -> bool {
    matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
}

for_isa! {
    /// Products of all rows and tokens of a tile.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn mul<S>(tile: Tile<'_>, out: &mut [[f32; ROWS]; TOKENS]) mul_s;

    /// Products of all rows and tokens of a block, of which each is handed to `store`: token, and results of its rows.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn mul_many<S>(block: Block<'_>, store: &dyn Fn(usize, &[f32])) mul_many_s;
}

/// A number in memory.
trait Number {
    const SIZE: usize;
    /// # Safety
    /// `p` is valid for `S::N` numbers, and the instruction set is available.
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
}

struct F32;
struct F16;
struct BF16;

impl Number for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: by the caller.
        unsafe { S::load(p.cast()) }
    }
}

impl Number for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: by the caller.
        unsafe { S::load_f16(p.cast()) }
    }
}

impl Number for BF16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: by the caller.
        unsafe { S::load_bf16(p.cast()) }
    }
}

#[inline(always)]
unsafe fn mul_s<S: Simd>(tile: Tile<'_>, out: &mut [[f32; ROWS]; TOKENS]) {
    // SAFETY: by the caller.
    unsafe {
        match tile.ty {
            GgmlType::F32 => mul_numbers::<S, F32>(tile, out),
            GgmlType::F16 => mul_numbers::<S, F16>(tile, out),
            GgmlType::BF16 => mul_numbers::<S, BF16>(tile, out),
            _ => unreachable!("see `is_float`"),
        }
    }
}

#[inline(always)]
unsafe fn mul_many_s<S: Simd>(block: Block<'_>, store: &dyn Fn(usize, &[f32])) {
    // SAFETY: by the caller.
    unsafe {
        match block.ty {
            GgmlType::F32 => mul_block::<S, F32>(block, store),
            GgmlType::F16 => mul_block::<S, F16>(block, store),
            GgmlType::BF16 => mul_block::<S, BF16>(block, store),
            _ => unreachable!("see `is_float`"),
        }
    }
}

#[inline(always)]
unsafe fn mul_block<S: Simd, T: Number>(b: Block<'_>, store: &dyn Fn(usize, &[f32])) {
    let size = b.n_in * T::SIZE;
    assert!(b.w.len().is_multiple_of(size) && b.x.len().is_multiple_of(b.n_in));
    let (n_rows, n) = (b.w.len() / size, b.x.len() / b.n_in);
    let whole = b.n_in / S::N * S::N;
    let columns = match n_rows {
        ..=BLOCK => COLUMNS,
        // About the same each time, in whole lines of the cache.
        _ => whole
            .div_ceil(whole.div_ceil(LARGE_COLUMNS).max(1))
            .next_multiple_of(16),
    };
    // Rows that are missing in the last tile repeat the last one.
    let n_filled = n_rows.next_multiple_of(ROWS);
    // Sums of a token: `[n_filled, S::N]`.
    let stride = n_filled * S::N;
    assert!((1..=LARGE).contains(&n_rows) && b.plain.len() >= n_filled * columns);
    assert!(b.sums.len() >= n * stride);
    let (w, x) = (b.w.as_ptr(), b.x.as_ptr());
    let (plain, sums) = (b.plain.as_mut_ptr(), b.sums.as_mut_ptr());
    // Half of the registers are half as wide.
    let some = if S::N == LANES { TOKENS } else { TOKENS / 2 };
    for column in (0..whole).step_by(columns.max(1)) {
        let width = (whole - column).min(columns);
        // SAFETY: by the caller; rows, tokens and columns are within what was asserted.
        unsafe {
            for r in 0..n_filled {
                let from = r.min(n_rows - 1) * size + column * T::SIZE;
                // Tiles are read from one place: `[n_filled / ROWS, columns / S::N, ROWS, S::N]`.
                let plain = plain.add(r / ROWS * ROWS * columns + r % ROWS * S::N);
                for i in (0..width).step_by(S::N) {
                    let at = from + i * T::SIZE;
                    if at % 64 < S::N * T::SIZE {
                        read_ahead(false, b.next.wrapping_add(at), 64);
                    }
                    S::store(plain.add(i * ROWS), T::load::<S>(w.add(at)));
                }
            }
            for (t, first) in (0..n)
                .step_by(some)
                .flat_map(|t| (0..n_rows).step_by(ROWS).map(move |r| (t, r)))
            {
                let plain = plain.add(first * columns).cast_const();
                // Tokens that are missing repeat the last one, which writes the same again.
                let token = |i: usize| (t + i).min(n - 1);
                let x = |i: usize| x.add(token(i) * b.n_in + column);
                let sums = |i: usize| sums.add(token(i) * stride + first * S::N);
                let goes_on = column > 0;
                if S::N == LANES {
                    let (x, sums) = (std::array::from_fn(x), std::array::from_fn(sums));
                    add_tile::<S, TOKENS>(plain, x, width, goes_on, sums);
                } else {
                    let (x, sums) = (std::array::from_fn(x), std::array::from_fn(sums));
                    add_tile::<S, { TOKENS / 2 }>(plain, x, width, goes_on, sums);
                }
            }
        }
    }
    let mut out = [0.0; LARGE];
    for t in 0..n {
        // SAFETY: as above.
        unsafe {
            for (r, out) in out.iter_mut().enumerate().take(n_rows) {
                *out = match whole {
                    0 => 0.0,
                    _ => S::sum(S::load(sums.add(t * stride + r * S::N))),
                };
                for i in whole..b.n_in {
                    let w = T::load::<crate::simd::Plain>(w.add(r * size + i * T::SIZE));
                    *out += w * *x.add(t * b.n_in + i);
                }
            }
        }
        store(t, &out[..n_rows]);
    }
}

/// Adds products of `width` columns to sums of rows and tokens, or makes them. `w` has vectors of all rows side by side:
/// `[width / S::N, ROWS, S::N]`.
#[inline(always)]
unsafe fn add_tile<S: Simd, const N: usize>(
    w: *const f32,
    x: [*const f32; N],
    width: usize,
    goes_on: bool,
    sums: [*mut f32; N],
) {
    // SAFETY: by the caller.
    unsafe {
        let mut acc = [[S::splat(0.0); ROWS]; N];
        if goes_on {
            for (acc, sums) in acc.iter_mut().zip(sums) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = S::load(sums.add(r * S::N));
                }
            }
        }
        for i in (0..width).step_by(S::N) {
            let w = |r: usize| S::load(w.add(i * ROWS + r * S::N));
            add_products::<S, N>(w, |t| S::load(x[t].add(i)), &mut acc);
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (r, acc) in acc.iter().enumerate() {
                S::store(sums.add(r * S::N), *acc);
            }
        }
    }
}

/// Adds products of vectors of rows, which `w` reads, and of tokens, which `x` reads.
///
/// The fewer of both are held and the others read one after the other: three tokens, a row and twelve sums are what sixteen
/// registers hold, and a sum that has to wait for memory halves the speed.
#[inline(always)]
unsafe fn add_products<S: Simd, const N: usize>(
    w: impl Fn(usize) -> S::V,
    x: impl Fn(usize) -> S::V,
    acc: &mut [[S::V; ROWS]; N],
) {
    // SAFETY: by the caller.
    unsafe {
        if N < ROWS {
            let x: [_; N] = std::array::from_fn(x);
            for r in 0..ROWS {
                let w = w(r);
                for (acc, x) in acc.iter_mut().zip(x) {
                    acc[r] = S::fma(w, x, acc[r]);
                }
            }
        } else {
            let w: [_; ROWS] = std::array::from_fn(w);
            for (t, acc) in acc.iter_mut().enumerate() {
                let x = x(t);
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = S::fma(w, x, *acc);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn mul_numbers<S: Simd, T: Number>(tile: Tile<'_>, out: &mut [[f32; ROWS]; TOKENS]) {
    let n_in = tile.n_in;
    assert!(tile.w.iter().all(|w| w.len() == n_in * T::SIZE) && tile.x.len().is_multiple_of(n_in));
    let n = tile.x.len() / n_in;
    assert!((1..=TOKENS).contains(&n));
    let w = tile.w.map(<[u8]>::as_ptr);
    let x = |t: usize| tile.x.as_ptr().wrapping_add(t.min(n - 1) * n_in);
    // SAFETY: by the caller; rows and tokens are within their slices.
    unsafe {
        if n == 1 {
            mul_tile::<S, T, 1>(w, [x(0)], n_in, &mut out[..1]);
        } else if S::N == 16 && n > 3 {
            mul_tile::<S, T, 6>(w, std::array::from_fn(x), n_in, &mut out[..]);
        } else {
            // Half of the registers are half as wide.
            for t in (0..n).step_by(3) {
                let x = std::array::from_fn(|i| x(t + i));
                mul_tile::<S, T, 3>(w, x, n_in, &mut out[t..t + 3]);
            }
        }
    }
}

#[inline(always)]
unsafe fn mul_tile<S: Simd, T: Number, const N: usize>(
    w: [*const u8; ROWS],
    x: [*const f32; N],
    n_in: usize,
    out: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); ROWS]; N];
        let whole = n_in / S::N * S::N;
        let near = crate::kernels::near();
        let mut i = 0;
        while i < whole {
            // With few tokens, the speed is that of the memory.
            if N <= 3 && S::N > 1 && i * T::SIZE % 64 < S::N * T::SIZE {
                for w in w {
                    read_ahead(near, w.wrapping_add(i * T::SIZE + AHEAD), 64);
                }
            }
            let w = |r: usize| T::load::<S>(w[r].add(i * T::SIZE));
            add_products::<S, N>(w, |t| S::load(x[t].add(i)), &mut sums);
            i += S::N;
        }
        for ((out, sums), x) in out.iter_mut().zip(sums).zip(x) {
            for ((out, sum), w) in out.iter_mut().zip(sums).zip(w) {
                *out = S::sum(sum);
                for i in whole..n_in {
                    *out += T::load::<crate::simd::Plain>(w.add(i * T::SIZE)) * *x.add(i);
                }
            }
        }
    }
}
