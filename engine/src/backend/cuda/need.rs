//! What of a model is on a device, and what that takes.

use std::collections::HashSet;
use std::ops::Range;

use lemma_cuda::Gpu;
use lemma_cuda::ops::Half;
use lemma_quant::GgmlType;

use super::super::{Buf, Tensor};
use super::buffers::Moe;
use super::host::StepLayout;
use super::recurrent::States;
use crate::arch::{ArchModel, Binder, HParams, Widths};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::memory::show;
use crate::options::LoadOptions;
use crate::report;
use crate::session::MAX_SCORE_LOGITS;

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

    /// The next smaller part: one layer's experts less, or one layer.
    pub fn less(self, hp: &HParams) -> Self {
        match hp.n_expert > 0 && self.experts < hp.n_layer {
            true => Self {
                experts: self.experts + 1,
                ..self
            },
            false => Self {
                first: self.first + 1,
                ..self
            },
        }
    }

    /// Whether a tensor of those layers stays where the file has it.
    pub(super) fn leaves(&self, t: &Tensor) -> bool {
        t.experts_of.is_some_and(|il| il < self.experts)
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
    /// Bytes of its tensors as the file has them.
    pub(super) in_file: u64,
    weights: u64,
    pool: u64,
    scratch: u64,
}

/// What a driver gives for so many bytes: from 1 MiB on whole blocks of 2 (measured).
fn taken(bytes: usize) -> u64 {
    let block = if bytes > 1 << 20 { 2 << 20 } else { 512 };
    (bytes as u64).next_multiple_of(block)
}

impl Need {
    /// Of a part of a model beside a pool of so many bytes, whose tables take so many `tables`.
    pub(super) fn new(
        file: &GgufFile,
        hp: &HParams,
        [pool, tables]: [u64; 2],
        n_ubatch: usize,
        split: Split,
    ) -> Result<Self, Error> {
        let (mut in_file, mut weights, mut known) = (0u64, 0u64, HashSet::new());
        let mut count = |t: Tensor| {
            // What is not copied is there once, however often it is bound.
            let copied = t.bytes.is_empty();
            if !split.leaves(&t) && (copied || known.insert(t.bytes.as_ptr())) {
                in_file += t.n_bytes() as u64;
                // Rows are padded, and formats without kernels become f16.
                let row = || lemma_cuda::row_bytes(t.ty, t.n_in);
                let row = row().or_else(|| lemma_cuda::row_bytes(GgmlType::F16, t.n_in));
                weights += taken(match t.vector {
                    true => 4 * t.n_in,
                    false => row.unwrap_or(0).saturating_mul(t.n_out),
                });
            }
            Ok(())
        };
        let binder = Binder::new(file, &mut count).part(split.layers(hp));
        ArchModel::bind(hp, &mut binder.dry())?;
        let widths = Widths::of(hp);
        // In f32, and once more quantized.
        let buffers = Buf::ALL.iter().map(|&b| n_ubatch * widths.get(b));
        let buffers: u64 = buffers
            .map(|n| taken(4 * n) + taken(n) + taken(n / 4))
            .sum();
        let widest = Buf::ALL.iter().map(|&b| widths.get(b)).max().unwrap_or(0);
        let half = match n_ubatch {
            0..Half::MIN_TOKENS => 0,
            _ => Half::bytes(n_ubatch, widest),
        };
        // What experts on the CPU say, if some are there.
        let hosted = match hp.n_expert {
            0 => 0,
            _ => taken(4 * n_ubatch * hp.n_expert_latent.unwrap_or(hp.n_embd)),
        };
        let logits = MAX_SCORE_LOGITS.min(n_ubatch * hp.n_vocab).max(hp.n_vocab) + hp.n_vocab;
        let others = [
            half,
            Moe::bytes(hp, n_ubatch),
            4 * logits,
            StepLayout::new(hp, n_ubatch).bytes(),
        ];
        // Kernels, staging of uploads, what is small.
        let rest = 96 << 20;
        let scratch = others.map(taken).iter().sum::<u64>() + buffers + hosted + tables + rest;
        Ok(Self {
            split,
            in_file,
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
