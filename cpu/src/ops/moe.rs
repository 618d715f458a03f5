//! A feed-forward layer that is a mixture of experts.
//!
//! Tokens of a batch are sorted by expert, so that each expert meets all of its tokens at once. What experts say of a token
//! is added up in the order of their weights all the same: a token in a batch gets what it would get alone.

use super::{Activation, Limits, Pass, id};
use crate::lanes::{self, LANES};
use crate::{Experts, Mat, MulMat, Shared};

/// How the router's logits become weights of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// Each expert for itself.
    Sigmoid,
}

/// What an expert makes of its gate and what goes up, or of what goes up alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// [`Pass::geglu`]
    Geglu,
    /// [`Pass::reglu`]
    Reglu,
    /// [`Activation::ReluSqr`], of experts without gates.
    ReluSqr,
    /// [`Pass::swiglu`]
    Swiglu,
    /// [`Pass::swiglu_oai`]
    SwigluOai,
}

/// What is added to the products of a layer of experts.
#[derive(Clone, Copy, Debug)]
pub struct MoeBias<'a> {
    /// `[n_expert]`
    pub router: &'a [f32],
    /// `[n_expert, n_ff]`
    pub gate: &'a [f32],
    /// `[n_expert, n_ff]`
    pub up: &'a [f32],
    /// `[n_expert, n_embd]`
    pub down: &'a [f32],
}

/// A feed-forward layer of experts: `sum over the best experts of weight * down(act(gate x, up x))`.
#[derive(Clone, Copy)]
pub struct MoeFfn<'a> {
    /// `n_embd` to a logit for each expert.
    pub router: Mat<'a>,
    /// `n_embd` to `n_ff`, of experts that have gates.
    pub gate: Option<Experts<'a>>,
    /// `n_embd` to `n_ff`.
    pub up: Experts<'a>,
    /// `n_ff` to `n_embd`.
    pub down: Experts<'a>,
    /// Factors of what experts give, `[n_expert]`.
    pub down_scale: Option<&'a [f32]>,
    /// Added to products.
    pub bias: Option<MoeBias<'a>>,
    /// Between them.
    pub act: Act,
    /// The bound of [`Pass::swiglu_clamped`], in its place.
    pub clamp: Option<f32>,
    /// Experts that a token uses.
    pub n_expert_used: usize,
    /// From logits to weights.
    pub gating: Gating,
    /// Added to the weights to choose experts, but not to what they count: `[n_expert]`.
    pub choice_bias: Option<&'a [f32]>,
    /// Groups of experts that lie side by side; divides `n_expert`, 64 at most.
    pub n_group: usize,
    /// Groups that a token may use experts of: those whose two best experts have the largest sum.
    pub n_group_used: usize,
    /// Whether the weights of the chosen are made to sum to 1.
    pub norm_topk: bool,
    /// Factor of all weights.
    pub weights_scale: f32,
    /// Whether weights are factors of what experts read, not of what they give.
    pub weighs_input: bool,
}

/// Experts of each token, and what goes through them.
pub(crate) struct Scratch {
    /// `[max_tokens, n_expert]`
    logits: Shared<f32>,
    /// `[max_tokens, n_expert_used]`
    chosen: Shared<u32>,
    /// `[max_tokens, n_expert_used]`
    weights: Shared<f32>,
    /// Token and place in `chosen` of what goes through experts, one expert after the other: `[2, max_tokens, n_expert_used]`.
    order: Shared<u32>,
    /// Where each expert begins in `order`, and where the last one ends: `[n_expert + 1]`.
    starts: Shared<u32>,
    /// Hidden layer of an expert: `[max_tokens, n_ff]`.
    gate: Shared<f32>,
    /// `[max_tokens, n_ff]`
    up: Shared<f32>,
    /// An expert's inputs: `[max_tokens, n_embd]`.
    x: Shared<f32>,
    /// Its outputs: `[max_tokens, n_embd]`.
    y: Shared<f32>,
    /// The outputs of all experts: `[max_tokens, n_expert_used, n_embd]`.
    all: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits) -> Self {
        let [logits, starts, chosen, hidden, width] = Self::lens(limits);
        Self {
            logits: Shared::zeroed(logits),
            chosen: Shared::zeroed(chosen),
            weights: Shared::zeroed(chosen),
            order: Shared::zeroed(2 * chosen),
            starts: Shared::zeroed(starts),
            gate: Shared::zeroed(hidden),
            up: Shared::zeroed(hidden),
            x: Shared::zeroed(width),
            y: Shared::zeroed(width),
            all: Shared::zeroed(limits.n_expert_used * width),
        }
    }

    pub(crate) fn size(limits: &Limits) -> usize {
        let [logits, starts, chosen, hidden, width] = Self::lens(limits);
        let outputs = (2 + limits.n_expert_used) * width;
        (logits + starts + 4 * chosen + 2 * hidden + outputs) * size_of::<f32>()
    }

    fn lens(limits: &Limits) -> [usize; 5] {
        [
            limits.max_tokens * limits.n_expert,
            limits.n_expert + 1,
            limits.max_tokens * limits.n_expert_used,
            limits.max_tokens * limits.n_ff_expert,
            limits.max_tokens * limits.n_embd_expert,
        ]
    }
}

impl Pass<'_> {
    /// `out += ffn(x)`, both `[n_tokens, n_embd]`, different buffers.
    pub fn moe_ffn(&self, out: &Shared<f32>, x: &Shared<f32>, f: &MoeFfn<'_>, n_tokens: usize) {
        let s = &self.scratch.moe;
        let router = MulMat {
            out: &s.logits,
            out_add: false,
            w: f.router,
            bias: f.bias.map(|b| b.router),
        };
        self.mul_mat(router, x, n_tokens);
        self.experts(out, [x, &s.logits], f, n_tokens);
    }

    /// `out = ffn(x)`, different buffers, of experts that are chosen by logits that are there already, `[n_tokens, n_expert]`; these are used up.
    pub fn moe_ffn_routed(
        &self,
        out: &Shared<f32>,
        [x, logits]: [&Shared<f32>; 2],
        f: &MoeFfn<'_>,
        n_tokens: usize,
    ) {
        let n = f.down.n_out;
        let columns = self.w.range(n, LANES);
        for t in 0..n_tokens {
            // SAFETY: these columns are this worker's, and stay so until they are added to.
            unsafe { out.slice_mut(t * n + columns.start..t * n + columns.end) }.fill(0.0);
        }
        self.experts(out, [x, logits], f, n_tokens);
    }

    /// `out += ffn(x)` by `logits`.
    fn experts(
        &self,
        out: &Shared<f32>,
        [x, logits]: [&Shared<f32>; 2],
        f: &MoeFfn<'_>,
        n_tokens: usize,
    ) {
        self.check(
            "moe_ffn",
            &[id(out), id(x), f.up.data.as_ptr() as usize, n_tokens],
        );
        let s = &self.scratch.moe;
        let (n_embd, n_ff, n_used) = (f.up.n_in, f.up.n_out, f.n_expert_used);
        assert!(n_tokens * n_embd <= s.x.len() && n_tokens * n_ff <= s.gate.len() && !out.is(x));
        assert!(f.gate.is_some() == (f.act != Act::ReluSqr));
        assert!(!logits.is(x) && !logits.is(out) && logits.len() >= n_tokens * f.router.n_out);
        assert!(n_used <= self.limits.n_expert_used && f.router.n_out <= self.limits.n_expert);
        assert!((1..=64).contains(&f.n_group) && f.router.n_out.is_multiple_of(f.n_group));
        assert!(n_used <= f.router.n_out / f.n_group * f.n_group_used.min(f.n_group));
        let product = |out, w, bias| MulMat {
            out,
            out_add: false,
            w,
            bias,
        };
        for t in self.w.range(n_tokens, 1) {
            let n_expert = f.router.n_out;
            // SAFETY: a token's rows are this worker's.
            let (logits, chosen, weights) = unsafe {
                (
                    logits.slice_mut(t * n_expert..(t + 1) * n_expert),
                    s.chosen.slice_mut(t * n_used..(t + 1) * n_used),
                    s.weights.slice_mut(t * n_used..(t + 1) * n_used),
                )
            };
            choose(logits, chosen, weights, f);
        }
        self.barrier();
        let expert = |e: usize, x: &Shared<f32>, n: usize| {
            let hidden = e * n_ff..(e + 1) * n_ff;
            let [gate, up] = [
                f.bias.map(|b| &b.gate[hidden.clone()]),
                f.bias.map(|b| &b.up[hidden.clone()]),
            ];
            let down = f.bias.map(|b| &b.down[e * n_embd..(e + 1) * n_embd]);
            let up = product(&s.up, f.up.expert(e), up);
            let hidden = match f.gate {
                Some(w) => {
                    self.mul_mats(&[product(&s.gate, w.expert(e), gate), up], x, n);
                    &s.gate
                }
                None => {
                    self.mul_mat(up, x, n);
                    &s.up
                }
            };
            match f.act {
                Act::Geglu => self.geglu(hidden, hidden, &s.up, n * n_ff),
                Act::Swiglu => match f.clamp {
                    Some(clamp) => self.swiglu_clamped(hidden, &s.up, clamp, n * n_ff),
                    None => self.swiglu(hidden, hidden, &s.up, n * n_ff),
                },
                Act::SwigluOai => self.swiglu_oai(hidden, hidden, &s.up, n * n_ff),
                Act::Reglu => self.reglu(hidden, &s.up, n * n_ff),
                Act::ReluSqr => self.activate(hidden, Activation::ReluSqr, n * n_ff),
            }
            self.mul_mat(product(&s.y, f.down.expert(e), down), hidden, n);
        };
        let columns = self.w.range(n_embd, LANES);
        // What goes through an expert becomes as much as the expert counts: row i of it by the weight at `place(i)`.
        let weigh = |x: &Shared<f32>, n: usize, place: &dyn Fn(usize) -> usize| {
            for i in self.w.range(n, 1) {
                // SAFETY: weights were written before the last barrier, the row is this worker's.
                unsafe {
                    let weight = s.weights.slice(0..n_tokens * n_used)[place(i)];
                    lanes::scale(self.isa, x.slice_mut(i * n_embd..(i + 1) * n_embd), weight);
                }
            }
            self.barrier();
        };
        // Columns of `out` that are this worker's: `+= weight * y` for a token and the `j`th of its experts.
        let add = |y: &Shared<f32>, row: usize, t: usize, j: usize| {
            let at = |row: usize| row * n_embd + columns.start..row * n_embd + columns.end;
            // SAFETY: `y` and the weights were written before the last barrier, the columns are this worker's.
            unsafe {
                let weight = match f.weighs_input {
                    true => 1.0,
                    false => s.weights.slice(0..n_tokens * n_used)[t * n_used + j],
                };
                lanes::add_scaled(self.isa, out.slice_mut(at(t)), y.slice(at(row)), weight);
            }
        };
        if n_tokens == 1 {
            for j in 0..n_used {
                // SAFETY: written before the last barrier, and not again in this operation.
                let e = unsafe { s.chosen.slice(0..n_used)[j] };
                if f.weighs_input {
                    self.copy_rows(&s.x, x, &[0], n_embd);
                    weigh(&s.x, 1, &|_| j);
                    expert(e as usize, &s.x, 1);
                } else {
                    expert(e as usize, x, 1);
                }
                add(&s.y, 0, 0, j);
                self.barrier();
            }
            return;
        }
        if self.ith() == 0 {
            // SAFETY: `chosen` was written before the last barrier, and nobody else uses the others before the next.
            unsafe {
                let [order, starts] = [&s.order, &s.starts].map(|b| b.slice_mut(0..b.len()));
                let (tokens, places) = order.split_at_mut(s.chosen.len());
                let chosen = s.chosen.slice(0..n_tokens * n_used);
                sort(
                    chosen,
                    n_used,
                    &mut starts[..=f.router.n_out],
                    tokens,
                    places,
                );
            }
        }
        self.barrier();
        // SAFETY: written before the last barrier, and not again in this operation.
        let (order, starts) = unsafe {
            (
                s.order.slice(0..s.order.len()),
                s.starts.slice(0..s.starts.len()),
            )
        };
        let (tokens, places) = order.split_at(s.chosen.len());
        for e in 0..f.router.n_out {
            let range = starts[e] as usize..starts[e + 1] as usize;
            if range.is_empty() {
                continue;
            }
            self.copy_rows(&s.x, x, &tokens[range.clone()], n_embd);
            if f.weighs_input {
                weigh(&s.x, range.len(), &|i| places[range.start + i] as usize);
            }
            expert(e, &s.x, range.len());
            for i in self.w.range(range.len(), 1) {
                let place = places[range.start + i] as usize;
                // SAFETY: `y` is only read, the place is this worker's.
                unsafe {
                    let y = s.y.slice(i * n_embd..(i + 1) * n_embd);
                    s.all
                        .slice_mut(place * n_embd..(place + 1) * n_embd)
                        .copy_from_slice(y);
                }
            }
            self.barrier();
        }
        for t in 0..n_tokens {
            for j in 0..n_used {
                add(&s.all, t * n_used + j, t, j);
            }
        }
        self.barrier();
    }
}

/// Sorts what is `chosen`, `[n_tokens, n_used]`, by expert: the token and the place in `chosen` of each one, and where
/// experts start, with the end of the last.
fn sort(chosen: &[u32], n_used: usize, starts: &mut [u32], tokens: &mut [u32], places: &mut [u32]) {
    starts.fill(0);
    for e in chosen {
        starts[*e as usize + 1] += 1;
    }
    for e in 1..starts.len() {
        starts[e] += starts[e - 1];
    }
    // Starts move to the ends of their experts, which are the starts of the next.
    for (place, e) in chosen.iter().enumerate() {
        let at = &mut starts[*e as usize];
        tokens[*at as usize] = (place / n_used) as u32;
        places[*at as usize] = place as u32;
        *at += 1;
    }
    starts.rotate_right(1);
    starts[0] = 0;
}

/// The best experts by `logits`, which become probabilities.
fn choose(logits: &mut [f32], chosen: &mut [u32], weights: &mut [f32], f: &MoeFfn<'_>) {
    match f.gating {
        Gating::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for x in logits.iter_mut() {
                *x = (*x - max).exp();
                sum += *x;
            }
            for x in logits.iter_mut() {
                *x /= sum;
            }
        }
        Gating::Sigmoid => {
            for x in logits.iter_mut() {
                *x = 1.0 / (1.0 + (-*x).exp());
            }
        }
    }
    let rank = |i: usize| logits[i] + f.choice_bias.map_or(0.0, |b| b[i]);
    let size = logits.len() / f.n_group;
    let open = open_groups(f, |group| {
        two_best((group * size..(group + 1) * size).map(rank))
    });
    let mut total = 0.0;
    for j in 0..chosen.len() {
        let mut best = None;
        for i in 0..logits.len() {
            let taken = open >> (i / size) & 1 == 0 || chosen[..j].contains(&(i as u32));
            if !taken && best.is_none_or(|b| rank(i) > rank(b)) {
                best = Some(i);
            }
        }
        let best = best.expect("no more experts are used than there are");
        chosen[j] = best as u32;
        weights[j] = logits[best];
        total += logits[best];
    }
    for (w, e) in weights.iter_mut().zip(chosen) {
        if f.norm_topk {
            // What a half-precision number can just hold, as in ggml: all sigmoids may be as good as zero.
            *w /= total.max(6.103_515_6e-5);
        }
        *w *= f.weights_scale * f.down_scale.map_or(1.0, |s| s[*e as usize]);
    }
}

/// The sum of the two largest.
fn two_best(x: impl Iterator<Item = f32>) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for x in x {
        if x > first {
            (first, second) = (x, first);
        } else if x > second {
            second = x;
        }
    }
    first + second
}

/// The groups that a token may use, a bit for each, by what they are worth; of equals the first.
fn open_groups(f: &MoeFfn<'_>, worth: impl Fn(usize) -> f32) -> u64 {
    let all = u64::MAX >> (64 - f.n_group);
    if f.n_group_used >= f.n_group {
        return all;
    }
    let mut open = 0;
    for _ in 0..f.n_group_used {
        let mut best: Option<(usize, f32)> = None;
        for group in (0..f.n_group).filter(|g| open >> g & 1 == 0) {
            let worth = worth(group);
            if best.is_none_or(|(_, b)| worth > b) {
                best = Some((group, worth));
            }
        }
        open |= best.map_or(0, |(group, _)| 1 << group);
    }
    open
}
