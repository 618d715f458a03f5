//! The CPU backend: the verbs over `lemma-cpu`, every worker of the team running the same pass.

mod machine;
mod pool;
mod recurrent;
mod runner;
mod state;
mod weight;

use std::ops::Range;

use lemma_cpu::{
    Attention, Estimate, KeyBounds, KvLayer, KvShape, Limits, Move, Ops, PageRef, Pass, Place,
    Shared, Window,
};

pub(super) use self::machine::ops_of;
#[cfg(any(feature = "cuda", feature = "cuda-emulate"))]
pub(super) use self::machine::workers;
pub use self::machine::{default_threads, isas};
pub(crate) use self::pool::bound_bytes;
use self::pool::{Bounds, Memory, layer_spans, masses, max_spans, n_bounds};
use self::recurrent::States;
pub use self::weight::CpuWeight;
pub(super) use self::weight::moe_ffn;
use self::weight::{activation, product};
use super::{Activation, Backend, Buf, Embedding, Linear, Moe, Outputs, RopeMode, Scan, Selective};
use crate::arch::{ArchModel, Binder, HParams, Rope, Widths};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::kv::Layout;
use crate::options::LoadOptions;

/// A model bound to the CPU.
pub struct CpuRunner {
    model: ArchModel<CpuWeight>,
    ops: Ops,
    state: State,
}

/// What the workers of a pass share.
struct State {
    hp: HParams,
    widths: Widths,
    rope: Rope,
    bufs: [Shared<f32>; Buf::ALL.len()],
    layout: Layout,
    /// The layers of the pool that this backend runs.
    layers: Range<usize>,
    /// Regions of the pool, each with its tiers: `[region, tier]`.
    kv: Vec<KvLayer>,
    /// What layers without pages keep.
    states: States,
    /// Which blocks of them have memory.
    memory: Memory,
    /// Page masses of each layer, table after table, `[heads, n_spans]`; empty where the policy does not want them.
    mass: Vec<Shared<f32>>,
    /// Bounds of the pages of each region, if they are asked for.
    bounds: Vec<KeyBounds>,
    /// The pages that a step attends to, and room to find them: `[n_pages]`.
    keep: Shared<u32>,
    order: Shared<u32>,
    /// `[n_outputs, n_vocab]`
    logits: Shared<f32>,
    n_outputs: usize,
    step: Step,
}

/// The data of one pass.
#[derive(Default)]
struct Step {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    /// Cosines and sines of each kind of rotation, `[n_tokens, n_rot / 2, 2]`.
    angles: Vec<Vec<f32>>,
    /// How much larger queries are, `[n_tokens]`, where [`Backend::heat`] is asked for.
    heat: Vec<f32>,
    /// Live pages of each layer, table after table.
    pages: Vec<Vec<PageRef>>,
    /// Where in them the tables are, if there are several.
    tables: Vec<Vec<(u32, u32)>>,
    /// Places of the tokens in each layer, table after table.
    places: Vec<Vec<Place>>,
    /// Pages that go to other tiers before anything is stored.
    moves: Vec<Move>,
    /// Of each layer, where bounds are kept: slots of the live pages, places of the tokens in them, and the pages that are attended
    /// in any case.
    bounds: Vec<Bounds>,
    outputs: Option<Outputs>,
    wants_mass: bool,
}

impl CpuRunner {
    /// [`CpuRunner::part`] that is all of a model.
    ///
    /// # Errors
    /// As there.
    pub fn new(
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
    ) -> Result<Self, Error> {
        Self::part(file, hp, o, layout, n_ubatch, 0..hp.n_layer)
    }

    /// Binds the tensors of some layers, starts the team and allocates the pool and the scratch of batches of `n_ubatch` tokens.
    ///
    /// # Errors
    /// Those of [`ArchModel::bind`]; [`Error::Usage`] for an instruction set that the machine does not have.
    pub fn part(
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
        part: Range<usize>,
    ) -> Result<Self, Error> {
        let layers = hp.layers_of_pool(&part);
        let mut make = |t| Ok(CpuWeight::new(t));
        let model = ArchModel::bind(hp, &mut Binder::new(file, &mut make).part(part))?;
        let widths = Widths::of(hp);
        let n_ubatch = n_ubatch.max(1);
        let limits = Limits {
            max_tokens: n_ubatch,
            max_width: widths.widest_input(hp),
            n_head: hp.n_head,
            head_dim: hp.head_dim.max(hp.head_dim_v),
            max_pages: max_spans(layout),
            head_product: hp.latent.map_or(0, |l| l.widest_product()),
            n_ff_expert: hp.n_ff_exp,
            n_embd_expert: match hp.n_expert {
                0 => 0,
                _ => hp.n_expert_latent.unwrap_or(hp.n_embd),
            },
            n_expert: hp.n_expert,
            n_expert_used: hp.n_expert_used,
        };
        let region = |r, tier| {
            let region = layout.region(tier, r);
            let lower = tier.checked_sub(1).map(|i| layout.tiers[i].stored);
            let n_heads = region.n_head_kv;
            // Layers of different heads have regions of their own.
            let own = hp.has_unlike_heads().then(|| hp.heads_of_pool(r));
            let shape = KvShape {
                ty_k: lower.map_or(o.kv.ty_k.into(), |d| d.ty_k),
                ty_v: lower.map_or(o.kv.ty_v.into(), |d| d.ty_v),
                values_in_keys: hp.latent.is_some(),
                n_head_kv: own.map_or(n_heads, |h| h.n_kv),
                head_dim_k: own.map_or(hp.head_dim, |h| h.dim),
                head_dim_v: own.map_or(hp.head_dim_v, |h| h.dim_v),
            };
            KvLayer::new(shape, region.n_blocks)
        };
        let rope = Rope::from_file(hp, file, layout.n_ctx)?;
        let step = Step {
            tokens: Vec::with_capacity(n_ubatch),
            positions: Vec::with_capacity(n_ubatch),
            angles: vec![vec![0.0; n_ubatch * hp.n_rot]; hp.n_rope_tables()],
            heat: Vec::with_capacity(n_ubatch),
            pages: (0..layout.n_layer)
                .map(|il| Vec::with_capacity(layer_spans(layout, il)))
                .collect(),
            tables: vec![Vec::with_capacity(layout.groups); layout.n_layer],
            places: (0..layout.n_layer)
                .map(|_| Vec::with_capacity(n_ubatch * layout.groups))
                .collect(),
            moves: Vec::with_capacity(6 * layout.n_tables() * layout.tiers.len()),
            bounds: (0..if layout.bounds { layout.n_layer } else { 0 })
                .map(|il| Bounds {
                    slots: Vec::with_capacity(layer_spans(layout, il)),
                    places: Vec::with_capacity(n_ubatch * layout.groups),
                    forced: Vec::with_capacity(layer_spans(layout, il)),
                    attends: None,
                })
                .collect(),
            outputs: None,
            wants_mass: false,
        };
        Ok(Self {
            model,
            ops: ops_of(o, limits)?,
            state: State {
                rope,
                bufs: Buf::ALL.map(|b| Shared::zeroed(n_ubatch * widths.get(b))),
                kv: (0..layout.n_regions())
                    .flat_map(|r| (0..layout.n_tiers()).map(move |tier| (r, tier)))
                    .map(|(r, tier)| region(r, tier))
                    .collect(),
                mass: (0..layout.n_layer)
                    .map(|il| Shared::mapped(masses(layout, il, hp)))
                    .collect(),
                bounds: (0..if layout.bounds { layout.n_regions() } else { 0 })
                    .map(|r| layout.region(0, r))
                    .map(|r| KeyBounds::new(n_bounds(layout, r), r.n_head_kv, hp.head_dim))
                    .collect(),
                keep: Shared::zeroed(max_spans(layout)),
                order: Shared::zeroed(max_spans(layout)),
                states: States::new(hp),
                memory: Memory::new(layout),
                layout: layout.clone(),
                layers,
                logits: Shared::zeroed(hp.n_vocab),
                n_outputs: 0,
                step,
                widths,
                hp: hp.clone(),
            },
        })
    }

    /// The residual stream as the last pass has left it, `[n_tokens, n_embd]`.
    #[cfg(any(feature = "cuda", feature = "cuda-emulate"))]
    pub(super) fn rows(&mut self) -> &[f32] {
        let s = &mut self.state;
        let n = s.step.tokens.len() * s.hp.n_embd;
        &s.bufs[Buf::X as usize].as_mut_slice()[..n]
    }
}

/// One worker's view of a pass.
struct CpuPass<'a> {
    pass: &'a Pass<'a>,
    s: &'a State,
}

impl CpuPass<'_> {
    fn n(&self) -> usize {
        self.s.step.tokens.len()
    }

    /// [`Backend::rms_norm`] of `n` rows of `width` elements.
    fn norm(
        &self,
        [out, x]: [&Shared<f32>; 2],
        w: &CpuWeight,
        (eps, width): (f32, usize),
        n: usize,
    ) {
        let (w, adds) = w.vec().split_at(width);
        self.pass.rms_norm(out, x, w, eps, n);
        if !adds.is_empty() {
            self.pass.add_bias(out, adds, n);
        }
    }

    /// Takes the keys of the pass into the bounds of their pages; for a single token, estimates the masses of the live pages
    /// and says whether some of them are to be left out.
    fn bound(&self, q: Buf, k: Buf, il: usize) -> bool {
        let s = self.s;
        let Some(b) = s.step.bounds.get(il) else {
            return false;
        };
        let (bounds, n) = (&s.bounds[s.layout.region_of(il)], self.n());
        self.pass
            .bound_keys(bounds, s.buf(k), &b.places, n, s.hp.n_head_kv);
        if n > 1 {
            return false;
        }
        let e = Estimate {
            n_head: s.hp.n_head,
            n_head_kv: s.hp.n_head_kv,
            slots: &b.slots,
            tables: &s.step.tables[il],
            scale: s.hp.attn_scale,
        };
        self.pass.bound_masses(&s.mass[il], s.buf(q), bounds, &e);
        if let Some(n) = b.attends {
            let mass = &s.mass[il];
            self.pass
                .choose_pages(&s.keep, &s.order, mass, &b.forced, s.hp.n_head, n);
        }
        b.attends.is_some()
    }
}

impl Backend for CpuPass<'_> {
    type Weight = CpuWeight;

    fn embed(&mut self, out: Buf, e: &Embedding<CpuWeight>) {
        let Some(w) = &e.w else { return };
        self.pass
            .embed(self.s.buf(out), w.mat(), &self.s.step.tokens);
        if e.scale != 1.0 {
            self.scale(out, e.scale);
        }
        if let Some(w) = &e.positions {
            let (s, xn) = (self.s, self.s.buf(Buf::Xn));
            self.pass.embed(xn, w.mat(), &s.step.positions);
            self.add(out, Buf::Xn);
        }
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &CpuWeight, eps: f32) {
        let (s, width) = (self.s, self.s.widths.get(x));
        self.norm([s.buf(out), s.buf(x)], w, (eps, width), self.n());
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &CpuWeight, eps: f32) {
        let (x, width) = (self.s.buf(x), self.s.widths.get(x));
        self.pass
            .rms_norm(x, x, w.vec(), eps, self.n() * width / w.vec().len());
    }

    fn rms_norm_groups(&mut self, x: Buf, w: &CpuWeight, n_group: usize, eps: f32) {
        let (x, n) = (self.s.buf(x), self.n());
        self.pass.rms_norm_groups(x, w.vec(), n_group, eps, n);
    }

    fn rms_norm_first(&mut self, x: Buf, w: &CpuWeight, eps: f32) {
        let (x, width) = (self.s.buf(x), self.s.widths.get(x));
        self.pass.rms_norm_first(x, w.vec(), eps, width, self.n());
    }

    fn mul_mat_heads(&mut self, out: Buf, w: &CpuWeight, x: Buf) {
        let (s, n_head) = (self.s, self.s.hp.n_head);
        let w = w.experts(n_head);
        let rest = s.widths.get(x) / n_head - w.n_in;
        self.pass
            .mul_mat_heads(s.buf(out), &w, s.buf(x), rest, self.n());
    }

    fn mul_mats<const N: usize>(&mut self, outs: [(Buf, &Linear<CpuWeight>); N], x: Buf) {
        let s = self.s;
        let mats = outs.map(|(out, w)| product(s.buf(out), false, w));
        self.pass.mul_mats(&mats, s.buf(x), self.n());
    }

    fn mul_mat_add(&mut self, acc: Buf, w: &Linear<CpuWeight>, x: Buf) {
        let s = self.s;
        self.pass
            .mul_mat(product(s.buf(acc), true, w), s.buf(x), self.n());
    }

    fn add(&mut self, acc: Buf, x: Buf) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(x));
        self.pass.add(s.buf(acc), s.buf(x), n);
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(x));
        self.pass.scale(s.buf(x), factor, n);
    }

    fn clamp(&mut self, x: Buf, most: f32) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(x));
        self.pass.clamp(s.buf(x), most, n);
    }

    fn center(&mut self, x: Buf) {
        let (x, width) = (self.s.buf(x), self.s.widths.get(x));
        self.pass.center(x, width, self.n());
    }

    fn center_heads(&mut self, x: Buf) {
        let (x, width, dim) = (self.s.buf(x), self.s.widths.get(x), self.s.hp.head_dim);
        self.pass.center(x, dim, self.n() * width / dim);
    }

    fn heat(&mut self, x: Buf) {
        let (x, width) = (self.s.buf(x), self.s.widths.get(x));
        self.pass.scale_rows(x, &self.s.step.heat, width);
    }

    fn place(&mut self, out: Buf, x: Buf, i: usize, n: usize) {
        let (s, width) = (self.s, self.s.widths.get(x));
        self.pass
            .place(s.buf(out), s.buf(x), [i, n], width, self.n());
    }

    fn part(&mut self, out: Buf, x: Buf, i: usize, n: usize) {
        let (s, width) = (self.s, self.s.widths.get(x) / n);
        self.pass
            .part(s.buf(out), s.buf(x), [i, n], width, self.n());
    }

    fn rope(&mut self, q: Buf, k: Buf, il: usize) {
        let s = self.s;
        let Some(kind) = s.hp.layers[il].rope else {
            return;
        };
        let mode = match s.rope.mode {
            RopeMode::Norm => lemma_cpu::RopeMode::Norm,
            RopeMode::Neox => lemma_cpu::RopeMode::NeoX,
        };
        let (heads, borrows) = (s.hp.heads(il), s.hp.layers[il].borrows);
        let queries = (q, s.rope.of_queries(kind), heads.n);
        let keys = (!borrows).then_some((k, kind, heads.n_kv));
        for (b, kind, n_head) in [Some(queries), keys].into_iter().flatten() {
            self.pass.rope(
                s.buf(b),
                self.n(),
                n_head,
                heads.dim,
                s.hp.rope_from(),
                s.rope.n_rot_of(kind),
                &s.step.angles[kind],
                mode,
            );
        }
    }

    fn attention(&mut self, out: Buf, [q, k, v]: [Buf; 3], il: usize, sinks: Option<&CpuWeight>) {
        let s = self.s;
        let layer = &s.hp.layers[il];
        let window = match (layer.window, layer.chunk) {
            (Some(n), _) => Some(Window::Newest(n)),
            (None, chunk) => chunk.map(Window::Chunk),
        };
        let (heads, borrows) = (s.hp.heads(il), s.hp.layers[il].borrows);
        let il = s.hp.layer_of_pool(il);
        let tiers = s.tiers(il);
        // New tokens go to the first tier.
        let layer = &tiers[0];
        let chosen = self.bound(q, k, il);
        let (k, v, places) = (s.buf(k), s.buf(v), &s.step.places[il]);
        if borrows {
        } else if s.layout.groups > 1 {
            self.pass
                .kv_store_heads(layer, k, v, places, s.hp.n_head_kv);
        } else {
            self.pass.kv_store(layer, k, v, places);
        }
        let a = Attention {
            n_head: heads.n,
            n_head_kv: heads.n_kv,
            pages: &s.step.pages[il],
            tables: &s.step.tables[il],
            keep: chosen.then_some(&s.keep),
            q_pos: &s.step.positions,
            scale: s.hp.attn_scale,
            sinks: sinks.map(CpuWeight::vec),
            softcap: s.hp.attn_softcap,
            window,
            mass: (s.step.wants_mass && !s.layout.bounds).then_some(&s.mass[il]),
        };
        self.pass.attention(s.buf(out), s.buf(q), tiers, &a);
    }

    fn split_heads(&mut self, [a, b]: [Buf; 2], x: Buf) {
        let (s, dim) = (self.s, self.s.hp.head_dim);
        let n_heads = self.n() * s.widths.get(a) / dim;
        self.pass
            .split_heads(s.buf(a), s.buf(b), s.buf(x), n_heads, dim);
    }

    fn sigmoid_mul(&mut self, x: Buf, gate: Buf) {
        let (s, n) = (self.s, self.n());
        let [width, n_gate] = [x, gate].map(|b| s.widths.get(b));
        self.pass
            .sigmoid_mul(s.buf(x), s.buf(gate), n, width, n_gate);
    }

    fn ssm_conv(&mut self, x: Buf, w: &CpuWeight, il: usize) {
        let (s, state) = (self.s, self.s.states.of(&self.s.hp, il));
        self.pass
            .ssm_conv(s.buf(x), w.vec(), state, self.n(), s.states.fresh);
    }

    fn short_conv(&mut self, x: Buf, bc: [Buf; 2], w: &CpuWeight, il: usize) {
        let (s, state) = (self.s, self.s.states.of(&self.s.hp, il));
        let (bc, fresh) = (bc.map(|b| s.buf(b)), s.states.fresh);
        self.pass
            .short_conv(s.buf(x), bc, w.vec(), state, self.n(), fresh);
    }

    fn ssm_scan(&mut self, out: Buf, xbc_dt: [Buf; 2], w: &Scan<CpuWeight>, il: usize) {
        let (s, state) = (self.s, self.s.states.of(&self.s.hp, il));
        let (scan, fresh) = (s.states.scan(w), s.states.fresh);
        let xbc_dt = xbc_dt.map(|b| s.buf(b));
        self.pass
            .ssm_scan(s.buf(out), xbc_dt, &scan, state, self.n(), fresh);
    }

    fn selective_scan(&mut self, out: Buf, x: [Buf; 4], w: &Selective<CpuWeight>, il: usize) {
        let (s, state) = (self.s, self.s.states.of(&self.s.hp, il));
        let (w, fresh) = (recurrent::selective(w), s.states.fresh);
        let x = x.map(|b| s.buf(b));
        self.pass
            .selective_scan(s.buf(out), x, &w, state, self.n(), fresh);
    }

    fn l2_norm_first(&mut self, x: Buf, n_head: usize, head_dim: usize, eps: f32) {
        let (x, width) = (self.s.buf(x), self.s.widths.get(x));
        self.pass
            .l2_norm_first(x, (n_head, head_dim), eps, width, self.n());
    }

    fn delta_gates(&mut self, alpha: Buf, beta: Buf, a: &CpuWeight, dt: &CpuWeight) {
        let n_beta = self.s.widths.get(beta);
        let [alpha, beta] = [alpha, beta].map(|b| self.s.buf(b));
        self.pass
            .delta_gates(alpha, (beta, n_beta), a.vec(), dt.vec(), self.n());
    }

    fn gated_delta_net(&mut self, out: Buf, qkv: Buf, gates: [Buf; 2], il: usize) {
        let (s, state) = (self.s, self.s.states.delta(&self.s.hp, il));
        let (gates, fresh) = (gates.map(|b| s.buf(b)), s.states.fresh);
        self.pass
            .gated_delta_net(s.buf(out), s.buf(qkv), gates, state, self.n(), fresh);
    }

    fn swiglu(&mut self, gate: Buf, up: Buf) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(gate));
        self.pass.swiglu(s.buf(gate), s.buf(gate), s.buf(up), n);
    }

    fn swiglu_clamped(&mut self, gate: Buf, up: Buf, clamp: f32) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(gate));
        self.pass.swiglu_clamped(s.buf(gate), s.buf(up), clamp, n);
    }

    fn geglu(&mut self, gate: Buf, up: Buf) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(gate));
        self.pass.geglu(s.buf(gate), s.buf(gate), s.buf(up), n);
    }

    fn activate(&mut self, x: Buf, by: Activation) {
        let (x, n) = (self.s.buf(x), self.n() * self.s.widths.get(x));
        self.pass.activate(x, activation(by), n);
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &Moe<CpuWeight>) {
        let f = moe_ffn(moe);
        self.pass
            .moe_ffn(self.s.buf(acc), self.s.buf(x), &f, self.n());
    }

    fn moe_ffn_routed(&mut self, out: Buf, x_route: [Buf; 2], moe: &Moe<CpuWeight>) {
        let (s, f) = (self.s, moe_ffn(moe));
        let x_route = x_route.map(|b| s.buf(b));
        self.pass.moe_ffn_routed(s.buf(out), x_route, &f, self.n());
    }

    fn output(&mut self, w: &Linear<CpuWeight>, norm: &CpuWeight, x: Buf, eps: f32) {
        let (s, n) = (self.s, self.n());
        let (x, xn) = (s.buf(x), s.buf(Buf::Xn));
        let rows = match s.step.outputs {
            None | Some(Outputs::None) => return,
            Some(Outputs::All) => {
                self.norm([xn, x], norm, (eps, s.hp.n_embd), n);
                n
            }
            Some(Outputs::Last) => {
                self.pass.copy_rows(xn, x, &[n as u32 - 1], s.hp.n_embd);
                self.norm([xn, xn], norm, (eps, s.hp.n_embd), 1);
                1
            }
        };
        self.pass.mul_mat(product(&s.logits, false, w), xn, rows);
        if s.hp.logit_scale != 1.0 {
            self.pass
                .scale(&s.logits, s.hp.logit_scale, rows * s.hp.n_vocab);
        }
        if let Some(cap) = s.hp.logit_softcap {
            self.pass.softcap(&s.logits, cap, rows * s.hp.n_vocab);
        }
    }
}
