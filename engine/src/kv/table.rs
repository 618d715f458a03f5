//! The page table of a layer, or of a head.

use super::{Layout, PAGE};

/// A live page of a table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageMeta {
    /// The tier that it lies in; see [`Layout`].
    pub tier: u8,
    /// The physical place of the page in its tier.
    pub slot: u32,
    /// Position of its first token.
    pub first_pos: u32,
    /// Tokens in it; they stand at consecutive positions.
    pub len: u32,
    /// The step at which it last mattered.
    pub stamp: u32,
    /// Its attention mass at the last step, aggregated over the query heads.
    pub w: f32,
    /// What the policy has added up for it.
    pub sum: f32,
    /// The longest time between two of its stamps, in steps.
    pub gap: u32,
    /// Never recycled.
    pub pinned: bool,
    /// The widest range of values of any of its tokens and heads; 0 until it is full, and where nobody asks.
    pub range: f32,
    /// Position of the page that made it redundant; [`NONE`] if there is none.
    pub double: u32,
}

/// No position.
pub const NONE: u32 = u32::MAX;

impl PageMeta {
    /// A page that is opened for the token at `pos`.
    pub(super) fn new(slot: u32, pos: u32, pinned: bool) -> Self {
        Self {
            tier: 0,
            slot,
            first_pos: pos,
            len: 1,
            stamp: pos,
            w: 0.0,
            sum: 0.0,
            gap: 0,
            pinned,
            range: 0.0,
            double: NONE,
        }
    }
}

/// Where a token's key and value go: a block of [`PAGE`] tokens of the first tier and the row in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The block; with pages of [`PAGE`] tokens, the slot of the page.
    pub slot: u32,
    /// Row in the block, `0..PAGE`.
    pub row: u32,
}

/// A page, or a part of one, within a block of memory: what kernels read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its tier.
    pub tier: u8,
    /// The block.
    pub slot: u32,
    /// Its first row in the block.
    pub row: u32,
    /// Position of its first token.
    pub first_pos: u32,
    /// Tokens in it.
    pub len: u32,
}

/// A page that gave its slot away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recycled {
    /// Layer.
    pub il: usize,
    /// Table of the layer: the key and value head under [`Scope::Head`](crate::options::Scope::Head), else 0.
    pub group: usize,
    /// The step at which it happened (the position of the token that needed room).
    pub step: u32,
    /// The page as it was.
    pub page: PageMeta,
}

/// A page that moved to a lower tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demoted {
    /// Layer.
    pub il: usize,
    /// Table of the layer: the key and value head under [`Scope::Head`](crate::options::Scope::Head), else 0.
    pub group: usize,
    /// The step at which it happened (the position of the token that needed room).
    pub step: u32,
    /// The page as it was.
    pub page: PageMeta,
    /// Where it is now.
    pub tier: u8,
    /// Its slot there.
    pub slot: u32,
    /// A page that takes the place of this one, since the first tier gives its slot away.
    pub heir: Option<Heir>,
}

/// A page that moves within the first tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heir {
    /// Layer.
    pub il: usize,
    /// Table of the layer.
    pub group: usize,
    /// The slot that it leaves; it goes to that of the demoted page.
    pub slot: u32,
}

/// A page table.
#[derive(Debug, Default)]
pub struct LayerTable {
    /// Live pages in position order; the last is the current one.
    pub pages: Vec<PageMeta>,
    /// Places of the tokens of the step in progress.
    pub places: Vec<Place>,
    /// Pages recycled since the sequence began.
    pub recycled: u64,
}

impl LayerTable {
    /// The live pages as kernels read them, in position order.
    pub fn spans(&self, layout: &Layout) -> impl Iterator<Item = Span> {
        let size = layout.page;
        self.pages.iter().flat_map(move |p| {
            (0..p.len).step_by(PAGE).map(move |done| {
                let at = p.slot * size as u32 + done;
                Span {
                    tier: p.tier,
                    slot: at / PAGE as u32,
                    row: at % PAGE as u32,
                    first_pos: p.first_pos + done,
                    len: (p.len - done).min(PAGE as u32),
                }
            })
        })
    }

    /// Spans of the live pages.
    pub fn n_spans(&self) -> usize {
        let spans = |p: &PageMeta| (p.len as usize).div_ceil(PAGE);
        self.pages.iter().map(spans).sum()
    }
}

/// Whether page `i` may be recycled: not pinned and not among the last `recent`.
pub(super) fn may_recycle(pages: &[PageMeta], i: usize, recent: usize) -> bool {
    !pages[i].pinned && i + recent < pages.len()
}
