//! `mimo2`: MiMo-V2-Flash. Values are narrower than keys, of which a part rotates; layers with a window have more key and value heads than
//! others, a rotation of their own, and a sink. The first layer is dense, the others are mixtures of experts: a sigmoid of each, and something
//! added where they are chosen.

use super::ffn::Ffn;
use super::keys::{Keys, MAX_DIM};
use super::routing::expert_width;
use super::{Binder, HParams, Layers, RopeParams, Routing};
use crate::backend::{Backend, Buf::*, Embedding, Gating, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.attn_scale = 1.0 / (hp.head_dim as f32).sqrt();
    k.only_experts(hp)?;
    hp.n_ff_exp = expert_width(k)?;
    // Files do not say how many layers have no router.
    hp.routing = Routing {
        gating: Gating::Sigmoid,
        norm_topk: true,
        weights_scale: 1.0,
        ..Routing::of_tensors(k, hp)?
    };
    hp.value_scale = match k.float("attention.value_scale")?.unwrap_or(0.0) {
        0.0 => 1.0,
        x if x.is_finite() => x,
        x => return Err(k.bad("attention.value_scale", x, "a number".to_owned())),
    };
    let name = "attention.sliding_window_pattern";
    let Some(windows) = k.layer_flags(name, hp.n_layer)? else {
        return Err(k.missing(name));
    };
    let local = RopeParams::plain(k.positive("rope.freq_base_swa", Some(10_000.0))?);
    hp.windows(k.window()?, &windows, local);
    let heads = hp.counted_heads(k)?;
    k.no_other("attention.key_length_swa", hp.head_dim, MAX_DIM)?;
    k.no_other("attention.value_length_swa", hp.head_dim_v, MAX_DIM)?;
    k.no_other("rope.dimension_count_swa", hp.n_rot, MAX_DIM)?;
    hp.unlike_heads(k, &heads)
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    value_scale: f32,
    token_embd: Embedding<W>,
    layers: Layers<Layer<W>>,
    output_norm: W,
    output: Linear<W>,
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    attn_qkv: [Linear<W>; 3],
    attn_sinks: Option<W>,
    attn_output: Linear<W>,
    ffn_norm: W,
    ffn: Ffn<W>,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let (n_embd, n_vocab) = (hp.n_embd, hp.n_vocab);
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            let h = hp.heads(il);
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv_of(hp, h)?,
                attn_sinks: b.optional_vector("attn_sinks.weight", h.n)?,
                attn_output: b.linear("attn_output", h.n_att(), n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
            value_scale: hp.value_scale,
            token_embd: b.embedding(hp)?,
            layers,
            output_norm: b.vector("output_norm", n_embd)?,
            output: b.output(n_embd, n_vocab)?,
        })
    }

    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
        let eps = self.eps;
        b.embed(X, &self.token_embd);
        for (il, l) in self.layers.iter() {
            let [attn_q, attn_k, attn_v] = &l.attn_qkv;
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, l.attn_sinks.as_ref());
            b.scale(Att, self.value_scale);
            b.note("kqv_out", il, Att);
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
