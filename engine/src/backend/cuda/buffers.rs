//! Device memory that passes work in: the KV pool and the scratch of experts.

use lemma_cuda::ops::{self, Grouped, Heads, Tier, Tiers};
use lemma_cuda::{Buffer, CudaError, Gpu, Stretch, View};
use lemma_quant::GgmlType;
use lemma_quant::pages::KvType;

use super::moves::Moves;
use crate::arch::HParams;
use crate::error::Error;
use crate::kv::{Cache, Layout};
use crate::options::KvOptions;
use crate::report;

type Done = Result<(), CudaError>;

/// The KV pool on the device, and what goes with its pages.
pub(super) struct Pool {
    /// How keys and values are stored in each tier.
    types: Vec<[KvType; 2]>,
    /// Keys and values of each region (a layer, or all layers that share a budget), tier after tier.
    kv: Vec<[Stretch; 2]>,
    /// The slots of each region that pages could lie in during the last step, in the first tier.
    open: Vec<usize>,
    /// The region of each layer.
    region: Vec<usize>,
    /// What moves to lower tiers.
    pub(super) moves: Moves,
    /// `[n_layer, max_pages]` pairs of slot and first position.
    pub(super) tables: Buffer,
    /// `[n_layer, max_pages]` masses of the last step.
    pub(super) masses: Buffer,
    pub(super) sums: Buffer,
    pub(super) ml: Buffer,
    pub(super) page_ml: Buffer,
    pub(super) splits: usize,
    /// What pages are made of: keys and values, or keys alone.
    n_part: usize,
    pub(super) n_slots: usize,
    /// Pages that the table of a layer holds at most.
    pub(super) max_pages: usize,
    /// Whether it has failed to grow: some of it may have moved, and nobody knows where.
    lost: bool,
}

/// How keys and values are stored in each tier, if there are kernels for it. Values that are in the keys have a type that stands for none.
pub(super) fn types(
    kv: &KvOptions,
    layout: &Layout,
    h: Heads,
    n_part: usize,
) -> Result<Vec<[KvType; 2]>, Error> {
    let first = [kv.ty_k.into(), kv.ty_v.into()];
    let lower = layout.tiers.iter().map(|t| [t.stored.ty_k, t.stored.ty_v]);
    let mut all: Vec<[KvType; 2]> = std::iter::once(first).chain(lower).collect();
    if n_part == 1 {
        all.iter_mut().for_each(|ty| ty[1] = GgmlType::F16.into());
    }
    for (tier, types) in all.iter().enumerate() {
        for (ty, flag) in types.iter().zip(["-ctk", "-ctv"]) {
            if ops::page_bytes(*ty, h).is_some() {
                continue;
            }
            let (flag, known) = match tier {
                0 => (flag, "f16, q8_0 or q4_0"),
                _ => ("--kv-demote", "q8_0, q4_0 or k4/v2"),
            };
            return Err(report::usage(format!("{flag} {ty} on a GPU"), known));
        }
    }
    Ok(all)
}

/// Bytes of a page: of its keys, and of its values if it has some.
fn page_bytes(types: [KvType; 2], h: Heads, n_part: usize) -> [usize; 2] {
    let [k, v] = types.map(|ty| ops::page_bytes(ty, h).unwrap_or(0));
    [k, if n_part == 2 { v } else { 0 }]
}

/// Bytes of a region in a tier, of which `page` are those of a page: of its keys, and of its values.
fn region_bytes(page: [usize; 2], layout: &Layout, tier: usize, r: usize) -> [usize; 2] {
    page.map(|bytes| bytes * layout.region(tier, r).n_blocks)
}

/// Bytes of a pool. Lower tiers live on what the first has given away, if the device can give it back.
pub(super) fn pool_bytes(
    gpu: &Gpu,
    types: &[[KvType; 2]],
    h: Heads,
    n_part: usize,
    layout: &Layout,
) -> u64 {
    let n_tiers = if gpu.can_stretch() {
        1
    } else {
        layout.n_tiers()
    };
    let regions = 0..layout.n_regions();
    let parts = regions.flat_map(|r| (0..n_tiers).map(move |tier| (tier, r)));
    let page = |tier: usize| page_bytes(types[tier], h, n_part);
    let bytes = parts.map(|(tier, r)| region_bytes(page(tier), layout, tier, r));
    bytes.flatten().sum::<usize>() as u64
}

/// What a pool takes, each part of which begins with a block of its own, and what its tables do.
pub(super) fn room(
    gpu: &Gpu,
    types: &[[KvType; 2]],
    h: Heads,
    n_part: usize,
    layout: &Layout,
) -> [u64; 2] {
    let parts = (2 * types.len() * layout.n_regions()) as u64;
    let pool = pool_bytes(gpu, types, h, n_part, layout) + (parts << 21);
    [pool, table_bytes(gpu, h, n_part, layout)]
}

/// Bytes of what goes with a pool: page tables, masses, sums of attention.
pub(super) fn table_bytes(gpu: &Gpu, h: Heads, n_part: usize, layout: &Layout) -> u64 {
    let (max_pages, splits) = pages_and_splits(gpu, h, n_part, layout);
    let tables = 12 * layout.n_layer * max_pages + 8 * h.n_head * max_pages;
    (tables + h.n_head * splits * (4 * h.head_dim + 8)) as u64
}

/// Pages of the longest table, and among how many blocks attention divides them.
fn pages_and_splits(gpu: &Gpu, h: Heads, n_part: usize, layout: &Layout) -> (usize, usize) {
    let tables = 0..layout.n_tables();
    let max_pages = tables.map(|t| layout.max_pages(t)).max().unwrap_or(0);
    let splits = match n_part {
        1 => ops::latent_splits(gpu, h.n_head, max_pages),
        _ => ops::splits(gpu, h, max_pages),
    };
    (max_pages, splits)
}

impl Pool {
    pub(super) fn new(
        gpu: &Gpu,
        h: Heads,
        types: Vec<[KvType; 2]>,
        n_part: usize,
        layout: &Layout,
    ) -> Result<Self, CudaError> {
        let mut kv = Vec::new();
        for r in 0..layout.n_regions() {
            for (tier, types) in types.iter().enumerate() {
                let [k, v] = region_bytes(page_bytes(*types, h, n_part), layout, tier, r);
                kv.push([part(gpu, layout, tier, k)?, part(gpu, layout, tier, v)?]);
            }
        }
        Self::around(gpu, h, types, kv, n_part, layout)
    }

    /// Tables and scratch for a pool of this size.
    fn around(
        gpu: &Gpu,
        h: Heads,
        types: Vec<[KvType; 2]>,
        kv: Vec<[Stretch; 2]>,
        n_part: usize,
        layout: &Layout,
    ) -> Result<Self, CudaError> {
        let n_layer = layout.n_layer;
        let (max_pages, splits) = pages_and_splits(gpu, h, n_part, layout);
        let regions = kv.chunks(types.len()).map(|kv| tiers(&types, kv));
        Ok(Self {
            moves: Moves::new(gpu, h, &regions.collect::<Vec<_>>(), n_part, layout)?,
            tables: gpu.alloc(n_layer * max_pages * 8)?,
            masses: gpu.alloc(n_layer * max_pages * 4)?,
            sums: gpu.alloc(h.n_head * splits * h.head_dim * 4)?,
            ml: gpu.alloc(h.n_head * splits * 8)?,
            page_ml: gpu.alloc(h.n_head * max_pages * 8)?,
            open: (0..layout.n_regions())
                .map(|r| layout.region(0, r).n_blocks)
                .collect(),
            types,
            kv,
            region: (0..n_layer).map(|il| layout.region_of(il)).collect(),
            splits,
            n_part,
            n_slots: layout.n_slots,
            max_pages,
            lost: false,
        })
    }

    /// Sees to it that there is memory for what the step that begins reads and writes, and gives back what the last one has emptied. What
    /// lay in slots that this one gives away moves only now, so they stay until the next.
    pub(super) fn follow(&mut self, h: Heads, cache: &Cache) -> Done {
        self.check()?;
        let n = self.types.len();
        if n == 1 {
            return Ok(());
        }
        // Memory is given back before more is taken.
        for more in [false, true] {
            for (i, parts) in self.kv.iter_mut().enumerate() {
                let (tier, region) = (i % n, i / n);
                let mut slots = cache.open(tier, region);
                if tier == 0 {
                    slots = slots.max(self.open[region]);
                }
                let page = page_bytes(self.types[tier], h, self.n_part);
                for (part, page) in parts.iter_mut().zip(page) {
                    let bytes = slots * page;
                    if more || bytes < part.backed().bytes() {
                        part.back(bytes)?;
                    }
                }
            }
        }
        for (region, open) in self.open.iter_mut().enumerate() {
            *open = cache.open(0, region);
        }
        Ok(())
    }

    /// What was in the pool is gone when it has failed to grow.
    fn check(&self) -> Done {
        match self.lost {
            true => Err(CudaError(
                "the KV pool could not grow and is lost: load the model again".to_owned(),
            )),
            false => Ok(()),
        }
    }

    /// Moves to a larger pool, part by part, so that only one is held twice.
    pub(super) fn grow(&mut self, gpu: &Gpu, h: Heads, layout: &Layout) -> Done {
        self.check()?;
        let mut moved = false;
        let done = self.move_parts(gpu, h, layout, &mut moved);
        self.lost |= moved && done.is_err();
        done
    }

    /// `moved`: whether anything has.
    fn move_parts(&mut self, gpu: &Gpu, h: Heads, layout: &Layout, moved: &mut bool) -> Done {
        let n = self.types.len();
        for (i, parts) in self.kv.iter_mut().enumerate() {
            let page = page_bytes(self.types[i % n], h, self.n_part);
            let bytes = region_bytes(page, layout, i % n, i / n);
            for (old, bytes) in parts.iter_mut().zip(bytes) {
                let mut new = part(gpu, layout, i % n, bytes)?;
                let kept = old.backed();
                new.back(new.backed().bytes().max(kept.bytes()))?;
                if kept.bytes() > 0 {
                    gpu.copy(new.view().slice(0, kept.bytes()), kept)?;
                }
                *old = new;
                *moved = true;
            }
        }
        let kv = std::mem::take(&mut self.kv);
        *self = Self::around(gpu, h, self.types.clone(), kv, self.n_part, layout)?;
        Ok(())
    }

    /// Where keys and values of layer `il` are stored: in all tiers, or as long as nothing has left it in the first.
    pub(super) fn tiers(&self, il: usize, all: bool) -> Tiers {
        let n = self.types.len();
        let mut tiers = tiers(&self.types, &self.kv[self.region[il] * n..][..n]);
        if !all {
            tiers[1..].fill(None);
        }
        tiers
    }

    /// Where new pages of layer `il` are stored.
    pub(super) fn first(&self, il: usize) -> Tier {
        let first = self.tiers(il, false)[0];
        first.expect("there is a first tier")
    }

    /// Bytes of a pool of this layout.
    pub(super) fn bytes(&self, gpu: &Gpu, h: Heads, layout: &Layout) -> u64 {
        pool_bytes(gpu, &self.types, h, self.n_part, layout)
    }

    pub(super) fn table(&self, il: usize) -> View {
        self.tables
            .view()
            .slice(il * self.max_pages * 8, self.max_pages * 8)
    }
}

/// Room for keys or values of a region in a tier: in the first all of it, in lower ones addresses.
fn part(gpu: &Gpu, layout: &Layout, tier: usize, bytes: usize) -> Result<Stretch, CudaError> {
    // The first may be all there is: it has the most that is to be held, or more.
    if layout.tiers.iter().all(|t| t.n_slots == 0) {
        return Stretch::fixed(gpu, bytes);
    }
    let mut part = Stretch::new(gpu, bytes)?;
    part.back(if tier == 0 { bytes } else { 0 })?;
    Ok(part)
}

/// The tiers of a region.
fn tiers(types: &[[KvType; 2]], kv: &[[Stretch; 2]]) -> Tiers {
    let mut tiers = [None; ops::MAX_TIERS];
    for ((tier, [ty_k, ty_v]), [k, v]) in tiers.iter_mut().zip(types).zip(kv) {
        *tier = Some(Tier {
            k: k.view(),
            v: v.view(),
            ty_k: *ty_k,
            ty_v: *ty_v,
        });
    }
    tiers
}

/// Scratch of a mixture of experts.
pub(super) struct Moe {
    /// `[n_ubatch, n_expert]`
    pub(super) logits: Buffer,
    /// `[n_ubatch, n_expert_used]`
    pub(super) ids: Buffer,
    /// `[n_ubatch, n_expert_used]`
    pub(super) weights: Buffer,
    /// `[n_ubatch]` counters that are zero between calls.
    pub(super) arrived: Buffer,
    /// `[columns, n_ff_exp]`, twice: gate and up.
    pub(super) hidden: [Buffer; 2],
    /// The first of them quantized, if `n_ff_exp` is a multiple of 32.
    pub(super) q8: Option<(Buffer, Buffer)>,
    /// Tokens whose columns are mat-vecs at once.
    pub(super) tokens: usize,
    /// Nothing where batches are too small for it.
    pub(super) sorted: Option<Sorted>,
}

/// Scratch of columns that are sorted by expert.
pub(super) struct Sorted {
    pub(super) grouped: Grouped,
    /// `[columns, width]`: what experts give.
    pub(super) y: Buffer,
    /// Tokens whose columns are sorted at once.
    pub(super) tokens: usize,
}

/// Columns (pairs of token and expert) that are mat-vecs at once, and that are sorted by expert at once.
const COLUMNS: [usize; 2] = [256, 8192];

/// So many columns as tokens of a batch.
fn tokens(hp: &HParams, n_ubatch: usize, columns: usize) -> usize {
    (columns / hp.n_expert_used).clamp(1, n_ubatch)
}

/// Tokens whose columns are sorted by expert at once, if that ever pays.
fn grouped_tokens(hp: &HParams, n_ubatch: usize) -> Option<usize> {
    let tokens = tokens(hp, n_ubatch, COLUMNS[1]);
    let enough = tokens * hp.n_expert_used >= Grouped::min_columns(hp.n_expert);
    enough.then_some(tokens)
}

/// Width of what experts read and give.
fn width(hp: &HParams) -> usize {
    hp.n_expert_latent.unwrap_or(hp.n_embd)
}

impl Moe {
    /// Bytes of the scratch, about.
    pub(super) fn bytes(hp: &HParams, n_ubatch: usize) -> usize {
        if hp.n_expert == 0 {
            return 0;
        }
        let small = tokens(hp, n_ubatch, COLUMNS[0]);
        let columns = grouped_tokens(hp, n_ubatch).unwrap_or(small) * hp.n_expert_used;
        columns * (12 * hp.n_ff_exp + 8 * width(hp)) + n_ubatch * hp.n_expert * 4
    }

    pub(super) fn new(gpu: &Gpu, hp: &HParams, n_ubatch: usize) -> Result<Self, CudaError> {
        let tokens = tokens(hp, n_ubatch, COLUMNS[0]);
        let columns = tokens * hp.n_expert_used;
        let q8 = if hp.n_ff_exp.is_multiple_of(32) {
            Some((
                gpu.alloc(columns * hp.n_ff_exp)?,
                gpu.alloc(columns * hp.n_ff_exp / 4)?,
            ))
        } else {
            None
        };
        let (mut sorted, mut columns) = (None, columns);
        if let Some(tokens) = grouped_tokens(hp, n_ubatch) {
            columns = columns.max(tokens * hp.n_expert_used);
            sorted = Some(Sorted {
                grouped: Grouped::new(gpu, columns, hp.n_expert, width(hp).max(hp.n_ff_exp))?,
                y: gpu.alloc(columns * width(hp) * 4)?,
                tokens,
            });
        }
        Ok(Self {
            sorted,
            logits: gpu.alloc(n_ubatch * hp.n_expert * 4)?,
            ids: gpu.alloc(n_ubatch * hp.n_expert_used * 4)?,
            weights: gpu.alloc(n_ubatch * hp.n_expert_used * 4)?,
            arrived: gpu.alloc(n_ubatch * 4)?,
            hidden: [
                gpu.alloc(columns * hp.n_ff_exp * 4)?,
                gpu.alloc(columns * hp.n_ff_exp * 4)?,
            ],
            q8,
            tokens,
        })
    }
}
