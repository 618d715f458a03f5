//! One token with the formats of `patterns`, on AVX-512 with VBMI.
//!
//! An index is looked up with the instruction that picks bytes from two vectors, 64 of them at once; a table is a few dozen
//! vectors. What is found is not spread over the values of a pattern: activations come in the order in which a vector holds the
//! first value of each pattern, then the second, and so on ([`X256::grouped`]). So two rows go together, with 32 groups of eight
//! values each, and a lane of 32 bits has four groups: the 32 values that share a scale. Sums are those of `patterns`, bit for bit.

use super::fours::{Dots, Four256, four_rows, sums_of_rows};
use super::patterns::{self, Patterns};
use super::ternary;
use super::{Form, Rows, RowsFn};
use crate::activations::X256;
use lemma_quant::GgmlType;
use lemma_quant::grids::*;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// The kernel for a type, if there is one here and the processor has the instructions.
pub(super) fn kernel(ty: GgmlType) -> Option<(Form, RowsFn)> {
    if !is_x86_feature_detected!("avx512vbmi") {
        return None;
    }
    let rows: RowsFn = match ty {
        GgmlType::IQ2_XXS => rows::<Pairs<patterns::IQ2XXS>>,
        GgmlType::IQ2_XS => rows::<Pairs<patterns::IQ2XS>>,
        GgmlType::IQ2_S => rows::<Pairs<patterns::IQ2S>>,
        GgmlType::IQ3_XXS => rows::<Pairs<patterns::IQ3XXS>>,
        GgmlType::IQ3_S => rows::<Pairs<patterns::IQ3S>>,
        GgmlType::IQ1_S => rows::<Pairs<patterns::IQ1S>>,
        GgmlType::IQ1_M => rows::<Pairs<patterns::IQ1M>>,
        GgmlType::TQ2_0 => rows::<Ternary>,
        _ => return None,
    };
    Some((Form::X256, rows))
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn rows<F: Four256>(job: &Rows<'_>, out: &mut [f32]) {
    // SAFETY: by the caller.
    unsafe { four_rows::<F>(job, out) }
}

/// The codes of patterns in two planes of bytes: the first half of each pattern's values, and the second.
#[repr(C, align(64))]
struct Table<const N: usize>([[[u8; 64]; N]; 2]);

impl<const N: usize> Table<N> {
    /// With `bits` bits in the first half of a code.
    const fn new(codes: &[u16], bits: u32) -> Self {
        assert!(codes.len() == 64 * N);
        let mut planes = [[[0; 64]; N]; 2];
        let mut i = 0;
        while i < codes.len() {
            planes[0][i / 64][i % 64] = (codes[i] & ((1 << bits) - 1)) as u8;
            planes[1][i / 64][i % 64] = (codes[i] >> bits) as u8;
            i += 1;
        }
        Self(planes)
    }

    /// Both halves of the codes of 64 patterns. Their numbers have eight bits in `at` and the others in `upper`.
    #[inline]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"
    )]
    fn look_up(&self, at: __m512i, upper: [__mmask64; 3]) -> [__m512i; 2] {
        let masks = [_mm512_movepi8_mask(at), upper[0], upper[1], upper[2]];
        [0, 1].map(|half| {
            let load = |i: usize| vector(self.0[half][i]);
            // The lower seven bits choose in each pair of vectors; every further bit one of two.
            let pair = |i: usize| _mm512_permutex2var_epi8(load(2 * i), at, load(2 * i + 1));
            let choose = |bit: usize, a, b| _mm512_mask_blend_epi8(masks[bit], a, b);
            let of_4 = |i: usize| choose(0, pair(2 * i), pair(2 * i + 1));
            let of_8 = |i: usize| choose(1, of_4(2 * i), of_4(2 * i + 1));
            let of_16 = |i: usize| choose(2, of_8(2 * i), of_8(2 * i + 1));
            match N {
                4 => of_4(0),
                8 => of_8(0),
                16 => of_16(0),
                _ => choose(3, of_16(0), of_16(1)),
            }
        })
    }
}

static IQ2XXS: Table<4> = Table::new(&IQ2XXS_CODES, 8);
static IQ2XS: Table<8> = Table::new(&IQ2XS_CODES, 8);
static IQ2S: Table<16> = Table::new(&IQ2S_CODES, 8);
static IQ3XXS: Table<4> = Table::new(&IQ3XXS_CODES, 6);
static IQ3S: Table<8> = Table::new(&IQ3S_CODES, 6);
static IQ1S: Table<32> = Table::new(&IQ1S_CODES, 8);

/// [`KSIGNS`], as vectors.
#[repr(C, align(64))]
struct Signs([[u8; 64]; 2]);
static SIGNS: Signs = {
    let (mut signs, mut i) = ([[0; 64]; 2], 0);
    while i < 128 {
        signs[i / 64][i % 64] = KSIGNS[i];
        i += 1;
    }
    Signs(signs)
};

/// What the codes of `iq2` stand for.
const TWO_BITS: [i8; 16] = [8, 25, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// What those of `iq3_xxs` do, and those of `iq3_s`.
const THREE_BITS: [i8; 16] = [4, 12, 20, 28, 36, 44, 52, 62, 0, 0, 0, 0, 0, 0, 0, 0];
const ODD: [i8; 16] = [1, 3, 5, 7, 9, 11, 13, 15, 0, 0, 0, 0, 0, 0, 0, 0];
/// Ternary codes eightfold and unsigned, shifted down or (with the third bit) up: nine too large.
const SHIFTED: [i8; 16] = [0, 8, 16, 0, 2, 10, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Two blocks, looked up.
struct Pair {
    /// Values `0..8` of all groups, unsigned: 32 of the first block, then 32 of the second.
    values: [__m512i; 8],
    /// Bit `k` is set where value `k` is negative.
    signs: Option<__m512i>,
    /// Scales, in lanes of four groups: one, or two of 16 bits for two groups each.
    scales: __m512i,
}

/// What is special to a format here.
///
/// # Safety
/// As for [`Patterns`].
unsafe trait Grouped: Patterns {
    /// How much too large the values are.
    const OFFSET: i16;

    /// Looks up two blocks.
    ///
    /// # Safety
    /// Both are valid, and the instruction set is available.
    unsafe fn pair(a: *const u8, b: *const u8) -> Pair;
}

/// 64 bytes of numbers as a vector.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn vector<T: Copy, const N: usize>(v: [T; N]) -> __m512i {
    const { assert!(size_of::<[T; N]>() == 64) };
    // SAFETY: there are 64 bytes.
    unsafe { _mm512_loadu_si512(v.as_ptr().cast()) }
}

/// Every second 32-bit number of two vectors, from the first or the second on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn every_second<const FIRST: i32>(a: __m512i, b: __m512i) -> __m512i {
    let at: [i32; 16] = std::array::from_fn(|i| 2 * i as i32 + FIRST);
    _mm512_permutex2var_epi32(a, vector(at), b)
}

/// Every second byte of two vectors, from the first or the second on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn every_second_byte<const FIRST: u8>(a: __m512i, b: __m512i) -> __m512i {
    let at: [u8; 64] = std::array::from_fn(|i| 2 * i as u8 + FIRST);
    _mm512_permutex2var_epi8(a, vector(at), b)
}

/// In the bytes of each lane, its bits from `0`, `step`, `2 step` and `3 step` on. Bits above those asked for follow.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn spread<const STEP: u8>(v: __m512i) -> __m512i {
    let at: [u8; 64] = std::array::from_fn(|i| (i as u8 % 4) * STEP + (i as u8 / 4 % 2) * 32);
    _mm512_multishift_epi64_epi8(vector(at), v)
}

/// 32 bytes of each block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn halves(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: by the caller.
    unsafe {
        let a = _mm512_castsi256_si512(_mm256_loadu_si256(a.cast()));
        _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(b.cast()))
    }
}

/// 8 bytes of each block, one to a lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn eights(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: by the caller.
    unsafe {
        let [a, b] = [a, b].map(|p| _mm_loadl_epi64(p.cast()));
        _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(a, b))
    }
}

/// Values of 2 bits in the halves of codes of eight.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn two_bits(codes: [__m512i; 2], table: [i8; 16], also: __m512i) -> [__m512i; 8] {
    let table = vector([table; 4]);
    std::array::from_fn(|k| {
        let v = _mm512_srl_epi16(codes[k / 4], _mm_cvtsi32_si128(2 * (k as i32 % 4)));
        // v & 3 | also
        let v = _mm512_ternarylogic_epi32::<0xea>(v, _mm512_set1_epi8(3), also);
        _mm512_shuffle_epi8(table, v)
    })
}

/// Values of 3 bits in the halves of codes of four: those of the first four values, and of the others.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn three_bits(codes: [[__m512i; 2]; 2], table: [i8; 16]) -> [__m512i; 8] {
    let table = vector([table; 4]);
    std::array::from_fn(|k| {
        let shift = _mm_cvtsi32_si128(3 * (k as i32 % 2));
        let v = _mm512_srl_epi16(codes[k / 4][k / 2 % 2], shift);
        _mm512_shuffle_epi8(table, _mm512_and_si512(v, _mm512_set1_epi8(7)))
    })
}

/// The signs of four groups and their scale, from lanes with four numbers of 7 bits and a scale above.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn stored(v: __m512i) -> (__m512i, __m512i) {
    let scales = _mm512_or_si512(_mm512_srli_epi32::<27>(v), _mm512_set1_epi32(1));
    (signs(spread::<7>(v)), scales)
}

/// Signs for the lower seven bits of bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn signs(at: __m512i) -> __m512i {
    let [a, b] = SIGNS.0.map(|v| vector(v));
    _mm512_permutex2var_epi8(a, at, b)
}

/// Two odd scales to a lane, from bytes of two nibbles.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
fn two_scales(v: __m512i) -> __m512i {
    let both = _mm512_or_si512(v, _mm512_slli_epi32::<12>(v));
    let both = _mm512_and_si512(both, _mm512_set1_epi32(0x000f_000f));
    let one = _mm512_set1_epi32(0x0001_0001);
    _mm512_or_si512(_mm512_add_epi32(both, both), one)
}

const NONE: [__mmask64; 3] = [0; 3];

/// How formats are looked up.
macro_rules! grouped {
    ($($format:ident, $offset:literal, |$a:ident, $b:ident| $body:expr;)*) => {$(
        // SAFETY: offsets are within blocks of the format's size.
        unsafe impl Grouped for patterns::$format {
            const OFFSET: i16 = $offset;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
            unsafe fn pair($a: *const u8, $b: *const u8) -> Pair {
                // SAFETY: by the caller.
                unsafe { $body }
            }
        }
    )*};
}

grouped! {
    IQ2XXS, 0, |a, b| {
        let [a, b] = [a, b].map(|w| _mm512_loadu_si512(w.add(2).cast()));
        let codes = IQ2XXS.look_up(every_second::<0>(a, b), NONE);
        let (signs, scales) = stored(every_second::<1>(a, b));
        Pair {
            values: two_bits(codes, TWO_BITS, _mm512_setzero_si512()),
            signs: Some(signs),
            scales,
        }
    };
    IQ2XS, 0, |a, b| {
        let [q, r] = [a, b].map(|w| _mm512_loadu_si512(w.add(2).cast()));
        let upper = every_second_byte::<1>(q, r);
        let ninth = _mm512_test_epi8_mask(upper, _mm512_set1_epi8(1));
        let codes = IQ2XS.look_up(every_second_byte::<0>(q, r), [ninth, 0, 0]);
        Pair {
            values: two_bits(codes, TWO_BITS, _mm512_setzero_si512()),
            signs: Some(signs(_mm512_srli_epi16::<1>(upper))),
            scales: two_scales(eights(a.add(66), b.add(66))),
        }
    };
    IQ2S, 0, |a, b| {
        let upper = spread::<2>(eights(a.add(66), b.add(66)));
        let upper = [1, 2].map(|bit| _mm512_test_epi8_mask(upper, _mm512_set1_epi8(bit)));
        let codes = IQ2S.look_up(halves(a.add(2), b.add(2)), [upper[0], upper[1], 0]);
        Pair {
            values: two_bits(codes, TWO_BITS, _mm512_setzero_si512()),
            signs: Some(halves(a.add(34), b.add(34))),
            scales: two_scales(eights(a.add(74), b.add(74))),
        }
    };
    IQ3XXS, 0, |a, b| {
        let [q, r] = [a, b].map(|w| _mm512_loadu_si512(w.add(2).cast()));
        let codes = [every_second_byte::<0>(q, r), every_second_byte::<1>(q, r)]
            .map(|at| IQ3XXS.look_up(at, NONE));
        let (signs, scales) = stored(halves(a.add(66), b.add(66)));
        Pair {
            values: three_bits(codes, THREE_BITS),
            signs: Some(signs),
            scales,
        }
    };
    IQ3S, 0, |a, b| {
        let [q, r] = [a, b].map(|w| _mm512_loadu_si512(w.add(2).cast()));
        let upper = spread::<2>(eights(a.add(66), b.add(66)));
        let codes = [(every_second_byte::<0>(q, r), 1), (every_second_byte::<1>(q, r), 2)]
            .map(|(at, bit)| {
                let ninth = _mm512_test_epi8_mask(upper, _mm512_set1_epi8(bit));
                IQ3S.look_up(at, [ninth, 0, 0])
            });
        // Nibble j of 32 bits is the scale of lane j of its block.
        let [q, r] = [a, b].map(|w| w.add(106).cast::<i32>().read_unaligned());
        let scales = _mm512_inserti64x4::<1>(_mm512_set1_epi32(q), _mm256_set1_epi32(r));
        let lane: [i32; 16] = std::array::from_fn(|i| 4 * (i as i32 % 8));
        let scales = _mm512_srlv_epi32(scales, vector(lane));
        let scales = _mm512_and_si512(scales, _mm512_set1_epi32(15));
        let scales = _mm512_or_si512(_mm512_add_epi32(scales, scales), _mm512_set1_epi32(1));
        Pair {
            values: three_bits(codes, ODD),
            signs: Some(halves(a.add(74), b.add(74))),
            scales,
        }
    };
    IQ1S, 9, |a, b| {
        let high = _mm512_cvtepu16_epi32(_mm256_set_m128i(
            _mm_loadu_si128(b.add(34).cast()),
            _mm_loadu_si128(a.add(34).cast()),
        ));
        let upper = spread::<3>(high);
        let upper = [1, 2, 4].map(|bit| _mm512_test_epi8_mask(upper, _mm512_set1_epi8(bit)));
        let codes = IQ1S.look_up(halves(a.add(2), b.add(2)), upper);
        let down = _mm512_test_epi32_mask(high, _mm512_set1_epi32(0x8000));
        let up = _mm512_maskz_mov_epi32(!down, _mm512_set1_epi8(4));
        let scales = _mm512_and_si512(_mm512_srli_epi32::<11>(high), _mm512_set1_epi32(14));
        Pair {
            values: two_bits(codes, SHIFTED, up),
            signs: None,
            scales: _mm512_or_si512(scales, _mm512_set1_epi32(1)),
        }
    };
    IQ1M, 9, |a, b| {
        let high = _mm512_cvtepu16_epi32(_mm256_set_m128i(
            _mm_loadu_si128(b.add(32).cast()),
            _mm_loadu_si128(a.add(32).cast()),
        ));
        let nibbles = spread::<4>(high);
        let upper = [1, 2, 4].map(|bit| _mm512_test_epi8_mask(nibbles, _mm512_set1_epi8(bit)));
        let codes = IQ1S.look_up(halves(a, b), upper);
        let down = _mm512_test_epi8_mask(nibbles, _mm512_set1_epi8(8));
        // Lane j has scales 2 j and 2 j + 1, which are in half j / 2 from bit 6 (j % 2) on.
        let both = _mm512_castsi128_si512(_mm_unpacklo_epi64(
            _mm_loadl_epi64(a.add(48).cast()),
            _mm_loadl_epi64(b.add(48).cast()),
        ));
        let half: [u16; 32] = std::array::from_fn(|i| i as u16 / 4);
        let scales = _mm512_permutexvar_epi16(vector(half), both);
        let shift: [u16; 32] = std::array::from_fn(|i| 3 * (i as u16 % 4));
        let scales = _mm512_srlv_epi16(scales, vector(shift));
        let scales = _mm512_and_si512(scales, _mm512_set1_epi16(7));
        Pair {
            values: two_bits(codes, SHIFTED, _mm512_maskz_set1_epi8(!down, 4)),
            signs: None,
            scales: _mm512_or_si512(_mm512_add_epi16(scales, scales), _mm512_set1_epi16(1)),
        }
    };
}

/// Rows two at a time.
struct Pairs<F>(PhantomData<F>);

impl<F: Grouped> Pairs<F> {
    /// Sums of `scale * q * x` in lanes: eight of the first block, eight of the second.
    #[inline]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"
    )]
    unsafe fn sums(a: *const u8, b: *const u8, x: &X256) -> __m512i {
        // SAFETY: by the caller; `x` has 32 bytes of each of eight values, and eight sums, or pairs of them.
        unsafe {
            let zero = _mm512_setzero_si512();
            let pair = F::pair(a, b);
            let mut sums = zero;
            for (k, v) in pair.values.into_iter().enumerate() {
                let x = _mm256_load_si256(x.grouped[k].as_ptr().cast());
                let mut x = _mm512_broadcast_i64x4(x);
                if let Some(signs) = pair.signs {
                    let negative = _mm512_test_epi8_mask(signs, _mm512_set1_epi8(1 << k));
                    x = _mm512_mask_sub_epi8(x, negative, zero, x);
                }
                sums = if F::SUB == 16 {
                    _mm512_dpwssd_epi32(sums, _mm512_maddubs_epi16(v, x), pair.scales)
                } else {
                    _mm512_dpbusd_epi32(sums, v, x)
                };
            }
            if F::SUB == 16 {
                if F::OFFSET != 0 {
                    let x = _mm256_loadu_si256(x.sum16.as_ptr().cast());
                    let offset = _mm256_mullo_epi16(x, _mm256_set1_epi16(-F::OFFSET));
                    let offset = _mm512_broadcast_i64x4(offset);
                    sums = _mm512_dpwssd_epi32(sums, offset, pair.scales);
                }
                return sums;
            }
            if F::OFFSET != 0 {
                let x = _mm256_cvtepi16_epi32(_mm_loadu_si128(x.sum32.as_ptr().cast()));
                let offset = _mm256_mullo_epi32(x, _mm256_set1_epi32(F::OFFSET.into()));
                sums = _mm512_sub_epi32(sums, _mm512_broadcast_i64x4(offset));
            }
            _mm512_mullo_epi32(sums, pair.scales)
        }
    }
}

// SAFETY: those of the format.
unsafe impl<F: Grouped> Four256 for Pairs<F> {
    const SIZE: usize = F::SIZE;

    #[inline]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"
    )]
    unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots {
        // SAFETY: by the caller.
        unsafe {
            let [a, b, c, d] = w;
            let (first, second) = (Self::sums(a, b, x), Self::sums(c, d, x));
            // In each quarter, sums of both; of a and c in the first two, of b and d in the others.
            let v = _mm512_add_epi32(
                _mm512_unpacklo_epi32(first, second),
                _mm512_unpackhi_epi32(first, second),
            );
            let v = _mm512_add_epi32(v, _mm512_shuffle_epi32::<0b01_00_11_10>(v));
            let [first, second] = [_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v)]
                .map(|v| {
                    _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
                });
            Dots {
                sums: _mm_unpacklo_epi32(first, second),
                d: patterns::scales::<F>(w),
                mins: None,
            }
        }
    }
}

/// `tq2_0`, whose values lie in order.
struct Ternary;

// SAFETY: a block has 64 bytes of quants.
unsafe impl Four256 for Ternary {
    const SIZE: usize = ternary::TQ2_0::SIZE;

    #[inline]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"
    )]
    unsafe fn dots(w: [*const u8; 4], x: &X256) -> Dots {
        // SAFETY: by the caller; offsets into `x` end at 256.
        unsafe {
            // Values are one too large.
            let ones = _mm512_set1_epi8(1);
            let mut offset = _mm512_setzero_si512();
            let x: [__m512i; 4] = std::array::from_fn(|k| {
                let x = halves(
                    x.q.as_ptr().add(32 * k).cast(),
                    x.q.as_ptr().add(128 + 32 * k).cast(),
                );
                offset = _mm512_dpbusd_epi32(offset, ones, x);
                x
            });
            let offset = _mm512_sub_epi32(_mm512_setzero_si512(), offset);
            let sums = w.map(|w| {
                let q = _mm512_loadu_si512(w.cast());
                let mut sum = offset;
                for (k, x) in x.into_iter().enumerate() {
                    let q = _mm512_srl_epi16(q, _mm_cvtsi32_si128(2 * k as i32));
                    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(q, _mm512_set1_epi8(3)), x);
                }
                sum
            });
            Dots {
                sums: sums_of_rows(sums),
                d: patterns::scales::<ternary::TQ2_0>(w),
                mins: None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::kernels::Next;
    use crate::x86::rows::avx512;

    /// Processors without VBMI take the code of `patterns` with AVX-512's products, which those with it never do otherwise.
    #[test]
    fn without_vbmi_the_same_bits() {
        if !Isa::Avx512.is_available() || !is_x86_feature_detected!("avx512vbmi") {
            return;
        }
        let (n_blocks, n_rows) = (3, 7);
        let mut seed = 1u32;
        let mut byte = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed.to_be_bytes()[0]
        };
        let mut x = vec![X256::ZERO; n_blocks];
        for x in &mut x {
            let values = std::array::from_fn(|_| f32::from(byte()) - 127.5);
            crate::activations::quantize_256(Isa::Avx512, &values, x);
            x.arrange();
        }
        let mut tested = 0;
        for ty in GgmlType::ALL.iter().copied() {
            let Some((_, fast)) = kernel(ty) else {
                continue;
            };
            let (_, plain) = avx512::patterns(ty).expect("all are there");
            let row_size = ty.row_size(256 * n_blocks).expect("whole blocks");
            // Below 64 no half-precision number is large.
            let w: Vec<u8> = (0..n_rows * row_size).map(|_| byte() & 0x3f).collect();
            let job = Rows {
                w: &w,
                row_size,
                x: x.as_ptr().cast(),
                n_blocks,
                next: Next {
                    at: std::ptr::null(),
                    stride: 0,
                },
            };
            let [fast, plain] = [fast, plain].map(|kernel| {
                let mut out = vec![0f32; n_rows];
                // SAFETY: the instruction sets are there, and rows and activations as long as they say.
                unsafe { kernel(&job, &mut out) };
                out
            });
            assert!(plain.iter().all(|y| y.is_finite() && *y != 0.0), "{ty}");
            assert_eq!(fast, plain, "{ty}");
            tested += 1;
        }
        assert_eq!(tested, 8);
    }
}
