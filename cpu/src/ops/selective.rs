//! Selective state spaces (Mamba, arXiv 2312.00752): layers in which every channel has a memory of a few numbers, each of which a token makes it
//! forget in its own measure, before it adds its own.
//!
//! ```text
//! s_j = exp(dt a_j) s_j + dt x b_j;  out = Σ s_j c_j + d x
//! ```
//!
//! Channels do not need each other, so workers divide them, [`LANES`] at a time, and go through the tokens of a batch in their order.

use super::{Pass, RecurrentState, id};
use crate::Shared;
use crate::lanes::{LANES, exp, fma, multiversion};

/// The weights of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Selective<'a> {
    /// How fast each number of a channel is forgotten; negative: `[d_state, n_inner]`.
    pub a: &'a [f32],
    /// How much of its own input a channel passes on: `[n_inner]`, a multiple of 16.
    pub d: &'a [f32],
}

impl Pass<'_> {
    /// The scan, token by token. `x` and `dt`: `[n_tokens, n_inner]`, of `dt` a softplus is taken; `b`, `c`: `[n_tokens, d_state]`; `out`:
    /// `[n_tokens, n_inner]`, a buffer of its own. The state's numbers are `[n_inner / 16, d_state, 16]`. A `fresh` state is zero.
    pub fn selective_scan(
        &self,
        out: &Shared<f32>,
        [x, dt, b, c]: [&Shared<f32>; 4],
        w: &Selective<'_>,
        state: &RecurrentState,
        n_tokens: usize,
        fresh: bool,
    ) {
        self.check("selective_scan", &[id(out), id(&state.s), n_tokens]);
        let n = w.d.len();
        let d_state = w.a.len() / n;
        assert!(n.is_multiple_of(LANES) && w.a.len() == n * d_state);
        assert!(state.s.len() == n * d_state && out.len() >= n_tokens * n);
        assert!([x, dt, b, c].iter().all(|buf| !buf.is(out)));
        // SAFETY: these are only read.
        let [x, dt, b, c] = unsafe {
            [
                x.slice(0..n_tokens * n),
                dt.slice(0..n_tokens * n),
                b.slice(0..n_tokens * d_state),
                c.slice(0..n_tokens * d_state),
            ]
        };
        for i in self.w.range(n / LANES, 1) {
            let of = i * d_state * LANES..(i + 1) * d_state * LANES;
            // SAFETY: these channels of the state are this worker's.
            let s = unsafe { state.s.slice_mut(of) };
            if fresh {
                s.fill(0.0);
            }
            for t in 0..n_tokens {
                let at = t * n + i * LANES;
                // SAFETY: what these channels give is this worker's.
                let out = unsafe { out.slice_mut(at..at + LANES) };
                let bc = t * d_state..(t + 1) * d_state;
                let (bc, xdt) = ([&b[bc.clone()], &c[bc]], [&x[at..], &dt[at..]]);
                channels(self.isa, s, out, xdt, bc, [w.a, w.d], i * LANES);
            }
        }
        self.barrier();
    }
}

multiversion! {
    /// One token of [`LANES`] channels, of which `first` is the first.
    fn channels(
        s: &mut [f32],
        out: &mut [f32],
        xdt: [&[f32]; 2],
        bc: [&[f32]; 2],
        w: [&[f32]; 2],
        first: usize,
    ) {
        let ([x, dt], [b, c], [a, d]) = (xdt, bc, w);
        let mut step = [0.0; LANES];
        let mut adds = [0.0; LANES];
        let mut read = [0.0; LANES];
        for l in 0..LANES {
            // For large numbers the logarithm is the number.
            step[l] = if dt[l] > 20.0 { dt[l] } else { dt[l].exp().ln_1p() };
            adds[l] = step[l] * x[l];
            read[l] = d[first + l] * x[l];
        }
        let columns = s.as_chunks_mut::<LANES>().0.iter_mut();
        for (j, s) in columns.enumerate() {
            let a = &a[j * d.len() + first..][..LANES];
            for l in 0..LANES {
                s[l] = fma::<FMA>(s[l], exp::<FMA>(step[l] * a[l]), adds[l] * b[j]);
                read[l] = fma::<FMA>(s[l], c[j], read[l]);
            }
        }
        out.copy_from_slice(&read);
    }
}
