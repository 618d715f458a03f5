//! Formats whose blocks are longer than those of activations, of 32 values: `nvfp4`, with a scale for every sixteen, and `q1_0` and
//! `q2_0`, with one for 128 and 64.
//!
//! All are taken 128 values at a time, and to have a scale for every sixteen. Quants keep their signs; where the instructions want
//! one factor without, that is the activation, 128 too large, and what this is too much is known when a tile has been unpacked.

use super::bytes::{Avx512, Bytes, ROWS};
use super::dots::{self, Dots};
use super::mxfp4::TABLE;
use super::runs::Runs;
use super::unpack::{self, Tile, To, Unpack};
use super::util::*;
use super::{Form, Rows, RowsFn, TilesFn, UnpackFn};
use crate::Isa;
use crate::activations::{X32, X32x4};
use crate::kernels::run;
use lemma_quant::GgmlType;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Values that are taken at a time: rows have to be a multiple.
pub(super) const LEN: usize = 128;

/// What is special to a format.
///
/// # Safety
/// `SIZE` is the size of 128 values, and functions read nothing outside of it.
unsafe trait Sixteens {
    /// Bytes of 128 values.
    const SIZE: usize;

    /// The quants `32 i ..`, not -128.
    ///
    /// # Safety
    /// `w` is valid for 128 values, `i` is below 4, and AVX2 is available.
    unsafe fn quants(w: *const u8, i: usize) -> __m256i;

    /// The scales of four rows, of sixteen values each.
    ///
    /// # Safety
    /// Pointers are valid for 128 values each, and AVX2 is available.
    unsafe fn scales(w: [*const u8; 4]) -> [__m128; 8];
}

struct NVFP4;

// SAFETY: offsets are within two blocks of 36 bytes.
unsafe impl Sixteens for NVFP4 {
    const SIZE: usize = 72;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller; the table has 16 bytes.
        unsafe {
            // Eight bytes are sixteen values: the low nibbles, then the high ones.
            let q = _mm_loadu_si128(w.add(36 * (i / 2) + 4 + 16 * (i % 2)).cast());
            let mask = _mm_set1_epi8(15);
            let low = _mm_and_si128(q, mask);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(q), mask);
            let q = _mm256_set_m128i(_mm_unpackhi_epi64(low, high), _mm_unpacklo_epi64(low, high));
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(TABLE.as_ptr().cast()));
            _mm256_shuffle_epi8(table, q)
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales(w: [*const u8; 4]) -> [__m128; 8] {
        // SAFETY: by the caller; a block has 36 bytes.
        let ([a, b, c, d], [e, f, g, h]) = unsafe { (e4m3(w, 0), e4m3(w, 36)) };
        [a, b, c, d, e, f, g, h]
    }
}

/// The four scales that stand `at` so many bytes from each of four pointers: the first of each, the second, and so on.
///
/// # Safety
/// Pointers are valid for four bytes from there on.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn e4m3(w: [*const u8; 4], at: usize) -> [__m128; 4] {
    // Written out: what a closure does in `array::map` is not always inlined where instructions are not those of the whole program.
    // SAFETY: by the caller.
    let four = unsafe {
        let word = |w: *const u8| w.add(at).cast::<i32>().read_unaligned();
        _mm_set_epi32(word(w[3]), word(w[2]), word(w[1]), word(w[0]))
    };
    let turn = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    let four = _mm_shuffle_epi8(four, turn);
    // Without a sign; NaN is zero. As a half-precision number with four bits of exponent it is 256 times too small, and half
    // of it is wanted: see `ue4m3_half_to_f32`.
    let all = _mm_set1_epi8(0x7f);
    let four = _mm_andnot_si128(_mm_cmpeq_epi8(four, all), _mm_and_si128(four, all));
    let half = _mm256_slli_epi16::<7>(_mm256_cvtepu8_epi16(four));
    let up = _mm256_set1_ps(128.0);
    let low = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), up);
    let high = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half)), up);
    [
        _mm256_castps256_ps128(low),
        _mm256_extractf128_ps::<1>(low),
        _mm256_castps256_ps128(high),
        _mm256_extractf128_ps::<1>(high),
    ]
}

struct Q1_0;

// SAFETY: offsets are within a block of 18 bytes.
unsafe impl Sixteens for Q1_0 {
    const SIZE: usize = 18;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let bits = u32::from_le_bytes(unsafe { bytes(w.add(2 + 4 * i)) });
        // 0 to 1, and -1 to -1: of the bits that are not set.
        _mm256_or_si256(bits_to_bytes(!bits), _mm256_set1_epi8(1))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales(w: [*const u8; 4]) -> [__m128; 8] {
        // SAFETY: by the caller.
        [unsafe { f16x4(w) }; 8]
    }
}

struct Q2_0;

// SAFETY: offsets are within two blocks of 18 bytes.
unsafe impl Sixteens for Q2_0 {
    const SIZE: usize = 36;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let q = unsafe { _mm_loadl_epi64(w.add(18 * (i / 2) + 2 + 8 * (i % 2)).cast()) };
        // Four values of each byte side by side: one to a lane, and each byte of the lane its own two bits.
        let lanes = _mm256_cvtepu8_epi32(q);
        let lanes = _mm256_or_si256(lanes, _mm256_slli_epi32::<6>(lanes));
        let lanes = _mm256_or_si256(lanes, _mm256_slli_epi32::<12>(lanes));
        let crumbs = _mm256_and_si256(lanes, _mm256_set1_epi8(3));
        _mm256_sub_epi8(crumbs, _mm256_set1_epi8(1))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales(w: [*const u8; 4]) -> [__m128; 8] {
        // SAFETY: by the caller.
        let (a, b) = unsafe {
            let behind = [w[0].add(18), w[1].add(18), w[2].add(18), w[3].add(18)];
            (f16x4(w), f16x4(behind))
        };
        [a, a, a, a, b, b, b, b]
    }
}

/// What there is for a type and instruction set.
pub(super) fn kernel(ty: GgmlType, isa: Isa) -> Option<(Form, RowsFn, (UnpackFn, TilesFn))> {
    match ty {
        GgmlType::NVFP4 => of::<NVFP4>(isa),
        GgmlType::Q1_0 => of::<Q1_0>(isa),
        GgmlType::Q2_0 => of::<Q2_0>(isa),
        _ => None,
    }
}

fn of<F: Sixteens>(isa: Isa) -> Option<(Form, RowsFn, (UnpackFn, TilesFn))> {
    let (rows, gemm): (RowsFn, (UnpackFn, TilesFn)) = match isa {
        Isa::Scalar => return None,
        Isa::Avx2 => (avx2::rows::<F>, (avx2::unpack::<F>, avx2::mul)),
        Isa::AvxVnni => (avx_vnni::rows::<F>, (avx_vnni::unpack::<F>, avx_vnni::mul)),
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
            (avx512::rows::<F>, (avx512::unpack::<F>, avx512::mul))
        }
    };
    Some((Form::X32, rows, gemm))
}

/// Lanes of products of 32 quants: those of the first sixteen in the lower half.
#[inline(always)]
unsafe fn products(w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: by the caller, AVX2 is available. No quant or activation is -128.
    unsafe { dots::Avx2::signed(w, x) }
}

/// Rows with one token.
///
/// # Safety
/// See [`RowsFn`]; rows are whole numbers of 128 values.
#[inline(always)]
unsafe fn multiply<F: Sixteens>(job: &Rows<'_>, out: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe {
        let x: &[X32x4] = std::slice::from_raw_parts(job.x.cast(), job.n_blocks / 4);
        let mut runs = Runs::new(job, out.len());
        for i in 0..run(out.len()) {
            let mut at = i * job.row_size;
            let mut acc = _mm_setzero_ps();
            for x in x {
                let w = runs.at(at, F::SIZE);
                let scales = F::scales(w);
                for b in 0..4 {
                    let low = _mm_loadu_si128(x.low[b].as_ptr().cast());
                    let high = _mm_loadu_si128(x.high[b].as_ptr().cast());
                    let (q, d) = (_mm256_set_m128i(high, low), _mm_set1_ps(x.d[b]));
                    // Of two rows, a lane of four for each sixteen values: first halves below, second ones above.
                    let two = |i: usize| {
                        let a = products(F::quants(w[i], b), q);
                        let b = products(F::quants(w[i + 1], b), q);
                        _mm256_hadd_epi32(a, b)
                    };
                    let sums = _mm256_cvtepi32_ps(_mm256_hadd_epi32(two(0), two(2)));
                    let first = _mm256_castps256_ps128(sums);
                    let second = _mm256_extractf128_ps::<1>(sums);
                    acc = _mm_fmadd_ps(first, _mm_mul_ps(scales[2 * b], d), acc);
                    acc = _mm_fmadd_ps(second, _mm_mul_ps(scales[2 * b + 1], d), acc);
                }
                at += F::SIZE;
            }
            runs.store(i, acc, out);
        }
    }
}

/// 128 values of a row, unpacked.
#[repr(C, align(32))]
struct Row {
    q: [i8; LEN],
    /// Of sixteen quants, times -128: what they come to with activations that are so much too large.
    sums: [i32; 8],
    d: [f32; 8],
}

impl Row {
    const ZERO: Self = Self {
        q: [0; LEN],
        sums: [0; 8],
        d: [0.0; 8],
    };

    /// # Safety
    /// `w` is valid for 128 values.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn read<F: Sixteens>(&mut self, w: *const u8) {
        // SAFETY: by the caller.
        self.d = unsafe { F::scales([w; 4]) }.map(|d| _mm_cvtss_f32(d));
        for i in 0..4 {
            // SAFETY: by the caller; stores are within arrays, which are aligned.
            unsafe {
                let q = F::quants(w, i);
                _mm256_store_si256(self.q.as_mut_ptr().add(32 * i).cast(), q);
                let lanes = products(q, _mm256_set1_epi8(-1));
                let two = [
                    _mm256_castsi256_si128(lanes),
                    _mm256_extracti128_si256::<1>(lanes),
                ];
                let sums = _mm_slli_epi32::<7>(sum_half_lanes([two[0], two[1], two[0], two[1]]));
                _mm_storel_epi64(self.sums.as_mut_ptr().add(2 * i).cast(), sums);
            }
        }
    }
}

/// For batches. In the tile, `d` and `m` are the scales of the first and second half of 32 values, and `scales` what is to be added
/// to their sums.
struct Batch<F>(PhantomData<F>);

// SAFETY: those of the format.
unsafe impl<F: Sixteens> Unpack for Batch<F> {
    const SIZE: usize = F::SIZE;
    const LEN: usize = LEN;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        let mut rows = [const { Row::ZERO }; ROWS];
        let offsets = std::array::from_fn(|r| (r * size_of::<Row>()) as i32);
        // SAFETY: by the caller; offsets are within a `Row`.
        unsafe {
            to.read_ahead(F::SIZE);
            for (i, row) in rows[..B::LANES].iter_mut().enumerate() {
                row.read::<F>(to.row(i));
            }
            let rows = to.rows(rows.as_ptr().cast(), &offsets);
            to.all_quants(&rows, LEN);
            for part in 0..2 {
                for (i, v) in rows.sixteen(LEN + 16 * part).into_iter().enumerate() {
                    to.scale(4 * part + i, v);
                }
                let [a, b, c, d] = rows.sixteen(LEN + 32 + 16 * part);
                to.halves(2 * part, a, b);
                to.halves(2 * part + 1, c, d);
            }
        }
    }
}

/// Adds products of a tile with `N` tokens, with vectors of 256 bits. See [`TilesFn`].
///
/// # Safety
/// The instruction set is available.
#[inline(always)]
unsafe fn mul_256<P: Dots, const N: usize, const FUSED: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    for (tile, acc) in rows.iter().zip(acc.chunks_exact_mut(n)) {
        for (t, half) in (0..n).step_by(N).flat_map(|t| [(t, 0), (t, 8)]) {
            // SAFETY: by the caller; arrays are as long as the loops say.
            unsafe {
                // Tokens that are missing repeat the last one.
                let at: [usize; N] = std::array::from_fn(|i| (t + i).min(n - 1));
                let mut total = at.map(|t| _mm256_loadu_ps(acc[t].as_ptr().add(half)));
                for b in 0..n32 {
                    let x = at.map(|t| x.cast::<X32>().add(b * n + t));
                    for h in 0..2 {
                        let (sum, d) = of_half(tile, b, h);
                        let mut sums = [_mm256_setzero_si256(); N];
                        if FUSED {
                            sums = [_mm256_load_si256(sum.as_ptr().add(half).cast()); N];
                        }
                        for k in 4 * h..4 * h + 4 {
                            let w = tile.q.as_ptr().add(64 * (8 * b + k) + 4 * half);
                            let w = _mm256_load_si256(w.cast());
                            for t in 0..N {
                                let x = (*x[t]).q.as_ptr().cast::<i32>().add(k);
                                let x = _mm256_set1_epi32(x.read_unaligned());
                                sums[t] = if FUSED {
                                    let x = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
                                    P::bytes(sums[t], x, w)
                                } else {
                                    _mm256_add_epi32(sums[t], products(w, x))
                                };
                            }
                        }
                        let d = _mm256_load_ps(d.as_ptr().add(half));
                        for t in 0..N {
                            let d = _mm256_mul_ps(d, _mm256_set1_ps((*x[t]).d));
                            total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), d, total[t]);
                        }
                    }
                }
                for i in 0..N.min(n - t) {
                    _mm256_storeu_ps(acc[t + i].as_mut_ptr().add(half), total[i]);
                }
            }
        }
    }
}

/// The same with vectors of 512 bits.
///
/// # Safety
/// See [`mul_256`].
#[inline(always)]
unsafe fn mul_512<const N: usize>(
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
                let mut total = at.map(|t| _mm512_loadu_ps(acc[t].as_ptr()));
                for b in 0..n32 {
                    let x = at.map(|t| x.cast::<X32>().add(b * n + t));
                    for h in 0..2 {
                        let (sum, d) = of_half(tile, b, h);
                        let mut sums = [_mm512_load_si512(sum.as_ptr().cast()); N];
                        for k in 4 * h..4 * h + 4 {
                            let w = tile.q.as_ptr().add(64 * (8 * b + k));
                            let w = _mm512_load_si512(w.cast());
                            for t in 0..N {
                                let x = (*x[t]).q.as_ptr().cast::<i32>().add(k);
                                let x = _mm512_set1_epi32(x.read_unaligned());
                                let x = _mm512_xor_si512(x, _mm512_set1_epi8(-128));
                                sums[t] = _mm512_dpbusd_epi32(sums[t], x, w);
                            }
                        }
                        let d = _mm512_load_ps(d.as_ptr());
                        for t in 0..N {
                            let d = _mm512_mul_ps(d, _mm512_set1_ps((*x[t]).d));
                            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), d, total[t]);
                        }
                    }
                }
                for i in 0..N.min(n - t) {
                    _mm512_storeu_ps(acc[t + i].as_mut_ptr(), total[i]);
                }
            }
        }
    }
}

/// [`mul_256`] for as many tokens as there are.
///
/// # Safety
/// The instruction set is available.
#[inline(always)]
unsafe fn by_256<P: Dots, const FUSED: bool>(
    rows: &[Tile],
    x: *const u8,
    n: usize,
    n32: usize,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: by the caller.
    unsafe {
        match n {
            1 | 2 => mul_256::<P, 2, FUSED>(rows, x, n, n32, acc),
            _ => mul_256::<P, 4, FUSED>(rows, x, n, n32, acc),
        }
    }
}

/// [`mul_512`] for as many tokens as there are.
///
/// # Safety
/// The instruction set is available.
#[inline(always)]
unsafe fn by_512(rows: &[Tile], x: *const u8, n: usize, n32: usize, acc: &mut [[f32; ROWS]]) {
    // SAFETY: by the caller.
    unsafe {
        match n {
            1 | 2 => mul_512::<2>(rows, x, n, n32, acc),
            3 | 4 => mul_512::<4>(rows, x, n, n32, acc),
            _ => mul_512::<8>(rows, x, n, n32, acc),
        }
    }
}

/// What is added to sums over half `h` of 32 columns `b`, and their scales.
#[inline(always)]
fn of_half(tile: &Tile, b: usize, h: usize) -> (&[i32; ROWS], &[f32; ROWS]) {
    let d = if h == 0 { &tile.d } else { &tile.m };
    (&tile.scales[2 * b + h], &d[b])
}

/// What is compiled for every instruction set.
macro_rules! compiled {
    ($isa:ident, $features:literal, $bytes:ty, $mul:expr) => {
        mod $isa {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) unsafe fn rows<F: Sixteens>(job: &Rows<'_>, out: &mut [f32]) {
                // SAFETY: by the caller.
                unsafe { multiply::<F>(job, out) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn unpack<F: Sixteens>(
                w: *const u8,
                row_size: usize,
                n: usize,
                n32: usize,
                next: *const u8,
                tile: &mut Tile,
            ) {
                // SAFETY: by the caller.
                unsafe { unpack::unpack::<Batch<F>, $bytes>(w, row_size, n, n32, next, tile) };
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn mul(
                rows: &[Tile],
                x: *const u8,
                n: usize,
                n32: usize,
                acc: &mut [[f32; ROWS]],
            ) {
                // SAFETY: by the caller.
                unsafe { $mul(rows, x, n, n32, acc) }
            }
        }
    };
}

compiled!(
    avx2,
    "avx2,fma,f16c",
    super::super::bytes::Avx2,
    by_256::<dots::Avx2, false>
);
compiled!(
    avx_vnni,
    "avx2,fma,f16c,avxvnni",
    super::super::bytes::Avx2,
    by_256::<dots::AvxVnni, true>
);
compiled!(
    avx512,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
    Avx512,
    by_512
);
