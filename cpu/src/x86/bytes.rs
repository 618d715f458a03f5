//! Vectors of bytes of any width, for what is the same on all instruction sets: four columns of a row in every lane.

use std::arch::x86_64::*;

/// Rows of a tile.
pub(crate) const ROWS: usize = 16;

/// Some rows of weights, from a certain place in each on.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    /// Where the first one is.
    pub(super) w: *const u8,
    /// How far behind it they all are, in bytes.
    pub(super) offsets: &'a [i32; ROWS],
}

impl Places<'_> {
    /// Row `i` from that place on.
    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> *const u8 {
        self.w.wrapping_offset(self.offsets[i] as isize)
    }
}

/// Operations on vectors of an instruction set. A lane has 32 bits and belongs to a row.
///
/// # Safety
/// Every function asks for the instruction set; those with pointers or places ask for what they read or write to be valid.
pub(super) unsafe trait Bytes {
    /// A vector.
    type V: Copy;
    /// Lanes.
    const LANES: usize;

    /// Sixteen bytes of the rows from `first` on, four in each vector.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sixteen(p: Places<'_>, first: usize) -> [Self::V; 4];
    /// Four bytes of the rows from `first` on.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn four(p: Places<'_>, first: usize) -> Self::V;
    /// Writes lanes.
    ///
    /// # Safety
    /// See the trait; `p` is aligned.
    unsafe fn store(p: *mut u8, v: Self::V);
    /// Writes the half-precision numbers in the lower halves of lanes as f32.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn store_halves(p: *mut f32, v: Self::V);
    /// The same number in all lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn splat(a: u32) -> Self::V;
    /// `a & b`
    ///
    /// # Safety
    /// See the trait.
    unsafe fn and(a: Self::V, b: Self::V) -> Self::V;
    /// `a | b`
    ///
    /// # Safety
    /// See the trait.
    unsafe fn or(a: Self::V, b: Self::V) -> Self::V;
    /// `a ^ b`
    ///
    /// # Safety
    /// See the trait.
    unsafe fn xor(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b` of lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// Lanes shifted left.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn shl(v: Self::V, n: u32) -> Self::V;
    /// Lanes shifted right.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn shr(v: Self::V, n: u32) -> Self::V;
    /// Signed lanes shifted right.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sar(v: Self::V, n: u32) -> Self::V;
    /// Bytes `v` of a table of sixteen; zero where the upper bit is set.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn look_up(table: [i8; 16], v: Self::V) -> Self::V;
    /// In each run of four lanes, bytes at the places that `pick` says; zero where its upper bit is set.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn pick(v: Self::V, pick: [i8; 16]) -> Self::V;
    /// Ones in the bytes that have any bit of `mask`, which has one in every byte; zeros in the others.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn has(v: Self::V, mask: u32) -> Self::V;
    /// Ones in lanes that are `a`, zeros in the others.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn is(v: Self::V, a: u32) -> Self::V;
}

/// 256 bits.
pub(super) struct Avx2;
/// 512 bits.
pub(super) struct Avx512;

/// From sixteen bytes of four rows in each run of four lanes to four bytes of each row in a vector.
macro_rules! turned {
    ($z:expr, $low32:ident, $high32:ident, $low64:ident, $high64:ident) => {{
        let z = $z;
        let (a, b) = ($low32(z[0], z[1]), $high32(z[0], z[1]));
        let (c, d) = ($low32(z[2], z[3]), $high32(z[2], z[3]));
        [$low64(a, c), $high64(a, c), $low64(b, d), $high64(b, d)]
    }};
}

pub(super) use turned;

macro_rules! operations {
    ($features:literal: $($name:ident($($arg:ident: $ty:ty),*) $body:expr;)*) => {$(
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name($($arg: $ty),*) -> Self::V {
            // SAFETY: by the caller.
            #[allow(unused_unsafe, reason = "only some ask for it")]
            unsafe { $body }
        }
    )*};
}

// SAFETY: the functions are what they are called.
unsafe impl Bytes for Avx2 {
    type V = __m256i;
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sixteen(p: Places<'_>, first: usize) -> [__m256i; 4] {
        let mut z = [_mm256_setzero_si256(); 4];
        for (i, z) in z.iter_mut().enumerate() {
            // SAFETY: by the caller.
            unsafe {
                let a = _mm_loadu_si128(p.row(first + i).cast());
                let b = _mm_loadu_si128(p.row(first + 4 + i).cast());
                *z = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b);
            }
        }
        turned!(
            z,
            _mm256_unpacklo_epi32,
            _mm256_unpackhi_epi32,
            _mm256_unpacklo_epi64,
            _mm256_unpackhi_epi64
        )
    }
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(p: *mut u8, v: __m256i) {
        // SAFETY: by the caller.
        unsafe { _mm256_store_si256(p.cast(), v) }
    }
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn store_halves(p: *mut f32, v: __m256i) {
        let v = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
        let v = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(v, v));
        // SAFETY: by the caller.
        unsafe { _mm256_storeu_ps(p, _mm256_cvtph_ps(_mm256_castsi256_si128(v))) }
    }
    operations! {
        "avx2":
        four(p: Places<'_>, first: usize)
            _mm256_i32gather_epi32::<1>(
                p.w.cast(),
                _mm256_loadu_si256(p.offsets.as_ptr().add(first).cast()),
            );
        splat(a: u32) _mm256_set1_epi32(a.cast_signed());
        and(a: __m256i, b: __m256i) _mm256_and_si256(a, b);
        or(a: __m256i, b: __m256i) _mm256_or_si256(a, b);
        xor(a: __m256i, b: __m256i) _mm256_xor_si256(a, b);
        sub(a: __m256i, b: __m256i) _mm256_sub_epi32(a, b);
        shl(v: __m256i, n: u32) _mm256_sll_epi32(v, _mm_cvtsi32_si128(n.cast_signed()));
        shr(v: __m256i, n: u32) _mm256_srl_epi32(v, _mm_cvtsi32_si128(n.cast_signed()));
        sar(v: __m256i, n: u32) _mm256_sra_epi32(v, _mm_cvtsi32_si128(n.cast_signed()));
        look_up(table: [i8; 16], v: __m256i)
            _mm256_shuffle_epi8(
                _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())),
                v,
            );
        pick(v: __m256i, pick: [i8; 16])
            _mm256_shuffle_epi8(
                v,
                _mm256_broadcastsi128_si256(_mm_loadu_si128(pick.as_ptr().cast())),
            );
        has(v: __m256i, mask: u32) {
            let mask = _mm256_set1_epi32(mask.cast_signed());
            _mm256_cmpeq_epi8(_mm256_and_si256(v, mask), mask)
        };
        is(v: __m256i, a: u32) _mm256_cmpeq_epi32(v, _mm256_set1_epi32(a.cast_signed()));
    }
}

// SAFETY: the functions are what they are called.
unsafe impl Bytes for Avx512 {
    type V = __m512i;
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn sixteen(p: Places<'_>, first: usize) -> [__m512i; 4] {
        let mut z = [_mm512_setzero_si512(); 4];
        for (i, z) in z.iter_mut().enumerate() {
            // SAFETY: by the caller.
            unsafe {
                let at = |j: usize| _mm_loadu_si128(p.row(first + 4 * j + i).cast());
                let v = _mm512_castsi128_si512(at(0));
                let v = _mm512_mask_broadcast_i32x4(v, 0xf0, at(1));
                let v = _mm512_mask_broadcast_i32x4(v, 0xf00, at(2));
                *z = _mm512_mask_broadcast_i32x4(v, 0xf000, at(3));
            }
        }
        turned!(
            z,
            _mm512_unpacklo_epi32,
            _mm512_unpackhi_epi32,
            _mm512_unpacklo_epi64,
            _mm512_unpackhi_epi64
        )
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(p: *mut u8, v: __m512i) {
        // SAFETY: by the caller.
        unsafe { _mm512_store_si512(p.cast(), v) }
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_halves(p: *mut f32, v: __m512i) {
        // SAFETY: by the caller.
        unsafe { _mm512_storeu_ps(p, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v))) }
    }
    operations! {
        "avx2,avx512f,avx512bw,avx512vl,avx512dq":
        four(p: Places<'_>, first: usize)
            _mm512_i32gather_epi32::<1>(
                _mm512_loadu_si512(p.offsets.as_ptr().add(first).cast()),
                p.w.cast(),
            );
        splat(a: u32) _mm512_set1_epi32(a.cast_signed());
        and(a: __m512i, b: __m512i) _mm512_and_si512(a, b);
        or(a: __m512i, b: __m512i) _mm512_or_si512(a, b);
        xor(a: __m512i, b: __m512i) _mm512_xor_si512(a, b);
        sub(a: __m512i, b: __m512i) _mm512_sub_epi32(a, b);
        shl(v: __m512i, n: u32) _mm512_sll_epi32(v, _mm_cvtsi32_si128(n.cast_signed()));
        shr(v: __m512i, n: u32) _mm512_srl_epi32(v, _mm_cvtsi32_si128(n.cast_signed()));
        sar(v: __m512i, n: u32) _mm512_sra_epi32(v, _mm_cvtsi32_si128(n.cast_signed()));
        look_up(table: [i8; 16], v: __m512i)
            _mm512_shuffle_epi8(
                _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())),
                v,
            );
        pick(v: __m512i, pick: [i8; 16])
            _mm512_shuffle_epi8(
                v,
                _mm512_broadcast_i32x4(_mm_loadu_si128(pick.as_ptr().cast())),
            );
        has(v: __m512i, mask: u32)
            _mm512_movm_epi8(_mm512_test_epi8_mask(v, _mm512_set1_epi32(mask.cast_signed())));
        is(v: __m512i, a: u32)
            _mm512_movm_epi32(_mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(a.cast_signed())));
    }
}
