use super::*;

/// Numbers around 0, as many as asked, from a generator with a seed.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| (0..6).map(|_| uniform()).sum::<f32>())
        .collect()
}

/// What is left of a page of rows of `dim` values.
fn stored(ty: KvType, dim: usize, values: &[f32]) -> Vec<f32> {
    let mut page = vec![0xFF; ty.page_size(dim).unwrap()];
    let mut got = vec![f32::NAN; values.len()];
    for i in 0..dim / TILE {
        let mut tile = [[0.0; TILE]; PAGE];
        let rows = |t: usize| t * dim + i * TILE..t * dim + (i + 1) * TILE;
        for (t, row) in tile.iter_mut().enumerate() {
            row.copy_from_slice(&values[rows(t)]);
        }
        ty.write_tile(&tile, &mut page, i);
        ty.read_tile(&page, i, &mut tile);
        for (t, row) in tile.iter().enumerate() {
            got[rows(t)].copy_from_slice(row);
        }
    }
    got
}

/// Squared error relative to the squares.
fn nmse(ty: KvType, dim: usize, values: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let got = stored(ty, dim, values);
    let off: f64 = values.iter().zip(&got).map(|(a, b)| square(a - b)).sum();
    off / values.iter().map(|&x| square(x)).sum::<f64>()
}

#[test]
fn scales_are_found_again() {
    for byte in 0..=255 {
        assert_eq!(byte_of(scale(byte)), byte);
        if byte > 1 {
            let between = (scale(byte - 1) + scale(byte)) / 2.0;
            assert_eq!(byte_of(between), byte, "the next one above");
        }
    }
    assert_eq!((byte_of(1e-30), byte_of(1e30)), (1, 255));
    assert_eq!(scale(1), 1.125 / 65536.0);
    assert_eq!(scale(255), 1.875 * 32768.0);
}

#[test]
fn sizes() {
    assert_eq!(KvType::K4.page_size(64), Some(64 * 16 * 5 / 8));
    assert_eq!(KvType::V2.page_size(64), Some(64 * 16 * 5 / 16));
    assert_eq!(KvType::V2.page_size(48), None);
    assert_eq!(KvType::K4.page_size(24), None);
    assert_eq!(KvType::Rows(GgmlType::Q8_0).page_size(64), Some(16 * 68));
}

#[test]
fn values_come_back_as_far_as_bits_go() {
    for dim in [32, 64, 96, 128, 256] {
        let x = noise(PAGE * dim, dim as u64);
        let (k4, v2) = (nmse(KvType::K4, dim, &x), nmse(KvType::V2, dim, &x));
        // Uniform steps of the best size leave 0.0115 and 0.119 of a normal distribution; ranges are known here, so it can be less.
        assert!(k4 < 0.01 && v2 < 0.11, "{dim}: {k4} {v2}");
        assert!(k4 > 0.001 && v2 > 0.04, "{dim}: {k4} {v2}");
    }
}

#[test]
fn few_levels_are_exact() {
    let x: Vec<f32> = (0..PAGE * 64)
        .map(|i| 0.75 * (i * 7 / 3 % 4) as f32 - 1.5)
        .collect();
    assert_eq!(nmse(KvType::V2, 64, &x), 0.0);
    let x: Vec<f32> = (0..PAGE * 64)
        .map(|i| 0.5 * (i / 64 * 5 % 16) as f32 - 1.5 + (i % 16) as f32)
        .collect();
    assert_eq!(nmse(KvType::K4, 64, &x), 0.0);
}

#[test]
fn a_large_channel_does_no_harm_to_keys() {
    // Two channels far away from zero, as biases of keys put them.
    let dim = 128;
    let mut x = noise(PAGE * dim, 7);
    for row in x.chunks_exact_mut(dim) {
        row[5] += 30.0;
        row[77] = -60.0 + 8.0 * row[77];
    }
    let error_of = |ty: KvType| {
        let got = stored(ty, dim, &x);
        // Of the other channels: what queries tell tokens apart by.
        let others = (0..x.len()).filter(|i| ![5, 77].contains(&(i % dim)));
        others.map(|i| (x[i] - got[i]).powi(2)).sum::<f32>()
    };
    let (k4, q4_0) = (error_of(KvType::K4), error_of(GgmlType::Q4_0.into()));
    assert!(5.0 * k4 < q4_0, "{k4} {q4_0}");
}

#[test]
fn anything_can_be_stored() {
    let odd = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        1e-40,
        65504.0,
        -65504.0,
        f32::MAX,
        -1e-6,
    ];
    let x: Vec<f32> = (0..PAGE * 32).map(|i| odd[i * 7 % odd.len()]).collect();
    for x in [
        &x[..],
        &[f32::NAN; PAGE * 32],
        &[65504.0; PAGE * 32],
        &[0.0; PAGE * 32],
    ] {
        for ty in [KvType::K4, KvType::V2] {
            let got = stored(ty, 32, x);
            assert!(got.iter().all(|x| x.abs() < 3e5), "{ty}");
            if x[0] == 65504.0 {
                assert!(got.iter().all(|x| (x / 65504.0 - 1.0).abs() < 0.1), "{ty}");
            }
            if x[0] == 0.0 {
                assert!(got.iter().all(|&x| x == 0.0), "{ty}");
            }
        }
    }
    // And any bytes can be read.
    for ty in [KvType::K4, KvType::V2] {
        for byte in 0..=255 {
            let page = vec![byte; ty.page_size(32).unwrap()];
            let mut got = [[f32::NAN; TILE]; PAGE];
            ty.read_tile(&page, 0, &mut got);
            assert!(got.as_flattened().iter().all(|x| x.is_finite()));
        }
    }
}
