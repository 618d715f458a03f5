//! Weights in bfloat16 where there are products of such pairs: AVX-512 BF16.
//!
//! Activations are rounded to bfloat16 once for all rows, so that nothing has to be unpacked: an instruction multiplies 32
//! weights as they lie. Each row and token has one vector of sums that runs along the row, whose lanes are added up in
//! one order; so results do not depend on how many are computed together.

use super::Avx512;
use super::ahead::{Reach, prefetch};
use crate::float::{BLOCK, LANES, ROWS, RoundedBlock as Block, RoundedTile as Tile, TOKENS};
use crate::simd::Simd;
use std::arch::x86_64::*;

/// Columns of a block. Longer ones store and load sums less often, which counts for more than that rows and tokens of a tile
/// leave the first-level cache: 1,024 are a sixth slower.
const COLUMNS: usize = 3072;
/// Columns that an instruction multiplies. Activations of a token are filled up with zeros to a multiple of these.
pub(crate) const STEP: usize = 32;
/// How far rows of a tile are read ahead, in bytes.
const AHEAD: usize = 1 << 10;

/// Bytes of a rounded token.
pub(crate) const fn token_size(n_in: usize) -> usize {
    n_in.next_multiple_of(STEP) * 2
}

/// Rounds a token to bfloat16: `token_size(x.len())` bytes.
///
/// # Safety
/// AVX-512 BF16 is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) unsafe fn round(x: &[f32], to: &mut [u8]) {
    assert!(to.len() == token_size(x.len()));
    for (x, to) in x.chunks(16).zip(to.chunks_mut(32)) {
        // SAFETY: lanes without a number are neither read nor written; `__m256bh` is 256 bits.
        unsafe {
            let v = _mm512_maskz_loadu_ps(lanes(x.len()) as __mmask16, x.as_ptr());
            let v: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), v);
        }
    }
    if (1..=16).contains(&(x.len() % STEP)) {
        let end = to.len();
        to[end - 32..].fill(0);
    }
}

/// The first `n` lanes, at most 32.
fn lanes(n: usize) -> u32 {
    (1u64 << n.min(32)).wrapping_sub(1) as u32
}

/// Products of all rows and tokens of a tile.
///
/// # Safety
/// AVX-512 BF16 is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(crate) unsafe fn mul(tile: Tile<'_>, out: &mut [[f32; ROWS]; TOKENS]) {
    let (n_in, size) = (tile.n_in, token_size(tile.n_in));
    assert!(tile.w.iter().all(|w| w.len() == n_in * 2) && tile.x.len().is_multiple_of(size));
    let n = tile.x.len() / size;
    assert!((1..=TOKENS).contains(&n));
    let w = tile.w.map(<[u8]>::as_ptr);
    let ahead = w.map(|w| w.wrapping_add(AHEAD));
    let x = |t: usize| tile.x.as_ptr().wrapping_add(t.min(n - 1) * size);
    // SAFETY: by the caller; rows and tokens are within their slices.
    unsafe {
        if n == 1 {
            mul_tile(w, [x(0)], n_in, ahead, &mut out[..1]);
        } else if n <= 3 {
            mul_tile(w, [0, 1, 2].map(x), n_in, ahead, &mut out[..3]);
        } else {
            mul_tile::<TOKENS>(w, std::array::from_fn(x), n_in, ahead, &mut out[..]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn mul_tile<const N: usize>(
    w: [*const u8; ROWS],
    x: [*const u8; N],
    n_in: usize,
    ahead: [*const u8; ROWS],
    out: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); ROWS]; N];
        add_products(Reach::get().near, w, x, n_in, ahead, &mut acc);
        for (out, acc) in out.iter_mut().zip(acc) {
            *out = acc.map(|acc| Avx512::sum(acc));
        }
    }
}

/// Products of all rows and tokens of a block, of which each is handed to `store`: token, and results of its rows.
///
/// # Safety
/// AVX-512 BF16 is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(crate) unsafe fn mul_many(b: Block<'_>, store: &dyn Fn(usize, &[f32])) {
    let (w_size, x_size) = (b.n_in * 2, token_size(b.n_in));
    assert!(b.w.len().is_multiple_of(w_size) && b.x.len().is_multiple_of(x_size));
    let (n_rows, n) = (b.w.len() / w_size, b.x.len() / x_size);
    assert!((1..=BLOCK).contains(&n_rows) && b.sums.len() >= n * BLOCK * LANES);
    let (w, x, sums) = (b.w.as_ptr(), b.x.as_ptr(), b.sums.as_mut_ptr());
    // The rows that come next are read ahead over so many tiles, some of them with each.
    let n_tiles = n.div_ceil(TOKENS) * n_rows.div_ceil(ROWS);
    let some = BLOCK.div_ceil(n_tiles);
    for column in (0..b.n_in).step_by(COLUMNS) {
        let width = (b.n_in - column).min(COLUMNS);
        let tiles = (0..n)
            .step_by(TOKENS)
            .flat_map(|t| (0..n_rows).step_by(ROWS).map(move |r| (t, r)));
        for (i, (t, first)) in tiles.enumerate() {
            // Rows and tokens that are missing repeat the last ones; of tokens, this writes the same again.
            let w: [_; ROWS] = std::array::from_fn(|r| {
                w.wrapping_add((first + r).min(n_rows - 1) * w_size + column * 2)
            });
            let token = |i: usize| (t + i).min(n - 1);
            let x = std::array::from_fn(|i| x.wrapping_add(token(i) * x_size + column * 2));
            let sums =
                std::array::from_fn(|i| sums.wrapping_add((token(i) * BLOCK + first) * LANES));
            let ahead = |r: usize| b.next.wrapping_add((i * some + r) * w_size + column * 2);
            // SAFETY: by the caller; rows, tokens and columns are within what was asserted.
            unsafe {
                match some {
                    _ if i * some >= n_rows => add_tile(w, x, width, [], column > 0, sums),
                    1 => add_tile(w, x, width, [0].map(ahead), column > 0, sums),
                    2 => add_tile(w, x, width, [0, 1].map(ahead), column > 0, sums),
                    3 | 4 => add_tile(w, x, width, [0, 1, 2, 3].map(ahead), column > 0, sums),
                    _ => {
                        let ahead: [_; BLOCK] = std::array::from_fn(ahead);
                        add_tile(w, x, width, ahead, column > 0, sums);
                    }
                }
            }
        }
    }
    // Two tokens at a time.
    for t in (0..n).step_by(2) {
        let sums = [t, (t + 1).min(n - 1)].map(|t| sums.wrapping_add(t * BLOCK * LANES));
        let mut out = [0.0; 2 * BLOCK];
        // SAFETY: within the room for sums, all of which were written for the rows that there are.
        unsafe {
            let load = |i: usize| {
                let row = (i % BLOCK).min(n_rows - 1);
                _mm512_loadu_ps(sums[i / BLOCK].add(row * LANES))
            };
            _mm512_storeu_ps(out.as_mut_ptr(), sums_of(load));
        }
        for (t, out) in (t..n).zip(out.chunks(BLOCK)) {
            store(t, &out[..n_rows]);
        }
    }
}

/// Adds products of `width` columns to sums of rows and tokens, or makes them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn add_tile<const A: usize>(
    w: [*const u8; ROWS],
    x: [*const u8; TOKENS],
    width: usize,
    ahead: [*const u8; A],
    goes_on: bool,
    sums: [*mut f32; TOKENS],
) {
    // SAFETY: by the caller.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); ROWS]; TOKENS];
        if goes_on {
            for (acc, sums) in acc.iter_mut().zip(sums) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_loadu_ps(sums.add(r * LANES));
                }
            }
        }
        add_products(false, w, x, width, ahead, &mut acc);
        for (acc, sums) in acc.iter().zip(sums) {
            for (r, acc) in acc.iter().enumerate() {
                _mm512_storeu_ps(sums.add(r * LANES), *acc);
            }
        }
    }
}

/// Adds products of `width` columns; meanwhile begins to read as many from each of `ahead` on, which may be anywhere: to the
/// first-level cache if that is `near`, or to the second.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn add_products<const N: usize, const A: usize>(
    near: bool,
    w: [*const u8; ROWS],
    x: [*const u8; N],
    width: usize,
    ahead: [*const u8; A],
    acc: &mut [[__m512; ROWS]; N],
) {
    let mut add = |at: usize, w: [__m512bh; ROWS]| {
        for (acc, x) in acc.iter_mut().zip(x) {
            // SAFETY: tokens are filled up.
            let x = pairs(unsafe { _mm512_loadu_si512(x.add(at).cast()) });
            for (acc, w) in acc.iter_mut().zip(w) {
                *acc = _mm512_dpbf16_ps(*acc, w, x);
            }
        }
    };
    let whole = width / STEP * STEP;
    // SAFETY: by the caller; lanes behind the last column are not read, and a prefetch cannot fault.
    unsafe {
        for at in (0..whole * 2).step_by(STEP * 2) {
            for p in ahead {
                prefetch(near, p.wrapping_add(at), 64);
            }
            add(at, w.map(|w| pairs(_mm512_loadu_si512(w.add(at).cast()))));
        }
        if whole < width {
            let at = whole * 2;
            let rest = lanes(width - whole);
            add(
                at,
                w.map(|w| pairs(_mm512_maskz_loadu_epi16(rest, w.add(at).cast()))),
            );
        }
    }
}

/// A vector as pairs of numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(v: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are numbers.
    unsafe { std::mem::transmute(v) }
}

/// Sums of all lanes of 16 vectors, each in the order of `Avx512::sum`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sums_of(load: impl Fn(usize) -> __m512) -> __m512 {
    // Each step adds parts of two vectors and keeps both sums apart, so four steps leave one vector: first halves, then
    // quarters, so that vectors 0, 4, 8 and 12 are in the quarters of the first result.
    let quarters = |i: usize| {
        let halves = |a, b| {
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
                _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
            )
        };
        let (a, b) = (
            halves(load(i), load(i + 4)),
            halves(load(i + 8), load(i + 12)),
        );
        _mm512_add_ps(
            _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
        )
    };
    let eighths = |a, b| {
        let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    };
    let (a, b) = (
        eighths(quarters(0), quarters(1)),
        eighths(quarters(2), quarters(3)),
    );
    _mm512_add_ps(
        _mm512_shuffle_ps::<0b10_00_10_00>(a, b),
        _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
    )
}
