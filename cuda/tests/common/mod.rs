//! What the kernel tests share: devices, random numbers, comparison.
#![allow(dead_code, unreachable_pub, reason = "not every test uses everything")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

pub mod pages;
pub mod pool;
pub mod weights;

use lemma_cuda::ops::Glu;
use lemma_cuda::{Buffer, Gpu, View};

/// The devices to test on: real ones, and the emulator where it was built.
pub fn gpus() -> Vec<Gpu> {
    let mut all = Vec::new();
    #[cfg(feature = "emulate")]
    all.extend([Gpu::emulated(false), Gpu::emulated(true)]);
    let found = lemma_cuda::devices();
    if let Some(info) = found.list.first() {
        all.push(Gpu::open(info.ordinal).expect("a device that can be opened"));
    } else if all.is_empty() {
        eprintln!("skipped: {}", found.reason.unwrap_or_default());
    }
    all
}

/// Whether a device is the emulator, for which large shapes take too long.
pub fn is_slow(gpu: &Gpu) -> bool {
    gpu.info().name == "emulator"
}

/// A small generator of random numbers.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next()) * n as u64) >> 32) as usize
    }

    /// Roughly normal, by the sum of four.
    pub fn normal(&mut self) -> f32 {
        (0..4)
            .map(|_| self.next() as f32 / u32::MAX as f32 - 0.5)
            .sum::<f32>()
            * 1.7
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// Normalised mean squared error; infinite for anything that is not a number.
pub fn nmse(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error: f64 = got
        .iter()
        .zip(want)
        .map(|(g, w)| (f64::from(*g) - w).powi(2))
        .sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    let e = error / norm.max(1e-30);
    if e.is_finite() { e } else { f64::INFINITY }
}

pub fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn bytes_of(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn upload(gpu: &Gpu, x: &[f32]) -> Buffer {
    gpu.buffer_of(&bytes_of(x)).expect("upload")
}

pub fn upload_u32(gpu: &Gpu, x: &[u32]) -> Buffer {
    gpu.buffer_of(&x.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
        .expect("upload")
}

/// A buffer of `n` numbers that are NaN, so that what is not written shows.
pub fn poisoned(gpu: &Gpu, n: usize) -> Buffer {
    gpu.buffer_of(&vec![0xff; n * 4]).expect("upload")
}

pub fn read(gpu: &Gpu, view: View) -> Vec<f32> {
    gpu.read(view)
        .expect("read")
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("four")))
        .collect()
}

/// Every kind of gate.
pub const GLUS: [Glu; 4] = [Glu::Swiglu, Glu::SwigluOai, Glu::Geglu, Glu::Reglu];

/// What a kind makes of a gate and of what goes up beside it.
pub fn gated(kind: Glu, g: f64, u: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match kind {
        Glu::Swiglu => g * sigmoid(g) * u,
        Glu::SwigluOai => {
            let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
            g * sigmoid(1.702 * g) * (u + 1.0)
        }
        Glu::Geglu => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh()) * u
        }
        Glu::Reglu => g.max(0.0) * u,
    }
}
