//! Attention over pages.
//!
//! Query heads that share a key and value head are worked on together, for a few tokens at a time: a page is decoded
//! once for all of them.
//!
//! Pages come in chunks of a fixed number. A chunk is summed up for itself, first all logits, then all values, and then joined to those
//! before. With one token, workers take chunks and a second stage joins them; with many, a worker goes through all chunks of its
//! tokens. The sums are the same.

mod scratch;
mod window;

pub(crate) use scratch::Scratch;

use super::{Pass, id};
use crate::attend::{self, BLOCK, CHUNK, Keys, Part, Queries, Rounded, Rows, SPAN, Values};
use crate::decode;
use crate::lanes::{self, LANES, multiversion};
use crate::{KvLayer, KvShape, PAGE, PageRef, Shared};
use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, tiles};
use scratch::{Memory, State};
use std::ops::Range;
pub use window::Window;

/// Rows of queries that share a decoded page, if there are so many.
const ROWS: usize = 16;

/// Up to so many rows read half-precision pages as they are: they are converted once for every six rows then, which
/// costs less than to write and read them as f32.
const DIRECT: usize = 8;

/// So many pages later something is read that the pool is asked for now: about as long as memory takes to answer on a busy machine.
const AHEAD: usize = 4;

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
    /// What a token sees, if not all.
    pub window: Option<Window>,
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
        self.longest().div_ceil(CHUNK)
    }

    /// Pages of the longest table.
    fn longest(&self) -> usize {
        let pages = (0..self.n_head_kv).map(|head| self.range(head).len());
        pages.max().unwrap_or(0)
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
        assert!(a.longest() <= self.limits.max_pages);
        assert!(shape.head_dim_k.max(shape.head_dim_v) <= self.limits.head_dim);
        assert!(a.pages.iter().all(|p| (p.row + p.len) as usize <= PAGE));
        assert!(layers.iter().all(|l| l.shape().fits(shape)));
        assert!(a.sinks.is_none_or(|s| s.len() == a.n_head));
        let n_tokens = a.q_pos.len();
        if n_tokens == 1 {
            // Chunks of one head after the other.
            let items = a.n_head_kv * chunks;
            let place = |item: usize| (item / chunks, item % chunks);
            // The head whose queries this worker has at hand.
            let mut at_hand = None;
            for item in self.w.claim(items, 1).map(|r| r.start) {
                let after = item + self.nth();
                let after = (after < items).then(|| place(after));
                self.one_chunk(q, layers, a, place(item), after, &mut at_hand);
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
        (head, chunk): (usize, usize),
        after: Option<(usize, usize)>,
        at_hand: &mut Option<usize>,
    ) {
        let layer = &layers[0];
        let (group, dim_v) = (a.group(), dim(layer.shape().head_dim_v));
        if chunk * CHUNK >= a.range(head).len() {
            return;
        }
        let mut m = self.memory(layer, group);
        if at_hand.replace(head) != Some(head) {
            self.load_queries(&mut m, q, layers, a, head, 0..1);
        }
        self.chunk(&mut m, layers, a, head, 0..1, chunk, after);
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
        self.load_queries(&mut m, q, layers, a, head, tokens.clone());
        for r in 0..n {
            self.start(&mut m.total, a, r, head * group + r % group);
        }
        for chunk in 0..a.range(head).len().div_ceil(CHUNK) {
            let after = Some((head, chunk + 1));
            self.chunk(&mut m, layers, a, head, tokens.clone(), chunk, after);
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

    /// The queries of a group of heads, times the scale of logits: `[tokens, group, dim_k]`, filled up with zeros; and what they have at most, where
    /// keys of some pages ask for it; and the same in 16 bits.
    fn load_queries(
        &self,
        m: &mut Memory<'_>,
        q: &Shared<f32>,
        layers: &[KvLayer],
        a: &Attention<'_>,
        head: usize,
        tokens: Range<usize>,
    ) {
        let (group, len) = (a.group(), layers[0].shape().head_dim_k);
        for (r, to) in m.q.chunks_exact_mut(dim(len)).enumerate() {
            let row = (tokens.start + r / group) * a.n_head + head * group + r % group;
            // SAFETY: `q` is only read.
            let q = unsafe { q.slice(row * len..(row + 1) * len) };
            for (to, q) in to.iter_mut().zip(q) {
                *to = q * a.scale;
            }
            to[len..].fill(0.0);
        }
        if layers.iter().any(|l| turned(l.shape().ty_k, len).is_some()) {
            let (n, planes) = (m.step.len(), attend::has_planes(self.isa));
            for (r, (q, step)) in m.q.chunks_exact(len).zip(&mut *m.step).enumerate() {
                let (quads, bytes) = (&mut *m.quads, &mut *m.bytes);
                *step = attend::round_query(self.isa, q, r, n, planes, quads, bytes, m.blocks);
            }
        }
        if layers.iter().any(|l| l.shape().ty_k == KvType::K4) {
            m.most.fill(0.0);
            for (r, q) in m.q.chunks_exact(dim(len)).enumerate() {
                let most = &mut m.most[r / group * dim(len)..];
                for (most, q) in most.iter_mut().zip(q) {
                    *most = if q.abs() > *most { q.abs() } else { *most };
                }
            }
        }
    }

    /// Sums up a chunk of pages. `after`: the head and number of the chunk that this worker is likely to go on with.
    #[allow(
        clippy::too_many_arguments,
        reason = "a place among heads, tokens and chunks"
    )]
    fn chunk(
        &self,
        m: &mut Memory<'_>,
        layers: &[KvLayer],
        a: &Attention<'_>,
        head: usize,
        tokens: Range<usize>,
        chunk: usize,
        after: Option<(usize, usize)>,
    ) {
        let shape = layers[0].shape();
        let (group, plane) = (a.group(), shape.plane(head));
        let n = tokens.len() * group;
        let (first, table) = (chunk * CHUNK, a.table(head));
        let start = a.range(head).start + first;
        // SAFETY: written before the last barrier.
        let keep = (a.keep).map(|k| unsafe { k.slice(start..(start + CHUNK).min(k.len())) });
        let pages = &table[first..(first + CHUNK).min(table.len())];
        let mut all_seen = [[(0, 0); ROWS]; CHUNK];
        for (i, (seen, page)) in all_seen.iter_mut().zip(pages).enumerate() {
            if keep.is_none_or(|k| k[i] != 0) {
                for (seen, pos) in seen.iter_mut().zip(&a.q_pos[tokens.clone()]) {
                    *seen = visible(page, *pos, a.window);
                }
            }
        }
        let rows = |page: usize| {
            let seen = &all_seen[page][..tokens.len()];
            let any = seen.iter().any(|s| s.0 < s.1);
            any.then_some(Rows { group, seen })
        };
        let planes = |page: &PageRef, plane| {
            let layer = &layers[usize::from(page.tier)];
            (layer.shape(), stored(layer, page.slot, plane))
        };
        // What comes some pages later: keys, then values, then keys of the chunk that is next.
        let coming = |part: usize, i: usize| match (pages.get(i), part) {
            (Some(page), _) => planes(page, plane).1[part],
            (None, 0) => (pages.get(i - pages.len())).map_or(&[][..], |p| planes(p, plane).1[1]),
            (None, _) => after.map_or(&[][..], |(head, chunk)| {
                let page = a.table(head).get(chunk * CHUNK + i - pages.len());
                page.map_or(&[][..], |p| planes(p, shape.plane(head)).1[0])
            }),
        };
        let queries = Queries {
            q: m.q,
            most: &m.most[..tokens.len() * dim(shape.head_dim_k)],
            rounded: Rounded {
                quads: m.quads,
                bytes: m.bytes,
                blocks: m.blocks,
                step: m.step,
            },
            softcap: a.softcap,
        };
        m.chunk.acc.fill(0.0);
        if (0..pages.len()).all(|page| rows(page).is_none()) {
            // Most chunks of a layer with a window.
            m.chunk.max.fill(f32::NEG_INFINITY);
            m.chunk.sum.fill(0.0);
            m.chunk.page_sum.fill(0.0);
        } else {
            for (i, page) in pages.iter().enumerate() {
                let Some(rows) = rows(i) else {
                    for logits in m.chunk.logits.chunks_exact_mut(SPAN) {
                        logits[i * PAGE..][..PAGE].fill(f32::NEG_INFINITY);
                    }
                    continue;
                };
                let (types, [k, _]) = planes(page, plane);
                let keys = self.keys(m.k, k, types, n);
                let next = coming(0, i + AHEAD);
                // SAFETY: `isa` is available.
                unsafe { attend::logits(self.isa, rows, queries, keys, next, &mut m.chunk, i) };
            }
            // SAFETY: `isa` is available.
            unsafe { attend::softmax(self.isa, &mut m.chunk, pages.len()) };
            for (i, page) in pages.iter().enumerate() {
                let Some(rows) = rows(i) else { continue };
                let (types, kv) = planes(page, plane);
                let to = match types.values_in_keys {
                    true => &mut *m.k,
                    false => &mut *m.v,
                };
                let live = page.row as usize..(page.row + page.len) as usize;
                let values = self.values(to, kv, types, n, live);
                let next = coming(1, i + AHEAD);
                let dim_v = dim(shape.head_dim_v);
                // SAFETY: `isa` is available.
                unsafe { attend::add_values(self.isa, rows, values, dim_v, next, &mut m.chunk, i) };
            }
        }
        if a.mass.is_some() && tokens.end == a.q_pos.len() {
            for j in 0..group {
                let r = n - group + j;
                let at = 2 * (head * group + j) * self.limits.max_pages + first;
                let sums = at + self.limits.max_pages;
                let stats = &self.scratch.attention.page_stats;
                // SAFETY: the pages of a chunk and head are this worker's.
                let [maxima, sums] =
                    [at, sums].map(|at| unsafe { stats.slice_mut(at..at + pages.len()) });
                maxima.fill(m.chunk.max[r]);
                sums.copy_from_slice(&m.chunk.page_sum[r * CHUNK..][..pages.len()]);
            }
        }
    }

    /// The keys of a head in a page, for `n` rows of queries: `[PAGE, dim]`.
    fn keys<'s>(&self, to: &'s mut [f32], bytes: &'s [u8], types: &KvShape, n: usize) -> Keys<'s> {
        if types.ty_k == KvType::K4 {
            let tiles = tiles(bytes);
            let scales = &mut to[..2 * types.head_dim_k];
            decode::scales_k4(self.isa, tiles, scales);
            return Keys::K4(tiles, scales);
        }
        if let Some(ty) = turned(types.ty_k, types.head_dim_k) {
            let (isa, dim) = (self.isa, types.head_dim_k);
            return Keys::Blocks(attend::turn(isa, Part::Keys, ty, bytes, dim, to));
        }
        if self.reads_f16(types.ty_k, types.head_dim_k, n) {
            return Keys::F16(bytes);
        }
        self.decode(to, bytes, types.ty_k, types.head_dim_k);
        Keys::F32(to)
    }

    /// The values of a head in a page whose rows `live` are its own, for `n` rows of queries: `[PAGE, dim]`, or longer, if they are what keys begin with.
    fn values<'s>(
        &self,
        to: &'s mut [f32],
        [k, v]: [&'s [u8]; 2],
        types: &KvShape,
        n: usize,
        live: Range<usize>,
    ) -> Values<'s> {
        let (bytes, ty, len) = match types.values_in_keys {
            true => (k, types.ty_k, types.head_dim_k),
            false => (v, types.ty_v, types.head_dim_v),
        };
        if ty == KvType::V2 && !types.values_in_keys {
            return Values::V2(tiles(bytes));
        }
        if let Some(ty) = turned(ty, types.head_dim_v) {
            let (isa, dim) = (self.isa, types.head_dim_v);
            return Values::Blocks(attend::turn(isa, Part::Values(live), ty, bytes, dim, to));
        }
        if self.reads_f16(ty, len, n) {
            return Values::F16(bytes);
        }
        self.decode(to, bytes, ty, len);
        Values::F32(to)
    }

    /// Whether `n` rows read numbers as they are.
    fn reads_f16(&self, ty: KvType, len: usize, n: usize) -> bool {
        ty == KvType::Rows(GgmlType::F16) && n <= DIRECT && dim(len) == len
    }

    /// Decodes a page of a head, `[PAGE, dim]`.
    fn decode(&self, to: &mut [f32], bytes: &[u8], ty: KvType, len: usize) {
        let ty = match ty {
            KvType::Rows(ty) => ty,
            pages => {
                let decode = match pages {
                    KvType::K4 => decode::decode_k4,
                    _ => decode::decode_v2,
                };
                // SAFETY: `isa` is available.
                return unsafe { decode(self.isa, bytes, to) };
            }
        };
        if dim(len) != len {
            let rows = bytes.chunks_exact(bytes.len() / PAGE);
            for (bytes, to) in rows.zip(to.chunks_exact_mut(dim(len))) {
                (ty.traits().dequantize_row)(bytes, &mut to[..len]);
                to[len..].fill(0.0);
            }
            return;
        }
        // SAFETY: `isa` is available.
        unsafe {
            match ty {
                GgmlType::F16 => decode::decode_f16(self.isa, bytes, to),
                _ => (ty.traits().dequantize_row)(bytes, to),
            }
        }
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

/// The type of a page that is turned and multiplied as whole numbers, the first `dim` of each row.
fn turned(ty: KvType, dim: usize) -> Option<GgmlType> {
    match ty {
        KvType::Rows(ty) if dim.is_multiple_of(BLOCK) && attend::is_turned(ty) => Some(ty),
        _ => None,
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
fn visible(page: &PageRef, pos: u32, window: Option<Window>) -> (u8, u8) {
    let first = page.first_pos;
    let end = if pos < first {
        0
    } else {
        (pos - first + 1).min(page.len)
    };
    let oldest = window.map_or(0, |w| w.oldest(pos));
    let seen = |token: u32| (page.row + token) as u8;
    (seen(oldest.saturating_sub(first).min(page.len)), seen(end))
}
