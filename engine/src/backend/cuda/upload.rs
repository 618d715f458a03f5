//! Weights on their way to the device.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use lemma_cuda::{Gpu, Source, Uploader};

use super::super::Tensor;
use super::super::cpu::CpuWeight;
use super::CudaWeight;
use super::need::Need;
use crate::arch::{ArchModel, Binder, HParams};
use crate::error::Error;
use crate::gguf::{Bytes, GgufFile};
use crate::memory::show;

/// Binds the tensors of a part of a model to device memory; one that is bound twice (a tied output) is uploaded once. With that comes in how
/// many layers there are experts that stayed.
pub(super) fn upload(
    gpu: &Gpu,
    file: &GgufFile,
    hp: &HParams,
    need: &Need,
    on_upload: Option<fn(u64, u64)>,
) -> Result<(ArchModel<CudaWeight>, usize), Error> {
    let start = Instant::now();
    let all = need.in_file;
    let mut uploader = Uploader::new(gpu)?;
    // With the bytes themselves: some are copies, and another must not come to lie where one has been.
    let mut known: HashMap<*const u8, (CudaWeight, Bytes)> = HashMap::new();
    let mut bytes = 0;
    let mut stayed = HashSet::new();
    let mut converted: Vec<&str> = Vec::new();
    let mut make = |t: Tensor| -> Result<CudaWeight, Error> {
        if need.split.leaves(&t) {
            stayed.extend(t.experts_of);
            return Ok(CudaWeight::Host(Arc::new(CpuWeight::new(t))));
        }
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
    let mut binder = Binder::new(file, &mut make).part(need.split.layers(hp));
    let model = ArchModel::bind(hp, &mut binder)?;
    gpu.synchronize()?;
    // Not every tensor of a file is one that the model uses.
    if let Some(report) = on_upload {
        report(all, all);
    }
    let s = start.elapsed().as_secs_f64();
    log::info!("{} of weights uploaded in {s:.2} s", show(bytes));
    Ok((model, stayed.len()))
}
