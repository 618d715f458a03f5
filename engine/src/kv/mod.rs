//! The books of the KV pool: which positions live in which slot of which layer.
//!
//! The pool itself (keys and values) belongs to a backend; this is the table that says what is where. A layer has a fixed number
//! of slots of a page each. Tokens are appended to the layer's current page; when that is full, the next page takes a free
//! slot or that of the page which the [policy](policy) gives away. Positions only grow: a recycled page leaves a hole, keys
//! keep the rotation that they were stored with, and what is valid is said by the table, never by an index.
//!
//! Where pages are [demoted](crate::options::KvOptions::demote), the pool has tiers: a page that must leave the first moves to the next,
//! where it is stored as a cheaper type, and is forgotten when it must leave the last ([`take`]).
//!
//! Live pages are kept in position order. With a pool that never fills, that is the same order and the same arithmetic under
//! every policy, so that all policies agree bit for bit until the first page is recycled.
//!
//! ```text
//! begin(n)   places for n tokens in every layer (may recycle)     -> Step with places per layer
//! …          the backend moves what was demoted, stores K and V there, attends, leaves masses
//! end()      masses -> PageMeta::w, policy refreshes time stamps
//! ```

mod describe;
mod layout;
pub mod policy;
pub mod spec;
mod table;
mod take;

pub use describe::{Part, ReadRow};
pub use layout::{Attend, Layout, Region, Tier};
pub use table::{Demoted, LayerTable, NONE, PageMeta, Place, Recycled, Span};

use std::ops::Range;

use crate::memory::make_room;
use crate::options::{Aggregate, KvOptions};
use describe::Describe;
use policy::{Policy, PolicyInfo};
use table::may_recycle;
use take::Candidate;

/// Tokens in a block of the pool, and in a page unless options say otherwise.
pub const PAGE: usize = 16;

/// Tokens that a page may have.
pub const PAGE_SIZES: [u32; 4] = [8, 16, 32, 64];

/// No page may give its slot away: everything is pinned or recent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolFull {
    /// Slots of a layer in all tiers.
    pub n_slots: usize,
    /// Pages that may not be recycled.
    pub held: usize,
}

/// Page tables of every layer, and the policy over them.
pub struct Cache {
    layout: Layout,
    tables: Vec<LayerTable>,
    /// Slots of each list that there is memory for; those after them are closed. See [`Layout`].
    open: Vec<usize>,
    /// Slots that hold nothing, the next one to take last: in each tier a list for each table, and one for the pool that tables share.
    free: Vec<Vec<u32>>,
    policy: Box<dyn Policy>,
    recent: usize,
    aggregate: Aggregate,
    pos: u32,
    first_recycle: Option<u32>,
    /// The last step at which a page was recycled or demoted.
    last_loss: Option<u32>,
    keeps_all: bool,
    /// Page masses are wanted although the policy does not ask for them.
    watched: bool,
    /// Pages recycled in the step that [`Cache::begin`] last opened.
    recycled: Vec<Recycled>,
    /// Pages that moved in that step, in the order in which they did.
    demoted: Vec<Demoted>,
    describe: Describe,
    /// The page of each table that would leave a tier, one way or the other, if any would; known as long as the table does not change.
    least: Vec<Option<Option<Candidate>>>,
}

impl Cache {
    /// An empty cache of `n_layer` tables with `n_slots` slots each, for whoever has no heads to tell apart.
    pub fn new(options: &KvOptions, policy: &PolicyInfo, n_layer: usize, n_slots: usize) -> Self {
        let layout = Layout::new(options, n_layer, 1, n_slots, n_slots * PAGE);
        Self::with_layout(options, policy, layout)
    }

    /// An empty cache.
    pub fn with_layout(options: &KvOptions, policy: &PolicyInfo, layout: Layout) -> Self {
        let mut cache = Self {
            tables: (0..layout.n_tables())
                .map(|_| LayerTable::default())
                .collect(),
            open: vec![0; layout.n_lists()],
            free: vec![Vec::new(); layout.n_lists()],
            policy: (policy.new)(options),
            keeps_all: policy.whole_context,
            watched: false,
            recent: (options.recent as usize).max(1),
            aggregate: options.aggregate,
            pos: 0,
            first_recycle: None,
            last_loss: None,
            recycled: Vec::new(),
            demoted: Vec::new(),
            describe: Describe::new(options.redundancy, options.guard),
            least: vec![None; take::n_asks(&layout)],
            layout: layout.emptied(),
        };
        cache.resize(layout);
        cache
    }

    /// Adds slots to the tables that have a budget, so that it is of `n_slots` pages; the backend must have added them to its pool
    /// as well.
    pub fn grow(&mut self, n_slots: usize) {
        if n_slots > self.layout.n_slots {
            self.resize(self.layout.grown(n_slots));
        }
    }

    fn resize(&mut self, layout: Layout) {
        for list in 0..self.free.len() {
            let more = layout.slots_of_list(list) - self.layout.slots_of_list(list);
            let (free, open) = (&mut self.free[list], &mut self.open[list]);
            make_room(free, layout.slots_of_list(list));
            if !layout.is_below(list) {
                // Slots in use stay; low slots are taken first, so fresh memory is touched from its start.
                free.splice(0..0, (*open as u32..(*open + more) as u32).rev());
                *open += more;
            }
        }
        for (t, table) in self.tables.iter_mut().enumerate() {
            make_room(&mut table.pages, layout.max_pages(t));
        }
        self.recycled.reserve(self.tables.len());
        // A slot that the first tier gives away sends two pages down, each of which may send others.
        self.demoted
            .reserve(3 * self.tables.len() * layout.tiers.len());
        self.policy.reserve(
            layout
                .max_pages(0)
                .max(layout.max_pages(layout.n_tables() - 1)),
        );
        self.layout = layout;
        self.reserve_descriptions();
    }

    /// Forgets the sequence; every slot is free again.
    pub fn clear(&mut self) {
        for list in 0..self.free.len() {
            self.reopen(list);
        }
        for t in &mut self.tables {
            t.pages.clear();
            t.places.clear();
            t.recycled = 0;
        }
        self.policy.reset();
        self.pos = 0;
        self.first_recycle = None;
        self.last_loss = None;
        self.recycled.clear();
        self.demoted.clear();
    }

    /// A list as it is at first: nothing is in its slots, and lower tiers have none.
    fn reopen(&mut self, list: usize) {
        let open = match self.layout.is_below(list) {
            false => self.layout.slots_of_list(list),
            true => 0,
        };
        self.open[list] = open;
        self.free[list].clear();
        self.free[list].extend((0..open as u32).rev());
    }

    /// Slots of a region in a tier that there is memory for: as many as the table with the most of them has.
    pub fn open(&self, tier: usize, region: usize) -> usize {
        let tables = self.layout.tables_of(region);
        let open = tables.map(|t| self.open[self.layout.list_of(tier, t)]);
        open.max().unwrap_or(0)
    }

    /// The shape of the pool.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Slots of a table that has a budget, in all tiers.
    pub fn n_slots(&self) -> usize {
        self.layout.all_slots()
    }

    /// Position of the next token.
    pub fn pos(&self) -> u32 {
        self.pos
    }

    /// Page table of layer `il`; that of its first head where heads have their own.
    pub fn layer(&self, il: usize) -> &LayerTable {
        &self.tables[il * self.layout.groups]
    }

    /// Page tables of all layers, head after head where heads have their own.
    pub fn tables(&self) -> &[LayerTable] {
        &self.tables
    }

    /// Layers.
    pub fn n_layer(&self) -> usize {
        self.layout.n_layer
    }

    /// Position at which a page was recycled for the first time.
    pub fn first_recycle(&self) -> Option<u32> {
        self.first_recycle
    }

    /// What the last [`Cache::begin`] recycled, layer by layer.
    pub fn recycled(&self) -> &[Recycled] {
        &self.recycled
    }

    /// What the last [`Cache::begin`] moved to lower tiers, in order: a slot may be left by one page and taken by the next.
    pub fn demoted(&self) -> &[Demoted] {
        &self.demoted
    }

    /// Whether the policy wants page masses, or somebody watches them.
    pub fn wants_mass(&self) -> bool {
        self.watched || self.policy.wants_mass()
    }

    /// Has page masses left after each step, whatever the policy.
    pub fn watch(&mut self) {
        self.watched = true;
    }

    /// Pages of a table that the step in progress attends to, if not to all, pinned ones and the current one among them.
    pub fn attends(&self, t: usize) -> Option<usize> {
        let attend = self.layout.attend?;
        let pages = self.tables[t].pages.iter();
        let pinned = pages.filter(|p| p.pinned).count();
        let beside = if attend.beside_pinned { pinned } else { 0 };
        Some((attend.pages + beside).max(pinned + 2))
    }

    /// Rows left in the current pages.
    fn rest(&self, t: usize) -> usize {
        let current = self.tables[t].pages.last();
        current.map_or(0, |p| self.layout.page - p.len as usize)
    }

    /// Slots that are free for table `t`, those of all tiers that are still closed among them.
    fn free_pages(&self, t: usize) -> usize {
        let first = self.layout.list_of(0, t);
        // What the first tier gives away is gone there.
        let lost = self.open[first] - self.layout.kept_of_list(first);
        let below = (1..self.layout.n_tiers()).map(|tier| {
            let list = self.layout.list_of(tier, t);
            self.layout.slots_of_list(list) - self.open[list] + self.free[list].len()
        });
        (self.free[first].len() + below.sum::<usize>()).saturating_sub(lost)
    }

    /// Tokens that can be appended to every table, if tables that have their slots in common can take so many `pages` in all.
    fn tokens(&self, pages: impl Fn(Range<usize>) -> usize) -> usize {
        let n_tables = self.tables.len();
        let alone = (0..n_tables).filter(|&t| !self.layout.is_shared(t));
        let shared = self.layout.sharing(n_tables - 1);
        let sharing = alone.map(|t| t..t + 1).chain([shared]);
        let tokens = sharing.map(|tables| {
            let (n, rest) = (tables.len(), self.rest(tables.start));
            pages(tables) / n * self.layout.page + rest
        });
        tokens.min().unwrap_or(0)
    }

    /// Tokens that can be appended without recycling anything.
    pub fn room(&self) -> usize {
        self.tokens(|tables| self.free_pages(tables.start))
    }

    /// Tokens that can be appended at all: room, and pages that may give their slots away.
    pub fn room_with_recycling(&self) -> usize {
        if self.keeps_all {
            return self.room();
        }
        self.tokens(|tables| {
            let free = self.free_pages(tables.start);
            let spare = tables.map(|t| {
                let pages = &self.tables[t].pages;
                let may = |&i: &usize| may_recycle(pages, i, 1);
                (0..pages.len()).filter(may).count()
            });
            free + spare.sum::<usize>()
        })
    }

    /// Tokens that one [`Cache::begin`] can take. A page is demoted only when it has been stored, so new pages have to fit the first tier,
    /// as small as it may become beside the current page of each table, and each may need three that leave it as long as slots are
    /// given away. At least 1.
    pub fn batch(&self) -> usize {
        if self.layout.tiers.is_empty() {
            return usize::MAX;
        }
        let tokens = self.tokens(|tables| {
            let first = self.layout.list_of(0, tables.start);
            let (free, n) = (self.free[first].len(), tables.len());
            let movable = tables.map(|t| {
                let pages = self.tables[t].pages.split_last();
                pages.map_or(0, |(_, p)| p.iter().filter(|p| p.tier == 0).count())
            });
            let left = self.layout.kept_of_list(first).saturating_sub(n);
            free + (movable.sum::<usize>() / 3).min(left.saturating_sub(free))
        });
        tokens.max(1)
    }

    /// Appends `n` tokens to every table and says where they go. Pages that hold any of them are pinned if `pin`.
    ///
    /// # Errors
    /// [`PoolFull`] when a page is needed and none may be recycled; the tables are then as they were for the layers not yet
    /// reached, so the sequence must be cleared (callers check [`Cache::room_with_recycling`] for prompts and keep to [`Cache::batch`]).
    pub fn begin(&mut self, n: usize, pin: bool) -> Result<(), PoolFull> {
        self.recycled.clear();
        self.demoted.clear();
        self.least.fill(None);
        for t in 0..self.tables.len() {
            self.tables[t].places.clear();
            for pos in self.pos..self.pos + n as u32 {
                self.append(t, pos, pin)?;
            }
        }
        self.pos += n as u32;
        Ok(())
    }

    fn append(&mut self, t: usize, pos: u32, pin: bool) -> Result<(), PoolFull> {
        let pages = &mut self.tables[t].pages;
        let (slot, row) = match pages.last_mut() {
            Some(p) if (p.len as usize) < self.layout.page => {
                p.len += 1;
                p.pinned |= pin;
                (p.slot, p.len - 1)
            }
            _ => {
                let slot = self.take(t, pos)?;
                // Page 0 is the attention sink: it stays under every policy.
                let page = PageMeta::new(slot, pos, pin || pos == 0);
                self.tables[t].pages.push(page);
                self.forget_least(t);
                (slot, 0)
            }
        };
        let place = self.layout.place(slot, row);
        self.tables[t].places.push(place);
        Ok(())
    }

    /// Where the next token will go in each table, into `out`; `false` if a table needs a new page for it.
    pub fn next_places(&self, out: &mut Vec<Place>) -> bool {
        out.clear();
        out.extend(self.tables.iter().map_while(|t| {
            let current = t.pages.last()?;
            let room = (current.len as usize) < self.layout.page;
            room.then(|| self.layout.place(current.slot, current.len))
        }));
        out.len() == self.tables.len()
    }

    /// [`Cache::end_table`] for a layer whose heads share a table.
    pub fn end_layer(&mut self, il: usize, mass: &[f32], n_head: usize) {
        debug_assert_eq!(self.layout.groups, 1);
        self.end_table(il, mass, n_head);
    }

    /// Takes the page masses of the step for table `t` and lets the policy renew time stamps.
    ///
    /// `mass`: `[n_head, n_spans]`, the softmax weight of each [span](LayerTable::spans) (in position order) for each query head that
    /// reads the table.
    pub fn end_table(&mut self, t: usize, mass: &[f32], n_head: usize) {
        let n = mass.len() / n_head.max(1);
        debug_assert_eq!(n, self.tables[t].n_spans());
        let pages = &mut self.tables[t].pages;
        if n_head == 1 && n == pages.len() {
            // A GPU has joined heads itself and waits for this.
            for (p, &w) in pages.iter_mut().zip(mass) {
                p.w = match self.aggregate {
                    Aggregate::Max => w.max(0.0),
                    Aggregate::Mean => w,
                };
            }
        } else {
            let mut first = 0;
            for p in pages.iter_mut() {
                let spans = first..first + (p.len as usize).div_ceil(PAGE);
                first = spans.end;
                let head = |h: usize| mass[h * n..][spans.clone()].iter().sum::<f32>();
                let per_head = (0..n_head).map(head);
                p.w = match self.aggregate {
                    Aggregate::Max => per_head.fold(0.0, f32::max),
                    Aggregate::Mean => per_head.sum::<f32>() / n_head as f32,
                };
            }
        }
        self.policy.refresh(pages, self.pos - 1);
    }

    /// Pins the live pages that hold any of `positions`; returns the first positions of those that were not pinned before, each once.
    ///
    /// # Errors
    /// [`PoolFull`] when fewer than two pages of a layer would be left to take turns; nothing is pinned then.
    pub fn pin(&mut self, positions: &Range<u32>) -> Result<Vec<u32>, PoolFull> {
        let inside =
            |p: &PageMeta| p.first_pos < positions.end && p.first_pos + p.len > positions.start;
        for (t, table) in self.tables.iter().enumerate() {
            let held = table.pages.iter().filter(|p| p.pinned || inside(p));
            let (held, n_slots) = (held.count(), self.slots_of(t));
            if held + 2 > n_slots && !self.keeps_all {
                return Err(PoolFull { n_slots, held });
            }
        }
        let mut new = Vec::new();
        for table in &mut self.tables {
            for p in table.pages.iter_mut().filter(|p| !p.pinned && inside(p)) {
                p.pinned = true;
                new.push(p.first_pos);
            }
        }
        new.sort_unstable();
        new.dedup();
        Ok(new)
    }

    /// Slots that table `t` is sure of.
    fn slots_of(&self, t: usize) -> usize {
        if self.layout.is_shared(t) {
            self.layout.all_slots()
        } else {
            self.layout.max_pages(t)
        }
    }

    /// Lets pages go that [`Cache::pin`] has pinned, named by their first positions.
    pub fn unpin(&mut self, pages: &[u32]) {
        for p in self.tables.iter_mut().flat_map(|t| &mut t.pages) {
            p.pinned &= !pages.contains(&p.first_pos);
        }
    }

    /// Drops the tokens from `pos` on.
    ///
    /// Returns `false`, and does nothing, when a page was recycled or demoted at `pos` or later: what the token at `pos` attended to is gone,
    /// so the caller has to fill the cache again. What a policy has added up for the pages that stay is kept.
    pub fn rewind(&mut self, pos: u32) -> bool {
        if pos >= self.pos {
            return true;
        }
        if self.last_loss.is_some_and(|step| step >= pos) {
            return false;
        }
        for (t, table) in self.tables.iter_mut().enumerate() {
            while let Some(p) = table.pages.last_mut() {
                if p.first_pos >= pos {
                    let list = self.layout.list_of(usize::from(p.tier), t);
                    self.free[list].push(p.slot);
                    table.pages.pop();
                } else {
                    p.len = p.len.min(pos - p.first_pos);
                    break;
                }
            }
            for p in &mut table.pages {
                p.stamp = p.stamp.min(pos.saturating_sub(1));
                if p.double >= pos {
                    p.double = NONE;
                }
            }
        }
        self.take_back();
        self.pos = pos;
        true
    }

    /// Where nothing is left in the lower tiers, the first has its slots back.
    fn take_back(&mut self) {
        let n = self.layout.n_tiers();
        for t in 0..if n > 1 { self.tables.len() } else { 0 } {
            let first = self.layout.list_of(0, t);
            let (open, all) = (self.open[first], self.layout.slots_of_list(first));
            let used = |list: usize| self.free[list].len() < self.open[list];
            if open == all || (1..n).any(|tier| used(self.layout.list_of(tier, t))) {
                continue;
            }
            (1..n).for_each(|tier| self.reopen(self.layout.list_of(tier, t)));
            self.free[first].splice(0..0, (open as u32..all as u32).rev());
            self.open[first] = all;
        }
    }
}

#[cfg(test)]
mod tests;
