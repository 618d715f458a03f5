//! What of a model is on a device, and what that takes.

use std::collections::HashSet;
use std::ops::Range;

use lemma_cuda::Gpu;
use lemma_cuda::ops::Half;

use super::super::{Buf, Tensor};
use super::buffers::Moe;
use super::recurrent::States;
use crate::arch::{ArchModel, Binder, HParams, Widths};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::memory::show;
use crate::options::LoadOptions;
use crate::report;

/// What of a model is on a device: all of it by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// The first layer that is there; those that follow are as well, and so is the output.
    pub first: usize,
    /// Layers from 0 on whose routed experts are not: the CPU runs those.
    pub experts: usize,
}

impl Split {
    /// The layers that are on the device.
    pub fn layers(&self, hp: &HParams) -> Range<usize> {
        self.first..hp.n_layer
    }

    /// Whether a tensor of those layers stays where the file has it.
    pub(super) fn leaves(&self, t: &Tensor) -> bool {
        t.experts_of.is_some_and(|il| il < self.experts)
    }

    /// Whether there are experts that the CPU runs.
    pub(super) fn has_experts(&self, hp: &HParams) -> bool {
        hp.n_expert > 0 && self.experts > self.first.max(hp.routing.n_dense)
    }

    /// As much of a model as fits and as the options say. Experts leave first: of these the CPU reads a few for each token, of other layers all.
    /// What fits not at all is [`Split::default`].
    pub fn that_fits(hp: &HParams, o: &LoadOptions, fits: impl Fn(Split) -> bool) -> Self {
        let n = hp.n_layer;
        let most = if hp.n_expert > 0 { n } else { 0 };
        let layers = o.gpu_layers.map(|asked| n.saturating_sub(asked as usize));
        let experts = o.cpu_experts.map(|asked| most.min(asked as usize));
        let of = |first, experts| Split { first, experts };
        // The least of a range for which something is so that stays so.
        let least = |range: Range<usize>, is: &dyn Fn(usize) -> bool| {
            let (mut low, mut high) = (range.start, range.end);
            while low < high {
                let middle = low.midpoint(high);
                match is(middle) {
                    true => high = middle,
                    false => low = middle + 1,
                }
            }
            low
        };
        let first = layers.unwrap_or(0);
        let experts = experts.unwrap_or_else(|| least(0..most, &|e| fits(of(first, e))));
        let first = layers.unwrap_or_else(|| least(0..n, &|first| fits(of(first, experts))));
        match first < n {
            true => of(first, experts),
            false => Self::default(),
        }
    }
}

/// What a model takes on a device.
pub(super) struct Need {
    pub(super) split: Split,
    pub(super) weights: u64,
    pool: u64,
    scratch: u64,
}

impl Need {
    /// Of a part of a model beside a pool of so many bytes.
    pub(super) fn new(
        file: &GgufFile,
        hp: &HParams,
        pool: u64,
        n_ubatch: usize,
        split: Split,
    ) -> Result<Self, Error> {
        let (mut weights, mut known) = (0u64, HashSet::new());
        let mut count = |t: Tensor| {
            // What is not copied is there once, however often it is bound.
            let copied = t.bytes.is_empty();
            if !split.leaves(&t) && (copied || known.insert(t.bytes.as_ptr())) {
                weights += t.n_bytes() as u64;
            }
            Ok(())
        };
        let binder = Binder::new(file, &mut count).part(split.layers(hp));
        ArchModel::bind(hp, &mut binder.dry())?;
        let widths = Widths::of(hp);
        let token: usize = Buf::ALL.iter().map(|&b| widths.get(b)).sum();
        let widest = Buf::ALL.iter().map(|&b| widths.get(b)).max().unwrap_or(0);
        let half = match n_ubatch {
            0..Half::MIN_TOKENS => 0,
            _ => Half::bytes(n_ubatch, widest),
        };
        let moe = Moe::bytes(hp, n_ubatch);
        let scratch = (n_ubatch * token * 6 + hp.n_vocab * 4 + half + moe) as u64 + (64 << 20);
        Ok(Self {
            split,
            weights,
            pool,
            scratch: scratch.saturating_add(States::bytes(hp, n_ubatch)),
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        let all = self.weights.saturating_add(self.pool);
        all.saturating_add(self.scratch)
    }

    /// Refuses what the device cannot hold.
    pub(super) fn check(&self, gpu: &Gpu) -> Result<(), Error> {
        let (free, _) = gpu.memory()?;
        if self.bytes() <= free as u64 {
            return Ok(());
        }
        let [weights, pool, scratch] = [self.weights, self.pool, self.scratch].map(show);
        Err(report::memory(
            format!("weights of {weights}, a KV pool of {pool} and {scratch} of scratch"),
            format!(
                "at most the {} that are free on {}",
                show(free as u64),
                gpu.info()
            ),
        ))
    }
}
