//! Weights on their way to the device.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use lemma_cuda::ops::Half;
use lemma_cuda::{Gpu, Source, Uploader};

use super::super::{Buf, Tensor};
use super::CudaWeight;
use super::buffers::Moe;
use super::recurrent::States;
use crate::arch::{ArchModel, Binder, HParams, Widths};
use crate::error::Error;
use crate::gguf::{Bytes, GgufFile};
use crate::memory::show;
use crate::report;

/// What a model takes on a device.
pub(super) struct Need {
    /// The first layer that is there.
    first: usize,
    weights: u64,
    pool: u64,
    scratch: u64,
}

impl Need {
    /// Of the layers from `first` on and what comes behind them, beside a pool of so many bytes.
    pub(super) fn new(
        file: &GgufFile,
        hp: &HParams,
        pool: u64,
        n_ubatch: usize,
        first: usize,
    ) -> Self {
        let mut weights = (file.tensors())
            .filter(|t| is_there(&t.name, first, file))
            .map(|t| t.n_bytes() as u64)
            .sum::<u64>();
        if let Some(l) = hp
            .latent
            .filter(|_| file.tensor("blk.0.attn_kv_b.weight").is_some())
        {
            // Files of before have matrices of heads for keys and values in one; what makes keys is turned, and f16 then.
            let n_layer = hp.n_layer - first;
            let keys = n_layer * hp.n_head * l.kv_lora * l.head_dim.saturating_sub(hp.n_rot);
            weights = weights.saturating_add(2 * keys as u64);
        }
        let widths = Widths::of(hp);
        let token: usize = Buf::ALL.iter().map(|&b| widths.get(b)).sum();
        let widest = Buf::ALL.iter().map(|&b| widths.get(b)).max().unwrap_or(0);
        let half = match n_ubatch {
            0..Half::MIN_TOKENS => 0,
            _ => Half::bytes(n_ubatch, widest),
        };
        let moe = Moe::bytes(hp, n_ubatch);
        let scratch = (n_ubatch * token * 6 + hp.n_vocab * 4 + half + moe) as u64 + (64 << 20);
        Self {
            first,
            weights,
            pool,
            scratch: scratch.saturating_add(States::bytes(hp, n_ubatch)),
        }
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

/// Whether a tensor is among those of the layers from `first` on and of what comes behind.
fn is_there(name: &str, first: usize, file: &GgufFile) -> bool {
    let il = (name.strip_prefix("blk.")).and_then(|n| n.split('.').next()?.parse::<usize>().ok());
    match il {
        Some(il) => il >= first,
        None if name == "token_embd.weight" => first == 0 || file.tensor("output.weight").is_none(),
        None => true,
    }
}

/// Binds the tensors of a part of a model to device memory; one that is bound twice (a tied output) is uploaded once.
pub(super) fn upload(
    gpu: &Gpu,
    file: &GgufFile,
    hp: &HParams,
    need: &Need,
    on_upload: Option<fn(u64, u64)>,
) -> Result<ArchModel<CudaWeight>, Error> {
    let start = Instant::now();
    let all = need.weights;
    let mut uploader = Uploader::new(gpu)?;
    // With the bytes themselves: some are copies, and another must not come to lie where one has been.
    let mut known: HashMap<*const u8, (CudaWeight, Bytes)> = HashMap::new();
    let mut bytes = 0;
    let mut converted: Vec<&str> = Vec::new();
    let mut make = |t: Tensor| -> Result<CudaWeight, Error> {
        let at = t.bytes.as_ptr();
        if let Some((w, _)) = known.get(&at) {
            return Ok(w.clone());
        }
        let made = if t.vector {
            let data: Vec<u8> = t.to_f32().iter().flat_map(|v| v.to_le_bytes()).collect();
            CudaWeight::Vec(Arc::new(gpu.buffer_of(&data)?))
        } else {
            if !lemma_cuda::has_kernels(t.ty) && !converted.contains(&t.ty.name()) {
                converted.push(t.ty.name());
                log::info!("{} has no CUDA kernels yet: converted to f16", t.ty.name());
            }
            CudaWeight::Mat(Arc::new(uploader.upload(Source {
                ty: t.ty,
                n_in: t.n_in,
                n_row: t.n_out,
                data: &t.bytes,
            })?))
        };
        bytes += t.bytes.len() as u64;
        if let Some(report) = on_upload {
            report(bytes, all);
        }
        known.insert(at, (made.clone(), t.bytes));
        Ok(made)
    };
    let part = need.first..hp.n_layer;
    let model = ArchModel::bind(hp, &mut Binder::new(file, &mut make).part(part))?;
    gpu.synchronize()?;
    // Not every tensor of a file is one that the model uses.
    if let Some(report) = on_upload {
        report(all, all);
    }
    let s = start.elapsed().as_secs_f64();
    log::info!("{} of weights uploaded in {s:.2} s", show(bytes));
    Ok(model)
}
