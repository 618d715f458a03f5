//! The verbs as phases of a decode step that is one launch.
//!
//! Nothing is launched here: a model's forward pass is walked through once, and what it would do becomes a list. Norms are
//! part of the products that read them, so they wait for those; so do norms over heads and rotation for attention, gate and up for
//! their product. A block's result that is normed before it is added waits for what reads the sum. A model that wants anything else (state
//! spaces, say) is refused with the reason.

use std::sync::Arc;

use lemma_cuda::ops::{Attention, Glu, Mode, Part, RopeStore, Store};
use lemma_cuda::step::{Attend, Builder, First, Mixture, Norms, Products, Program, Shape};
use lemma_cuda::{CudaError, View, Weight};

use super::super::{self as backend, Activation, Backend, Buf, Embedding, Linear};
use super::CudaWeight;
use super::pass::{Pass, experts, products};
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
        n_rope: pass.hp.ropes.len(),
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
        post: None,
        plus: None,
        centered: None,
        stream: 1.0,
        gone: None,
        q_norm: None,
        k_norm: None,
        norms: Norms::Heads,
        rope: None,
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
    /// The last norm, whose result nobody computes by itself.
    norm: Option<Norm>,
    /// A result that is to be normed, the weights, and epsilon, until it is added to something.
    post: Option<(Buf, View, f32)>,
    /// What is to be normed and added to a buffer by whoever reads that first.
    plus: Option<(Buf, First)>,
    /// What norms that come take the mean off.
    centered: Option<Buf>,
    /// What the residual stream would have to be multiplied by.
    stream: f32,
    /// What has been added to another buffer and is nowhere else.
    gone: Option<Buf>,
    q_norm: Option<(View, f32)>,
    k_norm: Option<(View, f32)>,
    norms: Norms,
    /// The kind of rotation.
    rope: Option<usize>,
    /// Gate and up, where their product goes, and their input.
    ffn: Option<([OwnedPart; 2], Buf, Buf)>,
}

/// A norm, and its input as it was.
#[derive(Clone, Copy)]
struct Norm {
    out: Buf,
    x: Buf,
    from: View,
    w: View,
    eps: f32,
    /// It is of what [`Phases::plus`] gives.
    of_sum: bool,
    /// The mean is taken off first.
    centers: bool,
}

/// What products read.
struct Input {
    src: View,
    first: First,
    norm: Option<(View, f32)>,
}

fn bias(w: &Linear<CudaWeight>) -> Option<View> {
    w.bias.as_ref().map(CudaWeight::vec)
}

impl Phases<'_> {
    /// Says what products with a buffer read, which may be the norm of something or a sum, and calls `f` with it.
    fn with_input(&mut self, x: Buf, f: impl FnOnce(&mut Builder, Input)) {
        let normed = self.norm.filter(|n| n.out == x);
        let of = normed.map_or(x, |n| n.x);
        let current = normed.is_none_or(|n| n.of_sum);
        let plus = self.plus.take_if(|p| current && p.0 == of).map(|p| p.1);
        let src = match normed {
            Some(n) if plus.is_none() => n.from,
            _ => self.written(of),
        };
        let norm = normed.map(|n| (n.w, n.eps));
        let centers = normed.is_some_and(|n| n.centers);
        if (normed.is_none() && self.centered == Some(of)) || (centers && plus.is_some()) {
            self.builder.refuse("centered activations");
        }
        let first = match plus {
            Some(plus) => plus,
            None if centers => First::Center,
            None => First::Nothing,
        };
        f(&mut self.builder, Input { src, first, norm });
        if plus.is_some() {
            // It stands there now.
            let bytes = self.pass.widths.get(of) * 4;
            let from = self.builder.hold(self.pass.view(of), bytes);
            let of_sum = |n: &&mut Norm| n.x == of && n.of_sum;
            if let Some(n) = self.norm.as_mut().filter(of_sum) {
                (n.from, n.of_sum) = (from, false);
            }
        }
    }

    /// A buffer that phases have written to: what others hold is from another step.
    fn written(&mut self, x: Buf) -> View {
        let view = self.pass.view(x);
        if !self.builder.is_written(view) || self.gone == Some(x) {
            self.builder
                .refuse("a phase that reads what none has written");
        }
        if self.post.is_some_and(|p| p.0 == x) || self.plus.is_some_and(|p| p.0 == x) {
            self.builder.refuse("norms behind a block that others read");
        }
        if x == Buf::X && self.stream != 1.0 {
            self.builder.refuse("scaled activations");
        }
        view
    }

    /// A buffer that something is added to, and what it would have to be multiplied by first: only the residual stream waits for that.
    fn summed(&mut self, acc: Buf) -> (View, f32) {
        let stream = std::mem::replace(&mut self.stream, 1.0);
        let view = self.written(acc);
        self.stream = stream;
        if stream != 1.0 && acc != Buf::X {
            self.builder.refuse("scaled activations");
        }
        (view, stream)
    }

    /// A buffer holds something else now.
    fn wrote(&mut self, out: Buf) {
        self.norm.take_if(|n| n.out == out);
        self.gone.take_if(|b| *b == out);
        if self.post.is_some_and(|p| p.0 == out) || self.plus.is_some_and(|p| p.0 == out) {
            self.builder.refuse("norms behind a block that nobody adds");
        }
    }

    fn products(&mut self, parts: &[Part<'_>], x: Buf, mode: Mode) {
        self.with_input(x, |builder, Input { src, first, norm }| {
            builder.products(&Products {
                parts,
                src,
                first,
                norm,
                mode,
            });
        });
    }

    /// Gate and up with what `by` makes of them.
    fn gate(&mut self, gate: Buf, by: Glu) {
        let Some(([(g, gb), (u, ub)], _, x)) = self.ffn.take().filter(|f| f.1 == gate) else {
            return self.builder.refuse("a gate without products");
        };
        if (g.ty(), g.n_row()) != (u.ty(), u.n_row()) {
            return self.builder.refuse("gate and up of different types");
        }
        let out = self.pass.view(gate);
        self.products(&[(&g, gb, out), (&u, ub, out)], x, Mode::Gated(by));
        self.wrote(gate);
    }
}

impl Backend for Phases<'_> {
    type Weight = CudaWeight;

    fn embed(&mut self, out: Buf, e: &Embedding<CudaWeight>) {
        match &e.w {
            Some(w) => self.builder.embed(self.pass.view(out), w.mat(), e.scale),
            None => self.builder.refuse("layers that are not on the device"),
        }
    }

    fn rms_norm(&mut self, out: Buf, x: Buf, w: &CudaWeight, eps: f32) {
        let (bytes, w) = (self.pass.widths.get(x) * 4, w.vec());
        if w.bytes() > bytes {
            return self.builder.refuse("norms that add something");
        }
        match (out == x, x) {
            (true, Buf::Q) if self.rope.is_none() => {
                (self.q_norm, self.norms) = (Some((w, eps)), Norms::AllHeads);
            }
            (true, Buf::K) if self.rope.is_none() => {
                (self.k_norm, self.norms) = (Some((w, eps)), Norms::AllHeads);
            }
            (true, _) => {
                self.written(x);
                if self.post.is_some() {
                    self.builder.refuse("norms behind several blocks at once");
                }
                self.post = Some((x, w, eps));
            }
            (false, _) => {
                if self.norm.is_some_and(|n| n.out == x) {
                    return self.builder.refuse("norms of norms");
                }
                let of_sum = self.plus.is_some_and(|p| p.0 == x);
                let view = match of_sum {
                    true => self.pass.view(x),
                    false => self.written(x),
                };
                self.norm = Some(Norm {
                    out,
                    x,
                    from: self.builder.hold(view, bytes),
                    w,
                    eps,
                    of_sum,
                    centers: self.centered == Some(x),
                });
            }
        }
    }

    fn rms_norm_heads(&mut self, x: Buf, w: &CudaWeight, eps: f32) {
        let norm = match x {
            Buf::Q => &mut self.q_norm,
            Buf::K => &mut self.k_norm,
            _ => {
                return self
                    .builder
                    .refuse("a norm over the heads of other buffers");
            }
        };
        *norm = Some((w.vec(), eps));
        self.norms = match self.rope {
            Some(_) => Norms::RotatedHeads,
            None => Norms::Heads,
        };
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
        let (to, stream) = self.summed(acc);
        self.products(&[(&**w.w.mat(), bias(w), to)], x, Mode::Add);
        self.wrote(acc);
        if stream != 1.0 {
            self.builder.scale_added(1.0 / stream);
        }
    }

    fn add(&mut self, acc: Buf, x: Buf) {
        match self.post.take_if(|p| p.0 == x) {
            Some((_, w, eps)) => {
                self.written(acc);
                let bytes = self.pass.widths.get(x) * 4;
                let x = self.written(x);
                let x = self.builder.hold(x, bytes);
                self.plus = Some((acc, First::Add { x, norm: w, eps }));
            }
            None => {
                let views = [acc, x].map(|b| self.written(b));
                self.builder.add_last(views[0], views[1]);
            }
        }
        self.gone = Some(x);
        self.norm.take_if(|n| n.out == acc);
    }

    fn scale(&mut self, x: Buf, factor: f32) {
        if self.post.is_some_and(|p| p.0 == x) {
            return self.builder.refuse("factors of what is to be normed");
        }
        if x != Buf::X {
            return self.builder.scale_last(self.pass.view(x), factor);
        }
        self.stream *= factor;
        if (self.stream - 1.0).abs() < 1e-6 {
            self.stream = 1.0;
        }
    }

    fn rope(&mut self, _: Buf, _: Buf, il: usize) {
        if self.pass.hp.temperature.is_some() {
            self.builder.refuse("queries that grow with their position");
        }
        self.rope = self.pass.hp.layers[il].rope;
    }

    fn attention(&mut self, out: Buf, qkv: [Buf; 3], il: usize, sinks: Option<&CudaWeight>) {
        let [q, k, v] = qkv.map(|b| self.written(b));
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
        let rope = self.rope.take();
        let at = Attend {
            il,
            rope: rope.unwrap_or(0),
            norms: std::mem::take(&mut self.norms),
            weighed: p.wants_mass,
        };
        let call = RopeStore {
            q,
            k,
            v,
            q_norm: self.q_norm.take(),
            k_norm: self.k_norm.take(),
            rope: rope.map(|kind| [p.step_words(p.layout.rope(kind), p.hp.head_dim); 2]),
            pairs: p.pairs(),
            store: Some(store),
        };
        let attention = Attention {
            q,
            tiers: p.pool.tiers(il, p.tiered),
            pages: p.pool.table(il),
            n_pages: p.step_words(1 + il, 1),
            pos: p.step_words(0, 1),
            scale: p.hp.attn_scale,
            window,
            cap: p.hp.attn_softcap,
            sinks: sinks.map(CudaWeight::vec),
        };
        self.builder.attend(at, p.view(out), &call, &attention);
        self.wrote(out);
    }

    fn swiglu(&mut self, gate: Buf, _: Buf) {
        self.gate(gate, Glu::Swiglu);
    }

    fn geglu(&mut self, gate: Buf, _: Buf) {
        self.gate(gate, Glu::Geglu);
    }

    /// Only norms read what has been centered, and nothing but sums comes to it: the mean is taken off on the way there.
    fn center(&mut self, x: Buf) {
        self.centered = Some(x);
    }

    fn center_heads(&mut self, _: Buf) {
        self.builder.refuse("norms of heads that take the mean off");
    }

    fn clamp(&mut self, _: Buf, _: f32) {
        self.builder.refuse("queries and keys within a bound");
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

    fn activate(&mut self, x: Buf, by: Activation) {
        self.builder
            .activate_last(self.pass.view(x), products::on_device(by));
    }

    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &backend::Moe<CudaWeight>) {
        let Some(room) = &self.pass.moe else {
            return self.builder.refuse("experts in a model without any");
        };
        let m = experts::Parts::of(moe);
        let Some((gate, glu)) = m.gate else {
            return self.builder.refuse("experts without gates");
        };
        let mut choice = experts::choice(moe);
        let (to, stream) = self.summed(acc);
        choice.scale /= stream;
        let (logits, hidden) = (room.logits.view(), room.hidden[0].view());
        self.with_input(x, |builder, Input { src, first, norm }| {
            builder.experts(&Mixture {
                src,
                first,
                norm,
                router: m.router,
                gate,
                up: m.up,
                down: m.down,
                glu,
                n_used: m.used,
                choice,
                logits,
                hidden,
                acc: to,
            });
        });
        self.wrote(acc);
    }

    fn output(&mut self, w: &Linear<CudaWeight>, norm: &CudaWeight, x: Buf, eps: f32) {
        // Pages are weighed while the other blocks already multiply.
        if self.pass.wants_mass {
            self.builder.weigh(self.masses);
        }
        if self.pass.hp.logit_softcap.is_some() {
            return self.builder.refuse("soft caps of logits");
        }
        self.rms_norm(Buf::Xn, x, norm, eps);
        let parts = [(&**w.w.mat(), bias(w), self.pass.logits[0].view())];
        self.products(&parts, Buf::Xn, Mode::Store);
        if self.pass.hp.logit_scale != 1.0 {
            self.builder
                .scale_last(self.pass.logits[0].view(), self.pass.hp.logit_scale);
        }
        self.builder.best();
    }
}
