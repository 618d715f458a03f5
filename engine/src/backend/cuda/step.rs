//! The verbs as phases of a decode step that is one launch.
//!
//! Nothing is launched here: a model's forward pass is walked through once, and what it would do becomes a list. Norms are
//! part of the products that read them, so they wait for those; so do norms over heads and rotation for attention, gate and up for
//! their product. A model that wants anything else (GELU, say) is refused with the reason.

use std::sync::Arc;

use lemma_cuda::ops::{Attention, Glu, Mode, Part, RopeStore, Store};
use lemma_cuda::step::{Builder, Mixture, Products, Program, Shape};
use lemma_cuda::{CudaError, View, Weight};

use super::super::{self as backend, Activation, Backend, Buf, Embedding, Linear};
use super::CudaWeight;
use super::pass::{Pass, experts};
use crate::arch::ArchModel;

/// The decode step of a model over the buffers of a pass, or why it cannot be one launch. Launches leave page masses in either of `masses` in
/// turn.
pub(super) fn program(
    model: &ArchModel<CudaWeight>,
    pass: &Pass,
    masses: [View; 2],
) -> Result<Result<Program, String>, CudaError> {
    let shape = Shape {
        heads: pass.heads,
        n_layer: pass.hp.n_layer_kv(),
        max_pages: pass.pool.max_pages,
        pairs: pass.pairs(),
        mean: pass.mean,
        scale: pass.hp.attn_scale,
    };
    let mut builder = Builder::new(&pass.gpu, shape);
    let bytes = pass.hp.n_vocab * 4;
    builder.alternate(pass.logits.each_ref().map(|l| l.view().slice(0, bytes)));
    builder.alternate(masses);
    let mut phases = Phases {
        pass,
        builder,
        masses: masses[0],
        norm: None,
        q_norm: None,
        k_norm: None,
        rope: false,
        ffn: None,
    };
    model.forward(&mut phases);
    phases.builder.finish()
}

/// A matrix, its bias.
type OwnedPart = (Arc<Weight>, Option<View>);

struct Phases<'a> {
    pass: &'a Pass,
    builder: Builder,
    masses: View,
    /// The last norm: its result, which nobody computes by itself, its input as it was, its weights and epsilon.
    norm: Option<(Buf, View, View, f32)>,
    q_norm: Option<(View, f32)>,
    k_norm: Option<(View, f32)>,
    rope: bool,
    /// Gate and up, where their product goes, and their input.
    ffn: Option<([OwnedPart; 2], Buf, Buf)>,
}

fn bias(w: &Linear<CudaWeight>) -> Option<View> {
    w.bias.as_ref().map(CudaWeight::vec)
}

impl Phases<'_> {
    /// What products with a buffer read: what was normed, if that is what it holds.
    fn input(&mut self, x: Buf) -> (View, Option<(View, f32)>) {
        match self.norm {
            Some((out, from, w, eps)) if out == x => (from, Some((w, eps))),
            _ => (self.written(x), None),
        }
    }

    /// A buffer that phases have written to: what others hold is from another step.
    fn written(&mut self, x: Buf) -> View {
        let view = self.pass.view(x);
        if !self.builder.is_written(view) {
            self.builder
                .refuse("a phase that reads what none has written");
        }
        view
    }

    /// A buffer holds something else now.
    fn wrote(&mut self, out: Buf) {
        self.norm.take_if(|n| n.0 == out);
    }

    fn products(&mut self, parts: &[Part<'_>], x: Buf, mode: Mode) {
        let (src, norm) = self.input(x);
        self.builder.products(&Products {
            parts,
            src,
            norm,
            mode,
        });
    }
}

impl Backend for Phases<'_> {
    type Weight = CudaWeight;

    fn embed(&mut self, out: Buf, e: &Embedding<CudaWeight>) {
        match &e.w {
            Some(w) if e.scale == 1.0 => self.builder.embed(self.pass.view(out), w.mat()),
            Some(_) => self.builder.refuse("scaled embeddings"),
            None => self.builder.refuse("layers that are not on the device"),
        }
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &CudaWeight, eps: f32) {
        if out == x {
            return self.builder.refuse("a norm of what is wanted without too");
        }
        let bytes = self.pass.widths.get(x) * 4;
        if w.vec().bytes() > bytes {
            return self.builder.refuse("norms that add something");
        }
        let view = self.written(x);
        let from = self.builder.hold(view, bytes);
        self.norm = Some((out, from, w.vec(), eps));
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &CudaWeight, eps: f32) {
        match x {
            Buf::Q if !self.rope => self.q_norm = Some((w.vec(), eps)),
            Buf::K if !self.rope => self.k_norm = Some((w.vec(), eps)),
            _ => self
                .builder
                .refuse("a norm over the heads of other buffers"),
        }
    }

    fn mul_mats<const N: usize>(&mut self, outs: [(Buf, &Linear<CudaWeight>); N], x: Buf) {
        if let [(gate @ Buf::Gate, g), (Buf::Up, u)] | [(gate @ Buf::GateSh, g), (Buf::UpSh, u)] =
            outs.as_slice()
        {
            let part = |w: &Linear<CudaWeight>| (Arc::clone(w.w.mat()), bias(w));
            self.ffn = Some(([part(g), part(u)], *gate, x));
            return;
        }
        if N > 3 {
            return self.builder.refuse("more than three products of one input");
        }
        let parts = outs.map(|(out, w)| (&**w.w.mat(), bias(w), self.pass.view(out)));
        self.products(&parts, x, Mode::Store);
        outs.iter().for_each(|o| self.wrote(o.0));
    }

    fn mul_mat_add(&mut self, acc: Buf, w: &Linear<CudaWeight>, x: Buf) {
        let parts = [(&**w.w.mat(), bias(w), self.written(acc))];
        self.products(&parts, x, Mode::Add);
        self.wrote(acc);
    }

    fn add(&mut self, _: Buf, _: Buf) {
        self.builder.refuse("sums that are not of products");
    }

    fn scale(&mut self, _: Buf, _: f32) {
        self.builder.refuse("scaled activations");
    }

    fn rope(&mut self, _: Buf, _: Buf, il: usize) {
        let kind = self.pass.hp.layers[il].rope;
        if kind.is_some_and(|kind| kind > 0) {
            self.builder.refuse("layers that rotate differently");
        }
        if self.pass.hp.temperature.is_some() {
            self.builder.refuse("queries that grow with their position");
        }
        self.rope = kind.is_some();
    }

    fn attention(&mut self, out: Buf, qkv: [Buf; 3], il: usize, sinks: Option<&CudaWeight>) {
        let [q, k, v] = qkv;
        let p = self.pass;
        if p.hp.latent.is_some() {
            return self.builder.refuse("latent attention");
        }
        let window = p.hp.layers[il].window;
        let il = p.hp.layer_of_pool(il);
        let first = p.pool.first(il);
        let store = Store {
            k: first.k,
            v: first.v,
            places: p.step_words(p.layout.places(il), 1),
        };
        let call = RopeStore {
            q: p.view(q),
            k: p.view(k),
            v: p.view(v),
            q_norm: self.q_norm.take(),
            k_norm: self.k_norm.take(),
            rope: std::mem::take(&mut self.rope)
                .then(|| [p.step_words(p.layout.rope(0), p.hp.head_dim); 2]),
            pairs: p.pairs(),
            store: Some(store),
        };
        let attention = Attention {
            q: p.view(q),
            tiers: p.pool.tiers(il, p.tiered),
            pages: p.pool.table(il),
            n_pages: p.step_words(1 + il, 1),
            pos: p.step_words(0, 1),
            scale: p.hp.attn_scale,
            window,
            cap: p.hp.attn_softcap,
            sinks: sinks.map(CudaWeight::vec),
        };
        self.builder
            .attend(il, p.view(out), &call, &attention, p.wants_mass);
        self.wrote(out);
    }

    fn swiglu(&mut self, gate: Buf, _: Buf) {
        let Some(([(g, gb), (u, ub)], _, x)) = self.ffn.take().filter(|f| f.1 == gate) else {
            return self.builder.refuse("a gate without products");
        };
        if (g.ty(), g.n_row()) != (u.ty(), u.n_row()) {
            return self.builder.refuse("gate and up of different types");
        }
        let out = self.pass.view(gate);
        self.products(&[(&g, gb, out), (&u, ub, out)], x, Mode::Gated(Glu::Swiglu));
    }

    fn center(&mut self, _: Buf) {
        self.builder.refuse("norms that take the mean off");
    }

    fn center_heads(&mut self, _: Buf) {
        self.builder.refuse("norms of heads that take the mean off");
    }

    fn heat(&mut self, _: Buf) {
        self.builder
            .refuse("queries that grow apart from their rotation");
    }

    fn place(&mut self, _: Buf, _: Buf, _: usize, _: usize) {
        self.builder.refuse("delta nets that forget elements apart");
    }

    fn part(&mut self, _: Buf, _: Buf, _: usize, _: usize) {
        self.builder.refuse("embeddings of layers");
    }

    fn swiglu_clamped(&mut self, _: Buf, _: Buf, _: f32) {
        self.builder.refuse("bounded gates");
    }

    fn selective_scan(
        &mut self,
        _: Buf,
        _: [Buf; 4],
        _: &backend::Selective<CudaWeight>,
        _: usize,
    ) {
        self.builder.refuse("state spaces");
    }

    fn rms_norm_first(&mut self, _: Buf, _: &CudaWeight, _: f32) {
        self.builder.refuse("latent attention");
    }

    fn mul_mat_heads(&mut self, _: Buf, _: &CudaWeight, _: Buf) {
        self.builder.refuse("latent attention");
    }

    fn split_heads(&mut self, _: [Buf; 2], _: Buf) {
        self.builder.refuse("gated delta nets");
    }

    fn sigmoid_mul(&mut self, _: Buf, _: Buf) {
        self.builder.refuse("gates of what is done already");
    }

    fn ssm_conv(&mut self, _: Buf, _: &CudaWeight, _: usize) {
        self.builder.refuse("gated delta nets");
    }

    fn short_conv(&mut self, _: Buf, _: [Buf; 2], _: &CudaWeight, _: usize) {
        self.builder.refuse("short convolutions");
    }

    fn ssm_scan(&mut self, _: Buf, _: [Buf; 2], _: &backend::Scan<CudaWeight>, _: usize) {
        self.builder.refuse("state spaces");
    }

    fn rms_norm_groups(&mut self, _: Buf, _: &CudaWeight, _: usize, _: f32) {
        self.builder.refuse("state spaces");
    }

    fn moe_ffn_routed(&mut self, _: Buf, _: [Buf; 2], _: &backend::Moe<CudaWeight>) {
        self.builder.refuse("routers apart from their experts");
    }

    fn l2_norm_first(&mut self, _: Buf, _: usize, _: usize, _: f32) {
        self.builder.refuse("gated delta nets");
    }

    fn delta_gates(&mut self, _: Buf, _: Buf, _: &CudaWeight, _: &CudaWeight) {
        self.builder.refuse("gated delta nets");
    }

    fn gated_delta_net(&mut self, _: Buf, _: Buf, _: [Buf; 2], _: usize) {
        self.builder.refuse("gated delta nets");
    }

    fn geglu(&mut self, _: Buf, _: Buf) {
        self.builder.refuse("GELU");
    }

    fn activate(&mut self, _: Buf, _: Activation) {
        self.builder.refuse("feed-forward blocks without gates");
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &backend::Moe<CudaWeight>) {
        let Some(room) = &self.pass.moe else {
            return self.builder.refuse("experts in a model without any");
        };
        let m = experts::Parts::of(moe);
        let Some((gate, glu)) = m.gate else {
            return self.builder.refuse("experts without gates");
        };
        let (src, norm) = self.input(x);
        let to = self.written(acc);
        self.builder.experts(&Mixture {
            src,
            norm,
            router: m.router,
            gate,
            up: m.up,
            down: m.down,
            glu,
            n_used: m.used,
            choice: experts::choice(moe),
            logits: room.logits.view(),
            hidden: room.hidden[0].view(),
            acc: to,
        });
        self.wrote(acc);
    }

    fn output(&mut self, w: &Linear<CudaWeight>, norm: &CudaWeight, x: Buf, eps: f32) {
        // Pages are weighed while the other blocks already multiply.
        if self.pass.wants_mass {
            self.builder.weigh(self.masses);
        }
        if self.pass.hp.logit_scale != 1.0 {
            return self.builder.refuse("scaled logits");
        }
        if self.pass.hp.logit_softcap.is_some() {
            return self.builder.refuse("soft caps of logits");
        }
        self.rms_norm(Buf::Xn, x, norm, eps);
        let parts = [(&**w.w.mat(), bias(w), self.pass.logits[0].view())];
        self.products(&parts, Buf::Xn, Mode::Store);
        self.builder.best();
    }
}
