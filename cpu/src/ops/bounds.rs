//! Bounds of pages: the least and the greatest key in each dimension, and what a query can at most make of them.
//!
//! The product of a query with any key of a page is at most `sum of max(q * least, q * greatest)` over the dimensions (Quest,
//! arXiv 2406.10774). From the bounds of all pages come estimated masses (a softmax over pages), and from these the pages that a
//! step attends to. All of it costs a key's worth of work a page, however many tokens it holds.

use super::{Pass, id};
use crate::lanes;
use crate::{PAGE, Place, Shared};
use std::ops::Range;

/// The bounds of the pages in a region of slots: `[slot][plane][2][head_dim]`, least and greatest.
#[derive(Debug)]
pub struct KeyBounds {
    n_planes: usize,
    dim: usize,
    data: Shared<f32>,
}

impl KeyBounds {
    /// Bounds for `n_slots` pages of `n_planes` key and value heads.
    pub fn new(n_slots: usize, n_planes: usize, dim: usize) -> Self {
        Self {
            n_planes,
            dim,
            data: Shared::zeroed(n_slots * n_planes * 2 * dim),
        }
    }

    /// Makes room for `n_slots` pages.
    pub fn grow(&mut self, n_slots: usize) {
        self.data.grow(n_slots * self.n_planes * 2 * self.dim);
    }

    fn plane(&self, head: usize) -> usize {
        if self.n_planes == 1 { 0 } else { head }
    }

    fn at(&self, slot: u32, head: usize) -> Range<usize> {
        let size = 2 * self.dim;
        let start = (slot as usize * self.n_planes + self.plane(head)) * size;
        start..start + size
    }
}

/// The pages whose masses are estimated.
#[derive(Clone, Copy, Debug)]
pub struct Estimate<'a> {
    /// Query heads; a multiple of `n_head_kv`.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Slots of the pages in the order of their positions, one table after the other.
    pub slots: &'a [u32],
    /// Where in `slots` the table of each key and value head lies: `[n_head_kv]`; empty if all share the only one.
    pub tables: &'a [(u32, u32)],
    /// Factor of the products of queries and keys.
    pub scale: f32,
}

impl Estimate<'_> {
    fn table(&self, head: usize) -> Range<usize> {
        match self.tables.get(head) {
            Some(&(from, to)) => from as usize..to as usize,
            None => 0..self.slots.len(),
        }
    }
}

impl Pass<'_> {
    /// Takes the keys of some tokens into the bounds of their pages; the first token of a page begins them anew. `k`:
    /// `[n_tokens, n_head_kv, head_dim]`; `places`: slot of the page and row in it, `[n_tokens]` or `[n_head_kv, n_tokens]`.
    pub fn bound_keys(
        &self,
        bounds: &KeyBounds,
        k: &Shared<f32>,
        places: &[Place],
        n_tokens: usize,
        n_head_kv: usize,
    ) {
        self.check("bound_keys", &[id(&bounds.data), id(k), places.len()]);
        let dim = bounds.dim;
        for head in self.w.range(n_head_kv, 1) {
            for t in 0..n_tokens {
                let shared = places.len() == n_tokens;
                let place = places[if shared { t } else { head * n_tokens + t }];
                let from = (t * n_head_kv + head) * dim;
                // SAFETY: keys are only read; what belongs to a head is this worker's.
                let (key, to) = unsafe {
                    (
                        k.slice(from..from + dim),
                        bounds.data.slice_mut(bounds.at(place.slot, head)),
                    )
                };
                let (least, greatest) = to.split_at_mut(dim);
                if place.row == 0 {
                    least.copy_from_slice(key);
                    greatest.copy_from_slice(key);
                } else {
                    for ((least, greatest), k) in least.iter_mut().zip(greatest).zip(key) {
                        *least = least.min(*k);
                        *greatest = greatest.max(*k);
                    }
                }
            }
        }
        self.barrier();
    }

    /// Estimated weights of pages for one token: a softmax over the bounds of a table's pages. `q`: `[n_head, head_dim]`; `mass`: for
    /// one table after the other, `[heads, pages]`.
    pub fn bound_masses(
        &self,
        mass: &Shared<f32>,
        q: &Shared<f32>,
        bounds: &KeyBounds,
        e: &Estimate<'_>,
    ) {
        self.check(
            "bound_masses",
            &[id(&bounds.data), id(mass), id(q), e.slots.len()],
        );
        let (dim, group) = (bounds.dim, e.n_head / e.n_head_kv);
        for h in self.w.range(e.n_head, 1) {
            let (head, table) = (h / group, e.table(h / group));
            let to = if e.tables.is_empty() {
                h * table.len()
            } else {
                table.start * group + h % group * table.len()
            };
            // SAFETY: queries and bounds are only read; the masses of a head are this worker's.
            let (q, mass) = unsafe {
                (
                    q.slice(h * dim..(h + 1) * dim),
                    mass.slice_mut(to..to + table.len()),
                )
            };
            for (mass, slot) in mass.iter_mut().zip(&e.slots[table]) {
                // SAFETY: as above.
                let bound = unsafe { bounds.data.slice(bounds.at(*slot, head)) };
                *mass = most(q, bound) * e.scale;
            }
            softmax(mass);
        }
        self.barrier();
    }

    /// Marks the `n` best pages of a table in `keep` (0 or 1), by the largest of their masses over `heads` heads, `[heads, pages]`; those
    /// that are `forced` are taken first and count. Among equals the earlier page is better.
    /// `keep` and `order`: `[pages]` at least.
    pub fn choose_pages(
        &self,
        keep: &Shared<u32>,
        order: &Shared<u32>,
        mass: &Shared<f32>,
        forced: &[bool],
        heads: usize,
        n: usize,
    ) {
        self.check("choose_pages", &[id(keep), id(mass), forced.len(), n]);
        if self.ith() == 0 {
            let pages = forced.len();
            // SAFETY: one worker alone is here; masses were left before the last barrier.
            let (keep, order, mass) = unsafe {
                (
                    keep.slice_mut(0..pages),
                    order.slice_mut(0..pages),
                    mass.slice(0..heads * pages),
                )
            };
            let value = |i: usize| {
                if forced[i] {
                    return f32::INFINITY;
                }
                (0..heads).map(|h| mass[h * pages + i]).fold(0.0, f32::max)
            };
            keep.fill(1);
            if n < pages {
                for (i, o) in order.iter_mut().enumerate() {
                    *o = i as u32;
                }
                order.select_nth_unstable_by(n, |&a, &b| {
                    let (x, y) = (value(a as usize), value(b as usize));
                    y.total_cmp(&x).then(a.cmp(&b))
                });
                for &i in &order[n..] {
                    keep[i as usize] = u32::from(forced[i as usize]);
                }
            }
        }
        self.barrier();
    }
}

/// The most that the product of `q` with a key within the bounds can be.
fn most(q: &[f32], bound: &[f32]) -> f32 {
    let (least, greatest) = bound.split_at(q.len());
    // A fixed number of partial sums: vectors, and the same result on every machine.
    let mut sums = [0.0f32; PAGE];
    let chunks = q
        .chunks(PAGE)
        .zip(least.chunks(PAGE))
        .zip(greatest.chunks(PAGE));
    for ((q, least), greatest) in chunks {
        for (((sum, q), a), b) in sums.iter_mut().zip(q).zip(least).zip(greatest) {
            *sum += (q * a).max(q * b);
        }
    }
    sums.iter().sum()
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = lanes::exp::<false>(*v - max);
        sum += *v;
    }
    for v in x.iter_mut() {
        *v /= sum;
    }
}
