//! Keys and values as they are stored, to f32.

use crate::lanes::multiversion;
use crate::simd::{Simd, for_isa};
use lemma_quant::pages::{PAGE, TILE, TileK4, TileV2, tiles};

for_isa! {
    /// Decodes half-precision numbers, a multiple of 16.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn decode_f16<S>(from: &[u8], to: &mut [f32]) decode_f16_s;

    /// Decodes a page of `k4`, as the reference does.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn decode_k4<S>(from: &[u8], to: &mut [f32]) decode_k4_s;

    /// Decodes a page of `v2`, as the reference does.
    ///
    /// # Safety
    /// `isa` is available.
    pub(crate) unsafe fn decode_v2<S>(from: &[u8], to: &mut [f32]) decode_v2_s;
}

multiversion! {
    /// The scales of all channels, and then the zeros, as `x = scale * q + zero`.
    pub(crate) fn scales_k4(tiles: &[TileK4], to: &mut [f32]) {
        let (d, zero) = to.split_at_mut(tiles.len() * TILE);
        let to = d.as_chunks_mut::<TILE>().0.iter_mut().zip(zero.as_chunks_mut::<TILE>().0);
        for (tile, (d, zero)) in tiles.iter().zip(to) {
            [*d, *zero] = tile.scales();
        }
    }
}

#[inline(always)]
unsafe fn decode_f16_s<S: Simd>(from: &[u8], to: &mut [f32]) {
    assert!(from.len() == 2 * to.len() && to.len().is_multiple_of(16));
    for i in (0..to.len()).step_by(S::N) {
        // SAFETY: lengths are asserted.
        unsafe {
            S::store(
                to.as_mut_ptr().add(i),
                S::load_f16(from.as_ptr().add(2 * i).cast()),
            );
        }
    }
}

#[inline(always)]
unsafe fn decode_k4_s<S: Simd>(from: &[u8], to: &mut [f32]) {
    let tiles = tiles::<TileK4>(from);
    let dim = tiles.len() * TILE;
    assert_eq!(to.len(), PAGE * dim);
    for (i, tile) in tiles.iter().enumerate() {
        let [d, zero] = tile.scales();
        for c in (0..TILE).step_by(S::N) {
            // SAFETY: a tile has `TILE` of each, and rows have room for all tiles.
            unsafe {
                let (d, zero) = (S::load(d.as_ptr().add(c)), S::load(zero.as_ptr().add(c)));
                let to = to.as_mut_ptr().add(i * TILE + c);
                for (half, words) in [&tile.a, &tile.b].into_iter().enumerate() {
                    let words = S::load_u32(words.as_ptr().add(c).cast());
                    for t in 0..PAGE / 2 {
                        // Every product and sum is exact.
                        let q = S::code::<4>(words, 4 * t as u32);
                        let to = to.add((half * PAGE / 2 + t) * dim);
                        S::store(to, S::fma(q, d, zero));
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn decode_v2_s<S: Simd>(from: &[u8], to: &mut [f32]) {
    let tiles = tiles::<TileV2>(from);
    let dim = tiles.len() * TILE;
    assert_eq!(to.len(), PAGE * dim);
    for (i, tile) in tiles.iter().enumerate() {
        let [d, zero] = tile.scales();
        for c in (0..TILE).step_by(S::N) {
            // SAFETY: a tile has `TILE` of them, and rows have room for all tiles.
            unsafe {
                let qs = S::load_u32(tile.qs.as_ptr().add(c).cast());
                let to = to.as_mut_ptr().add(i * TILE + c);
                for t in 0..PAGE {
                    let q = S::code::<2>(qs, 2 * t as u32);
                    let x = S::fma(q, S::splat(d[t]), S::splat(zero[t]));
                    S::store(to.add(t * dim), x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use lemma_quant::pages::KvType;

    #[test]
    fn pages_are_decoded_as_the_reference_does() {
        let dim = 96;
        let values: Vec<f32> = (0..PAGE * dim)
            .map(|i| (i as f32 * 0.37).sin() * (i % 41) as f32 - (i % 7) as f32)
            .collect();
        type Decode = unsafe fn(Isa, &[u8], &mut [f32]);
        let types: [(_, Decode); 2] = [(KvType::K4, decode_k4), (KvType::V2, decode_v2)];
        for (ty, decode) in types {
            let mut bytes = vec![0; ty.page_size(dim).unwrap()];
            let mut want = vec![0.0; values.len()];
            for i in 0..dim / TILE {
                let mut tile = [[0.0; TILE]; PAGE];
                let at = |t: usize| t * dim + i * TILE;
                for (t, row) in tile.iter_mut().enumerate() {
                    row.copy_from_slice(&values[at(t)..][..TILE]);
                }
                ty.write_tile(&tile, &mut bytes, i);
                ty.read_tile(&bytes, i, &mut tile);
                for (t, row) in tile.iter().enumerate() {
                    want[at(t)..][..TILE].copy_from_slice(row);
                }
            }
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; values.len()];
                // SAFETY: it is available.
                unsafe { decode(isa, &bytes, &mut got) };
                assert_eq!(got, want, "{ty} on {isa}");
            }
        }
    }
}
