//! How the slots of the pool are divided among page tables, and where they lie in memory.
//!
//! A layer has one page table, or one for each key and value head ([`Scope::Head`]). A table has slots of its own, or takes them from
//! one pool for the whole model ([`BudgetScope::Model`]); dense layers always have their own, as many as the context has
//! pages. Memory is made of *blocks* of [`PAGE`] tokens, whatever a page holds: kernels see blocks only.

use super::{PAGE, Place};
use crate::options::{BudgetScope, KvOptions, Scope, Score};

/// Shares of the pool that one table may hold at most where tables share a budget.
const MOST_SHARES: usize = 4;

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
    /// Tokens in a page.
    pub page: usize,
    /// Slots of a table; where tables share a budget, its mean.
    pub n_slots: usize,
    /// Layers, counted from the first, that keep everything.
    pub dense: usize,
    /// Slots of a table of a dense layer.
    pub dense_slots: usize,
    /// Whether the tables of layers that are not dense share their slots.
    pub shared: bool,
    /// Whether the least and the greatest key of a page are kept.
    pub bounds: bool,
    /// How many pages a step attends to, if not to all.
    pub attend: Option<Attend>,
}

/// How many pages of a table a step attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attend {
    /// Pages.
    pub pages: usize,
    /// Whether pinned pages come on top of them.
    pub beside_pinned: bool,
}

/// A stretch of memory: the blocks of one layer, or of all that share a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Blocks of [`PAGE`] tokens.
    pub n_blocks: usize,
    /// Heads that a block holds.
    pub n_head_kv: usize,
}

impl Layout {
    /// The layout that options ask for; `n_ctx` positions at most.
    pub fn new(
        o: &KvOptions,
        n_layer: usize,
        n_head_kv: usize,
        n_slots: usize,
        n_ctx: usize,
    ) -> Self {
        let page = o.page as usize;
        Self {
            n_layer,
            n_head_kv,
            head_dim: 0,
            groups: match o.scope {
                Scope::Head => n_head_kv,
                Scope::Layer => 1,
            },
            page,
            n_slots,
            dense: (o.dense_layers as usize).min(n_layer),
            dense_slots: n_ctx.div_ceil(page),
            shared: o.budget_scope == BudgetScope::Model,
            bounds: o.score == Score::Bound,
            attend: None,
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

    /// Lists of free slots: one a table, and one for the shared pool.
    pub(super) fn n_lists(&self) -> usize {
        self.n_tables() + 1
    }

    /// The list that table `t` takes its slots from.
    pub(super) fn list_of(&self, t: usize) -> usize {
        if self.is_shared(t) {
            self.n_tables()
        } else {
            t
        }
    }

    /// Slots of a list.
    pub(super) fn slots_of_list(&self, list: usize) -> usize {
        match list {
            t if t < self.n_dense() => self.dense_slots,
            t if t < self.n_tables() && self.shared => 0,
            t if t < self.n_tables() => self.n_slots,
            _ if self.shared => self.n_slots * (self.n_tables() - self.n_dense()),
            _ => 0,
        }
    }

    /// Pages that a table holds at most.
    pub fn max_pages(&self, t: usize) -> usize {
        let all = self.slots_of_list(self.list_of(t));
        if self.is_shared(t) {
            all.min(MOST_SHARES * self.n_slots)
        } else {
            all
        }
    }

    /// Stretches that kernels see in a table at most: its pages, in parts of one block.
    pub fn max_spans(&self, t: usize) -> usize {
        self.max_pages(t) * self.page.div_ceil(PAGE)
    }

    /// Regions of memory.
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

    /// The size of region `r`.
    pub fn region(&self, r: usize) -> Region {
        let blocks = |slots: usize| (slots * self.page).div_ceil(PAGE);
        if self.shared && r >= self.dense {
            Region {
                n_blocks: blocks(self.slots_of_list(self.n_tables())),
                n_head_kv: self.n_head_kv / self.groups,
            }
        } else {
            Region {
                n_blocks: blocks(self.slots_of_list(r * self.groups)),
                n_head_kv: self.n_head_kv,
            }
        }
    }

    /// Bytes of the pool, if a key and a value of one head take `row` bytes together, and a bound of one head `bound`.
    pub fn bytes(&self, row: u64, bound: u64) -> u64 {
        let size = |r: Region| {
            let tokens = (r.n_blocks * r.n_head_kv * PAGE) as u64;
            let pages = tokens / self.page as u64;
            tokens * row + if self.bounds { pages * bound } else { 0 }
        };
        (0..self.n_regions()).map(|r| size(self.region(r))).sum()
    }

    /// The block and the row in it of token `row` of a page.
    pub(super) fn place(&self, slot: u32, row: u32) -> Place {
        let at = slot * self.page as u32 + row;
        Place {
            slot: at / PAGE as u32,
            row: at % PAGE as u32,
        }
    }
}
