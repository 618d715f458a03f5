//! How large the parts of a pool are, and what a step says about pages that move and about pages whose keys are bounded.

use std::ops::Range;

use lemma_cpu::{KvLayer, Move, Place};

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

/// What a demotion moves within some layers, for kernels: the page, and then the one that takes its place, if there is one. Regions stand
/// one after the other, each with its tiers.
pub(super) fn moved(
    layout: &Layout,
    layers: &Range<usize>,
    d: &Demoted,
) -> impl Iterator<Item = Move> {
    let page = layout.page as u32;
    let down = layers.contains(&d.il).then(|| Move {
        from: at(layout, d.il, d.page.tier),
        to: at(layout, d.il, d.tier),
        from_token: d.page.slot * page,
        to_token: d.slot * page,
        planes: planes(layout, d.il, d.group),
    });
    let heir = d.heir.filter(|h| layers.contains(&h.il)).map(|h| Move {
        from: at(layout, h.il, 0),
        to: at(layout, h.il, 0),
        from_token: h.slot * page,
        to_token: d.page.slot * page,
        planes: planes(layout, h.il, h.group),
    });
    down.into_iter().chain(heir)
}

/// Where a tier of a layer stands.
fn at(layout: &Layout, il: usize, tier: u8) -> usize {
    layout.region_of(il) * layout.n_tiers() + usize::from(tier)
}

/// The planes of a block that belong to a table.
fn planes(layout: &Layout, il: usize, group: usize) -> (usize, usize) {
    let heads = layout.n_head_kv / layout.groups;
    // Where each table has blocks of its own heads, they begin at the first plane.
    let shares_blocks = layout.region(0, layout.region_of(il)).n_head_kv > heads;
    let first = if shares_blocks { group * heads } else { 0 };
    (first, first + heads)
}

/// The blocks of each tier of each region: `[region, tier]`.
pub(super) struct Memory(Vec<Blocks>);

#[derive(Clone, Copy, Default)]
struct Blocks {
    /// Those that pages could lie in during the last step.
    open: usize,
    /// Those that may have memory.
    used: usize,
}

impl Memory {
    /// Nothing has been written yet.
    pub(super) fn new(layout: &Layout) -> Self {
        Self(vec![
            Blocks::default();
            layout.n_regions() * layout.n_tiers()
        ])
    }

    /// Gives back the memory of blocks that are closed, before a step. What lay in those that the last step has closed has moved
    /// during that step; this step still reads from the ones that it closes itself.
    pub(super) fn follow(&mut self, pool: &mut [KvLayer], cache: &Cache) {
        let l = cache.layout();
        for (i, (kv, blocks)) in pool.iter_mut().zip(&mut self.0).enumerate() {
            let (region, tier) = (i / l.n_tiers(), i % l.n_tiers());
            let open = (cache.open(tier, region) * l.page).div_ceil(PAGE);
            if blocks.open < blocks.used {
                kv.release(blocks.open..blocks.used);
            }
            blocks.used = blocks.open.max(open);
            blocks.open = open;
        }
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
