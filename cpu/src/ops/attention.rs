//! Attention over pages.
//!
//! Query heads that share a key and value head are worked on together, for a few tokens at a time: a page is decoded
//! once for all of them, and each row of queries goes through the pages with an online softmax.
//!
//! Pages come in chunks of a fixed number. A chunk is summed up for itself and then joined to those before. With
//! one token, workers take chunks and a second stage joins them; with many, a worker goes through all chunks of its
//! tokens. The sums are the same.

use super::{Limits, Pass, id};
use crate::attend::{self, Page, Rows, Tokens};
use crate::decode;
use crate::lanes::{self, LANES, multiversion};
use crate::{KvLayer, PAGE, PageRef, Shared};
use lemma_quant::GgmlType;
use lemma_quant::pages::KvType;
use std::ops::Range;

/// Pages of a chunk; a constant, so that sums do not depend on the number of workers.
const CHUNK: usize = 16;
/// Rows of queries that share a decoded page, if there are so many.
const ROWS: usize = 16;

/// Up to so many rows read half-precision pages as they are: they are converted once for every six rows then, which
/// costs less than to write and read them as f32.
const DIRECT: usize = 8;

/// How attention looks at the pages.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Query heads; a multiple of `n_head_kv`.
    pub n_head: usize,
    /// Key and value heads: those of the pool, or more if it has one plane, where each head has pages of its own.
    pub n_head_kv: usize,
    /// The pages in the order of their positions; their slots are in any order. One table after the other.
    pub pages: &'a [PageRef],
    /// Where in `pages` the table of each key and value head lies: `[n_head_kv]`; empty if all share the only one.
    pub tables: &'a [(u32, u32)],
    /// Pages that are not looked at have 0 here, `[pages]`.
    pub keep: Option<&'a Shared<u32>>,
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
    /// The softmax weight of every page, for the last token of the batch: for one table after the other, `[heads, pages]`. A head's
    /// weights sum to 1 (with its sink's).
    pub mass: Option<&'a Shared<f32>>,
}

impl<'a> Attention<'a> {
    /// Query heads that share a key and value head.
    fn group(&self) -> usize {
        self.n_head / self.n_head_kv
    }

    fn range(&self, head: usize) -> Range<usize> {
        match self.tables.get(head) {
            Some(&(from, to)) => from as usize..to as usize,
            None => 0..self.pages.len(),
        }
    }

    /// The pages of a key and value head.
    fn table(&self, head: usize) -> &'a [PageRef] {
        &self.pages[self.range(head)]
    }

    /// Chunks of the longest table.
    fn chunks(&self) -> usize {
        let longest = (0..self.n_head_kv).map(|head| self.range(head).len()).max();
        longest.unwrap_or(0).div_ceil(CHUNK)
    }

    /// Where the weights of query head `h` begin in `mass`.
    fn mass_at(&self, h: usize) -> usize {
        let table = self.range(h / self.group());
        if self.tables.is_empty() {
            h * table.len()
        } else {
            table.start * self.group() + h % self.group() * table.len()
        }
    }
}

pub(crate) struct Scratch {
    /// What chunks contribute to one token: `[chunks, n_head]` of a row's state.
    partial: Shared<f32>,
    /// Largest logits so far, and sums relative to them, of every page: `[n_head, 2, max_pages]`.
    page_stats: Shared<f32>,
    /// Decoded keys and values, queries, and states of rows, for each worker.
    worker: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits, nth: usize) -> Self {
        let [partial, page_stats, worker] = Self::lens(limits, nth);
        Self {
            partial: Shared::zeroed(partial),
            page_stats: Shared::zeroed(page_stats),
            worker: Shared::zeroed(worker),
        }
    }

    pub(crate) fn size(limits: &Limits, nth: usize) -> usize {
        Self::lens(limits, nth).iter().sum::<usize>() * size_of::<f32>()
    }

    fn lens(limits: &Limits, nth: usize) -> [usize; 3] {
        [
            limits.max_pages.div_ceil(CHUNK) * limits.n_head * (LANES + Self::dim(limits)),
            limits.n_head * limits.max_pages * 2,
            nth * Self::worker_len(limits),
        ]
    }

    /// Keys and values of a page, then queries and two sets of states.
    fn worker_len(limits: &Limits) -> usize {
        let rows = (ROWS + limits.n_head) * (3 * Self::dim(limits) + 6);
        (2 * PAGE * Self::dim(limits) + rows).next_multiple_of(LANES)
    }

    fn dim(limits: &Limits) -> usize {
        limits.head_dim.next_multiple_of(LANES)
    }
}

/// The state of some rows: see [`Rows`].
struct State<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

impl State<'_> {
    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }
}

/// A worker's memory.
struct Memory<'a> {
    k: &'a mut [f32],
    v: &'a mut [f32],
    q: &'a mut [f32],
    page_sum: &'a mut [f32],
    chunk: State<'a>,
    total: State<'a>,
}

impl<'a> Memory<'a> {
    fn new(memory: &'a mut [f32], n: usize, dim_k: usize, dim_v: usize) -> Self {
        let mut rest = memory;
        let mut take = |len: usize| rest.split_off_mut(..len).expect("sized by the limits");
        let (k, v) = (take(PAGE * dim_k), take(PAGE * dim_v));
        let q = take(n * dim_k);
        let mut state = |n| State {
            acc: take(n * dim_v),
            max: take(n),
            sum: take(n),
        };
        let (chunk, total) = (state(n), state(n));
        Self {
            k,
            v,
            q,
            page_sum: take(n),
            chunk,
            total,
        }
    }
}

impl Pass<'_> {
    /// Softmax attention. `q`: `[n_tokens, n_head, head_dim_k]`, `out`: `[n_tokens, n_head, head_dim_v]`, different
    /// buffers. `layers`: the pools that the pages are in, of the same heads in types of their own.
    pub fn attention(
        &self,
        out: &Shared<f32>,
        q: &Shared<f32>,
        layers: &[KvLayer],
        a: &Attention<'_>,
    ) {
        let layer = &layers[0];
        self.check(
            "attention",
            &[id(out), id(q), id(&layer.k), a.pages.len(), a.q_pos.len()],
        );
        let shape = layer.shape();
        assert!(a.n_head.is_multiple_of(a.n_head_kv) && !out.is(q));
        assert!(shape.n_head_kv == a.n_head_kv || shape.n_head_kv == 1);
        assert!(a.tables.is_empty() || a.tables.len() == a.n_head_kv);
        let chunks = a.chunks();
        assert!(a.n_head <= self.limits.n_head);
        assert!(chunks <= self.limits.max_pages.div_ceil(CHUNK));
        assert!(shape.head_dim_k.max(shape.head_dim_v) <= self.limits.head_dim);
        assert!(a.pages.iter().all(|p| (p.row + p.len) as usize <= PAGE));
        assert!(layers.iter().all(|l| l.shape().fits(shape)));
        assert!(a.sinks.is_none_or(|s| s.len() == a.n_head));
        let n_tokens = a.q_pos.len();
        if n_tokens == 1 {
            for item in self.w.claim(a.n_head_kv * chunks, 1).map(|r| r.start) {
                // Chunks of one head after the other.
                self.one_chunk(q, layers, a, item / chunks, item % chunks);
            }
            self.barrier();
            for h in self.w.range(a.n_head, 1) {
                self.join_chunks(out, layer, a, h);
            }
        } else {
            let block = ROWS.div_ceil(a.group());
            let blocks = n_tokens.div_ceil(block);
            for item in self.w.claim(a.n_head_kv * blocks, 1).map(|r| r.start) {
                // The last tokens see most: they come first.
                let (b, head) = (blocks - 1 - item / a.n_head_kv, item % a.n_head_kv);
                let tokens = b * block..((b + 1) * block).min(n_tokens);
                self.some_tokens(out, q, layers, a, head, tokens);
            }
        }
        self.barrier();
    }

    /// One token and all heads of a group with one chunk, to `partial`.
    fn one_chunk(
        &self,
        q: &Shared<f32>,
        layers: &[KvLayer],
        a: &Attention<'_>,
        head: usize,
        chunk: usize,
    ) {
        let layer = &layers[0];
        let (group, dim_v) = (a.group(), dim(layer.shape().head_dim_v));
        if chunk * CHUNK >= a.range(head).len() {
            return;
        }
        let mut m = self.memory(layer, group);
        self.load_queries(m.q, q, layer, a, head, 0..1);
        m.chunk.clear();
        self.chunk(&mut m, layers, a, head, 0..1, chunk);
        for i in 0..group {
            let size = LANES + Scratch::dim(self.limits);
            let at = (chunk * a.n_head + head * group + i) * size;
            // SAFETY: a chunk's row is this worker's.
            let to = unsafe { self.scratch.attention.partial.slice_mut(at..at + size) };
            (to[0], to[1]) = (m.chunk.max[i], m.chunk.sum[i]);
            to[LANES..LANES + dim_v].copy_from_slice(&m.chunk.acc[i * dim_v..(i + 1) * dim_v]);
        }
    }

    /// Joins the chunks of head `h` of one token.
    fn join_chunks(&self, out: &Shared<f32>, layer: &KvLayer, a: &Attention<'_>, h: usize) {
        let dim_v = layer.shape().head_dim_v;
        let m = self.memory(layer, 1);
        let mut total = m.total;
        self.start(&mut total, a, 0, h);
        for chunk in 0..a.range(h / a.group()).len().div_ceil(CHUNK) {
            let size = LANES + Scratch::dim(self.limits);
            let at = (chunk * a.n_head + h) * size;
            // SAFETY: written before the last barrier.
            let from = unsafe { self.scratch.attention.partial.slice(at..at + size) };
            self.join(
                &mut total,
                0,
                from[0],
                from[1],
                &from[LANES..LANES + dim(dim_v)],
            );
        }
        self.finish(out, &total, 0, h, a, dim_v);
    }

    /// Some tokens and all heads of a group with all chunks.
    fn some_tokens(
        &self,
        out: &Shared<f32>,
        q: &Shared<f32>,
        layers: &[KvLayer],
        a: &Attention<'_>,
        head: usize,
        tokens: Range<usize>,
    ) {
        let layer = &layers[0];
        let shape = layer.shape();
        let (group, dim_v) = (a.group(), dim(shape.head_dim_v));
        let n = tokens.len() * group;
        let mut m = self.memory(layer, n);
        self.load_queries(m.q, q, layer, a, head, tokens.clone());
        for r in 0..n {
            self.start(&mut m.total, a, r, head * group + r % group);
        }
        for chunk in 0..a.range(head).len().div_ceil(CHUNK) {
            m.chunk.clear();
            self.chunk(&mut m, layers, a, head, tokens.clone(), chunk);
            for r in 0..n {
                let acc = &m.chunk.acc[r * dim_v..(r + 1) * dim_v];
                self.join(&mut m.total, r, m.chunk.max[r], m.chunk.sum[r], acc);
            }
        }
        for r in 0..n {
            let at = (tokens.start + r / group) * a.n_head + head * group + r % group;
            self.finish(out, &m.total, r, at, a, shape.head_dim_v);
        }
    }

    /// This worker's memory for `n` rows.
    fn memory(&self, layer: &KvLayer, n: usize) -> Memory<'_> {
        let len = Scratch::worker_len(self.limits);
        let start = self.ith() * len;
        // SAFETY: every worker has its own, and asks for it once at a time.
        let memory = unsafe { self.scratch.attention.worker.slice_mut(start..start + len) };
        let shape = layer.shape();
        Memory::new(memory, n, dim(shape.head_dim_k), dim(shape.head_dim_v))
    }

    /// The queries of a group of heads, times the scale of logits: `[tokens, group, dim_k]`, filled up with zeros.
    fn load_queries(
        &self,
        to: &mut [f32],
        q: &Shared<f32>,
        layer: &KvLayer,
        a: &Attention<'_>,
        head: usize,
        tokens: Range<usize>,
    ) {
        let (group, len) = (a.group(), layer.shape().head_dim_k);
        for (r, to) in to.chunks_exact_mut(dim(len)).enumerate() {
            let row = (tokens.start + r / group) * a.n_head + head * group + r % group;
            // SAFETY: `q` is only read.
            let q = unsafe { q.slice(row * len..(row + 1) * len) };
            for (to, q) in to.iter_mut().zip(q) {
                *to = q * a.scale;
            }
            to[len..].fill(0.0);
        }
    }

    /// Takes a chunk of pages into account.
    fn chunk(
        &self,
        m: &mut Memory<'_>,
        layers: &[KvLayer],
        a: &Attention<'_>,
        head: usize,
        tokens: Range<usize>,
        chunk: usize,
    ) {
        let shape = layers[0].shape();
        let (group, plane) = (a.group(), shape.plane(head));
        let n = tokens.len() * group;
        let first = chunk * CHUNK;
        let mut seen = [(0, 0); ROWS];
        let mut all_seen = [(0, 0); 2 * ROWS];
        let table = a.table(head);
        let start = a.range(head).start + first;
        // SAFETY: written before the last barrier.
        let keep = (a.keep).map(|k| unsafe { k.slice(start..(start + CHUNK).min(k.len())) });
        let pages = &table[first..(first + CHUNK).min(table.len())];
        for (i, page) in pages.iter().enumerate() {
            let mut any = false;
            let kept = keep.is_none_or(|k| k[i] != 0);
            for (seen, pos) in seen.iter_mut().zip(&a.q_pos[tokens.clone()]) {
                *seen = if kept {
                    visible(page, *pos, a.window)
                } else {
                    (0, 0)
                };
                any |= seen.0 < seen.1;
            }
            let is_last = tokens.end == a.q_pos.len();
            if any {
                let next = pages.get(i + 1);
                let next = next.map(|p| stored(&layers[usize::from(p.tier)], p.slot, plane));
                let layer = &layers[usize::from(page.tier)];
                let (types, [k, v]) = (layer.shape(), stored(layer, page.slot, plane));
                let k = self.tokens(m.k, k, types.ty_k, shape.head_dim_k, n);
                let v = match types.values_in_keys {
                    true => k,
                    false => self.tokens(m.v, v, types.ty_v, shape.head_dim_v, n),
                };
                let page = Page {
                    k,
                    v,
                    dim_v: dim(shape.head_dim_v),
                    softcap: a.softcap,
                    next: next.unwrap_or_default(),
                };
                // Rows of a token see the same.
                for start in (0..n).step_by(all_seen.len()) {
                    let rows = start..(start + all_seen.len()).min(n);
                    for (seen_r, r) in all_seen.iter_mut().zip(rows.clone()) {
                        *seen_r = seen[r / group];
                    }
                    let (dim_k, dim_v) = (dim(shape.head_dim_k), dim(shape.head_dim_v));
                    let mut rows = Rows {
                        q: &m.q[rows.start * dim_k..rows.end * dim_k],
                        max: &mut m.chunk.max[rows.clone()],
                        sum: &mut m.chunk.sum[rows.clone()],
                        acc: &mut m.chunk.acc[rows.start * dim_v..rows.end * dim_v],
                        seen: &all_seen[..rows.len()],
                        page_sum: &mut m.page_sum[rows],
                    };
                    // SAFETY: `isa` is available.
                    unsafe { attend::attend(self.isa, &mut rows, page) };
                }
            } else {
                m.page_sum[..n].fill(0.0);
            }
            if a.mass.is_some() && is_last {
                for j in 0..group {
                    let r = n - group + j;
                    let at = 2 * (head * group + j) * self.limits.max_pages + first + i;
                    let stats = &self.scratch.attention.page_stats;
                    for (at, x) in [
                        (at, m.chunk.max[r]),
                        (at + self.limits.max_pages, m.page_sum[r]),
                    ] {
                        // SAFETY: the page of a head is this worker's.
                        unsafe { stats.slice_mut(at..at + 1)[0] = x };
                    }
                }
            }
        }
    }

    /// The keys or values of a head in a page, for `n` rows of queries: `[PAGE, dim]`.
    fn tokens<'s>(
        &self,
        to: &'s mut [f32],
        bytes: &'s [u8],
        ty: KvType,
        len: usize,
        n: usize,
    ) -> Tokens<'s> {
        let ty = match ty {
            KvType::Rows(ty) => ty,
            pages => {
                let decode = match pages {
                    KvType::K4 => decode::decode_k4,
                    _ => decode::decode_v2,
                };
                // SAFETY: `isa` is available.
                unsafe { decode(self.isa, bytes, to) };
                return Tokens::F32(to);
            }
        };
        if dim(len) != len {
            let rows = bytes.chunks_exact(bytes.len() / PAGE);
            for (bytes, to) in rows.zip(to.chunks_exact_mut(dim(len))) {
                (ty.traits().dequantize_row)(bytes, &mut to[..len]);
                to[len..].fill(0.0);
            }
            return Tokens::F32(to);
        }
        // SAFETY: `isa` is available.
        unsafe {
            match ty {
                GgmlType::F16 if n <= DIRECT => return Tokens::F16(bytes),
                GgmlType::F16 => decode::decode_f16(self.isa, bytes, to),
                GgmlType::Q8_0 => decode::decode_q8_0(self.isa, bytes, to),
                GgmlType::Q4_0 => decode::decode_q4_0(self.isa, bytes, to),
                _ => (ty.traits().dequantize_row)(bytes, to),
            }
        }
        Tokens::F32(to)
    }

    /// What is there before any page.
    fn start(&self, total: &mut State<'_>, a: &Attention<'_>, r: usize, h: usize) {
        let dim_v = total.acc.len() / total.max.len();
        total.acc[r * dim_v..(r + 1) * dim_v].fill(0.0);
        (total.max[r], total.sum[r]) = match a.sinks {
            Some(sinks) => (sinks[h], 1.0),
            None => (f32::NEG_INFINITY, 0.0),
        };
    }

    /// Joins a chunk to row `r`.
    fn join(&self, total: &mut State<'_>, r: usize, max: f32, sum: f32, acc: &[f32]) {
        if max == f32::NEG_INFINITY {
            return;
        }
        let new = total.max[r].max(max);
        let (keep, add) = (exp(total.max[r] - new), exp(max - new));
        total.max[r] = new;
        total.sum[r] = total.sum[r] * keep + sum * add;
        let to = &mut total.acc[r * acc.len()..(r + 1) * acc.len()];
        // SAFETY: `isa` is available.
        unsafe { attend::accumulate(self.isa, to, keep, acc, add) };
    }

    /// Writes row `r` to head number `at` of all tokens' heads, and the weights of pages for the last token.
    fn finish(
        &self,
        out: &Shared<f32>,
        total: &State<'_>,
        r: usize,
        at: usize,
        a: &Attention<'_>,
        len: usize,
    ) {
        let (max, sum) = (total.max[r], total.sum[r]);
        // Nothing was seen: the average of nothing is taken to be zero.
        let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
        let start = r * dim(len);
        // SAFETY: the head's part of `out` is this worker's.
        let out = unsafe { out.slice_mut(at * len..(at + 1) * len) };
        for (out, acc) in out.iter_mut().zip(&total.acc[start..start + len]) {
            *out = acc * factor;
        }
        let (t, h) = (at / a.n_head, at % a.n_head);
        if let Some(mass) = a.mass.filter(|_| t + 1 == a.q_pos.len()) {
            let (n, to) = (a.range(h / a.group()).len(), a.mass_at(h));
            let stats = &self.scratch.attention.page_stats;
            let start = 2 * h * self.limits.max_pages;
            let sums = start + self.limits.max_pages;
            // SAFETY: the weights of a head are this worker's; statistics were written by itself or before the barrier.
            let (mass, maxima, sums) = unsafe {
                (
                    mass.slice_mut(to..to + n),
                    stats.slice(start..start + n),
                    stats.slice(sums..sums + n),
                )
            };
            page_weights(self.isa, mass, maxima, sums, max, factor);
        }
    }
}

multiversion! {
    /// Weights of pages from their sums of exponentials, which are relative to `maxima`, where the largest logit of all
    /// is `max` and the sum of all is `1 / factor`.
    fn page_weights(mass: &mut [f32], maxima: &[f32], sums: &[f32], max: f32, factor: f32) {
        for ((mass, page_max), sum) in mass.iter_mut().zip(maxima).zip(sums) {
            let weight = sum * lanes::exp::<FMA>(page_max - max) * factor;
            *mass = if *sum > 0.0 { weight } else { 0.0 };
        }
    }
}

/// Keys and values of a head in a page, as they are in the pool.
fn stored(layer: &KvLayer, slot: u32, plane: usize) -> [&[u8]; 2] {
    // SAFETY: attention only reads pools.
    unsafe {
        let k = layer.k.slice(layer.k_page(slot, plane));
        [k, layer.v.slice(layer.v_page(slot, plane))]
    }
}

/// Values of a head, rounded up to whole vectors.
fn dim(len: usize) -> usize {
    len.next_multiple_of(LANES)
}

fn exp(x: f32) -> f32 {
    lanes::exp::<false>(x)
}

/// The tokens of a page that a query at `pos` sees.
fn visible(page: &PageRef, pos: u32, window: Option<u32>) -> (u8, u8) {
    let first = page.first_pos;
    let end = if pos < first {
        0
    } else {
        (pos - first + 1).min(page.len)
    };
    let oldest = window.map_or(0, |w| (pos + 1).saturating_sub(w));
    let seen = |token: u32| (page.row + token) as u8;
    (seen(oldest.saturating_sub(first).min(page.len)), seen(end))
}
