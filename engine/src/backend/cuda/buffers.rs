//! Device memory that passes work in: the KV pool and the scratch of experts.

use lemma_cuda::ops::{self, Heads};
use lemma_cuda::{Buffer, CudaError, Gpu, View};

use crate::arch::HParams;
use crate::kv::PAGE;

type Done = Result<(), CudaError>;

/// The KV pool on the device, and what goes with its pages.
pub(super) struct Pool {
    /// Keys of each layer, `[slots, PAGE, n_head_kv, head_dim]` f16.
    pub(super) k: Vec<Buffer>,
    /// Values likewise.
    pub(super) v: Vec<Buffer>,
    /// `[n_layer, slots]` pairs of slot and first position.
    pub(super) tables: Buffer,
    /// `[n_layer, slots]` masses of the last step.
    pub(super) masses: Buffer,
    pub(super) sums: Buffer,
    pub(super) ml: Buffer,
    pub(super) page_ml: Buffer,
    pub(super) splits: usize,
    pub(super) n_slots: usize,
}

impl Pool {
    pub(super) fn new(
        gpu: &Gpu,
        h: Heads,
        n_layer: usize,
        n_slots: usize,
    ) -> Result<Self, CudaError> {
        let layer = || gpu.alloc(n_slots * PAGE * h.n_head_kv * h.head_dim * 2);
        let k = (0..n_layer).map(|_| layer()).collect::<Result<_, _>>()?;
        let v = (0..n_layer).map(|_| layer()).collect::<Result<_, _>>()?;
        Self::around(gpu, h, k, v, n_slots)
    }

    /// Tables and scratch for a pool of this size.
    fn around(
        gpu: &Gpu,
        h: Heads,
        k: Vec<Buffer>,
        v: Vec<Buffer>,
        n_slots: usize,
    ) -> Result<Self, CudaError> {
        let (n_layer, splits) = (k.len(), ops::splits(gpu, h, n_slots));
        Ok(Self {
            tables: gpu.alloc(n_layer * n_slots * 8)?,
            masses: gpu.alloc(n_layer * n_slots * 4)?,
            sums: gpu.alloc(h.n_head * splits * h.head_dim * 4)?,
            ml: gpu.alloc(h.n_head * splits * 8)?,
            page_ml: gpu.alloc(h.n_head * n_slots * 8)?,
            k,
            v,
            splits,
            n_slots,
        })
    }

    /// Moves to a larger pool, layer by layer, so that only one layer is held twice.
    pub(super) fn grow(&mut self, gpu: &Gpu, h: Heads, n_slots: usize) -> Done {
        for old in self.k.iter_mut().chain(&mut self.v) {
            let new = gpu.alloc(n_slots * PAGE * h.n_head_kv * h.head_dim * 2)?;
            gpu.copy(new.view().slice(0, old.view().bytes()), old.view())?;
            *old = new;
        }
        let (k, v) = (std::mem::take(&mut self.k), std::mem::take(&mut self.v));
        *self = Self::around(gpu, h, k, v, n_slots)?;
        Ok(())
    }

    pub(super) fn table(&self, il: usize) -> View {
        self.tables
            .view()
            .slice(il * self.n_slots * 8, self.n_slots * 8)
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
