//! What is written to the pool.

use super::{Pass, id};
use crate::tensor::row_size;
use crate::{KvLayer, Move, PAGE, Place, Shared};
use lemma_quant::GgmlType;

/// Values that are stored anew at a time: a block of every type that a page can move to.
const BLOCK: usize = 32;

impl Pass<'_> {
    /// Writes keys and values of `places.len()` tokens to their places. `k`: `[n_tokens, n_head_kv, head_dim_k]`,
    /// `v` likewise. No two places may be the same.
    pub fn kv_store(&self, layer: &KvLayer, k: &Shared<f32>, v: &Shared<f32>, places: &[Place]) {
        let n_head_kv = layer.shape().n_head_kv;
        self.store_rows(layer, k, v, n_head_kv, places.len(), |t, _| places[t]);
    }

    /// The same where every head has places of its own: `[n_head_kv, n_tokens]`. No two places of a plane may be the same.
    pub fn kv_store_heads(
        &self,
        layer: &KvLayer,
        k: &Shared<f32>,
        v: &Shared<f32>,
        places: &[Place],
        n_head_kv: usize,
    ) {
        let n = places.len() / n_head_kv;
        self.store_rows(layer, k, v, n_head_kv, n, |t, head| places[head * n + t]);
    }

    fn store_rows(
        &self,
        layer: &KvLayer,
        k: &Shared<f32>,
        v: &Shared<f32>,
        n_head_kv: usize,
        n_tokens: usize,
        place: impl Fn(usize, usize) -> Place,
    ) {
        self.check("kv_store", &[id(k), id(v), id(&layer.k), n_tokens]);
        let shape = layer.shape();
        assert!(shape.n_head_kv == n_head_kv || shape.n_head_kv == 1);
        let (dim_k, dim_v) = (shape.head_dim_k, shape.head_dim_v);
        let quantize = |ty: lemma_quant::GgmlType| {
            ty.traits()
                .quantize_row
                .expect("checked when the pool was made")
        };
        let (quantize_k, quantize_v) = (quantize(shape.ty_k), quantize(shape.ty_v));
        for i in self.w.range(n_tokens * n_head_kv, 1) {
            let (place, head) = (place(i / n_head_kv, i % n_head_kv), i % n_head_kv);
            let head = shape.plane(head);
            assert!(
                (place.slot as usize) < layer.n_slots(),
                "the slot is in the pool"
            );
            // SAFETY: inputs are only read; the row of a place and head is this worker's, because places differ.
            unsafe {
                let k = k.slice(i * dim_k..(i + 1) * dim_k);
                let v = v.slice(i * dim_v..(i + 1) * dim_v);
                quantize_k(k, layer.k.slice_mut(layer.k_row(place, head)));
                quantize_v(v, layer.v.slice_mut(layer.v_row(place, head)));
            }
        }
        self.barrier();
    }

    /// Copies pages to other slots: `(from, to)`. A slot that is written to may not occur twice.
    pub fn kv_copy_pages(&self, layer: &KvLayer, pairs: &[(u32, u32)]) {
        self.check("kv_copy_pages", &[id(&layer.k), pairs.len()]);
        let n_head = layer.shape().n_head_kv;
        for i in self.w.range(pairs.len() * n_head, 1) {
            let ((from, to), head) = (pairs[i / n_head], i % n_head);
            assert_ne!(from, to, "a page is copied to another slot");
            // SAFETY: the page of a slot and head is this worker's to write, and not read by others.
            unsafe {
                let source = layer.k.slice(layer.k_page(from, head));
                layer
                    .k
                    .slice_mut(layer.k_page(to, head))
                    .copy_from_slice(source);
                let source = layer.v.slice(layer.v_page(from, head));
                layer
                    .v
                    .slice_mut(layer.v_page(to, head))
                    .copy_from_slice(source);
            }
        }
        self.barrier();
    }

    /// Stores pages of `page` tokens anew where they move to, in this order: a move may take the place that one before it has left.
    /// Where types differ, keys and values are whole blocks of 32.
    pub fn kv_move(&self, pool: &[KvLayer], moves: &[Move], page: usize) {
        if moves.is_empty() {
            return;
        }
        self.check("kv_move", &[pool.len(), moves.len(), page]);
        for m in moves {
            let (from, to) = (&pool[m.from], &pool[m.to]);
            let dims = |l: &KvLayer| (l.shape().head_dim_k, l.shape().head_dim_v);
            assert!((m.from, m.from_token) != (m.to, m.to_token) && dims(from) == dims(to));
        }
        // Rows of a page keep their number, so a worker that moves some rows of every page waits for nobody.
        for row in self.w.range(page, 1) {
            for m in moves {
                let at = |first: u32| {
                    let token = first as usize + row;
                    Place {
                        slot: (token / PAGE) as u32,
                        row: (token % PAGE) as u32,
                    }
                };
                let (from, to) = (&pool[m.from], &pool[m.to]);
                let (old, new) = (at(m.from_token), at(m.to_token));
                for plane in m.planes.0..m.planes.1 {
                    let (k, v) = (from.k_row(old, plane), from.v_row(old, plane));
                    // SAFETY: this worker alone touches the row of any page that is moved.
                    unsafe {
                        let (k, v) = (from.k.slice(k), from.v.slice(v));
                        let new_k = to.k.slice_mut(to.k_row(new, plane));
                        let new_v = to.v.slice_mut(to.v_row(new, plane));
                        store_anew((from.shape().ty_k, k), (to.shape().ty_k, new_k));
                        store_anew((from.shape().ty_v, v), (to.shape().ty_v, new_v));
                    }
                }
            }
        }
        self.barrier();
    }
}

/// Decodes a row and encodes it as another type, if it is another.
fn store_anew(from: (GgmlType, &[u8]), to: (GgmlType, &mut [u8])) {
    if from.0 == to.0 {
        to.1.copy_from_slice(from.1);
        return;
    }
    let mut values = [0.0; BLOCK];
    let quantize = to.0.traits().quantize_row;
    let quantize = quantize.expect("checked when the pool was made");
    let old = from.1.chunks_exact(row_size(from.0, BLOCK));
    let new = to.1.chunks_exact_mut(row_size(to.0, BLOCK));
    for (old, new) in old.zip(new) {
        (from.0.traits().dequantize_row)(old, &mut values);
        quantize(&values, new);
    }
}
