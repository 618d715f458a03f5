//! How large the parts of a pool are, and what a step says about pages that move and about pages whose keys are bounded.

use lemma_cpu::{Move, Place};

use crate::arch::HParams;
use crate::kv::{Cache, Demoted, Layout, PAGE, Region};

/// Spans of the longest table.
pub(super) fn max_spans(layout: &Layout) -> usize {
    let tables = 0..layout.n_tables();
    tables.map(|t| layout.max_spans(t)).max().unwrap_or(0)
}

/// Spans of the tables of a layer at most.
pub(super) fn layer_spans(layout: &Layout, il: usize) -> usize {
    layout.tables_of(il).map(|t| layout.max_spans(t)).sum()
}

/// Pages of a region.
pub(super) fn n_bounds(layout: &Layout, r: Region) -> usize {
    r.n_blocks * PAGE / layout.page
}

/// Masses that a layer leaves at most.
pub(super) fn masses(layout: &Layout, il: usize, hp: &HParams) -> usize {
    layer_spans(layout, il) * (hp.n_head / layout.groups)
}

/// A page that was demoted, for kernels: regions stand one after the other, each with its tiers.
pub(super) fn moved(layout: &Layout, d: &Demoted) -> Move {
    let at = |tier: u8| layout.region_of(d.il) * layout.n_tiers() + usize::from(tier);
    let heads = layout.n_head_kv / layout.groups;
    // Where each table has blocks of its own heads, they begin at the first plane.
    let shares_blocks = layout.region(0, layout.region_of(d.il)).n_head_kv > heads;
    let first = if shares_blocks { d.group * heads } else { 0 };
    Move {
        from: at(d.page.tier),
        to: at(d.tier),
        from_token: d.page.slot * layout.page as u32,
        to_token: d.slot * layout.page as u32,
        planes: (first, first + heads),
    }
}

/// Bytes of the bounds of a page for one head.
pub(crate) fn bound_bytes(hp: &HParams) -> u64 {
    (2 * hp.head_dim * size_of::<f32>()) as u64
}

/// What the bounds of a layer need to know.
#[derive(Clone, Default)]
pub(super) struct Bounds {
    pub(super) slots: Vec<u32>,
    pub(super) places: Vec<Place>,
    pub(super) forced: Vec<bool>,
    pub(super) attends: Option<usize>,
}

impl Bounds {
    pub(super) fn fill(&mut self, cache: &Cache, il: usize) {
        let layout = cache.layout();
        self.slots.clear();
        self.places.clear();
        self.forced.clear();
        self.attends = cache.attends(il * layout.groups);
        let (page, block) = (layout.page as u32, PAGE as u32);
        for table in &cache.tables()[layout.tables_of(il)] {
            self.slots.extend(table.pages.iter().map(|p| p.slot));
            self.forced.extend(table.pages.iter().map(|p| p.pinned));
            if let Some(current) = self.forced.last_mut() {
                *current = true;
            }
            self.places.extend(table.places.iter().map(|p| {
                let at = p.slot * block + p.row;
                Place {
                    slot: at / page,
                    row: at % page,
                }
            }));
        }
    }
}
