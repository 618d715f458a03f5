//! The pool of key and value pages of a layer.

use crate::Shared;
use lemma_quant::pages::KvType;
use std::ops::Range;

pub use lemma_quant::pages::PAGE;

/// The shape of a layer's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// How keys are stored: rows of `F32`, `F16` or any type with a quantizer whose blocks divide a head, or whole pages, which only
    /// [`kv_move`](crate::Pass::kv_move) writes.
    pub ty_k: KvType,
    /// How values are stored.
    pub ty_v: KvType,
    /// Whether values are what keys begin with, as in latent attention. Only keys are stored then, and `ty_v` says nothing.
    pub values_in_keys: bool,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Values in a key.
    pub head_dim_k: usize,
    /// Values in a value.
    pub head_dim_v: usize,
}

/// Keys and values of a layer: slots that hold a page of [`PAGE`] tokens each.
///
/// Layout of both: `[slot][kv head][token in page][head_dim]`. It is zero and costs nothing until it is written to.
#[derive(Debug)]
pub struct KvLayer {
    shape: KvShape,
    n_slots: usize,
    pub(crate) k: Shared<u8>,
    pub(crate) v: Shared<u8>,
}

/// A page that attention reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRef {
    /// The pool that it is in, of those that attention is given.
    pub tier: u8,
    /// Where it is.
    pub slot: u32,
    /// The token of the slot that it begins with: pages of fewer than [`PAGE`] tokens share a slot.
    pub row: u32,
    /// Position of its first token; the others follow one by one.
    pub first_pos: u32,
    /// Tokens in it, at most [`PAGE`] with those of the slot before them.
    pub len: u32,
}

/// Where a token's key and value go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The slot.
    pub slot: u32,
    /// The token in the page, below [`PAGE`].
    pub row: u32,
}

/// A page that is stored anew in another pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The pool that it leaves, of those that the operation is given.
    pub from: usize,
    /// The pool that it goes to, another one.
    pub to: usize,
    /// Its first token in the pool that it leaves, counted through all slots.
    pub from_token: u32,
    /// Its first token in the pool that it goes to.
    pub to_token: u32,
    /// The planes that it has, from and to.
    pub planes: (usize, usize),
}

impl KvShape {
    /// Bytes that a slot takes, keys and values together.
    pub fn slot_size(&self) -> usize {
        self.n_head_kv * (self.page_k() + self.page_v())
    }

    /// The plane of the pool that holds key and value head `head` of the model: its own, or the only one, where heads have slots
    /// of their own.
    pub fn plane(&self, head: usize) -> usize {
        if self.n_head_kv == 1 { 0 } else { head }
    }

    /// Whether pages of this shape and of `other` hold the same heads, in types of their own.
    pub(crate) fn fits(&self, other: &Self) -> bool {
        let heads = |s: &Self| (s.n_head_kv, s.head_dim_k, s.head_dim_v, s.values_in_keys);
        heads(self) == heads(other)
    }

    /// Bytes of a head's keys in a page.
    pub(crate) fn page_k(&self) -> usize {
        page_size(self.ty_k, self.head_dim_k)
    }

    /// Bytes of a head's values in a page.
    pub(crate) fn page_v(&self) -> usize {
        match self.values_in_keys {
            true => 0,
            false => page_size(self.ty_v, self.head_dim_v),
        }
    }

    /// Whether keys and values are rows that can be written one by one.
    pub(crate) fn has_rows(&self) -> bool {
        self.ty_k.rows().is_some() && (self.values_in_keys || self.ty_v.rows().is_some())
    }
}

impl KvLayer {
    /// A pool of `n_slots` empty slots.
    ///
    /// # Panics
    /// If a type cannot be written, or its blocks do not divide a head, or keys are too short for the values in them.
    pub fn new(shape: KvShape, n_slots: usize) -> Self {
        assert!(!shape.values_in_keys || shape.head_dim_v <= shape.head_dim_k);
        let types = [shape.ty_k, shape.ty_v];
        for ty in &types[..if shape.values_in_keys { 1 } else { 2 }] {
            let writes = ty.rows().is_none_or(|t| t.quantize_row.is_some());
            assert!(writes, "{ty} can be written");
        }
        let pages = n_slots * shape.n_head_kv;
        Self {
            shape,
            n_slots,
            k: Shared::mapped(pages * shape.page_k()),
            v: Shared::mapped(pages * shape.page_v()),
        }
    }

    /// The shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// How many slots there are.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Makes room for `n_slots`; pages stay in their slots. For the time of the call both pools take memory.
    pub fn grow(&mut self, n_slots: usize) {
        if n_slots > self.n_slots {
            let pages = n_slots * self.shape.n_head_kv;
            self.k.grow(pages * self.shape.page_k());
            self.v.grow(pages * self.shape.page_v());
            self.n_slots = n_slots;
        }
    }

    /// Gives the memory of slots back to the system, between steps, as far as it goes; what was in them is lost.
    pub fn release(&mut self, slots: Range<usize>) {
        let size = |page: usize| self.shape.n_head_kv * page;
        let bytes = |page: usize| slots.start * size(page)..slots.end * size(page);
        let (k, v) = (bytes(self.shape.page_k()), bytes(self.shape.page_v()));
        self.k.release(k);
        self.v.release(v);
    }

    /// Copies a page to another slot, between steps.
    pub fn copy_page(&mut self, from: u32, to: u32) {
        let (k_from, k_to) = (self.k_slot(from), self.k_slot(to));
        let (v_from, v_to) = (self.v_slot(from), self.v_slot(to));
        self.k.as_mut_slice().copy_within(k_from, k_to.start);
        self.v.as_mut_slice().copy_within(v_from, v_to.start);
    }

    /// Fills a page with zeros, between steps.
    pub fn clear_page(&mut self, slot: u32) {
        let (k, v) = (self.k_slot(slot), self.v_slot(slot));
        self.k.as_mut_slice()[k].fill(0);
        self.v.as_mut_slice()[v].fill(0);
    }

    /// Reads the key of a token into `out` (`head_dim_k` long), between steps.
    ///
    /// # Panics
    /// If keys are not stored as rows.
    pub fn read_k(&mut self, place: Place, head: usize, out: &mut [f32]) {
        let range = self.k_row(place, head);
        let rows = self.shape.ty_k.rows().expect("keys are rows");
        (rows.dequantize_row)(&self.k.as_mut_slice()[range], out);
    }

    /// Reads the value of a token into `out` (`head_dim_v` long), between steps.
    ///
    /// # Panics
    /// If values are not stored as rows.
    pub fn read_v(&mut self, place: Place, head: usize, out: &mut [f32]) {
        if self.shape.values_in_keys {
            let mut key = vec![0.0; self.shape.head_dim_k];
            self.read_k(place, head, &mut key);
            out.copy_from_slice(&key[..out.len()]);
            return;
        }
        let range = self.v_row(place, head);
        let rows = self.shape.ty_v.rows().expect("values are rows");
        (rows.dequantize_row)(&self.v.as_mut_slice()[range], out);
    }

    /// The bytes of a head's keys in a page: `[PAGE, head_dim_k]`.
    pub(crate) fn k_page(&self, slot: u32, head: usize) -> Range<usize> {
        page(slot, head, self.shape.n_head_kv, self.shape.page_k())
    }

    /// The bytes of a head's values in a page: `[PAGE, head_dim_v]`.
    pub(crate) fn v_page(&self, slot: u32, head: usize) -> Range<usize> {
        page(slot, head, self.shape.n_head_kv, self.shape.page_v())
    }

    /// The bytes of a token's key, where keys are rows.
    pub(crate) fn k_row(&self, place: Place, head: usize) -> Range<usize> {
        row(self.k_page(place.slot, head), place.row)
    }

    /// The bytes of a token's value, where values are rows.
    pub(crate) fn v_row(&self, place: Place, head: usize) -> Range<usize> {
        row(self.v_page(place.slot, head), place.row)
    }

    fn k_slot(&self, slot: u32) -> Range<usize> {
        self.k_page(slot, 0).start..self.k_page(slot + 1, 0).start
    }

    fn v_slot(&self, slot: u32) -> Range<usize> {
        self.v_page(slot, 0).start..self.v_page(slot + 1, 0).start
    }
}

fn page_size(ty: KvType, dim: usize) -> usize {
    (ty.page_size(dim)).unwrap_or_else(|| panic!("heads of {dim} are whole blocks of {ty}"))
}

fn page(slot: u32, head: usize, n_head: usize, size: usize) -> Range<usize> {
    let start = (slot as usize * n_head + head) * size;
    start..start + size
}

fn row(page: Range<usize>, row: u32) -> Range<usize> {
    let (size, row) = (page.len() / PAGE, row as usize);
    assert!(row < PAGE, "a page has {PAGE} tokens");
    page.start + row * size..page.start + (row + 1) * size
}
