//! Layers that keep a state of fixed size in place of keys and values: what they keep, and their short convolutions.

use super::{Pass, id};
use crate::Shared;
use crate::lanes::{self, Columns, LANES};

/// Most tokens that a convolution sees.
const MAX_CONV: usize = 8;

/// What a layer keeps of the tokens before.
#[derive(Debug)]
pub struct RecurrentState {
    /// Channels of the convolution: a multiple of 16.
    width: usize,
    /// Tokens that it sees, the current one included: 2 to 8.
    d_conv: usize,
    /// Its inputs, for each [`LANES`] channels the oldest first: `[width / 16, d_conv - 1, 16]`.
    past: Shared<f32>,
    /// The numbers of what comes behind the convolution, as that lays them out.
    pub(super) s: Shared<f32>,
}

impl RecurrentState {
    /// The state before the first token: of a convolution of `width` channels over `d_conv` tokens, and `n` numbers.
    ///
    /// # Panics
    /// If `width` is no multiple of 16 or `d_conv` not 2 to 8.
    pub fn new(width: usize, d_conv: usize, n: usize) -> Self {
        assert!(width.is_multiple_of(LANES) && (2..=MAX_CONV).contains(&d_conv));
        Self {
            width,
            d_conv,
            past: Shared::zeroed((d_conv - 1) * width),
            s: Shared::zeroed(n),
        }
    }

    /// Makes this the same as another of the same shape.
    pub fn copy_from(&mut self, other: &mut Self) {
        self.past
            .as_mut_slice()
            .copy_from_slice(other.past.as_mut_slice());
        self.s
            .as_mut_slice()
            .copy_from_slice(other.s.as_mut_slice());
    }
}

impl Pass<'_> {
    /// A causal convolution of every channel along the tokens, and `silu` of it, in place. `x`: `[n_tokens, width]`; `w`: `[d_conv, width]`,
    /// the oldest token first, and behind it what is added to each channel, if there is something. A `fresh` state knows nothing of what is
    /// in its memory.
    pub fn ssm_conv(
        &self,
        x: &Shared<f32>,
        w: &[f32],
        state: &RecurrentState,
        n_tokens: usize,
        fresh: bool,
    ) {
        self.check("ssm_conv", &[id(x), id(&state.past), n_tokens]);
        let (width, d_conv) = (state.width, state.d_conv);
        assert!(w.len() == d_conv * width || w.len() == (d_conv + 1) * width);
        assert!(x.len() >= n_tokens * width);
        self.conv(w, state, fresh, |at, past, taps, bias| {
            // SAFETY: these channels are this worker's, in rows that are there by the assertion.
            let x = unsafe { Columns::new(x.as_ptr().add(at), width, n_tokens) };
            lanes::conv_silu(self.isa, x, past, taps, bias);
        });
    }

    /// A gated short convolution, in place: `x = c * conv(b * x)`, `conv` along the tokens and every channel by itself. `x`, `b`, `c`:
    /// `[n_tokens, width]`, different buffers; `w`: `[d_conv, width]`, the oldest token first.
    pub fn short_conv(
        &self,
        x: &Shared<f32>,
        [b, c]: [&Shared<f32>; 2],
        w: &[f32],
        state: &RecurrentState,
        n_tokens: usize,
        fresh: bool,
    ) {
        self.check("short_conv", &[id(x), id(&state.past), n_tokens]);
        let (width, d_conv) = (state.width, state.d_conv);
        assert!(w.len() == d_conv * width && !x.is(b) && !x.is(c));
        assert!([x, b, c].iter().all(|x| x.len() >= n_tokens * width));
        self.conv(w, state, fresh, |at, past, taps, _| {
            // SAFETY: these channels are this worker's, in rows that are there by the assertion.
            let [x, b, c] =
                [x, b, c].map(|x| unsafe { Columns::new(x.as_ptr().add(at), width, n_tokens) });
            lanes::short_conv(self.isa, x, [b, c], past, taps);
        });
    }

    /// Divides the channels of a convolution: `each` gets the first of [`LANES`] channels that are this worker's, their inputs of before, their
    /// weights and what is added.
    fn conv(
        &self,
        w: &[f32],
        state: &RecurrentState,
        fresh: bool,
        each: impl Fn(usize, &mut [[f32; LANES]], &[[f32; LANES]], &[f32; LANES]),
    ) {
        let d_conv = state.d_conv;
        let size = (d_conv - 1) * LANES;
        let mut taps = [[0.0; LANES]; MAX_CONV + 1];
        for i in self.w.range(state.width / LANES, 1) {
            for (tap, w) in taps.iter_mut().zip(w.chunks_exact(state.width)) {
                tap.copy_from_slice(&w[i * LANES..(i + 1) * LANES]);
            }
            // SAFETY: these channels of the state are this worker's.
            let past = unsafe { state.past.slice_mut(i * size..(i + 1) * size) };
            if fresh {
                past.fill(0.0);
            }
            let (taps, rest) = taps.split_at(d_conv);
            each(i * LANES, past.as_chunks_mut().0, taps, &rest[0]);
        }
        self.barrier();
    }
}
