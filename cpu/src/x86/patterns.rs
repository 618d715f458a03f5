//! Formats whose values are looked up (`iq2_xxs` to `iq1_m`), and what they share with the ternary ones.
//!
//! Four or eight values are one pattern of a table, with signs or a shift of their own. Here a block becomes signed bytes and a
//! whole scale for every 16 or 32 of them: what `iq1_s` and `iq1_m` shift by, an eighth, becomes one where values are taken
//! eightfold. `patterns_512` multiplies the same blocks faster where there are the instructions for it.

use super::bytes::{Bytes, ROWS};
use super::q2_k::two_scales;
use super::unpack::{To, Unpack};
use super::util::*;
use crate::activations::X256;
use lemma_quant::grids::*;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// What is special to a format of 256 values.
///
/// # Safety
/// `SIZE` is the size of a block, and functions read nothing outside of it.
pub(super) unsafe trait Patterns {
    /// Bytes of a block.
    const SIZE: usize;
    /// Values that share a scale: 16 or 32.
    const SUB: usize;
    /// The scale of a block is its half-precision number times this.
    const FACTOR: f32;

    /// The quants `32 i ..` of a block, not -128.
    ///
    /// # Safety
    /// `w` is valid for a block, `i` is below 8, and the instruction set is available.
    unsafe fn quants(w: *const u8, i: usize) -> __m256i;

    /// The scales of 16 values each, up to 31.
    ///
    /// # Safety
    /// As for `quants`.
    unsafe fn sub_scales(w: *const u8) -> __m128i;

    /// The bits of the half-precision number, with which most formats begin.
    ///
    /// # Safety
    /// As for `quants`.
    #[inline]
    unsafe fn d(w: *const u8) -> u16 {
        // SAFETY: by the caller.
        unsafe { half(w) }
    }
}

/// The scales of four blocks.
///
/// # Safety
/// Pointers are valid for a block each.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn scales<F: Patterns>(w: [*const u8; 4]) -> __m128 {
    // SAFETY: by the caller.
    let d = from_halves(w.map(|w| unsafe { F::d(w) }));
    _mm_mul_ps(d, _mm_set1_ps(F::FACTOR))
}

/// Bytes negated where bits are set.
#[inline]
#[target_feature(enable = "avx2")]
fn with_signs(v: __m256i, bits: u32) -> __m256i {
    let negative = bits_to_bytes(bits);
    _mm256_sub_epi8(_mm256_xor_si256(v, negative), negative)
}

/// The signs of 32 values, from four numbers of 7 bits.
#[inline]
fn stored_signs(bits: u32) -> u32 {
    u32::from_le_bytes([0, 7, 14, 21].map(|shift| KSIGNS[(bits >> shift & 127) as usize]))
}

/// Four patterns of eight values.
#[inline]
#[target_feature(enable = "avx2")]
fn four_of<const N: usize>(grid: &[[u8; 8]; N], at: [usize; 4]) -> __m256i {
    let [a, b, c, d] = at.map(|i| i64::from_le_bytes(grid[i % N]));
    _mm256_set_epi64x(d, c, b, a)
}

/// Eight patterns of four values.
#[inline]
#[target_feature(enable = "avx2")]
fn eight_of<const N: usize>(grid: &[[u8; 4]; N], at: [usize; 8]) -> __m256i {
    let [a, b, c, d, e, f, g, h] = at.map(|i| i32::from_le_bytes(grid[i % N]));
    _mm256_set_epi32(h, g, f, e, d, c, b, a)
}

/// Four patterns of ternary values, eightfold.
#[inline]
#[target_feature(enable = "avx2")]
fn eightfold(at: [usize; 4]) -> __m256i {
    let [a, b, c, d] = at.map(|i| i64::from_le_bytes(IQ1S_GRID[i % 2048].map(i8::cast_unsigned)));
    let v = _mm256_slli_epi16::<3>(_mm256_set_epi64x(d, c, b, a));
    _mm256_and_si256(v, _mm256_set1_epi8(-8))
}

/// The number of 32 bits at `w`.
///
/// # Safety
/// There is one.
#[inline(always)]
pub(super) unsafe fn word(w: *const u8) -> u32 {
    // SAFETY: by the caller.
    u32::from_le_bytes(unsafe { bytes(w) })
}

/// The number of 16 bits at `w`.
///
/// # Safety
/// There is one.
#[inline(always)]
pub(super) unsafe fn half(w: *const u8) -> u16 {
    // SAFETY: by the caller.
    u16::from_le_bytes(unsafe { bytes(w) })
}

/// Sixteen odd scales of nibbles, the earlier one low: `2 s + 1`.
#[inline]
#[target_feature(enable = "avx2")]
fn odd_nibbles(packed: [u8; 8]) -> __m128i {
    let packed = _mm_cvtsi64_si128(i64::from_le_bytes(packed));
    let both = _mm_unpacklo_epi8(packed, _mm_srli_epi16::<4>(packed));
    let nibbles = _mm_and_si128(both, _mm_set1_epi8(15));
    _mm_or_si128(_mm_add_epi8(nibbles, nibbles), _mm_set1_epi8(1))
}

/// Each of eight scales twice.
#[inline]
#[target_feature(enable = "avx2")]
fn twice(scales: [u8; 8]) -> __m128i {
    let v = _mm_cvtsi64_si128(i64::from_le_bytes(scales));
    _mm_unpacklo_epi8(v, v)
}

pub(super) struct IQ2XXS;

// SAFETY: offsets are within the 66 bytes.
unsafe impl Patterns for IQ2XXS {
    const SIZE: usize = 66;
    const SUB: usize = 32;
    const FACTOR: f32 = 0.125;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let (at, signs) = unsafe { (bytes::<4>(w.add(2 + 8 * i)), word(w.add(6 + 8 * i))) };
        with_signs(
            four_of(&IQ2XXS_GRID, at.map(usize::from)),
            stored_signs(signs),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        twice(std::array::from_fn(
            |i| unsafe { *w.add(9 + 8 * i) } >> 4 << 1 | 1,
        ))
    }
}

pub(super) struct IQ2XS;

// SAFETY: offsets are within the 74 bytes.
unsafe impl Patterns for IQ2XS {
    const SIZE: usize = 74;
    const SUB: usize = 16;
    const FACTOR: f32 = 0.125;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let q: [usize; 4] =
            std::array::from_fn(|l| usize::from(unsafe { half(w.add(2 + 8 * i + 2 * l)) }));
        let signs = u32::from_le_bytes(q.map(|q| KSIGNS[q >> 9]));
        with_signs(four_of(&IQ2XS_GRID, q), signs)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        odd_nibbles(unsafe { bytes(w.add(66)) })
    }
}

pub(super) struct IQ2S;

// SAFETY: offsets are within the 82 bytes.
unsafe impl Patterns for IQ2S {
    const SIZE: usize = 82;
    const SUB: usize = 16;
    const FACTOR: f32 = 0.125;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let (low, signs, high) = unsafe {
            (
                bytes::<4>(w.add(2 + 4 * i)),
                word(w.add(34 + 4 * i)),
                usize::from(*w.add(66 + i)),
            )
        };
        let at = std::array::from_fn(|l| usize::from(low[l]) | (high >> (2 * l) & 3) << 8);
        with_signs(four_of(&IQ2S_GRID, at), signs)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        odd_nibbles(unsafe { bytes(w.add(74)) })
    }
}

pub(super) struct IQ3XXS;

// SAFETY: offsets are within the 98 bytes.
unsafe impl Patterns for IQ3XXS {
    const SIZE: usize = 98;
    const SUB: usize = 32;
    const FACTOR: f32 = 0.25;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let (at, signs) = unsafe { (bytes::<8>(w.add(2 + 8 * i)), word(w.add(66 + 4 * i))) };
        with_signs(
            eight_of(&IQ3XXS_GRID, at.map(usize::from)),
            stored_signs(signs),
        )
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        twice(std::array::from_fn(
            |i| unsafe { *w.add(69 + 4 * i) } >> 4 << 1 | 1,
        ))
    }
}

pub(super) struct IQ3S;

// SAFETY: offsets are within the 110 bytes.
unsafe impl Patterns for IQ3S {
    const SIZE: usize = 110;
    const SUB: usize = 32;
    const FACTOR: f32 = 1.0;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let (low, high, signs) = unsafe {
            (
                bytes::<8>(w.add(2 + 8 * i)),
                usize::from(*w.add(66 + i)),
                word(w.add(74 + 4 * i)),
            )
        };
        let at = std::array::from_fn(|l| usize::from(low[l]) | (high >> l & 1) << 8);
        with_signs(eight_of(&IQ3S_GRID, at), signs)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        let packed: [u8; 4] = unsafe { bytes(w.add(106)) };
        twice(std::array::from_fn(|j| {
            (packed[j / 2] >> (4 * (j % 2)) & 15) << 1 | 1
        }))
    }
}

pub(super) struct IQ1S;

// SAFETY: offsets are within the 50 bytes.
unsafe impl Patterns for IQ1S {
    const SIZE: usize = 50;
    const SUB: usize = 32;
    const FACTOR: f32 = 0.125;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let (low, high) = unsafe { (bytes::<4>(w.add(2 + 4 * i)), half(w.add(34 + 2 * i))) };
        let bits = usize::from(high);
        let at = std::array::from_fn(|l| usize::from(low[l]) | (bits >> (3 * l) & 7) << 8);
        let shift = if high & 0x8000 == 0 { 1 } else { -1 };
        _mm256_add_epi8(eightfold(at), _mm256_set1_epi8(shift))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        let high = |i| unsafe { *w.add(35 + 2 * i) };
        twice(std::array::from_fn(|i| (high(i) >> 4 & 7) << 1 | 1))
    }
}

pub(super) struct IQ1M;

// SAFETY: offsets are within the 56 bytes.
unsafe impl Patterns for IQ1M {
    const SIZE: usize = 56;
    const SUB: usize = 16;
    const FACTOR: f32 = 0.125;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn quants(w: *const u8, i: usize) -> __m256i {
        // SAFETY: by the caller.
        let (low, high) = unsafe { (bytes::<4>(w.add(4 * i)), half(w.add(32 + 2 * i))) };
        let nibbles: [usize; 4] = std::array::from_fn(|l| usize::from(high >> (4 * l) & 15));
        let at = std::array::from_fn(|l| usize::from(low[l]) | (nibbles[l] & 7) << 8);
        let [a, b, c, d] = nibbles.map(|n| {
            if n & 8 == 0 {
                0x0101_0101_0101_0101
            } else {
                -1
            }
        });
        _mm256_add_epi8(eightfold(at), _mm256_set_epi64x(d, c, b, a))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sub_scales(w: *const u8) -> __m128i {
        // SAFETY: by the caller.
        let scales: [u16; 4] = std::array::from_fn(|i| unsafe { half(w.add(48 + 2 * i)) });
        let scales: [u8; 16] =
            std::array::from_fn(|j| (scales[j / 4] >> (3 * (j % 4)) & 7) as u8 * 2 + 1);
        // SAFETY: they are sixteen bytes.
        unsafe { _mm_loadu_si128(scales.as_ptr().cast()) }
    }

    #[inline]
    unsafe fn d(w: *const u8) -> u16 {
        // SAFETY: by the caller.
        let top = |i: usize| u16::from(unsafe { *w.add(49 + 2 * i) } >> 4);
        top(0) | top(1) << 4 | top(2) << 8 | top(3) << 12
    }
}

pub(super) mod rows {
    use super::super::dots::Dots;
    use super::super::rows::Rows256;
    use super::*;

    /// One token.
    pub(in super::super) struct Rows<F>(PhantomData<F>);

    // SAFETY: those of the format.
    unsafe impl<F: Patterns> Rows256 for Rows<F> {
        const SIZE: usize = F::SIZE;
        const MINS: bool = false;

        #[inline(always)]
        unsafe fn dot<P: Dots>(w: *const u8, x: &X256) -> (__m256i, __m128i) {
            // SAFETY: by the caller; offsets into `x` end at 256.
            unsafe {
                let scales = F::sub_scales(w);
                let mut sum = _mm256_setzero_si256();
                for i in 0..8 {
                    let v = F::quants(w, i);
                    let x = _mm256_load_si256(x.q.as_ptr().add(32 * i).cast());
                    let p = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
                    sum = P::words(sum, p, two_scales(scales, i));
                }
                (sum, _mm_setzero_si128())
            }
        }

        #[inline]
        #[target_feature(enable = "avx2,f16c")]
        unsafe fn scales(w: [*const u8; 4]) -> (__m128, __m128) {
            // SAFETY: by the caller.
            unsafe { (scales::<F>(w), _mm_setzero_ps()) }
        }
    }
}

/// A block of a row, looked up.
#[repr(C, align(32))]
struct Row {
    /// Plus 128.
    q: [u8; 256],
    scales: [i32; 16],
    d: [f32; 8],
}

impl Row {
    const ZERO: Self = Self {
        q: [0; 256],
        scales: [0; 16],
        d: [0.0; 8],
    };

    /// # Safety
    /// `w` is valid for a block, and AVX2 is available.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn look_up<F: Patterns>(&mut self, w: *const u8) {
        let offset = _mm256_set1_epi8(-128);
        // SAFETY: by the caller; stores are within arrays, which are aligned.
        unsafe {
            for i in 0..8 {
                let v = _mm256_xor_si256(F::quants(w, i), offset);
                _mm256_store_si256(self.q.as_mut_ptr().add(32 * i).cast(), v);
            }
            let scales = F::sub_scales(w);
            let [low, high] = [
                _mm256_cvtepi8_epi32(scales),
                _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(scales)),
            ];
            _mm256_store_si256(self.scales.as_mut_ptr().cast(), low);
            _mm256_store_si256(self.scales.as_mut_ptr().add(8).cast(), high);
            self.d[0] = _mm_cvtss_f32(scales_of::<F>(w));
        }
    }
}

/// The scale of a block, in all lanes.
///
/// # Safety
/// `w` is valid for a block.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales_of<F: Patterns>(w: *const u8) -> __m128 {
    // SAFETY: by the caller.
    unsafe { scales::<F>([w; 4]) }
}

/// For batches.
pub(super) struct Batch<F>(PhantomData<F>);

// SAFETY: those of the format.
unsafe impl<F: Patterns> Unpack for Batch<F> {
    const SIZE: usize = F::SIZE;
    const LEN: usize = 256;

    #[inline(always)]
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>) {
        // Tables are looked up row by row; then rows are turned as those of other formats are.
        let mut rows = [const { Row::ZERO }; ROWS];
        let offsets = std::array::from_fn(|r| (r * size_of::<Row>()) as i32);
        // SAFETY: by the caller; offsets are within a `Row`.
        unsafe {
            to.read_ahead(F::SIZE);
            for (i, row) in rows[..B::LANES].iter_mut().enumerate() {
                row.look_up::<F>(to.row(i));
            }
            let rows = to.rows(rows.as_ptr().cast(), &offsets);
            to.all_quants(&rows, 256);
            for part in 0..4 {
                let [a, b, c, d] = rows.sixteen(256 + 16 * part);
                if F::SUB == 16 {
                    to.scales_of_two(2 * part, a, b, 7);
                    to.scales_of_two(2 * part + 1, c, d, 7);
                } else {
                    to.scales_of_two(part, a, c, 7);
                }
            }
            to.d_bits(rows.four(320));
        }
    }
}
