//! How formats lay sub-byte integers out in bytes.
//!
//! Three arrangements cover nearly all of them. They interleave distant values, so that a vector unit gets
//! runs of consecutive values by masking and shifting whole registers.

/// Splits bytes into nibbles: each run of `half` bytes gives `half` values from the low nibbles, then `half`
/// from the high ones.
#[inline]
pub(crate) fn unpack_nibbles(qs: &[u8], half: usize, out: &mut [u8]) {
    for (q, o) in qs.chunks_exact(half).zip(out.chunks_exact_mut(2 * half)) {
        let (lo, hi) = o.split_at_mut(half);
        for ((&q, lo), hi) in q.iter().zip(lo).zip(hi) {
            *lo = q & 0xf;
            *hi = q >> 4;
        }
    }
}

/// The inverse of [`unpack_nibbles`]. Bits above the fourth are dropped.
#[inline]
pub(crate) fn pack_nibbles(l: &[u8], half: usize, qs: &mut [u8]) {
    for (q, l) in qs.chunks_exact_mut(half).zip(l.chunks_exact(2 * half)) {
        let (lo, hi) = l.split_at(half);
        for ((q, &lo), &hi) in q.iter_mut().zip(lo).zip(hi) {
            *q = (lo & 0xf) | (hi << 4);
        }
    }
}

/// Splits 64 bytes into 2-bit values: in each half of 32 bytes, bits `2k` and `2k + 1` of byte `j` are value
/// `32 k + j` of the 128.
#[inline]
pub(crate) fn unpack_crumbs(qs: &[u8; 64]) -> [u8; 256] {
    let mut out = [0; 256];
    for (q, o) in qs.chunks_exact(32).zip(out.chunks_exact_mut(128)) {
        for (k, o) in o.chunks_exact_mut(32).enumerate() {
            for (&q, o) in q.iter().zip(o) {
                *o = (q >> (2 * k)) & 3;
            }
        }
    }
    out
}

/// The inverse of [`unpack_crumbs`]. Bits above the second are dropped.
#[inline]
pub(crate) fn pack_crumbs(l: &[u8; 256]) -> [u8; 64] {
    let mut qs = [0; 64];
    for (q, l) in qs.chunks_exact_mut(32).zip(l.chunks_exact(128)) {
        for (k, l) in l.chunks_exact(32).enumerate() {
            for (q, &l) in q.iter_mut().zip(l) {
                *q |= (l & 3) << (2 * k);
            }
        }
    }
    qs
}

/// Bit `k` of byte `j` belongs to value `32 k + j`; it is placed at bit `to` of that value.
#[inline]
pub(crate) fn or_bit_plane(plane: &[u8; 32], to: u32, out: &mut [u8; 256]) {
    for (k, o) in out.chunks_exact_mut(32).enumerate() {
        for (&h, o) in plane.iter().zip(o) {
            *o |= ((h >> k) & 1) << to;
        }
    }
}

/// The inverse of [`or_bit_plane`]: collects bit `from` of every value.
#[inline]
pub(crate) fn bit_plane(l: &[u8; 256], from: u32) -> [u8; 32] {
    let mut plane = [0; 32];
    for (k, l) in l.chunks_exact(32).enumerate() {
        for (h, &l) in plane.iter_mut().zip(l) {
            *h |= ((l >> from) & 1) << k;
        }
    }
    plane
}

/// Sum of products of unsigned quants (at most 127) and signed activations.
#[inline]
pub(crate) fn dot_u8(a: &[u8], b: &[i8]) -> i32 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| i32::from(a) * i32::from(b))
        .sum()
}

/// Sum of products of signed quants and signed activations.
#[inline]
pub(crate) fn dot_i8(a: &[i8], b: &[i8]) -> i32 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| i32::from(a) * i32::from(b))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 256 values that differ in every bit from one another's neighbours.
    fn values() -> [u8; 256] {
        std::array::from_fn(|i| (i as u8).wrapping_mul(101).wrapping_add((i / 16) as u8))
    }

    #[test]
    fn packing_is_undone() {
        let l = values();
        for half in [8, 16, 32, 64] {
            let (mut qs, mut out) = ([0; 128], [0; 256]);
            pack_nibbles(&l, half, &mut qs);
            unpack_nibbles(&qs, half, &mut out);
            assert_eq!(out, l.map(|l| l & 0xf));
        }
        assert_eq!(unpack_crumbs(&pack_crumbs(&l)), l.map(|l| l & 3));
        let mut out = [0; 256];
        or_bit_plane(&bit_plane(&l, 5), 5, &mut out);
        assert_eq!(out, l.map(|l| l & 32));
    }
}
