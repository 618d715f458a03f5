//! Device memory that passes work in: the KV pool and the scratch of experts.

use lemma_cuda::ops::{self, Heads};
use lemma_cuda::{Buffer, CudaError, Gpu, View};

use crate::arch::HParams;
use crate::kv::{Layout, PAGE};

type Done = Result<(), CudaError>;

/// The KV pool on the device, and what goes with its pages.
pub(super) struct Pool {
    /// Keys of each region (a layer, or all layers that share a budget), `[slots, PAGE, n_head_kv, head_dim]` f16.
    k: Vec<Buffer>,
    /// Values likewise.
    v: Vec<Buffer>,
    /// The region of each layer.
    region: Vec<usize>,
    /// `[n_layer, max_pages]` pairs of slot and first position.
    pub(super) tables: Buffer,
    /// `[n_layer, max_pages]` masses of the last step.
    pub(super) masses: Buffer,
    pub(super) sums: Buffer,
    pub(super) ml: Buffer,
    pub(super) page_ml: Buffer,
    pub(super) splits: usize,
    pub(super) n_slots: usize,
    /// Pages that the table of a layer holds at most.
    pub(super) max_pages: usize,
}

/// Bytes of the keys of region `r`, and of its values.
fn region_bytes(h: Heads, layout: &Layout, r: usize) -> usize {
    layout.region(0, r).n_blocks * PAGE * h.n_head_kv * h.head_dim * 2
}

impl Pool {
    pub(super) fn new(gpu: &Gpu, h: Heads, layout: &Layout) -> Result<Self, CudaError> {
        let regions = || {
            (0..layout.n_regions())
                .map(|r| gpu.alloc(region_bytes(h, layout, r)))
                .collect::<Result<Vec<_>, _>>()
        };
        Self::around(gpu, h, regions()?, regions()?, layout)
    }

    /// Tables and scratch for a pool of this size.
    fn around(
        gpu: &Gpu,
        h: Heads,
        k: Vec<Buffer>,
        v: Vec<Buffer>,
        layout: &Layout,
    ) -> Result<Self, CudaError> {
        let n_layer = layout.n_layer;
        let max_pages = (0..layout.n_tables())
            .map(|t| layout.max_pages(t))
            .max()
            .unwrap_or(0);
        let splits = ops::splits(gpu, h, max_pages);
        Ok(Self {
            tables: gpu.alloc(n_layer * max_pages * 8)?,
            masses: gpu.alloc(n_layer * max_pages * 4)?,
            sums: gpu.alloc(h.n_head * splits * h.head_dim * 4)?,
            ml: gpu.alloc(h.n_head * splits * 8)?,
            page_ml: gpu.alloc(h.n_head * max_pages * 8)?,
            k,
            v,
            region: (0..n_layer).map(|il| layout.region_of(il)).collect(),
            splits,
            n_slots: layout.n_slots,
            max_pages,
        })
    }

    /// Moves to a larger pool, region by region, so that only one is held twice.
    pub(super) fn grow(&mut self, gpu: &Gpu, h: Heads, layout: &Layout) -> Done {
        for buffers in [&mut self.k, &mut self.v] {
            for (r, old) in buffers.iter_mut().enumerate() {
                let new = gpu.alloc(region_bytes(h, layout, r))?;
                gpu.copy(new.view().slice(0, old.view().bytes()), old.view())?;
                *old = new;
            }
        }
        let (k, v) = (std::mem::take(&mut self.k), std::mem::take(&mut self.v));
        *self = Self::around(gpu, h, k, v, layout)?;
        Ok(())
    }

    /// Where keys and values of layer `il` are stored.
    pub(super) fn kv(&self, il: usize) -> (View, View) {
        let r = self.region[il];
        (self.k[r].view(), self.v[r].view())
    }

    pub(super) fn table(&self, il: usize) -> View {
        self.tables
            .view()
            .slice(il * self.max_pages * 8, self.max_pages * 8)
    }
}

/// Scratch of a mixture of experts.
pub(super) struct Moe {
    /// `[n_ubatch, n_expert]`
    pub(super) logits: Buffer,
    /// `[n_ubatch, n_expert_used]`
    pub(super) ids: Buffer,
    /// `[n_ubatch, n_expert_used]`
    pub(super) weights: Buffer,
    /// `[columns, n_ff]`, twice: gate and up.
    pub(super) hidden: [Buffer; 2],
    /// The first of them quantized, if `n_ff` is a multiple of 32.
    pub(super) q8: Option<(Buffer, Buffer)>,
    /// `[columns, n_embd]`
    pub(super) y: Buffer,
    /// Tokens of a batch of experts.
    pub(super) tokens: usize,
}

impl Moe {
    pub(super) fn new(
        gpu: &Gpu,
        hp: &HParams,
        n_ubatch: usize,
        columns: usize,
    ) -> Result<Self, CudaError> {
        let tokens = (columns / hp.n_expert_used).clamp(1, n_ubatch);
        let columns = tokens * hp.n_expert_used;
        let q8 = if hp.n_ff.is_multiple_of(32) {
            Some((
                gpu.alloc(columns * hp.n_ff)?,
                gpu.alloc(columns * hp.n_ff / 4)?,
            ))
        } else {
            None
        };
        Ok(Self {
            logits: gpu.alloc(n_ubatch * hp.n_expert * 4)?,
            ids: gpu.alloc(n_ubatch * hp.n_expert_used * 4)?,
            weights: gpu.alloc(n_ubatch * hp.n_expert_used * 4)?,
            hidden: [
                gpu.alloc(columns * hp.n_ff * 4)?,
                gpu.alloc(columns * hp.n_ff * 4)?,
            ],
            q8,
            y: gpu.alloc(columns * hp.n_embd * 4)?,
            tokens,
        })
    }
}
