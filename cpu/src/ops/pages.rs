//! What is written to the pool.

use super::{Pass, id};
use crate::tensor::row_size;
use crate::{KvLayer, Move, PAGE, Place, Shared};
use lemma_quant::pages::{KvType, TILE};

impl Pass<'_> {
    /// Writes keys and values of `places.len()` tokens to their places. `k`: `[n_tokens, n_head_kv, head_dim_k]`,
    /// `v` likewise, unless values are in keys. No two places may be the same.
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
        let quantize = |ty: KvType| {
            let rows = ty.rows().expect("tokens are written to rows");
            rows.quantize_row.expect("checked when the pool was made")
        };
        let quantize_k = quantize(shape.ty_k);
        let quantize_v = (!shape.values_in_keys).then(|| quantize(shape.ty_v));
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
                quantize_k(k, layer.k.slice_mut(layer.k_row(place, head)));
                if let Some(quantize_v) = quantize_v {
                    let v = v.slice(i * dim_v..(i + 1) * dim_v);
                    quantize_v(v, layer.v.slice_mut(layer.v_row(place, head)));
                }
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
        // Rows and planes of a page keep their numbers, so a worker that moves some of them of every page waits for nobody.
        if pool.iter().all(|l| l.shape().has_rows()) {
            for row in self.w.range(page, 1) {
                moves.iter().for_each(|m| move_row(pool, m, row));
            }
        } else {
            let planes = moves.iter().map(|m| m.planes.1).max().unwrap_or(0);
            for plane in self.w.range(planes, 1) {
                for m in moves {
                    if (m.planes.0..m.planes.1).contains(&plane) {
                        (0..page / PAGE).for_each(|i| move_block(pool, m, i * PAGE, plane));
                    }
                }
            }
        }
        self.barrier();
    }
}

/// Moves row `row` of a page, in all of its planes. The caller alone touches this row of any page that is moved.
fn move_row(pool: &[KvLayer], m: &Move, row: usize) {
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
        // SAFETY: the row is the caller's.
        unsafe {
            let new_k = to.k.slice_mut(to.k_row(new, plane));
            store_row(
                (from.shape().ty_k, from.k.slice(k)),
                (to.shape().ty_k, new_k),
            );
            if !from.shape().values_in_keys {
                let new_v = to.v.slice_mut(to.v_row(new, plane));
                store_row(
                    (from.shape().ty_v, from.v.slice(v)),
                    (to.shape().ty_v, new_v),
                );
            }
        }
    }
}

/// Moves a block of [`PAGE`] tokens of a page, from its token `row` on, in one plane, which the caller alone touches.
fn move_block(pool: &[KvLayer], m: &Move, row: usize, plane: usize) {
    let (from, to) = (&pool[m.from], &pool[m.to]);
    let at = |first: u32| {
        let token = first as usize + row;
        assert!(token.is_multiple_of(PAGE), "pages are whole blocks");
        (token / PAGE) as u32
    };
    let (page, new) = (at(m.from_token), at(m.to_token));
    let (k, v) = (from.k_page(page, plane), from.v_page(page, plane));
    // SAFETY: the plane is the caller's.
    unsafe {
        let (old, new_shape) = (from.shape(), to.shape());
        let new_k = to.k.slice_mut(to.k_page(new, plane));
        let k = (old.ty_k, from.k.slice(k));
        store_page(k, (new_shape.ty_k, new_k), old.head_dim_k);
        if !old.values_in_keys {
            let new_v = to.v.slice_mut(to.v_page(new, plane));
            let v = (old.ty_v, from.v.slice(v));
            store_page(v, (new_shape.ty_v, new_v), old.head_dim_v);
        }
    }
}

/// Decodes a page of `dim` values a token and encodes it as another type, if it is another.
fn store_page(from: (KvType, &[u8]), to: (KvType, &mut [u8]), dim: usize) {
    if from.0 == to.0 {
        to.1.copy_from_slice(from.1);
        return;
    }
    let mut tile = [[0.0; TILE]; PAGE];
    for i in 0..dim / TILE {
        from.0.read_tile(from.1, i, &mut tile);
        to.0.write_tile(&tile, to.1, i);
    }
}

/// Decodes a row and encodes it as another type, if it is another.
fn store_row(from: (KvType, &[u8]), to: (KvType, &mut [u8])) {
    if from.0 == to.0 {
        to.1.copy_from_slice(from.1);
        return;
    }
    let (KvType::Rows(old_ty), KvType::Rows(new_ty)) = (from.0, to.0) else {
        unreachable!("rows are moved to rows");
    };
    let mut values = [0.0; TILE];
    let quantize = new_ty.traits().quantize_row;
    let quantize = quantize.expect("checked when the pool was made");
    let old = from.1.chunks_exact(row_size(old_ty, TILE));
    let new = to.1.chunks_exact_mut(row_size(new_ty, TILE));
    for (old, new) in old.zip(new) {
        (old_ty.traits().dequantize_row)(old, &mut values);
        quantize(&values, new);
    }
}
