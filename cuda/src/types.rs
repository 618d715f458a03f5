//! Which formats have kernels, and how their rows lie in device memory (`kernels/types.cuh` says why).

use lemma_quant::GgmlType;

/// A part of a block that becomes a plane: offset and length in bytes.
pub(crate) type Plane = (u32, u32);

/// Planes of a chunk of a row of `ty`; empty for formats that stay as they are in the file. `None` if there are no kernels for `ty`.
pub(crate) fn planes(ty: GgmlType) -> Option<&'static [Plane]> {
    Some(match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::Q4_K | GgmlType::Q5_K => &[],
        GgmlType::Q4_0 | GgmlType::IQ4_NL => &[(2, 16), (0, 2)],
        GgmlType::Q4_1 => &[(4, 16), (0, 4)],
        GgmlType::Q5_0 => &[(6, 16), (2, 4), (0, 2)],
        GgmlType::Q5_1 => &[(8, 16), (4, 4), (0, 4)],
        GgmlType::Q8_0 => &[(2, 32), (0, 2)],
        GgmlType::MXFP4 => &[(1, 16), (0, 1)],
        GgmlType::IQ4_XS => &[(8, 128), (0, 8)],
        GgmlType::Q2_K => &[(16, 64), (0, 16), (80, 4)],
        GgmlType::Q3_K => &[(32, 64), (0, 32), (96, 12), (108, 2)],
        GgmlType::Q6_K => &[(0, 128), (128, 64), (192, 16), (208, 2)],
        _ => return None,
    })
}

/// Whether kernels read `ty` directly; other formats are converted to f16 at upload.
pub fn has_kernels(ty: GgmlType) -> bool {
    planes(ty).is_some()
}

/// Bytes of a row of `n_in` elements in device memory.
pub fn row_bytes(ty: GgmlType, n_in: usize) -> Option<usize> {
    let blocks = n_in
        .checked_div(ty.block_size())
        .filter(|b| b * ty.block_size() == n_in)?;
    let (planes, chunk) = (planes(ty)?, chunk_blocks(ty));
    Some(if planes.is_empty() {
        (blocks * ty.type_size()).next_multiple_of(16)
    } else {
        let last: usize = planes
            .iter()
            .map(|&(_, len)| (blocks % chunk * len as usize).next_multiple_of(16))
            .sum();
        blocks / chunk * chunk * ty.type_size() + last
    })
}

/// Blocks of a chunk of a row, `Chunk` in the kernels: 4,096 elements of up to four bits and a half, else 2,048 (1,024 and 512 of numbers with 16
/// and 32 bits).
pub(crate) fn chunk_blocks(ty: GgmlType) -> usize {
    let (bytes, block) = (ty.type_size(), ty.block_size());
    match block {
        1 => 2048 / bytes,
        _ if 8 * bytes / block <= 4 => 4096 / block,
        _ => 2048 / block,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_cover_every_byte_once() {
        for &ty in GgmlType::ALL {
            let Some(planes) = planes(ty).filter(|p| !p.is_empty()) else {
                continue;
            };
            let mut seen = vec![0; ty.type_size()];
            for &(at, len) in planes {
                seen[at as usize..][..len as usize]
                    .iter_mut()
                    .for_each(|s| *s += 1);
            }
            assert!(seen.iter().all(|&s| s == 1), "{ty:?}");
        }
    }

    #[test]
    fn rows_are_aligned() {
        assert_eq!(row_bytes(GgmlType::Q6_K, 512), Some(432));
        assert_eq!(row_bytes(GgmlType::Q6_K, 8960), Some(4 * 1680 + 640));
        assert_eq!(row_bytes(GgmlType::F16, 3), Some(16));
        assert_eq!(row_bytes(GgmlType::Q4_K, 100), None);
    }
}
