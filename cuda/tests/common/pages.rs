//! Pages of the pool as the reference stores them, in the order of device memory.

use half::f16;
use lemma_cuda::PAGE;
use lemma_cuda::ops::Heads;
use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, TILE, Tile};

pub const F16: KvType = KvType::Rows(GgmlType::F16);
pub const Q8_0: KvType = KvType::Rows(GgmlType::Q8_0);
pub const Q4_0: KvType = KvType::Rows(GgmlType::Q4_0);

/// Keys or values of some slots.
#[derive(Clone)]
pub struct Stored {
    /// `[slots, PAGE, n_head_kv, head_dim]`, what the type leaves of them.
    pub values: Vec<f32>,
    /// As the device has them.
    pub bytes: Vec<u8>,
}

/// Bytes of a row of 32 values: its quants, and where they begin.
fn row(ty: KvType) -> (usize, usize) {
    let bytes = ty.page_size(TILE).expect("whole blocks") / PAGE;
    (bytes - 2, 2)
}

/// A page of a head in the order of `kernels/pages.cuh`.
pub fn ordered(ty: KvType, page: &[u8], d: usize) -> Vec<u8> {
    if ty.rows().is_none() {
        return page.to_vec();
    }
    let ((quants, at), blocks) = (row(ty), d / TILE);
    let block = |row: usize, b: usize| &page[(row * blocks + b) * (quants + at)..][..quants + at];
    let mut out = Vec::new();
    for row in 0..PAGE {
        (0..blocks).for_each(|b| out.extend(&block(row, b)[at..]));
    }
    for b in 0..blocks {
        (0..PAGE).for_each(|row| out.extend(&block(row, b)[..at]));
    }
    out
}

/// Stores `values`, `[slots, PAGE, n_head_kv, head_dim]`.
pub fn stored(ty: KvType, h: Heads, mut values: Vec<f32>) -> Stored {
    let (n_kv, d) = (h.n_head_kv, h.head_dim);
    let mut bytes = Vec::new();
    if ty == F16 {
        for v in &mut values {
            let x = f16::from_f32(*v);
            *v = x.to_f32();
            bytes.extend(x.to_le_bytes());
        }
        return Stored { values, bytes };
    }
    for slot in values.chunks_exact_mut(PAGE * n_kv * d) {
        for kv in 0..n_kv {
            let mut page = vec![0; ty.page_size(d).expect("whole blocks")];
            for i in 0..d / TILE {
                let mut tile: Tile = [[0.0; TILE]; PAGE];
                let at = |row: usize| (row * n_kv + kv) * d + i * TILE;
                for (row, to) in tile.iter_mut().enumerate() {
                    to.copy_from_slice(&slot[at(row)..][..TILE]);
                }
                ty.write_tile(&tile, &mut page, i);
                ty.read_tile(&page, i, &mut tile);
                for (row, from) in tile.iter().enumerate() {
                    slot[at(row)..][..TILE].copy_from_slice(from);
                }
            }
            bytes.extend(ordered(ty, &page, d));
        }
    }
    Stored { values, bytes }
}

impl Stored {
    /// Makes nonsense of what follows the first `rows` of a slot.
    pub fn poison(&mut self, ty: KvType, h: Heads, slot: usize, rows: usize) {
        let width = h.n_head_kv * h.head_dim;
        let at = slot * PAGE * width;
        self.values[at + rows * width..at + PAGE * width].fill(f32::NAN);
        if ty == F16 {
            self.bytes[2 * (at + rows * width)..2 * (at + PAGE * width)].fill(0xff);
            return;
        }
        // Scales that are not numbers.
        let page = ty.page_size(h.head_dim).expect("whole blocks");
        let scales = page - PAGE * h.head_dim / TILE * 2;
        for kv in 0..h.n_head_kv {
            let page = &mut self.bytes[(slot * h.n_head_kv + kv) * page..][..page];
            for block in page[scales..].chunks_exact_mut(2 * PAGE) {
                block[2 * rows..].fill(0xff);
            }
        }
    }
}
