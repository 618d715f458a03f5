//! State spaces (Mamba-2, arXiv 2405.21060): layers whose memory of all earlier tokens is a matrix for each head, of which a token makes it forget
//! some, evenly, before it adds its own.
//!
//! ```text
//! S = exp(dt a) S + dt x bᵀ;  out = S c + d x
//! ```
//!
//! Rows of `S`, one for each element of a head, do not need each other, so workers divide them, and each goes through the tokens of a batch in
//! their order while its rows stay in the cache, as in a delta net.

use super::{Pass, RecurrentState, id};
use crate::Shared;
use crate::lanes::{self, LANES};
use crate::simd::{Simd, for_isa};

/// What a layer looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanShape {
    /// Heads.
    pub n_head: usize,
    /// Elements of a head: a multiple of 16.
    pub head_dim: usize,
    /// Groups of heads that lie side by side and share their `b` and `c`.
    pub n_group: usize,
    /// Elements of a `b` and a `c`: a multiple of 4.
    pub d_state: usize,
}

impl ScanShape {
    /// What goes in for a token: `x` of all heads, then `b` of all groups, then `c`.
    fn width(&self) -> usize {
        self.n_inner() + 2 * self.n_group * self.d_state
    }

    /// What comes out.
    fn n_inner(&self) -> usize {
        self.n_head * self.head_dim
    }
}

/// The weights of a layer, `[n_head]` each.
#[derive(Clone, Copy, Debug)]
pub struct Scan<'a> {
    /// How fast a head forgets; negative.
    pub a: &'a [f32],
    /// Added to `dt`.
    pub dt: &'a [f32],
    /// How much of its own input a head passes on.
    pub d: &'a [f32],
    /// What it looks like.
    pub shape: ScanShape,
}

impl Pass<'_> {
    /// The scan, token by token. `xbc`: `[n_tokens, x, b, c]`; `dt`: `[n_tokens, n_head]`, of which a softplus is taken in place; `out`:
    /// `[n_tokens, n_head, head_dim]`, a buffer of its own. The state's numbers are the matrices, column after column within a group of 16 rows:
    /// `[n_head, head_dim / 16, d_state, 16]`. A `fresh` state is zero.
    pub fn ssm_scan(
        &self,
        out: &Shared<f32>,
        [xbc, dt]: [&Shared<f32>; 2],
        scan: &Scan<'_>,
        state: &RecurrentState,
        n_tokens: usize,
        fresh: bool,
    ) {
        self.check("ssm_scan", &[id(out), id(&state.s), n_tokens]);
        let shape = scan.shape;
        let ScanShape {
            n_head,
            head_dim,
            n_group,
            d_state,
        } = shape;
        let (n, width) = (shape.n_inner(), shape.width());
        assert!(!out.is(xbc) && !out.is(dt) && !xbc.is(dt));
        assert!(head_dim.is_multiple_of(LANES) && state.s.len() == n * d_state);
        assert!(n_group > 0 && n_head.is_multiple_of(n_group) && out.len() >= n_tokens * n);
        assert!([scan.a, scan.dt, scan.d].iter().all(|w| w.len() == n_head));
        for t in self.w.range(n_tokens, 1) {
            // SAFETY: a token's row is this worker's.
            let dt = unsafe { dt.slice_mut(t * n_head..(t + 1) * n_head) };
            lanes::softplus(self.isa, dt, scan.dt);
        }
        self.barrier();
        // SAFETY: these are only read from here on.
        let (xbc, dt) = unsafe {
            (
                xbc.slice(0..n_tokens * width),
                dt.slice(0..n_tokens * n_head),
            )
        };
        for i in self.w.range(n / LANES, 1) {
            let head = i * LANES / head_dim;
            let group = head / (n_head / n_group);
            // SAFETY: this group of rows is this worker's.
            let s = unsafe {
                state
                    .s
                    .slice_mut(i * d_state * LANES..(i + 1) * d_state * LANES)
            };
            if fresh {
                s.fill(0.0);
            }
            for t in 0..n_tokens {
                let (x, bc) = xbc[t * width..(t + 1) * width].split_at(n);
                let (b, c) = bc.split_at(n_group * d_state);
                let of = group * d_state..(group + 1) * d_state;
                let dt = dt[t * n_head + head];
                let at = t * n + i * LANES;
                let mut row = Token {
                    s,
                    x: &x[i * LANES..(i + 1) * LANES],
                    b: &b[of.clone()],
                    c: &c[of],
                    dt,
                    keeps: (dt * scan.a[head]).exp(),
                    d: scan.d[head],
                    // SAFETY: what these rows give is this worker's.
                    out: unsafe { out.slice_mut(at..at + LANES) },
                };
                // SAFETY: the set is available: `Ops::new` has checked.
                unsafe { scan_rows(self.isa, &mut row) };
            }
        }
        self.barrier();
    }
}

/// A token and [`LANES`] rows of a state.
struct Token<'a> {
    /// `[d_state, 16]`
    s: &'a mut [f32],
    /// `[16]`
    x: &'a [f32],
    /// `[d_state]`
    b: &'a [f32],
    /// `[d_state]`
    c: &'a [f32],
    dt: f32,
    /// What is kept of the state.
    keeps: f32,
    d: f32,
    /// `[16]`
    out: &'a mut [f32],
}

for_isa! {
    /// One token of the scan.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn scan_rows<S>(t: &mut Token<'_>) scan_rows_s;
}

#[inline(always)]
unsafe fn scan_rows_s<S: Simd>(t: &mut Token<'_>) {
    let d_state = t.b.len();
    assert!(d_state.is_multiple_of(4) && t.c.len() == d_state && t.s.len() == d_state * LANES);
    assert!(t.x.len() == LANES && t.out.len() == LANES);
    // SAFETY: lengths are asserted above, lanes divide 16; the instruction set is available.
    unsafe {
        for lane in (0..LANES).step_by(S::N) {
            let s = t.s.as_mut_ptr().add(lane);
            let x = S::load(t.x.as_ptr().add(lane));
            let (adds, keeps) = (S::mul(x, S::splat(t.dt)), S::splat(t.keeps));
            // Four sums side by side need not wait for each other.
            let mut sums = [S::splat(0.0); 4];
            for j in (0..d_state).step_by(4) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = s.add((j + i) * LANES);
                    let kept = S::mul(S::load(at), keeps);
                    let column = S::fma(adds, S::splat(*t.b.get_unchecked(j + i)), kept);
                    S::store(at, column);
                    *sum = S::fma(column, S::splat(*t.c.get_unchecked(j + i)), *sum);
                }
            }
            let read = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));
            S::store(t.out.as_mut_ptr().add(lane), S::fma(x, S::splat(t.d), read));
        }
    }
}
