//! State spaces (Mamba-2).

use super::{Quant, at, check, launch};
use crate::args;
use crate::gpu::{Gpu, Result, View};

/// Threads of a block.
const BLOCK: usize = 64;
/// Warps that a multiprocessor should have, of its own rows, before lanes share two of them.
const WARPS: usize = 8;

/// Shape of a state space.
#[derive(Clone, Copy, Debug)]
pub struct ScanHeads {
    /// Heads.
    pub n_head: usize,
    /// Elements of a head: a multiple of 16.
    pub head_dim: usize,
    /// Groups of heads that lie side by side and share their `b` and `c`; divides `n_head`.
    pub n_group: usize,
    /// Elements of a `b` and a `c`: a multiple of 4.
    pub d_state: usize,
}

/// Operands of the scan.
#[derive(Clone, Copy, Debug)]
pub struct SsmScan {
    /// `[n, n_head, head_dim]`
    pub out: View,
    /// `[n, n_head * head_dim + 2 * n_group * d_state]`: `x` of all heads, `b` of all groups, `c`.
    pub xbc: View,
    /// `[n, n_head]`: step sizes, of which a softplus is taken.
    pub dt: View,
    /// `[n_head, head_dim, d_state]`: a matrix for each head, renewed in place. No other launch between two uploads may write it: it is read
    /// while the launch before is still at work.
    pub state: View,
    /// `[1]` u32: position of the first token. At 0 the state is zero, whatever lies there.
    pub pos: View,
    /// `[n_head]`: how fast a head forgets.
    pub a: View,
    /// `[n_head]`: added to `dt`.
    pub bias: View,
    /// `[n_head]`: how much of its own input a head passes on.
    pub d: View,
}

/// The scan of `n` tokens, one after the other: `S = exp(a dt) S + dt x bᵀ; out = S c + d x`, `dt` a softplus.
///
/// # Errors
/// Those of the driver, as everywhere here.
pub fn ssm_scan(gpu: &Gpu, c: &SsmScan, h: ScanHeads, n: usize) -> Result<()> {
    let (inner, bc) = (h.n_head * h.head_dim, h.n_group * h.d_state);
    let width = inner + 2 * bc;
    assert!(h.head_dim.is_multiple_of(16) && h.n_head.is_multiple_of(h.n_group));
    assert!(h.d_state.is_multiple_of(4));
    check(c.xbc, n * width);
    check(c.dt, n * h.n_head);
    check(c.out, n * inner);
    check(c.state, inner * h.d_state);
    check(c.pos, 1);
    [c.a, c.bias, c.d].iter().for_each(|w| check(*w, h.n_head));
    // Rows are read by fours.
    assert!(c.xbc.at.is_multiple_of(16) && c.state.at.is_multiple_of(16));
    let lanes = if h.d_state > 128 { 16 } else { 8 };
    // Two rows need what a token brings only once, but half as many warps hide less of the way that it takes.
    let each = match inner * lanes / 64 >= WARPS * gpu.info().n_sm as usize {
        true => 2,
        false => 1,
    };
    let a = args::SsmScan {
        xbc: c.xbc.at,
        dt: c.dt.at,
        state: c.state.at,
        out: c.out.at,
        pos: c.pos.at,
        a: c.a.at,
        bias: c.bias.at,
        d: c.d.at,
        n: n as u32,
        n_head: h.n_head as u32,
        head_dim: h.head_dim as u32,
        n_group: h.n_group as u32,
        d_state: h.d_state as u32,
        width: width as u32,
        each: each as u32,
        pad: 0,
    };
    let rows = BLOCK / lanes * each;
    gpu.launch(launch([inner / rows, 1, 1], BLOCK as u32, 0), &a)
}

/// `x = x / rms(x) * w` over each of `n_group` parts of the rows of x, `[n, width]`; w has `width` elements. With `up`, `[n, width]`, it is
/// `silu(x) * up` that is normed; `quant` gets the result once more, quantized (parts are multiples of 32 then).
///
/// # Errors
/// Those of the driver.
#[allow(clippy::too_many_arguments, reason = "operands of one kernel")]
pub fn rms_norm_groups(
    gpu: &Gpu,
    x: View,
    up: Option<View>,
    w: View,
    quant: Option<Quant>,
    n: usize,
    n_group: usize,
    eps: f32,
) -> Result<()> {
    let width = w.bytes() / 4;
    check(x, n * width);
    up.iter().for_each(|up| check(*up, n * width));
    assert!(width.is_multiple_of(n_group));
    let part = width / n_group;
    if let Some(q) = quant {
        q.check(n * width);
        assert!(part.is_multiple_of(32));
    }
    let a = args::RmsNormGroups {
        x: x.at,
        up: at(up),
        w: w.at,
        q: at(quant.map(|q| q.q)),
        ds: at(quant.map(|q| q.ds)),
        width: width as u32,
        eps,
    };
    let block = part.div_ceil(4).next_multiple_of(32).clamp(32, 1024) as u32;
    gpu.launch(launch([n_group, n, 1], block, 0), &a)
}
