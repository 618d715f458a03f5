//! How the slots of the pool are divided among page tables, and where they lie in memory.
//!
//! A layer has one page table, or one for each key and value head ([`Scope::Head`]). A table has slots of its own, or takes them from
//! one pool for the whole model ([`BudgetScope::Model`]); dense layers always have their own, as many as the context has
//! pages. Memory is made of *blocks* of [`PAGE`] tokens, whatever a page holds: kernels see blocks only.
//!
//! With [demotion](KvOptions::demote) the first *tier* begins with all of the budget. When it is full it gives slot after slot away, and
//! their bytes hold pages of cheaper types, of which there are more; some slots stay. Slots are numbered anew in each tier. A tier
//! has address space for the most that it can hold, memory only for what it holds.

use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, TILE};

use super::{PAGE, Place};
use crate::options::{BudgetScope, Demotion, KvOptions, Scope, Score};

/// Shares of the pool that one table may hold at most where tables share a budget.
const MOST_SHARES: usize = 4;

/// The whole, in the units of [`Demotion::share`](crate::options::Demotion).
const MILLION: u64 = 1_000_000;

/// Slots that the first tier has at least: for the page that is written, and one that can be moved.
const LEAST_HOT: usize = 2;

/// The shape of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Layers.
    pub n_layer: usize,
    /// Key and value heads of a layer.
    pub n_head_kv: usize,
    /// Page tables of a layer: 1 or `n_head_kv`.
    pub groups: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Positions at most.
    pub n_ctx: usize,
    /// Tokens in a page.
    pub page: usize,
    /// Slots of a table in the first tier as long as it has all of the budget; where tables share it, the mean.
    pub n_slots: usize,
    /// Those of them that stay when it has given away what it can.
    pub kept: usize,
    /// Bytes of a page of [`TILE`] elements of a key and of a value in the first tier (of a key that holds the value).
    pub cost: u64,
    /// What comes after the first tier; empty where pages are not demoted.
    pub tiers: Vec<Tier>,
    /// Layers, counted from the first, that keep everything.
    pub dense: usize,
    /// Slots of a table of a dense layer: pages of the context.
    pub dense_slots: usize,
    /// Slots of a table that all tiers may have together, unless the first alone has more.
    pub most_held: usize,
    /// Whether the tables of layers that are not dense share their slots.
    pub shared: bool,
    /// Whether the least and the greatest key of a page are kept.
    pub bounds: bool,
    /// How many pages a step attends to, if not to all.
    pub attend: Option<Attend>,
}

/// A tier after the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// How keys and values are stored, and its share of the budget.
    pub stored: Demotion,
    /// Bytes of a page of [`TILE`] elements of a key and of a value.
    pub cost: u64,
    /// Slots of a table at the end; where tables share a budget, its mean.
    pub n_slots: usize,
}

/// How many pages of a table a step attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attend {
    /// Pages.
    pub pages: usize,
    /// Whether pinned pages come on top of them.
    pub beside_pinned: bool,
}

/// A stretch of memory: the blocks of one layer, or of all that share a budget, in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Blocks of [`PAGE`] tokens.
    pub n_blocks: usize,
    /// Heads that a block holds.
    pub n_head_kv: usize,
}

/// Bytes of a page of [`TILE`] elements; types of other blocks have no tier, and their cost decides nothing.
fn cost(ty: KvType) -> u64 {
    ty.page_size(TILE).unwrap_or(0) as u64
}

impl Layout {
    /// The layout that options ask for, with a budget of `n_slots` pages a table; `n_ctx` positions at most.
    pub fn new(
        o: &KvOptions,
        n_layer: usize,
        n_head_kv: usize,
        n_slots: usize,
        n_ctx: usize,
    ) -> Self {
        let page = o.page as usize;
        let layout = Self {
            n_layer,
            n_head_kv,
            head_dim: 0,
            n_ctx,
            groups: match o.scope {
                Scope::Head => n_head_kv,
                Scope::Layer => 1,
            },
            page,
            n_slots: 0,
            kept: 0,
            cost: cost(o.ty_k.into()) + cost(o.ty_v.into()),
            tiers: (o.demotions().iter())
                .map(|d| Tier {
                    stored: *d,
                    cost: cost(d.ty_k) + cost(d.ty_v),
                    n_slots: 0,
                })
                .collect(),
            dense: (o.dense_layers as usize).min(n_layer),
            dense_slots: n_ctx.div_ceil(page),
            most_held: o.most_held().map_or(usize::MAX, |n| n as usize / page),
            shared: o.budget_scope == BudgetScope::Model,
            bounds: o.score == Score::Bound,
            attend: None,
        };
        layout.sized(n_slots)
    }

    /// Pages cost what keys cost, which hold the values. Before slots are divided: [`Self::sized`].
    pub fn values_are_in_keys(&mut self, ty_k: GgmlType) {
        self.cost = cost(ty_k.into());
        for t in &mut self.tiers {
            t.cost = cost(t.stored.ty_k);
        }
    }

    /// The same with a budget of `n` pages a table. Tiers never take more bytes than it, nor hold more than the context or
    /// [`Self::most_held`] together: where they would, more of the first stays.
    pub fn sized(&self, n: usize) -> Self {
        let mut l = self.clone();
        (l.n_slots, l.kept) = (n, n);
        let lower: u64 = self.tiers.iter().map(|t| u64::from(t.stored.share)).sum();
        if lower == 0 {
            return l;
        }
        let first = (n as u64 * (MILLION - lower)).div_ceil(MILLION) as usize;
        for hot in first.max(LEAST_HOT).min(n)..=n {
            l.kept = hot;
            let all = (n - hot) as u64 * self.cost;
            let (mut left, mut rest) = (all, lower);
            for t in &mut l.tiers {
                rest -= u64::from(t.stored.share);
                // The last takes what rounding has left.
                let bytes = left - all * rest / lower;
                t.n_slots = (bytes / t.cost) as usize;
                left -= t.n_slots as u64 * t.cost;
            }
            if l.all_slots() <= self.dense_slots.min(self.most_held) {
                break;
            }
        }
        l
    }

    /// The same with a larger budget; no tier becomes smaller.
    pub(crate) fn grown(&self, n: usize) -> Self {
        let mut l = self.sized(n.max(self.n_slots));
        for (new, old) in l.tiers.iter_mut().zip(&self.tiers) {
            new.n_slots = new.n_slots.max(old.n_slots);
        }
        l
    }

    /// The same without any slot.
    pub(super) fn emptied(&self) -> Self {
        Self {
            dense_slots: 0,
            ..self.sized(0)
        }
    }

    /// Tiers, the first included.
    pub fn n_tiers(&self) -> usize {
        1 + self.tiers.len()
    }

    /// Slots of a table in a tier at most; where tables share a budget, its mean.
    pub fn slots_of_tier(&self, tier: usize) -> usize {
        match tier {
            0 => self.n_slots,
            _ => self.tiers[tier - 1].n_slots,
        }
    }

    /// Slots of a table in all tiers at the end; where tables share a budget, its mean.
    pub fn all_slots(&self) -> usize {
        self.kept + self.tiers.iter().map(|t| t.n_slots).sum::<usize>()
    }

    /// Bytes of a page of [`TILE`] elements of a key and of a value in a tier.
    pub fn cost_of_tier(&self, tier: usize) -> u64 {
        match tier {
            0 => self.cost,
            _ => self.tiers[tier - 1].cost,
        }
    }

    /// Page tables.
    pub fn n_tables(&self) -> usize {
        self.n_layer * self.groups
    }

    /// The tables of layer `il`.
    pub fn tables_of(&self, il: usize) -> std::ops::Range<usize> {
        il * self.groups..(il + 1) * self.groups
    }

    /// Tables of dense layers; they come first.
    pub(super) fn n_dense(&self) -> usize {
        self.dense * self.groups
    }

    /// Whether table `t` takes its slots from the shared pool.
    pub(super) fn is_shared(&self, t: usize) -> bool {
        self.shared && t >= self.n_dense()
    }

    /// The tables that give their slots to table `t` and take theirs from it.
    pub(super) fn sharing(&self, t: usize) -> std::ops::Range<usize> {
        if self.is_shared(t) {
            self.n_dense()..self.n_tables()
        } else {
            t..t + 1
        }
    }

    /// Lists of free slots of a tier: one a table, and one for the shared pool.
    fn lists(&self) -> usize {
        self.n_tables() + 1
    }

    /// Lists of free slots, tier after tier.
    pub(super) fn n_lists(&self) -> usize {
        self.n_tiers() * self.lists()
    }

    /// The list that table `t` takes its slots of a tier from.
    pub(super) fn list_of(&self, tier: usize, t: usize) -> usize {
        tier * self.lists()
            + if self.is_shared(t) {
                self.n_tables()
            } else {
                t
            }
    }

    /// Whether a list is of a lower tier.
    pub(super) fn is_below(&self, list: usize) -> bool {
        list >= self.lists()
    }

    /// Slots of a list at most.
    pub(super) fn slots_of_list(&self, list: usize) -> usize {
        let tier = list / self.lists();
        self.of_list(list, self.slots_of_tier(tier))
    }

    /// What a list has, if a table of its tier has `n_slots`.
    fn of_list(&self, list: usize, n_slots: usize) -> usize {
        match list % self.lists() {
            t if t < self.n_dense() && list < self.lists() => self.dense_slots,
            t if t < self.n_dense() => 0,
            t if t < self.n_tables() && self.shared => 0,
            t if t < self.n_tables() => n_slots,
            _ if self.shared => n_slots * (self.n_tables() - self.n_dense()),
            _ => 0,
        }
    }

    /// Slots of a list of the first tier that stay.
    pub(super) fn kept_of_list(&self, list: usize) -> usize {
        self.of_list(list, self.kept)
    }

    /// Pages that a table holds at most.
    pub fn max_pages(&self, t: usize) -> usize {
        let all = self.of_list(self.list_of(0, t), self.all_slots());
        if self.is_shared(t) {
            all.min(MOST_SHARES * self.all_slots())
        } else {
            all
        }
    }

    /// Stretches that kernels see in a table at most: its pages, in parts of one block.
    pub fn max_spans(&self, t: usize) -> usize {
        self.max_pages(t) * self.page.div_ceil(PAGE)
    }

    /// Regions of memory in a tier.
    pub fn n_regions(&self) -> usize {
        if self.shared {
            (self.dense + 1).min(self.n_layer)
        } else {
            self.n_layer
        }
    }

    /// The region of layer `il`.
    pub fn region_of(&self, il: usize) -> usize {
        il.min(self.n_regions() - 1)
    }

    /// The size of region `r` in a tier.
    pub fn region(&self, tier: usize, r: usize) -> Region {
        let first = r * self.groups;
        let slots = self.slots_of_list(self.list_of(tier, first));
        Region {
            n_blocks: (slots * self.page).div_ceil(PAGE),
            n_head_kv: if self.is_shared(first) {
                self.n_head_kv / self.groups
            } else {
                self.n_head_kv
            },
        }
    }

    /// Bytes of the pool, if a key and a value of one head take `row` bytes together in the first tier, and a bound of one head `bound`.
    /// Lower tiers live on what the first has given away.
    pub fn bytes(&self, row: u64, bound: u64) -> u64 {
        let size = |r: Region| {
            let tokens = (r.n_blocks * r.n_head_kv * PAGE) as u64;
            let pages = tokens / self.page as u64;
            tokens * row + if self.bounds { pages * bound } else { 0 }
        };
        let regions = (0..self.n_regions()).map(|r| self.region(0, r));
        regions.map(size).sum()
    }

    /// The block and the row in it of token `row` of a page.
    pub fn place(&self, slot: u32, row: u32) -> Place {
        let at = slot * self.page as u32 + row;
        Place {
            slot: at / PAGE as u32,
            row: at % PAGE as u32,
        }
    }
}
