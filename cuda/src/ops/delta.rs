//! Gated delta nets.

use super::{Quant, at, check, launch};
use crate::args;
use crate::gpu::{Gpu, Result, View};

/// The widest head of a delta net.
pub const MAX_DELTA_DIM: usize = 256;
/// Rows of a state that a block has.
const ROWS: usize = 16;

/// Takes apart what `n_head` heads have side by side, two parts of `head_dim` elements: x `[n_head, 2, head_dim]`, outputs
/// `[n_head, head_dim]`.
///
/// # Errors
/// Those of the driver, as everywhere here.
pub fn split_heads(
    gpu: &Gpu,
    outs: [View; 2],
    x: View,
    n_head: usize,
    head_dim: usize,
) -> Result<()> {
    let n_elem = n_head * head_dim;
    check(x, 2 * n_elem);
    outs.iter().for_each(|out| check(*out, n_elem));
    let a = args::SplitHeads {
        x: x.at,
        first: outs[0].at,
        second: outs[1].at,
        n_elem: n_elem as u64,
        head_dim: head_dim as u32,
        pad: 0,
    };
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}

/// `x / sqrt(|x|² + eps)`, in place over each of the `n_head` heads of `head_dim` elements that rows of x, `[n, stride]`, begin with.
///
/// # Errors
/// Those of the driver.
pub fn l2_norm_first(
    gpu: &Gpu,
    x: View,
    n: usize,
    stride: usize,
    [n_head, head_dim]: [usize; 2],
    eps: f32,
) -> Result<()> {
    check(x, n * stride);
    assert!(n_head * head_dim <= stride);
    let a = args::L2Norm {
        x: x.at,
        units: (n * n_head) as u32,
        n_head: n_head as u32,
        head_dim: head_dim as u32,
        stride: stride as u32,
        eps,
        pad: 0,
    };
    gpu.launch(launch([(n * n_head).div_ceil(4), 1, 1], 128, 0), &a)
}

/// The gates of a delta net, in place: `alpha = exp(a * softplus(alpha + dt))`, `beta = sigmoid(beta)`; alpha and beta `[n, n_head]`, a
/// and dt `[n_head]`.
///
/// # Errors
/// Those of the driver.
pub fn delta_gates(
    gpu: &Gpu,
    [alpha, beta]: [View; 2],
    [a, dt]: [View; 2],
    n: usize,
    n_head: usize,
) -> Result<()> {
    let n_elem = n * n_head;
    [alpha, beta].iter().for_each(|x| check(*x, n_elem));
    [a, dt].iter().for_each(|x| check(*x, n_head));
    let args = args::DeltaGates {
        alpha: alpha.at,
        beta: beta.at,
        a: a.at,
        dt: dt.at,
        n_elem: n_elem as u32,
        n_head: n_head as u32,
    };
    gpu.launch(launch([n_elem.div_ceil(128), 1, 1], 128, 0), &args)
}

/// Shape of a delta net.
#[derive(Clone, Copy, Debug)]
pub struct DeltaHeads {
    /// Heads of queries and keys.
    pub n_head_k: usize,
    /// Heads of values; a multiple of `n_head_k`.
    pub n_head_v: usize,
    /// Elements of a query, a key and a value: a multiple of 16, at most [`MAX_DELTA_DIM`].
    pub head_dim: usize,
    /// Whether value heads of a key head lie side by side; otherwise value head `h` goes with key head `h % n_head_k`.
    pub side_by_side: bool,
}

/// Operands of the gated delta rule.
#[derive(Clone, Copy, Debug)]
pub struct DeltaNet {
    /// `[n, n_head_v, head_dim]`
    pub out: View,
    /// `[n, 2 * n_head_k + n_head_v, head_dim]`: queries, keys, values.
    pub qkv: View,
    /// `[n, n_head_v]`: what is kept of the state.
    pub alpha: View,
    /// `[n, n_head_v]`: how much of a correction is made.
    pub beta: View,
    /// `[n_head_v, head_dim, head_dim]`: a matrix for each head whose rows belong to elements of its values, renewed in place.
    pub state: View,
    /// `[1]` u32: position of the first token. At 0 the state is zero, whatever lies there.
    pub pos: View,
    /// Of one token: queries and keys are not normed yet, and alpha and beta are what gates are made of.
    pub raw: Option<RawDelta>,
}

/// What [`l2_norm_first`] and [`delta_gates`] would have done to the inputs of a rule.
#[derive(Clone, Copy, Debug)]
pub struct RawDelta {
    /// Epsilon of the norms.
    pub eps: f32,
    /// `[n_head_v]`
    pub a: View,
    /// `[n_head_v]`
    pub dt: View,
}

/// The gated delta rule of `n` tokens, one after the other: `S = alpha S; S += beta (v - S k) kᵀ; out = S q / sqrt(head_dim)`.
///
/// # Errors
/// Those of the driver.
pub fn gated_delta_net(gpu: &Gpu, c: &DeltaNet, h: DeltaHeads, n: usize) -> Result<()> {
    let (d, rows) = (h.head_dim, h.n_head_v * h.head_dim);
    let width = (2 * h.n_head_k + h.n_head_v) * d;
    assert!(d.is_multiple_of(16) && d <= MAX_DELTA_DIM && h.n_head_v.is_multiple_of(h.n_head_k));
    check(c.qkv, n * width);
    check(c.out, n * rows);
    for x in [c.alpha, c.beta] {
        check(x, n * h.n_head_v);
    }
    check(c.state, rows * d);
    check(c.pos, 1);
    // Rows are read by fours.
    assert!(c.qkv.at.is_multiple_of(16) && c.state.at.is_multiple_of(16));
    let a = args::DeltaNet {
        qkv: c.qkv.at,
        alpha: c.alpha.at,
        beta: c.beta.at,
        state: c.state.at,
        out: c.out.at,
        pos: c.pos.at,
        n: n as u32,
        n_head_k: h.n_head_k as u32,
        n_head_v: h.n_head_v as u32,
        head_dim: d as u32,
        width: width as u32,
        side_by_side: u32::from(h.side_by_side),
        scale: 1.0 / (d as f32).sqrt(),
        ..args::DeltaNet::default()
    };
    let launch = launch([rows / ROWS, 1, 1], 128, 0);
    let Some(raw) = c.raw else {
        return gpu.launch(launch, &a);
    };
    assert_eq!(n, 1, "inputs of one token");
    for x in [raw.a, raw.dt] {
        check(x, h.n_head_v);
    }
    let a = args::DeltaNet {
        a: raw.a.at,
        dt: raw.dt.at,
        eps: raw.eps,
        ..a
    };
    gpu.launch(launch, &args::DeltaStep(a))
}

/// `gate = silu(gate) * x / rms(x) * w` of `n_head` heads: x and gate `[n_head, head_dim]`, where w has `head_dim` elements; `quant` gets the
/// result once more, quantized.
///
/// # Errors
/// Those of the driver.
pub fn gated_norm(
    gpu: &Gpu,
    gate: View,
    x: View,
    w: View,
    quant: Option<Quant>,
    n_head: usize,
    eps: f32,
) -> Result<()> {
    let d = w.bytes() / 4;
    check(gate, n_head * d);
    check(x, n_head * d);
    if let Some(q) = quant {
        q.check(n_head * d);
        assert!(d.is_multiple_of(32));
    }
    let a = args::GatedNorm {
        x: x.at,
        w: w.at,
        gate: gate.at,
        q: at(quant.map(|q| q.q)),
        ds: at(quant.map(|q| q.ds)),
        units: n_head as u32,
        head_dim: d as u32,
        eps,
        pad: 0,
    };
    gpu.launch(launch([n_head.div_ceil(4), 1, 1], 128, 0), &a)
}
