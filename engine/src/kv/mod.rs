//! The books of the KV pool: which positions live in which slot of which layer.
//!
//! The pool itself (keys and values) belongs to a backend; this is the table that says what is where. A layer has a fixed number
//! of slots of [`PAGE`] tokens. Tokens are appended to the layer's current page; when that is full, the next page takes a free
//! slot or that of the page which the [policy](policy) gives away. Positions only grow: a recycled page leaves a hole, keys
//! keep the rotation that they were stored with, and what is valid is said by the table, never by an index.
//!
//! Live pages are kept in position order. With a pool that never fills, that is the same order and the same arithmetic under
//! every policy, so that all policies agree bit for bit until the first page is recycled.
//!
//! ```text
//! begin(n)   places for n tokens in every layer (may recycle)     -> Step with places per layer
//! …          the backend stores K and V there, attends, leaves masses
//! end()      masses -> PageMeta::w, policy refreshes time stamps
//! ```

pub mod policy;
pub mod spec;

use std::ops::Range;

use crate::options::{Aggregate, KvOptions};
use policy::{Policy, PolicyInfo};

/// Tokens in a page.
pub const PAGE: usize = 16;

/// Tokens that a page may have.
pub const PAGE_SIZES: [u32; 4] = [8, 16, 32, 64];

/// A live page of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageMeta {
    /// The physical place of the page.
    pub slot: u32,
    /// Position of its first token.
    pub first_pos: u32,
    /// Tokens in it, `1..=PAGE`; they stand at consecutive positions.
    pub len: u32,
    /// The step at which it last mattered.
    pub stamp: u32,
    /// Its attention mass at the last step, aggregated over the query heads.
    pub w: f32,
    /// Never recycled.
    pub pinned: bool,
}

/// Where a token's key and value go: a slot and the row in its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Slot of the page.
    pub slot: u32,
    /// Row in the page, `0..PAGE`.
    pub row: u32,
}

/// A page that gave its slot away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recycled {
    /// Layer.
    pub il: usize,
    /// The step at which it happened (the position of the token that needed room).
    pub step: u32,
    /// The page as it was.
    pub page: PageMeta,
}

/// Page table of one layer.
#[derive(Debug, Default)]
pub struct LayerTable {
    /// Live pages in position order; the last is the current one.
    pub pages: Vec<PageMeta>,
    /// Slots that hold nothing; the next one to take is the last.
    free: Vec<u32>,
    /// Places of the tokens of the step in progress.
    pub places: Vec<Place>,
    /// Pages recycled since the sequence began.
    pub recycled: u64,
}

/// No page may give its slot away: everything is pinned or recent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFull {
    /// Slots of a layer.
    pub n_slots: usize,
    /// Pages that may not be recycled.
    pub held: usize,
}

/// Page tables of every layer, and the policy over them.
pub struct Cache {
    layers: Vec<LayerTable>,
    policy: Box<dyn Policy>,
    n_slots: usize,
    recent: usize,
    aggregate: Aggregate,
    pos: u32,
    first_recycle: Option<u32>,
    last_recycle: Option<u32>,
    keeps_all: bool,
    /// Page masses are wanted although the policy does not ask for them.
    watched: bool,
    /// Pages recycled in the step that [`Cache::begin`] last opened.
    recycled: Vec<Recycled>,
}

impl Cache {
    /// An empty cache of `n_layer` tables with `n_slots` slots each.
    pub fn new(options: &KvOptions, policy: &PolicyInfo, n_layer: usize, n_slots: usize) -> Self {
        let mut cache = Self {
            layers: (0..n_layer).map(|_| LayerTable::default()).collect(),
            policy: (policy.new)(options, n_layer),
            keeps_all: policy.whole_context,
            watched: false,
            n_slots: 0,
            recent: (options.recent as usize).max(1),
            aggregate: options.aggregate,
            pos: 0,
            first_recycle: None,
            last_recycle: None,
            recycled: Vec::new(),
        };
        cache.grow(n_slots);
        cache
    }

    /// Adds slots; the backend must have added them to its pool as well.
    pub fn grow(&mut self, n_slots: usize) {
        if n_slots <= self.n_slots {
            return;
        }
        for l in &mut self.layers {
            let new = (self.n_slots as u32..n_slots as u32).rev();
            // Slots in use stay; low slots are taken first, so fresh memory is touched from its start.
            l.free.splice(0..0, new);
            l.pages.reserve(n_slots - l.pages.len());
        }
        self.recycled.reserve(self.layers.len());
        self.policy.reserve(n_slots);
        self.n_slots = n_slots;
    }

    /// Forgets the sequence; every slot is free again.
    pub fn clear(&mut self) {
        for l in &mut self.layers {
            l.pages.clear();
            l.places.clear();
            l.free.clear();
            l.free.extend((0..self.n_slots as u32).rev());
            l.recycled = 0;
        }
        self.policy.reset();
        self.pos = 0;
        self.first_recycle = None;
        self.last_recycle = None;
        self.recycled.clear();
    }

    /// Slots of a layer.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Position of the next token.
    pub fn pos(&self) -> u32 {
        self.pos
    }

    /// Page table of layer `il`.
    pub fn layer(&self, il: usize) -> &LayerTable {
        &self.layers[il]
    }

    /// Layers.
    pub fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// Position at which a page was recycled for the first time.
    pub fn first_recycle(&self) -> Option<u32> {
        self.first_recycle
    }

    /// What the last [`Cache::begin`] recycled, layer by layer.
    pub fn recycled(&self) -> &[Recycled] {
        &self.recycled
    }

    /// Whether the policy wants page masses, or somebody watches them.
    pub fn wants_mass(&self) -> bool {
        self.watched || self.policy.wants_mass()
    }

    /// Has page masses left after each step, whatever the policy.
    pub fn watch(&mut self) {
        self.watched = true;
    }

    /// Tokens that can be appended without recycling anything.
    pub fn room(&self) -> usize {
        self.layers
            .iter()
            .map(|l| l.free.len() * PAGE + l.pages.last().map_or(0, |p| PAGE - p.len as usize))
            .min()
            .unwrap_or(0)
    }

    /// Tokens that can be appended at all: room, and pages that may give their slots away.
    pub fn room_with_recycling(&self) -> usize {
        let n = self.layers.iter().map(|l| {
            (0..l.pages.len())
                .filter(|&i| may_recycle(&l.pages, i, 1))
                .count()
        });
        if self.keeps_all {
            self.room()
        } else {
            self.room() + n.min().unwrap_or(0) * PAGE
        }
    }

    /// Appends `n` tokens to every layer's table and says where they go. Pages that hold any of them are pinned if `pin`.
    ///
    /// # Errors
    /// [`PoolFull`] when a page is needed and none may be recycled; the tables are then as they were for the layers not yet
    /// reached, so the sequence must be cleared (callers check [`Cache::room_with_recycling`] for prompts).
    pub fn begin(&mut self, n: usize, pin: bool) -> Result<(), PoolFull> {
        self.recycled.clear();
        for il in 0..self.layers.len() {
            self.layers[il].places.clear();
            for i in 0..n {
                let pos = self.pos + i as u32;
                let l = &mut self.layers[il];
                match l.pages.last_mut() {
                    Some(p) if (p.len as usize) < PAGE => {
                        l.places.push(Place {
                            slot: p.slot,
                            row: p.len,
                        });
                        p.len += 1;
                        p.pinned |= pin;
                    }
                    _ => {
                        let slot = match l.free.pop() {
                            Some(slot) => slot,
                            None => self.recycle(il, pos)?,
                        };
                        let l = &mut self.layers[il];
                        // Page 0 is the attention sink: it stays under every policy.
                        let pinned = pin || pos == 0;
                        l.pages.push(PageMeta {
                            slot,
                            first_pos: pos,
                            len: 1,
                            stamp: pos,
                            w: 0.0,
                            pinned,
                        });
                        l.places.push(Place { slot, row: 0 });
                    }
                }
            }
        }
        self.pos += n as u32;
        Ok(())
    }

    fn recycle(&mut self, il: usize, step: u32) -> Result<u32, PoolFull> {
        let l = &mut self.layers[il];
        let pages = &l.pages;
        let mut choose = |recent| {
            self.policy
                .victim(il, pages, &|i| may_recycle(pages, i, recent))
        };
        // In a pool so small that the recent pages are all there is, only the current one is protected.
        let Some(i) = choose(self.recent).or_else(|| choose(1)) else {
            return Err(PoolFull {
                n_slots: self.n_slots,
                held: pages.len(),
            });
        };
        let page = l.pages.remove(i);
        l.recycled += 1;
        self.first_recycle.get_or_insert(step);
        self.last_recycle = Some(step);
        self.recycled.push(Recycled { il, step, page });
        Ok(page.slot)
    }

    /// Takes the page masses of the step for layer `il` and lets the policy renew time stamps.
    ///
    /// `mass`: `[n_head, n_pages]`, the softmax weight of each live page (in position order) for each query head.
    pub fn end_layer(&mut self, il: usize, mass: &[f32], n_head: usize) {
        let l = &mut self.layers[il];
        let n = l.pages.len();
        debug_assert_eq!(mass.len(), n * n_head);
        for (i, p) in l.pages.iter_mut().enumerate() {
            let per_head = (0..n_head).map(|h| mass[h * n + i]);
            p.w = match self.aggregate {
                Aggregate::Max => per_head.fold(0.0, f32::max),
                Aggregate::Mean => per_head.sum::<f32>() / n_head as f32,
            };
        }
        self.policy.refresh(il, &mut l.pages, self.pos - 1);
    }

    /// Pins the live pages that hold any of `positions`; returns the first positions of those that were not pinned before, each once.
    ///
    /// # Errors
    /// [`PoolFull`] when fewer than two pages of a layer would be left to take turns; nothing is pinned then.
    pub fn pin(&mut self, positions: &Range<u32>) -> Result<Vec<u32>, PoolFull> {
        let inside =
            |p: &PageMeta| p.first_pos < positions.end && p.first_pos + p.len > positions.start;
        for l in self.layers.iter().filter(|_| !self.keeps_all) {
            let held = l.pages.iter().filter(|p| p.pinned || inside(p)).count();
            if held + 2 > self.n_slots {
                return Err(PoolFull {
                    n_slots: self.n_slots,
                    held,
                });
            }
        }
        let mut new = Vec::new();
        for l in &mut self.layers {
            for p in l.pages.iter_mut().filter(|p| !p.pinned && inside(p)) {
                p.pinned = true;
                new.push(p.first_pos);
            }
        }
        new.sort_unstable();
        new.dedup();
        Ok(new)
    }

    /// Lets pages go that [`Cache::pin`] has pinned, named by their first positions.
    pub fn unpin(&mut self, pages: &[u32]) {
        for l in &mut self.layers {
            for p in l.pages.iter_mut() {
                p.pinned &= !pages.contains(&p.first_pos);
            }
        }
    }

    /// First positions of the pages of layer `il` that may be recycled, the next to go first. `None` if that is drawn.
    pub fn order(&mut self, il: usize) -> Option<Vec<u32>> {
        if self.policy.draws() {
            return None;
        }
        let pages = &self.layers[il].pages;
        let mut out: Vec<usize> = Vec::new();
        loop {
            let may = |i: usize| may_recycle(pages, i, self.recent) && !out.contains(&i);
            match self.policy.victim(il, pages, &may) {
                Some(i) => out.push(i),
                None => return Some(out.iter().map(|&i| pages[i].first_pos).collect()),
            }
        }
    }

    /// Drops the tokens from `pos` on.
    ///
    /// Returns `false`, and does nothing, when a page was recycled at `pos` or later: what the token at `pos` attended to is gone,
    /// so the caller has to fill the cache again.
    pub fn rewind(&mut self, pos: u32) -> bool {
        if pos >= self.pos {
            return true;
        }
        if self.last_recycle.is_some_and(|step| step >= pos) {
            return false;
        }
        for l in &mut self.layers {
            while let Some(p) = l.pages.last_mut() {
                if p.first_pos >= pos {
                    l.free.push(p.slot);
                    l.pages.pop();
                } else {
                    p.len = p.len.min(pos - p.first_pos);
                    break;
                }
            }
            for p in &mut l.pages {
                p.stamp = p.stamp.min(pos.saturating_sub(1));
            }
        }
        self.pos = pos;
        true
    }
}

/// Whether page `i` may be recycled: not pinned and not among the last `recent`.
fn may_recycle(pages: &[PageMeta], i: usize, recent: usize) -> bool {
    !pages[i].pinned && i + recent < pages.len()
}

#[cfg(test)]
mod tests;
