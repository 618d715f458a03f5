//! Attention, for batches and for one token.

use super::{Heads, MAX_HEAD_DIM, Quant, Tiers, at, check, launch, only_f16, tier_args};
use crate::gpu::{Gpu, Result, View};
use crate::{PAGE, args};

/// Threads of a block of the kernel that joins attention, and pages that it weighs.
const COMBINE_BLOCK: u32 = 128;
const COMBINE_PAGES: usize = 32;
/// Query rows of a block of the attention kernel.
const ATT_TILE: usize = 8;
const ATT_WARPS: usize = 4;
/// Queries of a warp of the kernel for batches, and the widest head that it takes.
const UNIT: usize = 8;
const BATCH_MAX_D: usize = 128;

/// Bytes of `TokenShared`.
const TOKEN_SHARED: usize = ATT_TILE * (BATCH_MAX_D + 4) * 4 + ATT_WARPS * BATCH_MAX_D * 4;

/// Queries of a block for wide heads, pages that it takes at once, and its threads.
pub(super) const WIDE_ROWS: usize = 16;
pub(super) const WIDE_PAGES: usize = 4;
pub(super) const WIDE_BLOCK: u32 = 256;

/// Bytes of shared memory of such a block: so many halves of a query, and rows of pages for a token.
pub(super) fn wide_shared(head_dim: usize, of_query: usize, of_token: usize) -> usize {
    let (row, keys) = (head_dim.next_multiple_of(64) + 8, WIDE_PAGES * PAGE);
    ((of_query * WIDE_ROWS + of_token * keys) * row + WIDE_ROWS * (keys + 8)) * 2
}

/// As kernels have a window that is none.
const NO_WINDOW: u32 = 0x7fff_ffff;

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// `[n, n_head, head_dim]`
    pub q: View,
    /// Keys and values; the first tier is there. Kernels for f16 alone serve a first tier of it without others.
    pub tiers: Tiers,
    /// `[max_pages]` pairs of u32: [slot](super::slot_of) and first position, in position order.
    pub pages: View,
    /// `[1]` u32: live pages.
    pub n_pages: View,
    /// `[1]` u32: position of the first token.
    pub pos: View,
    /// Factor of the scores.
    pub scale: f32,
    /// Tokens that a query sees, itself included, if not all.
    pub window: Option<u32>,
    /// Bound of the scores, positive: they become `cap * tanh(score / cap)`.
    pub cap: Option<f32>,
    /// `[n_head]`: a score of each head that takes part in the softmax and has no value.
    pub sinks: Option<View>,
}

impl Attention {
    /// Window and bound as kernels have them.
    pub(crate) fn bounds(&self) -> (u32, f32) {
        let window = self.window.map_or(NO_WINDOW, |w| w.min(NO_WINDOW));
        (window, self.cap.unwrap_or(0.0))
    }
}

/// Attention of `n` tokens of a batch: out `[n, n_head, head_dim]`.
///
/// # Errors
/// Those of the driver.
pub fn attention(gpu: &Gpu, out: View, h: Heads, c: &Attention, n: usize) -> Result<()> {
    check(out, n * h.n_head * h.head_dim);
    if h.head_dim.is_multiple_of(8) {
        return attention_batch(gpu, out, h, c, n);
    }
    launch_attention(
        gpu,
        h,
        c,
        n,
        1,
        args::Attention {
            out: out.at,
            ..args::Attention::default()
        },
    )
}

fn attention_batch(gpu: &Gpu, out: View, h: Heads, c: &Attention, n: usize) -> Result<()> {
    check_operands(h, c, n);
    let (window, cap) = c.bounds();
    let a = args::AttentionBatch {
        q: c.q.at,
        tiers: tier_args(&c.tiers),
        pages: c.pages.at,
        n_pages: c.n_pages.at,
        pos: c.pos.at,
        out: out.at,
        sinks: at(c.sinks),
        n: n as u32,
        n_head: h.n_head as u32,
        n_head_kv: h.n_head_kv as u32,
        head_dim: h.head_dim as u32,
        scale: c.scale,
        window,
        cap,
        pad: 0,
    };
    let queries = n * (h.n_head / h.n_head_kv);
    if h.head_dim > BATCH_MAX_D {
        let grid = [queries.div_ceil(WIDE_ROWS), h.n_head_kv, 1];
        // Queries are two halves each; values lie beside the keys.
        let shared = wide_shared(h.head_dim, 2, 2);
        let launch = launch(grid, WIDE_BLOCK, shared);
        return gpu.launch(launch, &args::AttentionWide(a));
    }
    let grid = [h.n_head_kv, queries.div_ceil(UNIT * ATT_WARPS), 1];
    let launch = launch(grid, 32 * ATT_WARPS as u32, 0);
    match (c.window.is_some() || c.cap.is_some(), only_f16(&c.tiers)) {
        (false, true) => gpu.launch(launch, &a),
        (false, false) => gpu.launch(launch, &args::AttentionBatchTiers(a)),
        (true, true) => gpu.launch(launch, &args::AttentionBatchBounded(a)),
        (true, false) => gpu.launch(launch, &args::AttentionBatchBoundedTiers(a)),
    }
}

/// Room for the parts of a decode step's attention.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// `[n_head, splits, head_dim]`
    pub sums: View,
    /// `[n_head, splits, 2]`
    pub ml: View,
    /// `[n_head, max_pages, 2]`
    pub page_ml: View,
    /// Blocks that share the pages of a head.
    pub splits: usize,
}

/// Masses of the pages of a decode step.
#[derive(Clone, Copy, Debug)]
pub struct Masses {
    /// `[max_pages]`: written for the live pages.
    pub w: View,
    /// The mean over the heads instead of the largest.
    pub mean: bool,
}

/// Attention of one token, its pages split over blocks: out `[n_head, head_dim]`, once more quantized, and the pages' masses.
///
/// # Errors
/// Those of the driver.
pub fn attention_decode(
    gpu: &Gpu,
    out: View,
    quant: Option<Quant>,
    masses: Option<Masses>,
    h: Heads,
    c: &Attention,
    parts: &Parts,
) -> Result<()> {
    let (d, max_pages) = (h.head_dim, c.pages.bytes() / 8);
    // Where a window ends few pages are left, and a warp takes one.
    let seen = c.window.map(|w| w as usize / PAGE + 3);
    let splits = seen.map_or(parts.splits, |n| parts.splits.min(n.div_ceil(ATT_WARPS)));
    check(out, h.n_head * d);
    check(parts.sums, h.n_head * splits * d);
    check(parts.ml, h.n_head * splits * 2);
    check(parts.page_ml, h.n_head * max_pages * 2);
    let a = args::Attention {
        part: parts.sums.at,
        part_ml: parts.ml.at,
        page_ml: if masses.is_some() {
            parts.page_ml.at
        } else {
            0
        },
        ..args::Attention::default()
    };
    launch_attention(gpu, h, c, 1, splits, a)?;
    combine(gpu, out, quant, masses, h, c, parts, (splits, true))
}

/// Joins the parts of one token's attention and weighs the pages; heads have `head_dim` elements of values. Of the splits are used as many as
/// there are pages for, or all, if they are not `few`.
#[allow(clippy::too_many_arguments, reason = "operands of one kernel")]
pub(super) fn combine(
    gpu: &Gpu,
    out: View,
    quant: Option<Quant>,
    masses: Option<Masses>,
    h: Heads,
    c: &Attention,
    parts: &Parts,
    (splits, few): (usize, bool),
) -> Result<()> {
    let (d, max_pages) = (h.head_dim, c.pages.bytes() / 8);
    if let Some(q) = quant {
        q.check(h.n_head * d);
        assert!(d.is_multiple_of(32));
    }
    if let Some(m) = masses {
        check(m.w, max_pages);
    }
    let a = args::Combine {
        part: parts.sums.at,
        part_ml: parts.ml.at,
        page_ml: parts.page_ml.at,
        sinks: at(c.sinks),
        pages: c.pages.at,
        n_pages: c.n_pages.at,
        pos: c.pos.at,
        out: out.at,
        q: at(quant.map(|q| q.q)),
        ds: at(quant.map(|q| q.ds)),
        w: at(masses.map(|m| m.w)),
        n_head: h.n_head as u32,
        head_dim: d as u32,
        splits: splits as u32,
        max_pages: max_pages as u32,
        mean: u32::from(masses.is_some_and(|m| m.mean)),
        window: c.bounds().0,
        few: u32::from(few),
        pad: 0,
    };
    let weigh = if masses.is_some() {
        max_pages.div_ceil(COMBINE_PAGES)
    } else {
        0
    };
    gpu.launch(
        launch([h.n_head + weigh, 1, 1], COMBINE_BLOCK, h.n_head * 8),
        &a,
    )
}

fn check_operands(h: Heads, c: &Attention, n: usize) {
    let d = h.head_dim;
    check(c.q, n * h.n_head * d);
    assert!(d.is_multiple_of(2) && d <= MAX_HEAD_DIM && h.n_head.is_multiple_of(h.n_head_kv));
    assert!(c.tiers[0].is_some(), "a first tier");
    c.tiers.iter().flatten().for_each(|t| t.check(h));
    check(c.n_pages, 1);
    check(c.pos, 1);
    assert!(c.window != Some(0) && c.cap.is_none_or(|cap| cap > 0.0));
    if let Some(sinks) = c.sinks {
        check(sinks, h.n_head);
    }
}

fn launch_attention(
    gpu: &Gpu,
    h: Heads,
    c: &Attention,
    n: usize,
    splits: usize,
    mut a: args::Attention,
) -> Result<()> {
    let d = h.head_dim;
    check_operands(h, c, n);
    (a.q, a.tiers) = (c.q.at, tier_args(&c.tiers));
    (a.pages, a.n_pages, a.pos) = (c.pages.at, c.n_pages.at, c.pos.at);
    (a.n, a.n_head, a.n_head_kv, a.head_dim) =
        (n as u32, h.n_head as u32, h.n_head_kv as u32, d as u32);
    (a.max_pages, a.scale) = ((c.pages.bytes() / 8) as u32, c.scale);
    (a.sinks, (a.window, a.cap)) = (at(c.sinks), c.bounds());
    // Queries, as plain numbers or as tensor cores take them, then sums of warps.
    let queries =
        (ATT_TILE * d.next_multiple_of(8) * 4).max(if d <= BATCH_MAX_D { TOKEN_SHARED } else { 0 });
    let shared = queries + ATT_WARPS * ATT_TILE * d * 4;
    let tiles = (n * (h.n_head / h.n_head_kv)).div_ceil(ATT_TILE);
    let launch = launch([h.n_head_kv, tiles, splits], 32 * ATT_WARPS as u32, shared);
    if only_f16(&c.tiers) {
        gpu.launch(launch, &a)
    } else {
        gpu.launch(launch, &args::AttentionTiers(a))
    }
}

/// Blocks that should share the pages of a head, so that one token's attention occupies the device.
pub fn splits(gpu: &Gpu, h: Heads, max_pages: usize) -> usize {
    let others = h.n_head_kv * (h.n_head / h.n_head_kv).div_ceil(ATT_TILE);
    (2 * gpu.info().n_sm as usize)
        .div_ceil(others)
        .clamp(1, 64)
        .min(max_pages.div_ceil(ATT_WARPS))
        .max(1)
}
