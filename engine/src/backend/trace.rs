//! The reference backend: plain loops over f32 activations with f64 sums, weights dequantized row by row, every named
//! intermediate kept.
//!
//! It is the oracle of the fast backends and a tool for whoever ports an architecture: run a pass, then look at
//! [`TraceRunner::named`] beside another engine's dump of the same names. It makes no attempt at speed.

use std::collections::BTreeMap;

use super::{Backend, Buf, Linear, Moe, Outputs, RopeMode, Runner, Tensor};
use crate::arch::{ArchModel, Binder, HParams, Rope, Widths};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::kv::{Cache, PAGE, PageMeta, Place};

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

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter()
        .zip(b)
        .map(|(x, y)| f64::from(*x) * f64::from(*y))
        .sum::<f64>() as f32
}

fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for v in x.iter_mut() {
        *v = (*v - max).exp();
        sum += *v;
    }
    for v in x.iter_mut() {
        *v /= sum;
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
    /// Keys and values per layer, `[slot, row, n_head_kv * head_dim]`, always f32.
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    tokens: Vec<u32>,
    pos: u32,
    tables: Vec<(Vec<PageMeta>, Vec<Place>)>,
    masses: Vec<Vec<f32>>,
    outputs: Outputs,
    logits: Vec<f32>,
    named: BTreeMap<String, Vec<f32>>,
}

impl TraceRunner {
    /// Binds a file's tensors; `n_slots` slots a layer.
    ///
    /// # Errors
    /// Those of [`ArchModel::bind`].
    pub fn new(file: &GgufFile, hp: &HParams, n_slots: usize) -> Result<Self, Error> {
        let mut make = |t| Ok(TraceWeight(t));
        let model = ArchModel::bind(hp, &mut Binder::new(file, &mut make))?;
        let widths = Widths::of(hp);
        let pass = TracePass {
            rope: Rope::from_file(hp, file)?,
            bufs: vec![Vec::new(); Buf::ALL.len()],
            k: vec![Vec::new(); hp.n_layer],
            v: vec![Vec::new(); hp.n_layer],
            tokens: Vec::new(),
            pos: 0,
            tables: Vec::new(),
            masses: Vec::new(),
            outputs: Outputs::Last,
            logits: Vec::new(),
            named: BTreeMap::new(),
            widths,
            hp: hp.clone(),
        };
        let mut runner = Self { model, pass };
        runner.grow(n_slots)?;
        Ok(runner)
    }

    /// Intermediates of the last pass by name (`attn_norm-0`, `kqv_out-3`, …), each `[n_tokens, width]`.
    pub fn named(&self) -> &BTreeMap<String, Vec<f32>> {
        &self.pass.named
    }

    /// Page masses of layer `il` after the last pass, `[n_head, n_pages]`.
    pub fn masses(&self, il: usize) -> &[f32] {
        &self.pass.masses[il]
    }
}

impl Runner for TraceRunner {
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error> {
        let p = &mut self.pass;
        p.tokens = tokens.to_vec();
        p.pos = cache.pos() - tokens.len() as u32;
        p.outputs = outputs;
        p.named.clear();
        p.tables = (0..cache.n_layer())
            .map(|il| {
                (
                    cache.layer(il).pages.clone(),
                    cache.layer(il).places.clone(),
                )
            })
            .collect();
        p.masses = vec![Vec::new(); cache.n_layer()];
        for b in Buf::ALL {
            p.bufs[b as usize] = vec![0.0; tokens.len() * p.widths.get(b)];
        }
        self.model.forward(p);
        if tokens.len() == 1 && cache.wants_mass() {
            for il in 0..cache.n_layer() {
                cache.end_layer(il, &p.masses[il], p.hp.n_head);
            }
        }
        Ok(())
    }

    fn logits(&mut self) -> &[f32] {
        &self.pass.logits
    }

    fn grow(&mut self, n_slots: usize) -> Result<(), Error> {
        let n = n_slots * PAGE * self.pass.widths.get(Buf::K);
        for layer in self.pass.k.iter_mut().chain(&mut self.pass.v) {
            layer.resize(n, 0.0);
        }
        Ok(())
    }

    fn slot_bytes(&self) -> u64 {
        (self.pass.hp.n_layer * 2 * PAGE * self.pass.widths.get(Buf::K) * 4) as u64
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
        let w = self.widths.get(b);
        &self.bufs[b as usize][t * w..][..w]
    }

    /// `w x (+ bias)` for every token, `[n, n_out]`.
    fn mul_mat(&self, w: &Linear<TraceWeight>, x: Buf) -> Vec<f32> {
        let bias = w.bias.as_ref().map(TraceWeight::vector);
        let n_out = w.w.0.n_out;
        let mut out = vec![0.0; self.n() * n_out];
        for o in 0..n_out {
            let row = w.w.row(o);
            for t in 0..self.n() {
                out[t * n_out + o] =
                    dot(&row, self.row(x, t)) + bias.as_ref().map_or(0.0, |b| b[o]);
            }
        }
        out
    }

    fn attend(&mut self, q: Buf, t: usize, il: usize, out: &mut [f32]) {
        let hp = &self.hp;
        let (d, n_kv) = (hp.head_dim, hp.n_head_kv * hp.head_dim);
        let (pages, _) = &self.tables[il];
        let pos = self.pos + t as u32;
        let mut masses = vec![0.0; hp.n_head * pages.len()];
        for h in 0..hp.n_head {
            let kv = h / (hp.n_head / hp.n_head_kv) * d;
            let qh = &self.row(q, t)[h * d..][..d];
            let mut scores = Vec::new();
            let mut at = Vec::new();
            for (i, p) in pages.iter().enumerate() {
                for row in 0..p.len {
                    if p.first_pos + row <= pos {
                        let base = (p.slot as usize * PAGE + row as usize) * n_kv + kv;
                        scores.push(
                            f64::from(dot(qh, &self.k[il][base..][..d])) * f64::from(hp.attn_scale),
                        );
                        at.push((i, base));
                    }
                }
            }
            softmax(&mut scores);
            let mut sum = vec![0.0f64; d];
            for (s, (i, base)) in scores.iter().zip(&at) {
                masses[h * pages.len() + i] += *s as f32;
                for (acc, v) in sum.iter_mut().zip(&self.v[il][*base..][..d]) {
                    *acc += s * f64::from(*v);
                }
            }
            for (o, s) in out[h * d..][..d].iter_mut().zip(sum) {
                *o = s as f32;
            }
        }
        self.masses[il] = masses;
    }
}

impl Backend for TracePass {
    type Weight = TraceWeight;

    fn embed(&mut self, out: Buf, w: &TraceWeight) {
        self.bufs[out as usize] = self
            .tokens
            .iter()
            .flat_map(|&id| w.row(id as usize))
            .collect();
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &TraceWeight, eps: f32) {
        let (w, width) = (w.vector(), self.widths.get(x));
        self.bufs[out as usize] = self.bufs[x as usize]
            .chunks_exact(width)
            .flat_map(|r| norm(r, &w, eps))
            .collect();
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &TraceWeight, eps: f32) {
        let w = w.vector();
        self.bufs[x as usize] = self.bufs[x as usize]
            .chunks_exact(w.len())
            .flat_map(|r| norm(r, &w, eps))
            .collect();
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

    fn rope(&mut self, q: Buf, k: Buf) {
        let (d, half) = (self.hp.head_dim, self.rope.n_rot / 2);
        let mut table = vec![0.0; self.n() * half * 2];
        self.rope.fill(self.pos, self.n(), &mut table);
        for b in [q, k] {
            let width = self.widths.get(b);
            for (t, row) in self.bufs[b as usize].chunks_exact_mut(width).enumerate() {
                for head in row.chunks_exact_mut(d) {
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

    fn attention(&mut self, out: Buf, q: Buf, k: Buf, v: Buf, il: usize) {
        let width = self.widths.get(k);
        for (t, p) in self.tables[il].1.clone().iter().enumerate() {
            let at = (p.slot as usize * PAGE + p.row as usize) * width;
            let (kr, vr) = (self.row(k, t).to_vec(), self.row(v, t).to_vec());
            self.k[il][at..][..width].copy_from_slice(&kr);
            self.v[il][at..][..width].copy_from_slice(&vr);
        }
        let width = self.widths.get(out);
        let mut all = vec![0.0; self.n() * width];
        for (t, row) in all.chunks_exact_mut(width).enumerate() {
            self.attend(q, t, il, row);
        }
        self.bufs[out as usize] = all;
    }

    fn swiglu(&mut self, gate: Buf, up: Buf) {
        let up = self.bufs[up as usize].clone();
        for (g, u) in self.bufs[gate as usize].iter_mut().zip(up) {
            *g = silu(*g) * u;
        }
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &Moe<TraceWeight>) {
        for t in 0..self.n() {
            let xn = self.row(x, t).to_vec();
            let mut probs: Vec<f64> = (0..moe.n_expert)
                .map(|e| f64::from(dot(&moe.gate_inp.row(e), &xn)))
                .collect();
            softmax(&mut probs);
            let mut order: Vec<usize> = (0..moe.n_expert).collect();
            order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]).then(a.cmp(&b)));
            order.truncate(moe.n_expert_used);
            let sum: f64 = if moe.norm_topk {
                order.iter().map(|&e| probs[e]).sum()
            } else {
                1.0
            };
            let mut y = vec![0.0f64; xn.len()];
            for e in order {
                let hidden: Vec<f32> = (0..moe.n_ff)
                    .map(|i| {
                        let r = e * moe.n_ff + i;
                        silu(dot(&moe.gate_exps.row(r), &xn)) * dot(&moe.up_exps.row(r), &xn)
                    })
                    .collect();
                for (o, y) in y.iter_mut().enumerate() {
                    *y += probs[e] / sum
                        * f64::from(dot(&moe.down_exps.row(e * xn.len() + o), &hidden));
                }
            }
            let width = xn.len();
            for (a, y) in self.bufs[acc as usize][t * width..][..width]
                .iter_mut()
                .zip(y)
            {
                *a += y as f32;
            }
        }
    }

    fn output(&mut self, w: &Linear<TraceWeight>, norm_w: &TraceWeight, x: Buf, eps: f32) {
        self.logits.clear();
        let first = match self.outputs {
            Outputs::None => self.n(),
            Outputs::Last => self.n() - 1,
            Outputs::All => 0,
        };
        let nw = norm_w.vector();
        let bias = w.bias.as_ref().map(TraceWeight::vector);
        for t in first..self.n() {
            let xn = norm(self.row(x, t), &nw, eps);
            self.logits.extend(
                (0..w.w.0.n_out)
                    .map(|o| dot(&w.w.row(o), &xn) + bias.as_ref().map_or(0.0, |b| b[o])),
            );
        }
    }

    fn note(&mut self, name: &'static str, il: usize, buf: Buf) {
        self.named
            .insert(format!("{name}-{il}"), self.bufs[buf as usize].clone());
    }
}

fn norm(row: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    row.iter()
        .zip(w)
        .map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32)
        .collect()
}

fn silu(x: f32) -> f32 {
    let x = f64::from(x);
    (x / (1.0 + (-x).exp())) as f32
}
