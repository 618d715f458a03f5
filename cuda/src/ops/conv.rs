//! Causal convolutions along the tokens, every channel by itself.

use super::{Quant, at, check, launch};
use crate::args;
use crate::gpu::{Gpu, Result, View};

/// Tokens that a convolution sees at most.
pub const MAX_CONV: usize = 8;
/// Tokens of a thread.
const CONV_TOKENS: usize = 8;

/// A convolution along the tokens.
#[derive(Clone, Copy, Debug)]
pub struct SsmConv {
    /// `[n, width]`, other memory than the input.
    pub out: View,
    /// `[n, width]`
    pub x: View,
    /// `[d_conv, width]`, the oldest token first; behind it may be what is added to each element.
    pub w: View,
    /// `[d_conv - 1, width]`: inputs of before, the oldest first; the last ones of the pass when it is over.
    pub past: View,
    /// `[1]` u32: position of the first token. At 0 nothing came before.
    pub pos: View,
}

impl SsmConv {
    fn args(&self, n: usize, width: usize, d_conv: usize) -> args::SsmConv {
        check(self.x, n * width);
        check(self.out, n * width);
        check(self.w, d_conv * width);
        assert!((2..=MAX_CONV).contains(&d_conv) && self.x.at != self.out.at);
        check(self.past, (d_conv - 1) * width);
        check(self.pos, 1);
        let taps = d_conv * width * 4;
        let rest = self.w.slice(taps, self.w.bytes() - taps);
        args::SsmConv {
            x: self.x.at,
            w: self.w.at,
            bias: at((rest.bytes() >= width * 4).then_some(rest)),
            past: self.past.at,
            pos: self.pos.at,
            out: self.out.at,
            n: n as u32,
            width: width as u32,
            d_conv: d_conv as u32,
            ..args::SsmConv::default()
        }
    }
}

fn grid(n: usize, width: usize) -> [usize; 3] {
    [width.div_ceil(128), n.div_ceil(CONV_TOKENS), 1]
}

/// A causal convolution over `d_conv` tokens, each of `width` elements by itself, and silu of the result.
///
/// # Errors
/// Those of the driver.
pub fn ssm_conv(gpu: &Gpu, c: &SsmConv, n: usize, width: usize, d_conv: usize) -> Result<()> {
    let a = c.args(n, width, d_conv);
    gpu.launch(launch(grid(n, width), 128, 0), &a)
}

/// The same between two gates, `[n, width]` each, in place of silu: `out = behind * conv(before * x)`; `quant` gets the result once more,
/// quantized.
///
/// # Errors
/// Those of the driver.
pub fn short_conv(
    gpu: &Gpu,
    c: &SsmConv,
    [before, behind]: [View; 2],
    quant: Option<Quant>,
    n: usize,
    width: usize,
    d_conv: usize,
) -> Result<()> {
    check(before, n * width);
    check(behind, n * width);
    assert!(before.at != c.out.at && behind.at != c.out.at);
    if let Some(q) = quant {
        q.check(n * width);
        assert!(width.is_multiple_of(32));
    }
    let a = args::SsmConv {
        before: before.at,
        behind: behind.at,
        q: at(quant.map(|q| q.q)),
        ds: at(quant.map(|q| q.ds)),
        ..c.args(n, width, d_conv)
    };
    gpu.launch(launch(grid(n, width), 128, 0), &args::ShortConv(a))
}
