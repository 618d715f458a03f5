//! Devices for tests of the CUDA backend.

use lemma_cuda::Gpu;

/// Devices to test on: the first of the machine, and the emulator where it was built. Says so where there is none.
#[allow(clippy::print_stdout, reason = "what was not tested")]
pub fn gpus() -> Vec<Gpu> {
    let mut all = Vec::new();
    #[cfg(feature = "cuda-emulate")]
    all.push(Gpu::emulated(false));
    let found = lemma_cuda::devices();
    if let Some(info) = found.list.first() {
        all.push(Gpu::open(info.ordinal).unwrap());
    } else if all.is_empty() {
        println!("skipped: {}", found.reason.unwrap_or_default());
    }
    all
}

/// Whether a device is the emulator, for which less must do.
pub fn is_slow(gpu: &Gpu) -> bool {
    gpu.is_emulated()
}
