//! The reference backend: plain loops over f32 activations with f64 sums, weights dequantized row by row, every named
//! intermediate kept.
//!
//! It is the oracle of the fast backends and a tool for whoever ports an architecture: run a pass, then look at
//! [`TraceRunner::named`] beside another engine's dump of the same names. It makes no attempt at speed.

mod attention;
mod experts;
mod math;
mod pool;
mod recurrent;

use std::collections::BTreeMap;

use self::math::{activation, affine, dot, gelu, norm, sigmoid, silu, softcap};
use super::{
    Activation, Backend, Buf, Embedding, Linear, Moe, Outputs, RopeMode, Runner, Scan, Selective,
    Tensor,
};
use crate::arch::{ArchModel, Binder, HParams, Rope, Widths};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::kv::{Cache, Layout, PAGE, PageMeta, Part, Place, Span};

/// A weight of the reference: the tensor where it lies in the file.
#[derive(Debug)]
pub struct TraceWeight(Tensor);

impl TraceWeight {
    /// Row `i`, dequantized.
    fn row(&self, i: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.0.n_in];
        self.0.dequantize_row(i, &mut out);
        out
    }

    fn vector(&self) -> Vec<f32> {
        self.row(0)
    }
}

/// A model bound to the reference backend.
pub struct TraceRunner {
    model: ArchModel<TraceWeight>,
    pass: TracePass,
}

/// State of the reference: buffers, KV pool and names.
struct TracePass {
    hp: HParams,
    widths: Widths,
    rope: Rope,
    bufs: Vec<Vec<f32>>,
    layout: Layout,
    /// Keys and values per region, tier after tier, `[block, row, heads of a block, head_dim]`, always f32; in lower tiers what their
    /// types leave of them.
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    states: recurrent::States,
    tokens: Vec<u32>,
    pos: u32,
    tables: Vec<(Vec<Span>, Vec<Place>)>,
    /// Page masses per table.
    masses: Vec<Vec<f32>>,
    /// Of each table: the pages that are attended in any case, and how many are in all.
    attends: Vec<(Vec<bool>, Option<usize>)>,
    /// Of each table: the pages that the last token attended to.
    attended: Vec<Vec<bool>>,
    outputs: Outputs,
    logits: Vec<f32>,
    named: BTreeMap<String, Vec<f32>>,
    closest_choice: f64,
}

impl TraceRunner {
    /// Binds a file's tensors and allocates the pool.
    ///
    /// # Errors
    /// Those of [`ArchModel::bind`].
    pub fn new(file: &GgufFile, hp: &HParams, layout: &Layout) -> Result<Self, Error> {
        let mut make = |t| Ok(TraceWeight(t));
        let model = ArchModel::bind(hp, &mut Binder::new(file, &mut make))?;
        let widths = Widths::of(hp);
        let pass = TracePass {
            rope: Rope::from_file(hp, file, layout.n_ctx)?,
            bufs: vec![Vec::new(); Buf::ALL.len()],
            layout: layout.clone(),
            k: vec![Vec::new(); layout.n_tiers() * layout.n_regions()],
            v: vec![Vec::new(); layout.n_tiers() * layout.n_regions()],
            states: recurrent::States::new(hp),
            tokens: Vec::new(),
            pos: 0,
            tables: Vec::new(),
            masses: Vec::new(),
            attends: Vec::new(),
            attended: Vec::new(),
            outputs: Outputs::Last,
            logits: Vec::new(),
            named: BTreeMap::new(),
            closest_choice: f64::INFINITY,
            widths,
            hp: hp.clone(),
        };
        let mut runner = Self { model, pass };
        runner.grow(layout)?;
        Ok(runner)
    }

    /// Intermediates of the last pass by name (`attn_norm-0`, `kqv_out-3`, …), each `[n_tokens, width]`.
    pub fn named(&self) -> &BTreeMap<String, Vec<f32>> {
        &self.pass.named
    }

    /// By how much the experts that were chosen were ahead of those that were not, the least of all layers and tokens of the last pass: where
    /// this is no more than rounding, another engine may well choose others. Infinite without such a choice.
    pub fn closest_choice(&self) -> f64 {
        self.pass.closest_choice
    }

    /// Page masses of table `t` after the last pass, `[heads, n_spans]`.
    pub fn masses(&self, t: usize) -> &[f32] {
        &self.pass.masses[t]
    }

    /// Which pages of table `t` the last token attended to, `[n_spans]`: all of them unless the policy selects.
    pub fn attended(&self, t: usize) -> &[bool] {
        &self.pass.attended[t]
    }
}

impl Runner for TraceRunner {
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error> {
        let p = &mut self.pass;
        for d in cache.demoted() {
            p.demote(d);
        }
        p.tokens = tokens.to_vec();
        p.pos = cache.pos() - tokens.len() as u32;
        if p.pos == 0 {
            p.states = recurrent::States::new(&p.hp);
        }
        p.outputs = outputs;
        p.named.clear();
        p.closest_choice = f64::INFINITY;
        let tables = cache.tables().iter();
        p.tables = tables
            .map(|t| (t.spans(cache.layout()).collect(), t.places.clone()))
            .collect();
        p.attends = (cache.tables().iter().enumerate())
            .map(|(t, table)| {
                let last = table.pages.len().saturating_sub(1);
                let forced = |(i, p): (usize, &PageMeta)| p.pinned || i == last;
                let forced = table.pages.iter().enumerate().map(forced).collect();
                (forced, cache.attends(t))
            })
            .collect();
        p.masses = vec![Vec::new(); p.tables.len()];
        p.attended = vec![Vec::new(); p.tables.len()];
        for b in Buf::ALL {
            p.bufs[b as usize] = vec![0.0; tokens.len() * p.widths.get(b)];
        }
        self.model.forward(p);
        if tokens.len() == 1 && cache.wants_mass() {
            for (t, mass) in p.masses.iter().enumerate() {
                let heads = p.hp.heads_of_pool(t / p.layout.groups);
                cache.end_table(t, mass, heads.n / p.layout.groups);
            }
        }
        if cache.wants_description() {
            cache.describe(tokens.len(), &mut |part, il, head, place, row| {
                let (region, at) = p.at(0, il, head, place.slot, place.row);
                let in_keys = part == Part::K || p.hp.latent.is_some();
                let pool = if in_keys { &p.k } else { &p.v };
                row.copy_from_slice(&pool[region][at..][..row.len()]);
            });
        }
        Ok(())
    }

    fn logits(&mut self) -> &[f32] {
        &self.pass.logits
    }

    fn save_state(&mut self) {
        self.pass.states.save();
    }

    fn restore_state(&mut self) {
        self.pass.states.restore();
    }

    fn grow(&mut self, layout: &Layout) -> Result<(), Error> {
        let p = &mut self.pass;
        for tier in 0..layout.n_tiers() {
            for r in 0..layout.n_regions() {
                let region = layout.region(tier, r);
                let dim = p.hp.head_dim.max(p.hp.head_dim_v);
                let n = region.n_blocks * PAGE * region.n_head_kv * dim;
                p.k[tier * layout.n_regions() + r].resize(n, 0.0);
                if p.hp.latent.is_none() {
                    p.v[tier * layout.n_regions() + r].resize(n, 0.0);
                }
            }
        }
        p.layout = layout.clone();
        Ok(())
    }

    fn pool_bytes(&self, layout: &Layout) -> u64 {
        let hp = &self.pass.hp;
        let dim = hp.head_dim.max(hp.head_dim_v);
        let n = dim * if hp.latent.is_some() { 1 } else { 2 };
        layout.bytes((n * size_of::<f32>()) as u64, 0)
    }

    fn describe(&self) -> String {
        "trace (scalar reference)".to_owned()
    }
}

impl TracePass {
    fn n(&self) -> usize {
        self.tokens.len()
    }

    fn row(&self, b: Buf, t: usize) -> &[f32] {
        // Layers may fill their rows in part; these lie side by side then.
        let w = self.bufs[b as usize].len() / self.n();
        &self.bufs[b as usize][t * w..][..w]
    }

    /// `w x (+ bias)` for every token, `[n, n_out]`.
    fn mul_mat(&self, w: &Linear<TraceWeight>, x: Buf) -> Vec<f32> {
        let bias = w.bias.as_ref().map(TraceWeight::vector);
        let n_out = w.w.0.n_out;
        let mut out = vec![0.0; self.n() * n_out];
        let mut row = vec![0.0; w.w.0.n_in];
        for o in 0..n_out {
            w.w.0.dequantize_row(o, &mut row);
            for t in 0..self.n() {
                out[t * n_out + o] =
                    dot(&row, self.row(x, t)) + bias.as_ref().map_or(0.0, |b| b[o]);
            }
        }
        out
    }

    /// The table of head `kv` of layer `il`.
    fn table(&self, il: usize, kv: usize) -> usize {
        let groups = self.layout.groups;
        il * groups + kv * groups / self.hp.n_head_kv
    }
}

impl Backend for TracePass {
    type Weight = TraceWeight;

    fn embed(&mut self, out: Buf, e: &Embedding<TraceWeight>) {
        let Some(w) = &e.w else { return };
        let rows = self.tokens.iter().flat_map(|&id| w.row(id as usize));
        self.bufs[out as usize] = rows.map(|x| x * e.scale).collect();
        if let Some(w) = &e.positions {
            let rows = (self.pos..).flat_map(|p| w.row(p as usize));
            let x = self.bufs[out as usize].iter_mut();
            x.zip(rows).for_each(|(x, p)| *x += p);
        }
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &TraceWeight, eps: f32) {
        let (w, width) = (w.vector(), self.widths.get(x));
        self.bufs[out as usize] = self.bufs[x as usize]
            .chunks_exact(width)
            .flat_map(|r| affine(r, &w, eps))
            .collect();
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &TraceWeight, eps: f32) {
        let w = w.vector();
        self.bufs[x as usize] = self.bufs[x as usize]
            .chunks_exact(w.len())
            .flat_map(|r| norm(r, &w, eps))
            .collect();
    }

    fn rms_norm_groups(&mut self, x: Buf, w: &TraceWeight, n_group: usize, eps: f32) {
        let w = w.vector();
        let width = w.len() / n_group;
        let parts = self.bufs[x as usize].chunks_exact(width);
        let weights = w.chunks_exact(width).cycle();
        self.bufs[x as usize] = parts
            .zip(weights)
            .flat_map(|(x, w)| norm(x, w, eps))
            .collect();
    }

    fn rms_norm_first(&mut self, x: Buf, w: &TraceWeight, eps: f32) {
        let (w, width) = (w.vector(), self.widths.get(x));
        for row in self.bufs[x as usize].chunks_exact_mut(width) {
            let first = norm(&row[..w.len()], &w, eps);
            row[..w.len()].copy_from_slice(&first);
        }
    }

    fn mul_mat_heads(&mut self, out: Buf, w: &TraceWeight, x: Buf) {
        let (n_head, n_in) = (self.hp.n_head, w.0.n_in);
        let (n_out, width) = (w.0.n_out / n_head, self.widths.get(x) / n_head);
        let heads = self.bufs[x as usize].chunks_exact(width).enumerate();
        let product = |(i, head): (usize, &[f32])| {
            let rows = i % n_head * n_out..(i % n_head + 1) * n_out;
            let mut y: Vec<f32> = rows.map(|r| dot(&w.row(r), &head[..n_in])).collect();
            y.extend(&head[n_in..]);
            y
        };
        self.bufs[out as usize] = heads.flat_map(product).collect();
    }

    fn mul_mats<const N: usize>(&mut self, outs: [(Buf, &Linear<TraceWeight>); N], x: Buf) {
        for (out, w) in outs {
            self.bufs[out as usize] = self.mul_mat(w, x);
        }
    }

    fn mul_mat_add(&mut self, acc: Buf, w: &Linear<TraceWeight>, x: Buf) {
        let y = self.mul_mat(w, x);
        for (a, y) in self.bufs[acc as usize].iter_mut().zip(y) {
            *a += y;
        }
    }

    fn add(&mut self, acc: Buf, x: Buf) {
        let x = self.bufs[x as usize].clone();
        for (a, x) in self.bufs[acc as usize].iter_mut().zip(x) {
            *a += x;
        }
    }

    fn clamp(&mut self, x: Buf, most: f32) {
        let x = &mut self.bufs[x as usize];
        x.iter_mut().for_each(|x| *x = x.clamp(-most, most));
    }

    fn center(&mut self, x: Buf) {
        let width = self.widths.get(x);
        for row in self.bufs[x as usize].chunks_exact_mut(width) {
            let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
            row.iter_mut()
                .for_each(|x| *x = (f64::from(*x) - mean) as f32);
        }
    }

    fn center_heads(&mut self, x: Buf) {
        let dim = self.hp.head_dim;
        for head in self.bufs[x as usize].chunks_exact_mut(dim) {
            let mean = head.iter().map(|x| f64::from(*x)).sum::<f64>() / dim as f64;
            head.iter_mut()
                .for_each(|x| *x = (f64::from(*x) - mean) as f32);
        }
    }

    fn heat(&mut self, x: Buf) {
        let width = self.widths.get(x);
        let rows = self.bufs[x as usize].chunks_exact_mut(width);
        for (row, p) in rows.zip(self.pos..) {
            let factor = self.hp.heat.map_or(1.0, |h| h.at(f64::from(p)));
            row.iter_mut()
                .for_each(|x| *x = (f64::from(*x) * factor) as f32);
        }
    }

    fn place(&mut self, out: Buf, x: Buf, i: usize, n: usize) {
        let (width, n_tokens) = (self.widths.get(x), self.n());
        self.bufs[out as usize].resize(n_tokens * n * width, 0.0);
        let x = self.bufs[x as usize].clone();
        let rows = self.bufs[out as usize].chunks_exact_mut(n * width);
        for (to, from) in rows.zip(x.chunks_exact(width)) {
            to[i * width..][..width].copy_from_slice(from);
        }
    }

    fn part(&mut self, out: Buf, x: Buf, i: usize, n: usize) {
        let width = self.widths.get(x) / n;
        let rows = self.bufs[x as usize].chunks_exact(width * n);
        self.bufs[out as usize] = rows
            .flat_map(|row| row[i * width..][..width].to_vec())
            .collect();
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        for x in &mut self.bufs[x as usize] {
            *x *= factor;
        }
    }

    fn rope(&mut self, q: Buf, k: Buf, il: usize) {
        let Some(kind) = self.hp.layers[il].rope else {
            return;
        };
        let (heads, n_rot) = (self.hp.heads(il), self.rope.n_rot_of(kind));
        let (d, half) = (heads.dim, n_rot / 2);
        let mut table = vec![0.0; self.n() * half * 2];
        let queries = (q, self.rope.of_queries(kind), heads.n_q());
        let keys = (!self.hp.layers[il].borrows).then_some((k, kind, heads.n_k()));
        for (b, kind, width) in [Some(queries), keys].into_iter().flatten() {
            self.rope.fill(kind, self.pos, self.n(), n_rot, &mut table);
            for (t, row) in self.bufs[b as usize].chunks_exact_mut(width).enumerate() {
                for head in row.chunks_exact_mut(d) {
                    let head = &mut head[self.hp.rope_from()..];
                    for i in 0..half {
                        let (x, y) = match self.rope.mode {
                            RopeMode::Norm => (2 * i, 2 * i + 1),
                            RopeMode::Neox => (i, i + half),
                        };
                        let (cos, sin) = (table[(t * half + i) * 2], table[(t * half + i) * 2 + 1]);
                        (head[x], head[y]) =
                            (head[x] * cos - head[y] * sin, head[x] * sin + head[y] * cos);
                    }
                }
            }
        }
    }

    fn attention(&mut self, out: Buf, [q, k, v]: [Buf; 3], il: usize, sinks: Option<&TraceWeight>) {
        let sinks = sinks.map(TraceWeight::vector);
        let (heads, layer) = (self.hp.heads(il), self.hp.layers[il]);
        let (d, dim_v) = (heads.dim, heads.dim_v);
        let il = self.hp.layer_of_pool(il);
        for t in (0..self.n()).filter(|_| !layer.borrows) {
            for kv in 0..heads.n_kv {
                let p = self.tables[self.table(il, kv)].1[t];
                let (region, at) = self.at(0, il, kv, p.slot, p.row);
                let key = self.row(k, t)[kv * d..][..d].to_vec();
                self.k[region][at..][..d].copy_from_slice(&key);
                if self.hp.latent.is_none() {
                    let value = self.row(v, t)[kv * dim_v..][..dim_v].to_vec();
                    self.v[region][at..][..dim_v].copy_from_slice(&value);
                }
            }
        }
        let width = heads.n_att();
        let mut all = vec![0.0; self.n() * width];
        for (t, row) in all.chunks_exact_mut(width).enumerate() {
            let first = layer.oldest(self.pos + t as u32);
            self.attend(q, t, (il, first), heads, sinks.as_deref(), row);
        }
        self.bufs[out as usize] = all;
    }

    fn split_heads(&mut self, outs: [Buf; 2], x: Buf) {
        let dim = self.hp.head_dim;
        for (part, out) in outs.into_iter().enumerate() {
            let heads = self.bufs[x as usize].chunks_exact(2 * dim);
            self.bufs[out as usize] = heads
                .flat_map(|h| h[part * dim..][..dim].to_vec())
                .collect();
        }
    }

    fn sigmoid_mul(&mut self, x: Buf, gate: Buf) {
        let each = self.widths.get(x) / self.widths.get(gate);
        let gates = self.bufs[gate as usize].clone();
        let x = self.bufs[x as usize].chunks_exact_mut(each);
        for (x, g) in x.zip(gates) {
            for x in x {
                *x = (f64::from(*x) * sigmoid(g)) as f32;
            }
        }
    }

    fn ssm_conv(&mut self, x: Buf, w: &TraceWeight, il: usize) {
        self.conv(x, &w.vector(), il);
    }

    fn short_conv(&mut self, x: Buf, bc: [Buf; 2], w: &TraceWeight, il: usize) {
        self.gated_conv(x, bc, &w.vector(), il);
    }

    fn ssm_scan(&mut self, out: Buf, xbc_dt: [Buf; 2], w: &Scan<TraceWeight>, il: usize) {
        let w = [&w.a, &w.dt, &w.d].map(TraceWeight::vector);
        self.scan(out, xbc_dt, w, il);
    }

    fn selective_scan(&mut self, out: Buf, x: [Buf; 4], w: &Selective<TraceWeight>, il: usize) {
        self.selective(out, x, [&w.a, &w.d].map(TraceWeight::vector), il);
    }

    fn l2_norm_first(&mut self, x: Buf, n_head: usize, head_dim: usize, eps: f32) {
        let width = self.widths.get(x);
        for row in self.bufs[x as usize].chunks_exact_mut(width) {
            for head in row[..n_head * head_dim].chunks_exact_mut(head_dim) {
                let size = head.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                let size = (size + f64::from(eps)).sqrt();
                for x in head {
                    *x = (f64::from(*x) / size) as f32;
                }
            }
        }
    }

    fn delta_gates(&mut self, alpha: Buf, beta: Buf, a: &TraceWeight, dt: &TraceWeight) {
        let (a, dt) = (a.vector(), dt.vector());
        let heads = a.iter().zip(&dt).cycle();
        for (x, (a, dt)) in self.bufs[alpha as usize].iter_mut().zip(heads) {
            let softplus = (f64::from(*x) + f64::from(*dt)).exp().ln_1p();
            *x = (f64::from(*a) * softplus).exp() as f32;
        }
        for x in &mut self.bufs[beta as usize] {
            *x = sigmoid(*x) as f32;
        }
    }

    fn gated_delta_net(&mut self, out: Buf, qkv: Buf, gates: [Buf; 2], il: usize) {
        self.delta_rule(out, qkv, gates, il);
    }

    fn swiglu(&mut self, gate: Buf, up: Buf) {
        let up = self.bufs[up as usize].clone();
        for (g, u) in self.bufs[gate as usize].iter_mut().zip(up) {
            *g = silu(*g) * u;
        }
    }

    fn swiglu_clamped(&mut self, gate: Buf, up: Buf, clamp: f32) {
        let up = self.bufs[up as usize].clone();
        for (g, u) in self.bufs[gate as usize].iter_mut().zip(up) {
            *g = silu(*g).min(clamp) * u.clamp(-clamp, clamp);
        }
    }

    fn geglu(&mut self, gate: Buf, up: Buf) {
        let up = self.bufs[up as usize].clone();
        for (g, u) in self.bufs[gate as usize].iter_mut().zip(up) {
            *g = gelu(*g) * u;
        }
    }

    fn activate(&mut self, x: Buf, by: Activation) {
        for x in &mut self.bufs[x as usize] {
            *x = activation(*x, by);
        }
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &Moe<TraceWeight>) {
        self.experts(acc, x, None, moe);
    }

    fn moe_ffn_routed(&mut self, out: Buf, [x, route]: [Buf; 2], moe: &Moe<TraceWeight>) {
        self.bufs[out as usize].fill(0.0);
        self.experts(out, x, Some(route), moe);
    }

    fn output(&mut self, w: &Linear<TraceWeight>, norm_w: &TraceWeight, x: Buf, eps: f32) {
        self.logits.clear();
        let cap = self.hp.logit_softcap;
        let first = match self.outputs {
            Outputs::None => self.n(),
            Outputs::Last => self.n() - 1,
            Outputs::All => 0,
        };
        let nw = norm_w.vector();
        let bias = w.bias.as_ref().map(TraceWeight::vector);
        for t in first..self.n() {
            let xn = affine(self.row(x, t), &nw, eps);
            self.logits.extend(
                (0..w.w.0.n_out)
                    .map(|o| dot(&w.w.row(o), &xn) + bias.as_ref().map_or(0.0, |b| b[o]))
                    .map(|y| softcap(f64::from(y * self.hp.logit_scale), cap) as f32),
            );
        }
    }

    fn note(&mut self, name: &'static str, il: usize, buf: Buf) {
        self.named
            .insert(format!("{name}-{il}"), self.bufs[buf as usize].clone());
    }
}
