//! Attention over pages.

use super::{Limits, Pass, id};
use crate::lanes::{self, LANES};
use crate::{KvLayer, PAGE, PageRef, Place, Shared};

/// Pages whose results are combined first; a constant, so that sums do not depend on the number of workers.
const CHUNK: usize = 16;

/// How attention looks at the pages.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Query heads; a multiple of the pool's `n_head_kv`.
    pub n_head: usize,
    /// The pages in the order of their positions; their slots are in any order.
    pub pages: &'a [PageRef],
    /// Position of each token of the batch: it sees entries at its own position and before.
    pub q_pos: &'a [u32],
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// A logit of each head that takes part in the softmax but has no value: `[n_head]`.
    pub sinks: Option<&'a [f32]>,
    /// Bounds logits to `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// A token at position p sees positions above `p - window` only.
    pub window: Option<u32>,
    /// `[n_head, pages.len()]`: the softmax weight of every page, for the last token of the batch. A head's weights
    /// sum to 1 (with its sink's).
    pub mass: Option<&'a Shared<f32>>,
}

pub(crate) struct Scratch {
    /// What chunks of pages contribute to a token: `[chunks, n_head, LANES + head_dim]`.
    #[allow(dead_code)]
    partial: Shared<f32>,
    /// Largest logit and sum relative to it, of every page: `[n_head, max_pages, 2]`.
    page_stats: Shared<f32>,
    /// Decoded keys and values of a page for each worker: `[nth, 2, PAGE, head_dim]`.
    decoded: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits, nth: usize) -> Self {
        let [partial, page_stats, decoded] = Self::lens(limits, nth);
        Self {
            partial: Shared::zeroed(partial),
            page_stats: Shared::zeroed(page_stats),
            decoded: Shared::zeroed(decoded),
        }
    }

    pub(crate) fn size(limits: &Limits, nth: usize) -> usize {
        Self::lens(limits, nth).iter().sum::<usize>() * size_of::<f32>()
    }

    fn lens(limits: &Limits, nth: usize) -> [usize; 3] {
        let dim = limits.head_dim.next_multiple_of(LANES);
        [
            limits.max_pages.div_ceil(CHUNK) * limits.n_head * (LANES + dim),
            limits.n_head * limits.max_pages * 2,
            nth * 2 * PAGE * dim,
        ]
    }
}

impl Pass<'_> {
    /// Softmax attention. `q`: `[n_tokens, n_head, head_dim_k]`, `out`: `[n_tokens, n_head, head_dim_v]`, different
    /// buffers.
    pub fn attention(
        &self,
        out: &Shared<f32>,
        q: &Shared<f32>,
        layer: &KvLayer,
        a: &Attention<'_>,
    ) {
        self.check(
            "attention",
            &[id(out), id(q), id(&layer.k), a.pages.len(), a.q_pos.len()],
        );
        let shape = layer.shape();
        assert!(a.n_head.is_multiple_of(shape.n_head_kv) && !out.is(q));
        assert!(a.n_head <= self.limits.n_head && a.pages.len() <= self.limits.max_pages);
        assert!(shape.head_dim_k.max(shape.head_dim_v) <= self.limits.head_dim);
        for item in self.w.range(a.q_pos.len() * a.n_head, 1) {
            // SAFETY: `q` is only read, the head's part of `out` is this worker's.
            let (q, out) = unsafe {
                (
                    q.slice(item * shape.head_dim_k..(item + 1) * shape.head_dim_k),
                    out.slice_mut(item * shape.head_dim_v..(item + 1) * shape.head_dim_v),
                )
            };
            self.attend(out, q, layer, a, item / a.n_head, item % a.n_head);
        }
        self.barrier();
    }

    /// One head of one token.
    fn attend(
        &self,
        out: &mut [f32],
        q: &[f32],
        layer: &KvLayer,
        a: &Attention<'_>,
        t: usize,
        h: usize,
    ) {
        let shape = layer.shape();
        let head_kv = h / (a.n_head / shape.n_head_kv);
        let start = self.ith() * 2 * PAGE * self.limits.head_dim.next_multiple_of(LANES);
        // SAFETY: every worker has its own.
        let decoded = unsafe {
            self.scratch
                .attention
                .decoded
                .slice_mut(start..start + q.len().max(out.len()))
        };
        let pos = a.q_pos[t];
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
        if let Some(sinks) = a.sinks {
            (max, sum) = (sinks[h], 1.0);
        }
        out.fill(0.0);
        let mass = a.mass.filter(|_| t + 1 == a.q_pos.len());
        let stats_at = |i: usize| (h * self.limits.max_pages + i) * 2;
        for (i, page) in a.pages.iter().enumerate() {
            let mut logits = [f32::NEG_INFINITY; PAGE];
            for (row, logit) in logits.iter_mut().enumerate().take(page.len as usize) {
                let p = page.first_pos + row as u32;
                if p > pos || a.window.is_some_and(|w| pos - p >= w) {
                    continue;
                }
                let key = &mut decoded[..q.len()];
                let place = Place {
                    slot: page.slot,
                    row: row as u32,
                };
                // SAFETY: the pool is only read.
                let bytes = unsafe { layer.k.slice(layer.k_row(place, head_kv)) };
                (shape.ty_k.traits().dequantize_row)(bytes, key);
                *logit = lanes::dot(self.isa, q, key) * a.scale;
                if let Some(cap) = a.softcap {
                    *logit = cap * lanes::tanh::<false>(*logit / cap);
                }
            }
            let page_max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut page_sum = 0.0;
            if page_max > f32::NEG_INFINITY {
                let new_max = max.max(page_max);
                let rescale = lanes::exp::<false>(max - new_max);
                max = new_max;
                sum *= rescale;
                lanes::scale(self.isa, out, rescale);
                for (row, logit) in logits.iter().enumerate() {
                    let p = lanes::exp::<false>(logit - max);
                    if p > 0.0 {
                        page_sum += p;
                        let value = &mut decoded[..out.len()];
                        let place = Place {
                            slot: page.slot,
                            row: row as u32,
                        };
                        // SAFETY: the pool is only read.
                        let bytes = unsafe { layer.v.slice(layer.v_row(place, head_kv)) };
                        (shape.ty_v.traits().dequantize_row)(bytes, value);
                        lanes::add_scaled(self.isa, out, value, p);
                    }
                }
                sum += page_sum;
            }
            if mass.is_some() {
                let at = stats_at(i);
                // SAFETY: a head's pages are this worker's.
                unsafe { self.scratch.attention.page_stats.slice_mut(at..at + 2) }
                    .copy_from_slice(&[max, page_sum]);
            }
        }
        if sum > 0.0 {
            lanes::scale(self.isa, out, 1.0 / sum);
        }
        if let Some(mass) = mass {
            for i in 0..a.pages.len() {
                let (from, to) = (stats_at(i), h * a.pages.len() + i);
                // SAFETY: a head's pages are this worker's.
                unsafe {
                    let stats = self.scratch.attention.page_stats.slice(from..from + 2);
                    let seen = stats[1] > 0.0;
                    mass.slice_mut(to..to + 1)[0] = if seen {
                        stats[1] * lanes::exp::<false>(stats[0] - max) / sum
                    } else {
                        0.0
                    };
                }
            }
        }
    }
}
