//! Experts that stay where the file has them, and that the CPU runs: of all weights of a large mixture most are theirs, and a token reads few of
//! them. What they read comes to the host, what they say goes back, and meanwhile the device waits.

use std::fmt;

use lemma_cpu::{Limits, Ops, Shared};
use lemma_cuda::{Buffer, Gpu, Pinned, ops};

use super::super::{CudaWeight, Split};
use super::{Done, Pass};
use crate::arch::HParams;
use crate::backend::cpu::{CpuWeight, moe_ffn, ops_of};
use crate::backend::{Buf, Moe};
use crate::error::Error;
use crate::options::LoadOptions;

/// Workers, and what travels.
pub(in super::super) struct Hosted {
    ops: Ops,
    /// Layers that have such experts.
    n_layer: usize,
    /// `[n_ubatch, n_embd]` of what experts read, and of what they say.
    x: Shared<f32>,
    y: Shared<f32>,
    down: Pinned,
    up: Pinned,
    said: Buffer,
}

impl Hosted {
    /// Nothing where the device has all experts of its layers.
    pub(in super::super) fn of(
        gpu: &Gpu,
        hp: &HParams,
        o: &LoadOptions,
        n_ubatch: usize,
        split: Split,
    ) -> Result<Option<Self>, Error> {
        if !split.has_experts(hp) {
            return Ok(None);
        }
        let limits = Limits {
            max_tokens: n_ubatch,
            max_width: hp.n_embd.max(hp.n_ff_exp),
            n_ff_expert: hp.n_ff_exp,
            n_embd_expert: hp.n_embd,
            n_expert: hp.n_expert,
            n_expert_used: hp.n_expert_used,
            ..Limits::default()
        };
        let n = n_ubatch * hp.n_embd;
        Ok(Some(Self {
            ops: ops_of(o, limits)?,
            n_layer: split.experts - split.first.max(hp.routing.n_dense),
            x: Shared::zeroed(n),
            y: Shared::zeroed(n),
            down: gpu.pinned(n * 4)?,
            up: gpu.pinned(n * 4)?,
            said: gpu.alloc(n * 4)?,
        }))
    }
}

impl fmt::Display for Hosted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, s) = (self.n_layer, if self.n_layer == 1 { "" } else { "s" });
        let (isa, n_threads) = (self.ops.isa(), self.ops.team().n_threads());
        let t = if n_threads == 1 { "" } else { "s" };
        write!(
            f,
            "the experts of {n} layer{s} on the CPU ({isa}, {n_threads} thread{t})"
        )
    }
}

impl AsRef<CpuWeight> for CudaWeight {
    fn as_ref(&self) -> &CpuWeight {
        match self {
            Self::Host(w) => w,
            Self::Mat(_) | Self::Vec(_) => unreachable!("experts are all on one side"),
        }
    }
}

impl Pass {
    /// `acc += experts(x)`
    pub(super) fn hosted_experts(&mut self, acc: Buf, x: Buf, moe: &Moe<CudaWeight>) -> Done {
        self.flush()?;
        self.fresh[acc as usize] = false;
        let n = self.n * self.widths.get(x);
        let (from, to) = (self.view(x).slice(0, n * 4), self.view(acc));
        let Some(h) = &mut self.hosted else {
            return Err(super::experts::no_room());
        };
        h.down.download(0, from)?;
        h.down.bytes()?;
        h.x.as_mut_slice()[..n].copy_from_slice(&h.down.settled_f32()[..n]);
        h.y.as_mut_slice()[..n].fill(0.0);
        let (f, n_tokens) = (moe_ffn(moe), self.n);
        h.ops
            .run_some(n_tokens, |pass| pass.moe_ffn(&h.y, &h.x, &f, n_tokens));
        let said = &h.y.as_mut_slice()[..n];
        let bytes = h.up.bytes_mut()?.as_chunks_mut::<4>().0;
        for (to, x) in bytes.iter_mut().zip(said) {
            *to = x.to_ne_bytes();
        }
        let at = h.said.view().slice(0, n * 4);
        h.up.upload(0, at)?;
        ops::add_scaled(&self.gpu, to, 1.0, Some(at), n)
    }
}
