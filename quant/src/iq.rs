//! What the "i" formats with tables share.

use crate::bits::dot_i8;
use crate::q8_k::{BlockQ8K, QK_K};

/// Gives the values of a pattern their signs: bit `j` of `signs` negates value `j`.
#[inline]
pub(crate) fn apply_signs(pattern: [u8; 8], signs: u8) -> [i8; 8] {
    std::array::from_fn(|j| {
        let v = pattern[j] as i8;
        if signs >> j & 1 == 1 { -v } else { v }
    })
}

/// Two patterns of four values in a row.
#[inline]
pub(crate) fn join(a: [u8; 4], b: [u8; 4]) -> [u8; 8] {
    std::array::from_fn(|j| if j < 4 { a[j] } else { b[j - 4] })
}

/// Fills a block with groups of eight quants.
#[inline]
pub(crate) fn groups_of_8(mut group: impl FnMut(usize) -> [i8; 8]) -> [i8; QK_K] {
    let mut q = [0; QK_K];
    for (g, q) in q.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *q = group(g);
    }
    q
}

/// The low nibbles (even positions) and high nibbles (odd ones) of `p`.
#[inline]
pub(crate) fn nibbles<const N: usize>(p: &[u8]) -> [u8; N] {
    std::array::from_fn(|j| p[j / 2] >> (4 * (j % 2)) & 0xf)
}

/// Writes `scale[j] * q` for sub-blocks of equal length.
#[inline]
pub(crate) fn scale_quants<const N: usize>(scales: [f32; N], q: &[i8; QK_K], y: &mut [f32]) {
    let subs = scales.into_iter().zip(q.chunks_exact(QK_K / N));
    for ((dl, q), y) in subs.zip(y.chunks_exact_mut(QK_K / N)) {
        for (y, &q) in y.iter_mut().zip(q) {
            *y = dl * f32::from(q);
        }
    }
}

/// Sum over sub-blocks of `2 scale + 1` times the products of quants and activations.
#[inline]
pub(crate) fn dot_odd_scales<const N: usize>(scales: [u8; N], q: &[i8; QK_K], y: &BlockQ8K) -> i32 {
    scales
        .into_iter()
        .zip(q.chunks_exact(QK_K / N))
        .zip(y.qs.chunks_exact(QK_K / N))
        .map(|((sc, q), a)| (2 * i32::from(sc) + 1) * dot_i8(q, a))
        .sum()
}
