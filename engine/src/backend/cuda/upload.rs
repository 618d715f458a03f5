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

/// Refuses a model that the device cannot hold.
pub(super) fn check_memory(
    gpu: &Gpu,
    file: &GgufFile,
    hp: &HParams,
    widths: &Widths,
    pool: u64,
    n_ubatch: usize,
) -> Result<(), Error> {
    let mut weights = file.n_tensor_bytes();
    if let Some(l) = hp
        .latent
        .filter(|_| file.tensor("blk.0.attn_kv_b.weight").is_some())
    {
        // Files of before have matrices of heads for keys and values in one; what makes keys is turned, and f16 then.
        let keys = hp.n_layer * hp.n_head * l.kv_lora * l.head_dim.saturating_sub(hp.n_rot);
        weights = weights.saturating_add(2 * keys as u64);
    }
    let token: usize = Buf::ALL.iter().map(|&b| widths.get(b)).sum();
    let widest = Buf::ALL.iter().map(|&b| widths.get(b)).max().unwrap_or(0);
    let half = match n_ubatch {
        0..Half::MIN_TOKENS => 0,
        _ => Half::bytes(n_ubatch, widest),
    };
    let moe = Moe::bytes(hp, n_ubatch);
    let scratch = (n_ubatch * token * 6 + hp.n_vocab * 4 + half + moe) as u64 + (64 << 20);
    let scratch = scratch.saturating_add(States::bytes(hp, n_ubatch));
    let need = weights.saturating_add(pool).saturating_add(scratch);
    let (free, _) = gpu.memory()?;
    if need > free as u64 {
        return Err(report::memory(
            format!(
                "weights of {}, a KV pool of {} and {} of scratch",
                show(weights),
                show(pool),
                show(scratch)
            ),
            format!(
                "at most the {} that are free on {}",
                show(free as u64),
                gpu.info()
            ),
        ));
    }
    Ok(())
}

/// Binds every tensor to device memory; one that is bound twice (a tied output) is uploaded once.
pub(super) fn upload(
    gpu: &Gpu,
    file: &GgufFile,
    hp: &HParams,
    on_upload: Option<fn(u64, u64)>,
) -> Result<ArchModel<CudaWeight>, Error> {
    let start = Instant::now();
    let all = file.n_tensor_bytes();
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
    let model = ArchModel::bind(hp, &mut Binder::new(file, &mut make))?;
    gpu.synchronize()?;
    // Not every tensor of a file is one that the model uses.
    if let Some(report) = on_upload {
        report(all, all);
    }
    let s = start.elapsed().as_secs_f64();
    log::info!("{} of weights uploaded in {s:.2} s", show(bytes));
    Ok(model)
}
