//! Experts that stay where the file has them, and that the CPU runs: of all weights of a large mixture most are theirs, and a token reads few of
//! them. What they read comes to the host, what they say goes back, and meanwhile the device waits.

use std::fmt;

use lemma_cpu::{Limits, Ops, Shared};
use lemma_cuda::{Buffer, Gpu, Pinned, ops};

use super::super::CudaWeight;
use super::super::host::put;
use super::{Done, Pass};
use crate::arch::HParams;
use crate::backend::cpu::{CpuWeight, moe_ffn, ops_of, workers};
use crate::backend::{Buf, Moe};
use crate::error::Error;
use crate::options::LoadOptions;

/// Workers, and what travels.
pub(in super::super) struct Hosted {
    ops: Ops,
    /// Layers that have such experts.
    n_layer: usize,
    /// `[n_ubatch, width]` of what experts read, and of what they say.
    x: Shared<f32>,
    y: Shared<f32>,
    /// `[n_ubatch, n_expert]`, products of a router apart from the experts.
    route: Shared<f32>,
    down: Pinned,
    up: Pinned,
    said: Buffer,
}

impl Hosted {
    /// For so many layers; nothing where the device has all experts.
    pub(in super::super) fn of(
        gpu: &Gpu,
        hp: &HParams,
        o: &LoadOptions,
        n_ubatch: usize,
        n_layer: usize,
    ) -> Result<Option<Self>, Error> {
        if n_layer == 0 {
            return Ok(None);
        }
        let width = hp.n_expert_latent.unwrap_or(hp.n_embd);
        let (n, n_route) = (n_ubatch * width, n_ubatch * hp.n_expert);
        let limits = Limits {
            max_tokens: n_ubatch,
            max_width: hp.n_embd.max(hp.n_ff_exp).max(width),
            n_ff_expert: hp.n_ff_exp,
            n_embd_expert: width,
            n_expert: hp.n_expert,
            n_expert_used: hp.n_expert_used,
            ..Limits::default()
        };
        Ok(Some(Self {
            ops: ops_of(o, limits)?,
            n_layer,
            x: Shared::zeroed(n),
            y: Shared::zeroed(n),
            route: Shared::zeroed(n_route),
            down: gpu.pinned((n + n_route) * 4)?,
            up: gpu.pinned(n * 4)?,
            said: gpu.alloc(n * 4)?,
        }))
    }
}

impl fmt::Display for Hosted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, s) = (self.n_layer, if self.n_layer == 1 { "" } else { "s" });
        let workers = workers(&self.ops);
        write!(f, "the experts of {n} layer{s} on the CPU ({workers})")
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
    /// `out += experts(x)`, or `out = experts(x)` where a router's products are there already: `route`.
    pub(super) fn hosted_experts(
        &mut self,
        out: Buf,
        x: Buf,
        route: Option<Buf>,
        moe: &Moe<CudaWeight>,
    ) -> Done {
        let n_tokens = self.n;
        let n = n_tokens * self.widths.get(x);
        let from = self.view(x).slice(0, n * 4);
        let routes = route.map(|b| self.view(b).slice(0, n_tokens * moe.n_expert * 4));
        let to = self.view(out).slice(0, n * 4);
        let Some(h) = &mut self.hosted else {
            return Err(super::experts::no_room());
        };
        h.down.download(0, from)?;
        if let Some(routes) = routes {
            h.down.download(n * 4, routes)?;
        }
        h.down.bytes()?;
        let (read, routed) = h.down.settled_f32().split_at(n);
        h.x.as_mut_slice()[..n].copy_from_slice(read);
        let f = moe_ffn(moe);
        match routes {
            Some(_) => {
                let n_route = n_tokens * moe.n_expert;
                h.route.as_mut_slice()[..n_route].copy_from_slice(&routed[..n_route]);
                h.ops.run_some(n_tokens, |pass| {
                    pass.moe_ffn_routed(&h.y, [&h.x, &h.route], &f, n_tokens);
                });
            }
            None => {
                h.y.as_mut_slice()[..n].fill(0.0);
                h.ops
                    .run_some(n_tokens, |pass| pass.moe_ffn(&h.y, &h.x, &f, n_tokens));
            }
        }
        let said = h.y.as_mut_slice()[..n].iter();
        put(h.up.bytes_mut()?, 0, said.map(|x| x.to_bits()));
        match route {
            Some(_) => h.up.upload(0, to),
            None => {
                let at = h.said.view().slice(0, n * 4);
                h.up.upload(0, at)?;
                ops::add_scaled(&self.gpu, to, 1.0, Some(at), n)
            }
        }
    }
}
