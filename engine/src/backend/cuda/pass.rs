//! The verbs as launches.

mod attention;
pub(super) mod experts;
pub(super) mod hosted;
pub(super) mod products;
mod recurrent;

use std::ops::Range;
use std::sync::Arc;

use lemma_cuda::ops::{self, Glu, Half, Heads, Mode, Pairs, Quant, RopeStore, Store};
use lemma_cuda::{Buffer, CudaError, Gpu, View, Weight};

use super::super::{
    Activation, Backend, Buf, Embedding, Linear, Moe as MoeWeights, RopeMode, Scan, Selective,
};
use super::buffers::{Moe, Pool};
use super::recurrent::States;
use super::{CudaWeight, StepLayout};
use crate::arch::{ArchModel, HParams, Rope, Widths};

type Done = Result<(), CudaError>;

/// Verbs that wait for the one they are fused with.
#[derive(Default)]
pub(super) struct Pending {
    q_norm: Option<(View, f32)>,
    k_norm: Option<(View, f32)>,
    /// The kind of rotation.
    rope: Option<usize>,
    /// Gate and up, and their input.
    ffn: Option<([OwnedPart; 2], Buf)>,
    /// What goes up in a block whose activation may be part of the product, and its input.
    up: Option<(OwnedPart, Buf)>,
    /// What comes before the rule of a delta net, for one token.
    delta: recurrent::Before,
    /// The norm over heads of what a delta net gives, and its epsilon.
    delta_norm: Option<(View, f32)>,
    /// What gates what a state space gives, and that.
    scan_gate: Option<[Buf; 2]>,
}

/// A matrix, its bias, where its product goes.
type OwnedPart = (Arc<Weight>, Option<View>, Buf);

/// State of a pass.
pub(super) struct Pass {
    pub(super) gpu: Gpu,
    pub(super) hp: HParams,
    /// The layers of the pool that are on the device.
    pub(super) layers: Range<usize>,
    /// Experts that the CPU runs.
    pub(super) hosted: Option<hosted::Hosted>,
    pub(super) heads: Heads,
    pub(super) widths: Widths,
    pub(super) rope: Rope,
    pub(super) n_ubatch: usize,
    /// `[n_ubatch, width]` of each [`Buf`].
    pub(super) bufs: Vec<Buffer>,
    /// The same quantized, for those that are multiplied.
    pub(super) q8: Vec<Option<(Buffer, Buffer)>>,
    /// Whether the quantized form is that of the buffer.
    pub(super) fresh: [bool; Buf::ALL.len()],
    pub(super) pool: Pool,
    /// Of models with recurrent states.
    pub(super) states: Option<States>,
    /// Data of the pass.
    pub(super) step: Buffer,
    pub(super) layout: StepLayout,
    /// `[n_outputs, n_vocab]`; the second is of the size of one, for steps that overlap.
    pub(super) logits: [Buffer; 2],
    pub(super) moe: Option<Moe>,
    /// Weights and activations of large batches, in f16.
    pub(super) half: Option<Half>,
    pub(super) pending: Pending,
    /// Tokens of the pass.
    pub(super) n: usize,
    pub(super) n_outputs: usize,
    pub(super) wants_mass: bool,
    pub(super) mean: bool,
    /// Pages lie in lower tiers.
    pub(super) tiered: bool,
    /// The first thing that went wrong; verbs have no way to say it.
    pub(super) failed: Option<CudaError>,
}

impl Pass {
    /// Launches a pass.
    pub(super) fn forward(&mut self, model: &ArchModel<CudaWeight>) -> Done {
        self.fresh = [false; Buf::ALL.len()];
        self.pending = Pending::default();
        self.failed = None;
        if let Some(states) = &mut self.states {
            states.convolved = false;
        }
        model.forward(self);
        match self.failed.take() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    fn note_failure(&mut self, done: Done) {
        if let Err(e) = done {
            self.failed.get_or_insert(e);
        }
    }

    fn refuse(&mut self, what: &str) {
        self.note_failure(Err(CudaError(format!("{what} have no kernel"))));
    }

    pub(super) fn pairs(&self) -> Pairs {
        match self.rope.mode {
            RopeMode::Norm => Pairs::Neighbours,
            RopeMode::Neox => Pairs::Halves(self.rope.n_rot / 2),
        }
    }

    pub(super) fn view(&self, b: Buf) -> View {
        match &self.states {
            Some(states) if b == Buf::Qkv && states.convolved => states.conv(),
            _ => self.bufs[b as usize].view(),
        }
    }

    /// Rows `from .. from + n` of a buffer.
    fn rows(&self, b: Buf, from: usize, n: usize) -> View {
        let row = self.widths.get(b) * 4;
        self.view(b).slice(from * row, n * row)
    }

    pub(super) fn step_words(&self, at: usize, n: usize) -> View {
        self.step.view().slice(at * 4, n * 4)
    }

    /// The quantized form of a buffer, as it is: for those of whole blocks.
    fn quant(&self, b: Buf) -> Option<Quant> {
        let whole = self.widths.get(b).is_multiple_of(32);
        self.quant_room(b).filter(|_| whole)
    }

    /// Where the quantized form goes of what a buffer holds, which may be narrower.
    fn quant_room(&self, b: Buf) -> Option<Quant> {
        self.q8[b as usize].as_ref().map(|(q, ds)| Quant {
            q: q.view(),
            ds: ds.view(),
        })
    }

    /// The quantized form of a buffer, made if need be.
    fn fresh_quant(&mut self, b: Buf) -> Result<Option<Quant>, CudaError> {
        let Some(q) = self.quant_room(b) else {
            return Ok(None);
        };
        if !self.fresh[b as usize] {
            let n = self.n * self.widths.get(b);
            ops::quantize(&self.gpu, q, self.view(b), n - n % 32)?;
            self.fresh[b as usize] = true;
        }
        Ok(Some(q))
    }

    /// Does what has been put off and was not fused after all.
    fn flush(&mut self) -> Done {
        if let Some((parts, x)) = self.pending.ffn.take() {
            let parts: Vec<_> = parts
                .iter()
                .map(|(w, bias, out)| (&**w, *bias, self.view(*out)))
                .collect();
            self.mat_vec(&parts, x, Mode::Store)?;
        }
        if let Some((part, x)) = self.pending.up.take() {
            self.up_product(part, x, Mode::Store)?;
        }
        self.flush_delta()?;
        if let Some([gate, up]) = self.pending.scan_gate.take() {
            let n = self.n * self.widths.get(gate);
            ops::glu(&self.gpu, Glu::Swiglu, self.view(gate), self.view(up), n)?;
        }
        if self.pending.q_norm.is_some()
            || self.pending.k_norm.is_some()
            || self.pending.rope.is_some()
        {
            match self.hp.latent {
                Some(_) => self.rotate_ends(Buf::Q, Buf::K, None)?,
                None => self.rope_store(Buf::Q, Buf::K, Buf::V, None)?,
            }
        }
        Ok(())
    }

    fn up_product(&mut self, (w, bias, out): OwnedPart, x: Buf, mode: Mode) -> Done {
        self.mat_vec(&[(&w, bias, self.view(out))], x, mode)
    }

    fn rope_store(&mut self, q: Buf, k: Buf, v: Buf, store: Option<Store>) -> Done {
        let pending = &mut self.pending;
        let [q_norm, k_norm] = [pending.q_norm.take(), pending.k_norm.take()];
        let rope = pending.rope.take();
        let rotations = |table| self.step_words(self.layout.rope(table), self.n * self.hp.head_dim);
        let call = RopeStore {
            q: self.view(q),
            k: self.view(k),
            v: self.view(v),
            q_norm,
            k_norm,
            rope: rope.map(|kind| [self.rope.of_queries(kind), kind].map(rotations)),
            pairs: self.pairs(),
            store,
        };
        ops::rope_store(&self.gpu, self.heads, &call, self.n)
    }
}

impl Backend for Pass {
    type Weight = CudaWeight;

    fn embed(&mut self, out: Buf, e: &Embedding<CudaWeight>) {
        self.fresh[out as usize] = false;
        // Without embeddings the rows have been uploaded.
        let Some(w) = &e.w else { return };
        let tokens = self.step_words(self.layout.tokens(), self.n);
        let done = ops::embed(&self.gpu, self.view(out), w.mat(), tokens, self.n);
        self.note_failure(done);
        if e.scale != 1.0 {
            self.scale(out, e.scale);
        }
        if e.positions.is_some() {
            self.refuse("embeddings of positions");
        }
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &CudaWeight, eps: f32) {
        let done = self
            .flush()
            .and_then(|()| self.norm(out, self.view(x), w.vec(), self.n, eps));
        self.note_failure(done);
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &CudaWeight, eps: f32) {
        if self.pending.rope.is_some() || self.pending.ffn.is_some() {
            let done = self.flush();
            self.note_failure(done);
        }
        self.fresh[x as usize] = false;
        match x {
            Buf::Q if self.pending.q_norm.is_none() => self.pending.q_norm = Some((w.vec(), eps)),
            Buf::K if self.pending.k_norm.is_none() => self.pending.k_norm = Some((w.vec(), eps)),
            Buf::Dn => {
                let done = self.flush();
                self.note_failure(done);
                self.pending.delta_norm = Some((w.vec(), eps));
            }
            _ => {
                let (view, d) = (self.view(x), w.vec().bytes() / 4);
                let rows = self.n * self.widths.get(x) / d;
                let done = self.flush().and_then(|()| {
                    ops::rms_norm(&self.gpu, view, view, w.vec(), None, rows, d, eps)
                });
                self.note_failure(done);
            }
        }
    }

    fn mul_mats<const N: usize>(&mut self, outs: [(Buf, &Linear<CudaWeight>); N], x: Buf) {
        let done = self.products(&outs, x);
        self.note_failure(done);
    }

    fn mul_mat_add(&mut self, acc: Buf, w: &Linear<CudaWeight>, x: Buf) {
        self.fresh[acc as usize] = false;
        let bias = w.bias.as_ref().map(CudaWeight::vec);
        let done = self.flush().and_then(|()| {
            if self.n > 1 {
                self.batch(&[(w.w.mat(), bias, self.view(acc))], x, true)
            } else {
                self.mat_vec(&[(w.w.mat(), bias, self.view(acc))], x, Mode::Add)
            }
        });
        self.note_failure(done);
    }

    fn add(&mut self, acc: Buf, x: Buf) {
        self.fresh[acc as usize] = false;
        let (y, n) = (Some(self.view(x)), self.n * self.widths.get(x));
        let done = self
            .flush()
            .and_then(|()| ops::add_scaled(&self.gpu, self.view(acc), 1.0, y, n));
        self.note_failure(done);
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        self.fresh[x as usize] = false;
        let n = self.n * self.widths.get(x);
        let done = self
            .flush()
            .and_then(|()| ops::add_scaled(&self.gpu, self.view(x), factor, None, n));
        self.note_failure(done);
    }

    fn center(&mut self, x: Buf) {
        self.fresh[x as usize] = false;
        let (x, width) = (self.view(x), self.widths.get(x));
        let done = self
            .flush()
            .and_then(|()| ops::center(&self.gpu, x, self.n, width));
        self.note_failure(done);
    }

    fn sigmoid_mul(&mut self, x: Buf, gate: Buf) {
        self.fresh[x as usize] = false;
        let widths = [x, gate].map(|b| self.widths.get(b));
        let [x, gate] = [x, gate].map(|b| self.view(b));
        let done = self
            .flush()
            .and_then(|()| ops::sigmoid_mul(&self.gpu, x, gate, self.n, widths));
        self.note_failure(done);
    }

    fn rope(&mut self, _: Buf, _: Buf, il: usize) {
        let Some(kind) = self.hp.layers[il].rope else {
            return;
        };
        if self.pending.rope.is_some() || self.pending.ffn.is_some() {
            let done = self.flush();
            self.note_failure(done);
        }
        self.pending.rope = Some(kind);
    }

    fn attention(&mut self, out: Buf, qkv: [Buf; 3], il: usize, sinks: Option<&CudaWeight>) {
        let done = self.attend(out, qkv, il, sinks.map(CudaWeight::vec));
        self.note_failure(done);
    }

    fn swiglu(&mut self, gate: Buf, up: Buf) {
        let done = self.glu(Glu::Swiglu, gate, up);
        self.note_failure(done);
    }

    fn geglu(&mut self, gate: Buf, up: Buf) {
        let done = self.glu(Glu::Geglu, gate, up);
        self.note_failure(done);
    }

    fn rms_norm_first(&mut self, x: Buf, w: &CudaWeight, eps: f32) {
        self.fresh[x as usize] = false;
        let (view, width) = (self.view(x), self.widths.get(x));
        let done = self
            .flush()
            .and_then(|()| ops::rms_norm_first(&self.gpu, view, w.vec(), self.n, width, eps));
        self.note_failure(done);
    }

    fn mul_mat_heads(&mut self, out: Buf, w: &CudaWeight, x: Buf) {
        let done = self.head_products(out, w.mat(), x);
        self.note_failure(done);
    }

    fn split_heads(&mut self, outs: [Buf; 2], x: Buf) {
        let done = self.split(outs, x);
        self.note_failure(done);
    }

    fn ssm_conv(&mut self, x: Buf, w: &CudaWeight, il: usize) {
        let done = self.conv(x, None, w.vec(), il);
        self.note_failure(done);
    }

    fn short_conv(&mut self, x: Buf, bc: [Buf; 2], w: &CudaWeight, il: usize) {
        let done = self.conv(x, Some(bc), w.vec(), il);
        self.note_failure(done);
    }

    fn ssm_scan(&mut self, out: Buf, xbc_dt: [Buf; 2], w: &Scan<CudaWeight>, il: usize) {
        let done = self.scan(out, xbc_dt, w, il);
        self.note_failure(done);
    }

    fn rms_norm_groups(&mut self, x: Buf, w: &CudaWeight, n_group: usize, eps: f32) {
        let done = self.group_norm(x, w.vec(), n_group, eps);
        self.note_failure(done);
    }

    fn swiglu_clamped(&mut self, _: Buf, _: Buf, _: f32) {
        self.refuse("bounded gates");
    }

    fn selective_scan(&mut self, _: Buf, _: [Buf; 4], _: &Selective<CudaWeight>, _: usize) {
        self.refuse("state spaces");
    }

    fn center_heads(&mut self, _: Buf) {
        self.refuse("norms of heads that take the mean off");
    }

    fn clamp(&mut self, _: Buf, _: f32) {
        self.refuse("queries and keys within a bound");
    }

    fn heat(&mut self, _: Buf) {
        self.refuse("queries that grow apart from their rotation");
    }

    fn place(&mut self, _: Buf, _: Buf, _: usize, _: usize) {
        self.refuse("delta nets that forget elements apart");
    }

    fn part(&mut self, _: Buf, _: Buf, _: usize, _: usize) {
        self.refuse("embeddings of layers");
    }

    fn moe_ffn_routed(&mut self, out: Buf, [x, route]: [Buf; 2], moe: &MoeWeights<CudaWeight>) {
        let done = self.experts(out, x, Some(route), moe);
        self.note_failure(done);
    }

    fn l2_norm_first(&mut self, x: Buf, n_head: usize, head_dim: usize, eps: f32) {
        let done = self.l2_norm(x, [n_head, head_dim], eps);
        self.note_failure(done);
    }

    fn delta_gates(&mut self, alpha: Buf, beta: Buf, a: &CudaWeight, dt: &CudaWeight) {
        let done = self.gates([alpha, beta], [a.vec(), dt.vec()]);
        self.note_failure(done);
    }

    fn gated_delta_net(&mut self, out: Buf, qkv: Buf, gates: [Buf; 2], il: usize) {
        let done = self.delta_rule(out, qkv, gates, il);
        self.note_failure(done);
    }

    fn activate(&mut self, x: Buf, by: Activation) {
        let done = self.activation(x, by);
        self.note_failure(done);
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &MoeWeights<CudaWeight>) {
        let done = self.experts(acc, x, None, moe);
        self.note_failure(done);
    }

    fn output(&mut self, w: &Linear<CudaWeight>, norm: &CudaWeight, x: Buf, eps: f32) {
        let done = self.logits(w, norm, x, eps);
        self.note_failure(done);
    }
}
