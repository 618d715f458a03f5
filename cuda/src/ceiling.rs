//! What a device's memory can do at most: the yardstick of decoding, which reads all weights for a token.

use std::time::Instant;

use crate::gpu::{CudaError, Gpu, Result};
use crate::ops;

/// Bytes that are read at once, if there is room: many times the caches of any device.
const BYTES: usize = 1 << 30;

/// Bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceiling {
    /// Of a kernel that reads and keeps nothing.
    pub read: f64,
    /// Of copies, what is read and what is written together.
    pub copy: f64,
}

/// Measures a device, the best of a few rounds each.
///
/// # Errors
/// Those of the driver; that there is no room.
pub fn ceiling(gpu: &Gpu) -> Result<Ceiling> {
    gpu.bind()?;
    let (free, _) = gpu.memory()?;
    // The emulator computes every read.
    let most = if gpu.is_emulated() { 1 << 20 } else { BYTES };
    let bytes = most.min(free / 4) / 4096 * 4096;
    if bytes < most / 4 {
        return Err(CudaError(format!(
            "no room to read from: {free} bytes are free"
        )));
    }
    let (a, b, out) = (gpu.alloc(bytes)?, gpu.alloc(bytes)?, gpu.alloc(4)?);
    let best = |work: &dyn Fn() -> Result<()>| -> Result<f64> {
        let (rounds, each) = if gpu.is_emulated() { (1, 1) } else { (8, 8) };
        let mut best = f64::INFINITY;
        for _ in 0..rounds {
            gpu.synchronize()?;
            let start = Instant::now();
            for _ in 0..each {
                work()?;
            }
            gpu.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64() / f64::from(each));
        }
        Ok(best.max(1e-9))
    };
    Ok(Ceiling {
        read: bytes as f64 / best(&|| ops::read_all(gpu, a.view(), out.view()))?,
        copy: 2.0 * bytes as f64 / best(&|| gpu.copy(b.view(), a.view()))?,
    })
}
