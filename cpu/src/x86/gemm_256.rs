//! Batches with vectors of 256 bits, which hold half of the sixteen rows.
//!
//! AVX2 adds up products of bytes in 16 bits as long as they fit, then in 32. Bytes that use all eight bits are multiplied by
//! magnitude, with their signs moved to the activations, or, with more than a few tokens, as numbers of 16 bits (`gemm_words`). With
//! AVX-VNNI none of this is needed.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use super::bytes::ROWS;
use super::dots::{self, Dots};
use super::gemm::NONE;
use super::gemm_avx512::pairs;
use super::gemm_words;
use super::unpack::{self, Tile, Unpack};
use crate::activations::{X32, X256};
use std::arch::x86_64::*;

/// See `UnpackFn`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn unpack<F: Unpack>(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    next: *const u8,
    tile: &mut Tile,
) {
    // SAFETY: by the caller.
    unsafe { unpack::unpack::<F, super::bytes::Avx2>(w, row_size, n, n32, next, tile) };
}

/// In place of how many products of four columns fit 16 bits: signs are needed.
const SIGNS: usize = 0;
/// In place of it: products are added up in 32 bits at once.
const ALL: usize = usize::MAX;

/// Vectors for the sixteen rows of a tile and `N` tokens: of the first eight rows, then of the others.
pub(super) type Sums<const N: usize> = [[__m256i; N]; 2];

/// Adds sums of products of sixteen rows and `N` tokens over `4 * steps` columns to `sums`, each times the scale of its row, which
/// fits 16 bits. Both halves of the rows at once: what is read of a token is read once, which matters more than that the sums lie in
/// memory for it.
///
/// # Safety
/// Pointers are valid for that, and the instruction set is available.
#[inline(always)]
unsafe fn sub_block<P: Dots, const N: usize, const M: usize>(
    w: *const u8,
    x: [*const i32; N],
    steps: usize,
    scales: Option<[__m256i; 2]>,
    sums: &mut Sums<N>,
) {
    // SAFETY: by the caller.
    unsafe {
        let halves = |k: usize| [0, 32].map(|half| _mm256_load_si256(w.add(64 * k + half).cast()));
        if M == ALL {
            let mut a = match scales {
                Some(_) => [[_mm256_setzero_si256(); N]; 2],
                None => *sums,
            };
            for k in 0..steps {
                let w = halves(k);
                for t in 0..N {
                    let x = _mm256_set1_epi32(*x[t].add(k));
                    for h in 0..2 {
                        a[h][t] = P::bytes(a[h][t], w[h], x);
                    }
                }
            }
            let Some(scales) = scales else {
                *sums = a;
                return;
            };
            for h in 0..2 {
                for t in 0..N {
                    let scaled = _mm256_mullo_epi32(a[h][t], scales[h]);
                    sums[h][t] = _mm256_add_epi32(sums[h][t], scaled);
                }
            }
            return;
        }
        let factors = match scales {
            Some(scales) => scales.map(|s| twice(s)),
            None => [_mm256_set1_epi16(1); 2],
        };
        if M == SIGNS {
            for k in 0..steps {
                for (h, w) in halves(k).into_iter().enumerate() {
                    let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                    let magnitude = _mm256_abs_epi8(w);
                    for t in 0..N {
                        let x = _mm256_sign_epi8(_mm256_set1_epi32(*x[t].add(k)), w);
                        let two = _mm256_maddubs_epi16(magnitude, x);
                        sums[h][t] = P::words(sums[h][t], two, factors[h]);
                    }
                }
            }
            return;
        }
        for part in 0..steps / M {
            let mut a = [[_mm256_setzero_si256(); N]; 2];
            macro_rules! step {
                ($($k:literal)*) => {$(
                    let w = halves(part * M + $k);
                    for t in 0..N {
                        let x = _mm256_set1_epi32(*x[t].add(part * M + $k));
                        for h in 0..2 {
                            let two = _mm256_maddubs_epi16(w[h], x);
                            a[h][t] = match $k {
                                0 => two,
                                _ => _mm256_add_epi16(a[h][t], two),
                            };
                            in_register(&mut a[h][t]);
                        }
                    }
                )*};
            }
            // Written out: the end of a loop as short as this is guessed wrong every time.
            step!(0 1);
            if M > 2 {
                step!(2 3);
            }
            if M > 4 {
                step!(4 5 6 7);
            }
            for h in 0..2 {
                for t in 0..N {
                    sums[h][t] = P::words(sums[h][t], a[h][t], factors[h]);
                }
            }
        }
    }
}

/// Keeps the compiler from adding up in another order, for which there are not enough registers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn in_register(sum: &mut __m256i) {
    // SAFETY: no instruction.
    unsafe {
        std::arch::asm!(
            "/* {0} */",
            inout(ymm_reg) * sum,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// The same 16-bit number in both halves of every word. Words fit 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn twice(words: __m256i) -> __m256i {
    let low = _mm_set_epi32(0x0d0c_0d0c, 0x0908_0908, 0x0504_0504, 0x0100_0100);
    _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(low))
}

/// Formats of 256 values with scales for `SUB` of them, and offsets or minimums; and formats of 32 values, whose quants are 128,
/// shifted right by `SHIFT`, too large, if not `NONE`. See `TilesFn`.
macro_rules! tiles {
    ($features:literal, $dots:ty, $m:expr $(, $parameter:ident)?) => {
        #[target_feature(enable = $features)]
        pub(in super::super) unsafe fn mul_256<
            const SUB: usize,
            $(const $parameter: usize,)?
            const MINS: bool,
        >(
            rows: &[Tile],
            x: *const u8,
            n: usize,
            _: usize,
            acc: &mut [[f32; ROWS]],
        ) {
            // SAFETY: by the caller.
            unsafe {
                match n {
                    1 | 2 => mul_256_n::<$dots, 2, SUB, { $m }, MINS>(rows, x, n, acc),
                    gemm_words::FROM.. if $m == SIGNS => gemm_words::mul_256::<SUB>(rows, x, n, acc),
                    _ => mul_256_n::<$dots, 4, SUB, { $m }, MINS>(rows, x, n, acc),
                }
            }
        }

        #[target_feature(enable = $features)]
        pub(in super::super) unsafe fn mul_32<
            const SHIFT: u32,
            $(const $parameter: usize,)?
            const MINS: bool,
        >(
            rows: &[Tile],
            x: *const u8,
            n: usize,
            n32: usize,
            acc: &mut [[f32; ROWS]],
        ) {
            // SAFETY: by the caller.
            unsafe {
                match n {
                    1 | 2 => mul_32_n::<$dots, 2, SHIFT, { $m }, MINS>(rows, x, n, n32, acc),
                    gemm_words::FROM.. if $m == SIGNS => gemm_words::mul_32(rows, x, n, n32, acc),
                    _ => mul_32_n::<$dots, 4, SHIFT, { $m }, MINS>(rows, x, n, n32, acc),
                }
            }
        }
    };
}

/// With AVX2: `M` says how many products of four columns fit 16 bits, or `SIGNS`.
pub(super) mod avx2 {
    pub(in super::super) use super::unpack;
    use super::*;

    tiles!("avx2,fma,f16c", dots::Avx2, M, M);
}

/// With AVX-VNNI.
pub(super) mod avx_vnni {
    pub(in super::super) use super::unpack;
    use super::*;

    tiles!("avx2,fma,f16c,avxvnni", dots::AvxVnni, ALL);
}

/// `N` tokens at a time.
#[inline(always)]
unsafe fn mul_256_n<P: Dots, const N: usize, const SUB: usize, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    acc: &mut [[f32; ROWS]],
) {
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        for t in (0..n).step_by(N) {
            // SAFETY: by the caller; arrays are as long as the loops say.
            unsafe {
                // Tokens that are missing repeat the last one.
                let x: [*const X256; N] =
                    std::array::from_fn(|i| x.cast::<X256>().add((t + i).min(n - 1)));
                let mut sums = [[_mm256_setzero_si256(); N]; 2];
                for j in 0..256 / SUB {
                    let w = tile.q.as_ptr().add(16 * SUB * j);
                    let xq = x.map(|x| (*x).q.as_ptr().cast::<i32>().add(SUB / 4 * j));
                    let scales = halves(tile.scales[j].as_ptr());
                    sub_block::<P, N, M>(w, xq, SUB / 4, Some(scales), &mut sums);
                }
                let mut mins = match MINS {
                    true => [[_mm256_setzero_si256(); N]; 2],
                    false => sums,
                };
                // Signed bytes have no offset.
                if MINS || M != SIGNS {
                    for i in 0..128 / SUB {
                        let two = halves(tile.mins[i].as_ptr().cast());
                        for t in 0..N {
                            let sums = _mm256_set1_epi32(*pairs::<SUB>(x[t]).add(i));
                            for h in 0..2 {
                                mins[h][t] = P::words(mins[h][t], two[h], sums);
                            }
                        }
                    }
                    if !MINS {
                        sums = mins;
                    }
                }
                add_256::<N, MINS>(tile, x, sums, mins, &mut acc[t..]);
            }
        }
    }
}

/// Adds what a block of 256 columns makes of its sums to the results of up to `N` tokens.
///
/// # Safety
/// The tokens are there, and the instruction set is available.
#[inline(always)]
pub(super) unsafe fn add_256<const N: usize, const MINS: bool>(
    tile: &Tile,
    x: [*const X256; N],
    sums: Sums<N>,
    mins: Sums<N>,
    acc: &mut [[f32; ROWS]],
) {
    for h in 0..2 {
        for i in 0..N {
            let Some(to) = acc.get_mut(i) else { break };
            // SAFETY: by the caller.
            unsafe {
                let dx = _mm256_set1_ps((*x[i]).d);
                let to = to.as_mut_ptr().add(8 * h);
                let d = _mm256_load_ps(tile.d[0].as_ptr().add(8 * h));
                let (sum, d) = (_mm256_cvtepi32_ps(sums[h][i]), _mm256_mul_ps(d, dx));
                let mut total = _mm256_fmadd_ps(sum, d, _mm256_loadu_ps(to));
                if MINS {
                    let m = _mm256_load_ps(tile.m[0].as_ptr().add(8 * h));
                    let (sum, m) = (_mm256_cvtepi32_ps(mins[h][i]), _mm256_mul_ps(m, dx));
                    total = _mm256_fnmadd_ps(sum, m, total);
                }
                _mm256_storeu_ps(to, total);
            }
        }
    }
}

/// `N` tokens at a time.
#[inline(always)]
unsafe fn mul_32_n<P: Dots, const N: usize, const SHIFT: u32, const M: usize, const MINS: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        for t in (0..n).step_by(N) {
            // SAFETY: by the caller; arrays are as long as the loops say.
            unsafe {
                let at: [usize; N] = std::array::from_fn(|i| (t + i).min(n - 1));
                let mut total =
                    [0, 8].map(|half| at.map(|t| _mm256_loadu_ps(acc[t].as_ptr().add(half))));
                for b in 0..n32 {
                    let x = at.map(|t| x.cast::<X32>().add(b * n + t));
                    let first = match SHIFT {
                        NONE => [_mm256_setzero_si256(); N],
                        _ => x.map(|x| _mm256_set1_epi32((*x).minus_sum >> SHIFT)),
                    };
                    let mut sums = [first; 2];
                    let w = tile.q.as_ptr().add(8 * 64 * b);
                    let q = x.map(|x| (*x).q.as_ptr().cast());
                    sub_block::<P, N, M>(w, q, 8, None, &mut sums);
                    add_32::<N, MINS>(tile, b, x, sums, &mut total);
                }
                for h in 0..2 {
                    for i in 0..N {
                        if t + i == n {
                            break;
                        }
                        _mm256_storeu_ps(acc[t + i].as_mut_ptr().add(8 * h), total[h][i]);
                    }
                }
            }
        }
    }
}

/// Adds what block `b` of 32 columns makes of its sums to results.
///
/// # Safety
/// The tokens are there, and the instruction set is available.
#[inline(always)]
pub(super) unsafe fn add_32<const N: usize, const MINS: bool>(
    tile: &Tile,
    b: usize,
    x: [*const X32; N],
    sums: Sums<N>,
    total: &mut [[__m256; N]; 2],
) {
    for h in 0..2 {
        // SAFETY: by the caller.
        unsafe {
            let d = _mm256_load_ps(tile.d[b].as_ptr().add(8 * h));
            for t in 0..N {
                let d = _mm256_mul_ps(d, _mm256_set1_ps((*x[t]).d));
                total[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[h][t]), d, total[h][t]);
            }
            if MINS {
                let m = _mm256_load_ps(tile.m[b].as_ptr().add(8 * h));
                for t in 0..N {
                    total[h][t] = _mm256_fmadd_ps(m, _mm256_set1_ps((*x[t]).s), total[h][t]);
                }
            }
        }
    }
}

/// Sixteen words.
///
/// # Safety
/// They are there, `p` is aligned, and the instruction set is available.
#[inline(always)]
pub(super) unsafe fn halves(p: *const i32) -> [__m256i; 2] {
    // SAFETY: by the caller.
    unsafe { [0, 8].map(|half| _mm256_load_si256(p.add(half).cast())) }
}
