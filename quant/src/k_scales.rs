//! The twelve bytes that hold eight 6-bit scales and eight 6-bit minimums in `q4_K` and `q5_K`.
//!
//! The low six bits of bytes 0..4 are scales 0..4, those of bytes 4..8 are minimums 0..4. Bytes 8..12 hold the low
//! nibbles of scales 4..8 (low) and minimums 4..8 (high); their upper two bits are the upper two bits of
//! bytes 0..4 and 4..8.

/// Scales and minimums of the eight sub-blocks, each 0..=63.
#[inline]
pub fn unpack_k_scales(p: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = p[j] & 63;
        mins[j] = p[j + 4] & 63;
        scales[j + 4] = (p[j + 8] & 0xf) | (p[j] >> 6 << 4);
        mins[j + 4] = (p[j + 8] >> 4) | (p[j + 4] >> 6 << 4);
    }
    (scales, mins)
}

/// The inverse of [`unpack_k_scales`].
pub(crate) fn pack_k_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut p = [0; 12];
    for j in 0..4 {
        p[j] = scales[j] | (scales[j + 4] >> 4 << 6);
        p[j + 4] = mins[j] | (mins[j + 4] >> 4 << 6);
        p[j + 8] = (scales[j + 4] & 0xf) | (mins[j + 4] & 0xf) << 4;
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_undone() {
        let scales = [1, 2, 4, 8, 16, 32, 63, 42];
        let mins = [33, 0, 17, 63, 5, 48, 21, 62];
        assert_eq!(
            unpack_k_scales(&pack_k_scales(&scales, &mins)),
            (scales, mins)
        );
    }
}
