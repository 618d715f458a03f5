//! Weights that are plain numbers: a tile of rows and tokens at a time.
//!
//! Activations stay as they are, and weights are converted on the way. Each row and token has one vector of sums that
//! runs along the row, so results do not depend on how large the tile is.

use crate::simd::{Simd, for_isa};
use lemma_quant::GgmlType;

/// Rows of a tile.
pub(crate) const ROWS: usize = 4;
/// Tokens of a tile.
pub(crate) const TOKENS: usize = 6;

/// A tile of a product.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    /// `F32`, `F16` or `BF16`.
    pub(crate) ty: GgmlType,
    /// `n_rows` rows: 1 to `ROWS`.
    pub(crate) w: &'a [u8],
    /// `[n_tokens, n_in]`: 1 to `TOKENS`.
    pub(crate) x: &'a [f32],
    pub(crate) n_in: usize,
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
unsafe fn mul_numbers<S: Simd, T: Number>(tile: Tile<'_>, out: &mut [[f32; ROWS]; TOKENS]) {
    let n_in = tile.n_in;
    assert!(tile.w.len().is_multiple_of(n_in * T::SIZE) && tile.x.len().is_multiple_of(n_in));
    let (n_rows, n) = (tile.w.len() / (n_in * T::SIZE), tile.x.len() / n_in);
    assert!((1..=ROWS).contains(&n_rows) && (1..=TOKENS).contains(&n));
    // Rows that are missing repeat the last one; their results are not used.
    let w = std::array::from_fn(|r| r.min(n_rows - 1) * n_in * T::SIZE)
        .map(|at: usize| tile.w.as_ptr().wrapping_add(at));
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
        // With one token, the speed is that of the memory: the next rows are asked for in the order of their places.
        let mut ahead = w[0].wrapping_add(ROWS * n_in * T::SIZE);
        let mut i = 0;
        while i < whole {
            if N == 1 && S::N > 1 {
                for line in (0..ROWS * S::N * T::SIZE).step_by(64) {
                    prefetch(ahead.wrapping_add(line));
                }
                ahead = ahead.wrapping_add(ROWS * S::N * T::SIZE);
            }
            let w = w.map(|w| T::load::<S>(w.add(i * T::SIZE)));
            for (sums, x) in sums.iter_mut().zip(x) {
                let x = S::load(x.add(i));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = S::fma(w, x, *sum);
                }
            }
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

/// Begins to read from `p` on, which may be anywhere.
#[inline(always)]
fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch cannot fault.
        #[allow(unused_unsafe, reason = "older compilers ask for it")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(p.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
