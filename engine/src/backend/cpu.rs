//! The CPU backend: the verbs over `lemma-cpu`, every worker of the team running the same pass.

use lemma_cpu::{
    Attention, Experts, Gating, Isa, KvLayer, KvShape, Limits, Mat, MoeFfn, MulMat, Ops, PageRef,
    Pass, Place, Shared, Team,
};
use lemma_quant::GgmlType;

use super::{Backend, Buf, Linear, Moe, Outputs, RopeMode, Runner, Tensor};
use crate::arch::{ArchModel, Binder, HParams, Rope, Widths};
use crate::error::Error;
use crate::gguf::{Bytes, GgufFile};
use crate::kv::Cache;
use crate::options::LoadOptions;
use crate::report;

/// A weight of the CPU backend: where it lies in the file, or a small vector decoded once.
#[derive(Debug)]
pub enum CpuWeight {
    /// A matrix, used in place.
    Mat {
        /// How values are encoded.
        ty: GgmlType,
        /// Values in a row.
        n_in: usize,
        /// Rows.
        n_out: usize,
        /// The rows.
        bytes: Bytes,
    },
    /// A vector.
    Vec(Vec<f32>),
}

impl CpuWeight {
    fn new(t: Tensor) -> Self {
        if t.vector {
            Self::Vec(t.to_f32())
        } else {
            Self::Mat {
                ty: t.ty,
                n_in: t.n_in,
                n_out: t.n_out,
                bytes: t.bytes,
            }
        }
    }

    fn mat(&self) -> Mat<'_> {
        match self {
            Self::Mat {
                ty,
                n_in,
                n_out,
                bytes,
            } => Mat {
                ty: *ty,
                n_in: *n_in,
                n_out: *n_out,
                data: bytes,
            },
            Self::Vec(_) => unreachable!("bound as a matrix"),
        }
    }

    fn experts(&self, n_expert: usize) -> Experts<'_> {
        let m = self.mat();
        Experts {
            ty: m.ty,
            n_in: m.n_in,
            n_out: m.n_out / n_expert,
            n_expert,
            data: m.data,
        }
    }

    fn vec(&self) -> &[f32] {
        match self {
            Self::Vec(v) => v,
            Self::Mat { .. } => unreachable!("bound as a vector"),
        }
    }
}

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
    kv: Vec<KvLayer>,
    /// Page masses of each layer, `[n_head, n_pages]`; empty where the policy does not want them.
    mass: Vec<Shared<f32>>,
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
    /// Cosines and sines, `[n_tokens, n_rot / 2, 2]`.
    angles: Vec<f32>,
    /// Live pages of each layer.
    pages: Vec<Vec<PageRef>>,
    /// Places of the tokens in each layer.
    places: Vec<Vec<Place>>,
    outputs: Option<Outputs>,
    wants_mass: bool,
}

impl CpuRunner {
    /// Binds a file's tensors, starts the team and allocates the pool (`n_slots` slots a layer) and the scratch of batches of
    /// `n_ubatch` tokens.
    ///
    /// # Errors
    /// Those of [`ArchModel::bind`]; [`Error::Usage`] for an instruction set that the machine does not have.
    pub fn new(
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        n_slots: usize,
        n_ubatch: usize,
    ) -> Result<Self, Error> {
        let isa = isa(o.isa.as_deref())?;
        let n_threads = o
            .n_threads
            .filter(|&n| n > 0)
            .unwrap_or_else(lemma_cpu::default_threads);
        let model = ArchModel::bind(hp, &mut Binder::new(file, &mut |t| Ok(CpuWeight::new(t))))?;
        let widths = Widths::of(hp);
        let n_ubatch = n_ubatch.max(1);
        let limits = Limits {
            max_tokens: n_ubatch,
            max_width: Buf::ALL.iter().map(|&b| widths.get(b)).max().unwrap_or(0),
            n_head: hp.n_head,
            head_dim: hp.head_dim,
            max_pages: n_slots,
            n_ff_expert: if hp.n_expert > 0 { hp.n_ff } else { 0 },
            n_embd_expert: if hp.n_expert > 0 { hp.n_embd } else { 0 },
            n_expert: hp.n_expert,
            n_expert_used: hp.n_expert_used,
        };
        let shape = KvShape {
            ty_k: o.kv.ty_k,
            ty_v: o.kv.ty_v,
            n_head_kv: hp.n_head_kv,
            head_dim_k: hp.head_dim,
            head_dim_v: hp.head_dim,
        };
        let step = Step {
            tokens: Vec::with_capacity(n_ubatch),
            positions: Vec::with_capacity(n_ubatch),
            angles: vec![0.0; n_ubatch * hp.n_rot],
            pages: (0..hp.n_layer)
                .map(|_| Vec::with_capacity(n_slots))
                .collect(),
            places: (0..hp.n_layer)
                .map(|_| Vec::with_capacity(n_ubatch))
                .collect(),
            outputs: None,
            wants_mass: false,
        };
        Ok(Self {
            model,
            ops: Ops::new(Team::new(n_threads), isa, limits),
            state: State {
                rope: Rope::from_file(hp, file)?,
                bufs: Buf::ALL.map(|b| Shared::zeroed(n_ubatch * widths.get(b))),
                kv: (0..hp.n_layer)
                    .map(|_| KvLayer::new(shape, n_slots))
                    .collect(),
                mass: (0..hp.n_layer)
                    .map(|_| Shared::zeroed(n_slots * hp.n_head))
                    .collect(),
                logits: Shared::zeroed(hp.n_vocab),
                n_outputs: 0,
                step,
                widths,
                hp: hp.clone(),
            },
        })
    }
}

pub use lemma_cpu::default_threads;

/// Names of the instruction sets that this machine has kernels for, the best last.
pub fn isas() -> Vec<String> {
    Isa::available().map(|isa| isa.to_string()).collect()
}

/// Read bandwidth of `n_threads` workers over a buffer larger than the caches, in GB/s (10⁹ bytes): the ceiling of decoding.
pub fn read_bandwidth(n_threads: Option<usize>) -> f64 {
    let n = n_threads.filter(|&n| n > 0);
    let team = Team::new(n.unwrap_or_else(lemma_cpu::default_threads));
    lemma_cpu::ceiling::read_gbps(&team, 1 << 30)
}

/// The instruction set of a name, of the environment, or the best there is.
fn isa(name: Option<&str>) -> Result<Isa, Error> {
    let env = std::env::var("LEMMA_ISA").ok().filter(|v| !v.is_empty());
    let Some(name) = name.or(env.as_deref()) else {
        return Ok(Isa::detect());
    };
    match Isa::from_name(name) {
        Some(isa) if isa.is_available() => Ok(isa),
        _ => Err(report::usage(
            format!("instruction set {name:?}"),
            format!("one of {}", isas().join(", ")),
        )),
    }
}

impl Runner for CpuRunner {
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error> {
        let s = &mut self.state;
        s.prepare(tokens, cache, outputs);
        let (model, state) = (&self.model, &self.state);
        self.ops.run_some(tokens.len(), |pass| {
            model.forward(&mut CpuPass { pass, s: state })
        });
        if self.state.step.wants_mass {
            let n_head = self.state.hp.n_head;
            for il in 0..cache.n_layer() {
                let n = cache.layer(il).pages.len() * n_head;
                cache.end_layer(il, &self.state.mass[il].as_mut_slice()[..n], n_head);
            }
        }
        Ok(())
    }

    fn logits(&mut self) -> &[f32] {
        &self.state.logits.as_mut_slice()[..self.state.n_outputs * self.state.hp.n_vocab]
    }

    fn grow(&mut self, n_slots: usize) -> Result<(), Error> {
        let s = &mut self.state;
        for (kv, (mass, pages)) in
            s.kv.iter_mut()
                .zip(s.mass.iter_mut().zip(&mut s.step.pages))
        {
            kv.grow(n_slots);
            mass.grow(n_slots * s.hp.n_head);
            pages.reserve(n_slots - pages.len());
        }
        let limits = Limits {
            max_pages: n_slots,
            ..*self.ops.limits()
        };
        self.ops.set_limits(limits);
        Ok(())
    }

    fn slot_bytes(&self) -> u64 {
        self.state
            .kv
            .iter()
            .map(|l| l.shape().slot_size() as u64)
            .sum()
    }

    fn describe(&self) -> String {
        let n = self.ops.team().n_threads();
        format!(
            "cpu ({}, {n} thread{})",
            self.ops.isa(),
            if n == 1 { "" } else { "s" }
        )
    }
}

impl State {
    fn prepare(&mut self, tokens: &[u32], cache: &Cache, outputs: Outputs) {
        let n = tokens.len();
        let first = cache.pos() - n as u32;
        let step = &mut self.step;
        step.tokens.clear();
        step.tokens.extend_from_slice(tokens);
        step.positions.clear();
        step.positions.extend(first..first + n as u32);
        self.rope.fill(first, n, &mut step.angles);
        for (il, (pages, places)) in step.pages.iter_mut().zip(&mut step.places).enumerate() {
            let table = cache.layer(il);
            pages.clear();
            pages.extend(table.pages.iter().map(|p| PageRef {
                slot: p.slot,
                first_pos: p.first_pos,
                len: p.len,
            }));
            places.clear();
            places.extend(table.places.iter().map(|p| Place {
                slot: p.slot,
                row: p.row,
            }));
        }
        step.outputs = Some(outputs);
        step.wants_mass = n == 1 && cache.wants_mass();
        self.n_outputs = match outputs {
            Outputs::None => 0,
            Outputs::Last => 1,
            Outputs::All => n,
        };
        let wanted = self.n_outputs * self.hp.n_vocab;
        if self.logits.len() < wanted {
            self.logits = Shared::zeroed(wanted);
        }
    }

    fn buf(&self, b: Buf) -> &Shared<f32> {
        &self.bufs[b as usize]
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
}

fn product<'a>(out: &'a Shared<f32>, out_add: bool, w: &'a Linear<CpuWeight>) -> MulMat<'a> {
    MulMat {
        out,
        out_add,
        w: w.w.mat(),
        bias: w.bias.as_ref().map(CpuWeight::vec),
    }
}

impl Backend for CpuPass<'_> {
    type Weight = CpuWeight;

    fn embed(&mut self, out: Buf, w: &CpuWeight) {
        self.pass
            .embed(self.s.buf(out), w.mat(), &self.s.step.tokens);
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &CpuWeight, eps: f32) {
        self.pass
            .rms_norm(self.s.buf(out), self.s.buf(x), w.vec(), eps, self.n());
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &CpuWeight, eps: f32) {
        let (x, width) = (self.s.buf(x), self.s.widths.get(x));
        self.pass
            .rms_norm(x, x, w.vec(), eps, self.n() * width / w.vec().len());
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

    fn rope(&mut self, q: Buf, k: Buf) {
        let s = self.s;
        let mode = match s.rope.mode {
            RopeMode::Norm => lemma_cpu::RopeMode::Norm,
            RopeMode::Neox => lemma_cpu::RopeMode::NeoX,
        };
        for b in [q, k] {
            let n_head = s.widths.get(b) / s.hp.head_dim;
            self.pass.rope(
                s.buf(b),
                self.n(),
                n_head,
                s.hp.head_dim,
                s.rope.n_rot,
                &s.step.angles,
                mode,
            );
        }
    }

    fn attention(&mut self, out: Buf, q: Buf, k: Buf, v: Buf, il: usize) {
        let (s, layer) = (self.s, &self.s.kv[il]);
        self.pass
            .kv_store(layer, s.buf(k), s.buf(v), &s.step.places[il]);
        let a = Attention {
            n_head: s.hp.n_head,
            pages: &s.step.pages[il],
            q_pos: &s.step.positions,
            scale: s.hp.attn_scale,
            sinks: None,
            softcap: None,
            window: None,
            mass: s.step.wants_mass.then_some(&s.mass[il]),
        };
        self.pass.attention(s.buf(out), s.buf(q), layer, &a);
    }

    fn swiglu(&mut self, gate: Buf, up: Buf) {
        let (s, n) = (self.s, self.n() * self.s.widths.get(gate));
        self.pass.swiglu(s.buf(gate), s.buf(gate), s.buf(up), n);
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &Moe<CpuWeight>) {
        let f = MoeFfn {
            router: moe.gate_inp.mat(),
            gate: moe.gate_exps.experts(moe.n_expert),
            up: moe.up_exps.experts(moe.n_expert),
            down: moe.down_exps.experts(moe.n_expert),
            n_expert_used: moe.n_expert_used,
            gating: Gating::Softmax,
            choice_bias: None,
            norm_topk: moe.norm_topk,
            weights_scale: 1.0,
        };
        self.pass
            .moe_ffn(self.s.buf(acc), self.s.buf(x), &f, self.n());
    }

    fn output(&mut self, w: &Linear<CpuWeight>, norm: &CpuWeight, x: Buf, eps: f32) {
        let (s, n) = (self.s, self.n());
        let (x, xn) = (s.buf(x), s.buf(Buf::Xn));
        let rows = match s.step.outputs {
            None | Some(Outputs::None) => return,
            Some(Outputs::All) => {
                self.pass.rms_norm(xn, x, norm.vec(), eps, n);
                n
            }
            Some(Outputs::Last) => {
                self.pass.copy_rows(xn, x, &[n as u32 - 1], s.hp.n_embd);
                self.pass.rms_norm(xn, xn, norm.vec(), eps, 1);
                1
            }
        };
        self.pass.mul_mat(product(&s.logits, false, w), xn, rows);
    }
}
