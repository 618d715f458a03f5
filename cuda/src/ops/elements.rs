//! What is done to activations element by element, or row by row.

use super::{at, check, launch};
use crate::args;
use crate::gpu::{Gpu, Result, View};

/// What feed-forward blocks without gates make of each element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(x, 0)²`
    ReluSqr,
    /// `alpha_p x² + beta x` where x is positive, elsewhere `alpha_n (exp(min(x, eps)) - 1 - x) + beta x`.
    #[allow(missing_docs)]
    Xielu {
        alpha_n: f32,
        alpha_p: f32,
        beta: f32,
        eps: f32,
    },
    /// GELU by the tanh formula (arXiv 1606.08415).
    Gelu,
}

impl Activation {
    /// As kernels have it.
    pub(crate) fn args(self) -> args::ActivationParams {
        let none = args::ActivationParams::default();
        match self {
            Self::ReluSqr => args::ActivationParams { kind: 1, ..none },
            Self::Gelu => args::ActivationParams { kind: 3, ..none },
            Self::Xielu {
                alpha_n,
                alpha_p,
                beta,
                eps,
            } => args::ActivationParams {
                kind: 2,
                alpha_n,
                alpha_p,
                beta,
                eps,
            },
        }
    }
}

/// `x = by(x)`.
///
/// # Errors
/// Those of the driver.
pub fn activate(gpu: &Gpu, x: View, by: Activation, n_elem: usize) -> Result<()> {
    check(x, n_elem);
    let a = args::Activate {
        x: x.at,
        n_elem: n_elem as u64,
        by: by.args(),
        pad: 0,
    };
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}

/// `x *= sigmoid(gate)` of `n` rows: x `[n, width]`, gate `[n, n_gate]`, one element of it for several of x that lie side by side.
///
/// # Errors
/// Those of the driver.
pub fn sigmoid_mul(
    gpu: &Gpu,
    x: View,
    gate: View,
    n: usize,
    [width, n_gate]: [usize; 2],
) -> Result<()> {
    check(x, n * width);
    check(gate, n * n_gate);
    assert!(n_gate > 0 && width.is_multiple_of(n_gate));
    let n_elem = n * width;
    let a = args::SigmoidMul {
        x: x.at,
        gate: gate.at,
        n_elem: n_elem as u64,
        width: width as u32,
        n_gate: n_gate as u32,
    };
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}

/// `x -= mean(x)` of each row of x, `[n, width]`.
///
/// # Errors
/// Those of the driver.
pub fn center(gpu: &Gpu, x: View, n: usize, width: usize) -> Result<()> {
    check(x, n * width);
    let a = args::Center {
        x: x.at,
        width: width as u32,
        pad: 0,
    };
    let block = width.div_ceil(4).next_multiple_of(32).clamp(32, 1024) as u32;
    gpu.launch(launch([n, 1, 1], block, 0), &a)
}

/// `x = cap * tanh(x / cap)`; `cap` is positive.
///
/// # Errors
/// Those of the driver.
pub fn soft_cap(gpu: &Gpu, x: View, cap: f32, n_elem: usize) -> Result<()> {
    check(x, n_elem);
    assert!(cap > 0.0, "a bound of {cap}");
    let a = args::SoftCap {
        x: x.at,
        n_elem: n_elem as u64,
        cap,
        pad: 0,
    };
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}

/// `x = factor * x (+ y)`.
///
/// # Errors
/// Those of the driver.
pub fn add_scaled(gpu: &Gpu, x: View, factor: f32, y: Option<View>, n_elem: usize) -> Result<()> {
    for v in y.iter().chain(&[x]) {
        check(*v, n_elem);
    }
    let a = args::AddScaled {
        x: x.at,
        y: at(y),
        n_elem: n_elem as u64,
        factor,
        pad: 0,
    };
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}
