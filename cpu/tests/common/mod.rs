//! What the tests of this crate share.
#![allow(dead_code, unreachable_pub, reason = "no test uses everything")]

use lemma_cpu::{Isa, Limits, Ops, Team};
use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, PAGE, TILE};

/// A small generator of random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Between -1 and 1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / 8_388_608.0 - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }

    pub fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| self.unit() + self.unit() * self.unit())
            .collect()
    }
}

pub fn ops(isa: Isa, n_threads: usize, limits: Limits) -> Ops {
    Ops::new(Team::new(n_threads), isa, limits)
}

pub fn row_size(ty: GgmlType, n: usize) -> usize {
    ty.row_size(n).unwrap()
}

pub fn quantize(ty: GgmlType, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; row_size(ty, x.len())];
    ty.traits().quantize_row.unwrap()(x, &mut bytes);
    bytes
}

pub fn dequantize(ty: GgmlType, bytes: &[u8], n: usize) -> Vec<f32> {
    let mut y = vec![0.0; n];
    (ty.traits().dequantize_row)(bytes, &mut y);
    y
}

/// Normalised mean squared error.
pub fn nmse(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g) - w).powi(2))
        .sum();
    let power: f64 = want.iter().map(|w| w * w).sum();
    if power == 0.0 { error } else { error / power }
}

/// What a type leaves of rows of a head, `[PAGE, dim]`.
pub fn leave(ty: KvType, rows: &mut [Vec<f32>]) {
    let dim = rows[0].len();
    let mut page = vec![0; ty.page_size(dim).unwrap()];
    for i in 0..dim / TILE {
        let part = |row: &Vec<f32>| row[i * TILE..(i + 1) * TILE].try_into().unwrap();
        let mut tile = [[0.0; TILE]; PAGE];
        tile.iter_mut().zip(&*rows).for_each(|(t, r)| *t = part(r));
        ty.write_tile(&tile, &mut page, i);
        ty.read_tile(&page, i, &mut tile);
        for (row, tile) in rows.iter_mut().zip(&tile) {
            row[i * TILE..(i + 1) * TILE].copy_from_slice(tile);
        }
    }
}
