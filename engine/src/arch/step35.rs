//! `step35`: Step-3.5-Flash. Layers with a window have more query heads than others and rotate whole heads, the others half of each; a gate says
//! how much is taken of what each head gives. The first layers are dense, the others mixtures of experts: a sigmoid of each, something added
//! where they are chosen, and one that every token is sent to. In the last layers gates and what goes up are bounded.

use super::decoder::Norms;
use super::ffn::Ffn;
use super::keys::{Keys, MAX_DIM};
use super::routing::expert_width;
use super::{Binder, HParams, Layers, QkNorm, RopeParams, Routing};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.gates_heads = true;
    k.only_experts(hp)?;
    if k.has_tensor(0, "attn_q_norm.weight") {
        hp.qk_norm = QkNorm::Heads;
    }
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = k.count("expert_shared_feed_forward_length", MAX_DIM)?;
    hp.routing = Routing::of_tensors(k, hp)?;
    let bounds = |name: &str| -> Result<Vec<f32>, Error> {
        match k.has(name) {
            true => k.layer_floats_of(name, hp.n_layer),
            false => Ok(Vec::new()),
        }
    };
    hp.swiglu_clamp = [bounds("swiglu_clamp_exp")?, bounds("swiglu_clamp_shexp")?];

    let name = "attention.sliding_window_pattern";
    let Some(windows) = k.layer_flags(name, hp.n_layer)? else {
        return Err(k.missing(name));
    };
    let n_local = k.optional_count("rope.dimension_count_swa", MAX_DIM)?;
    let local = RopeParams {
        n_rot: Some(n_local.unwrap_or(hp.n_rot)),
        undivided: true,
        ..RopeParams::plain(k.positive("rope.freq_base_swa", Some(10_000.0))?)
    };
    hp.windows(k.window()?, &windows, local);
    let half = hp.n_rot / 2;
    hp.ropes[0].n_rot = Some(half);
    // As wide as the rotation of most layers: divisors, if there are some, are too.
    hp.n_rot = half.max(local.n_rot.unwrap_or(0));
    for name in ["attention.key_length_swa", "attention.value_length_swa"] {
        k.no_other(name, hp.head_dim, MAX_DIM)?;
    }
    let heads = hp.counted_heads(k)?;
    hp.unlike_heads(k, &heads)?;
    hp.cpu_only = Some("layers of different heads");
    Ok(())
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    token_embd: Embedding<W>,
    layers: Layers<Layer<W>>,
    output_norm: W,
    output: Linear<W>,
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    attn_qkv: [Linear<W>; 3],
    qk_norm: Norms<W>,
    /// A number for each head.
    attn_gate: Option<Linear<W>>,
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
                qk_norm: Norms::bind(hp, b)?,
                attn_gate: match b.has("attn_gate") {
                    true => Some(b.linear("attn_gate", n_embd, h.n)?),
                    false => None,
                },
                attn_output: b.linear("attn_output", h.n_att(), n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
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
            l.qk_norm.rope(b, il, eps);
            b.note("Qcur_pos", il, Q);
            b.note("Kcur_pos", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("attn_out", il, Att);
            if let Some(attn_gate) = &l.attn_gate {
                b.mul_mats([(Ag, attn_gate)], Xn);
                b.sigmoid_mul(Att, Ag);
                b.note("attn_gated", il, Att);
            }
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
