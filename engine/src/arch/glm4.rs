//! `glm4`: GLM-4-0414, GLM-Z1. Half of each head rotates; what attention and feed-forward block give is normed before it is added; gate and
//! up are one matrix.

use super::decoder::Norms;
use super::keys::Keys;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.partial_rotary = true;
    // Models that see pictures rotate sections of a head by other positions.
    k.absent("rope.dimension_sections")?;
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
    attn_output: Linear<W>,
    post_attention_norm: W,
    ffn_norm: W,
    /// Gate and up.
    ffn_up: [Linear<W>; 2],
    ffn_down: Linear<W>,
    post_ffw_norm: W,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_ff,
            n_vocab,
            ..
        } = hp.shape();
        // Files of `plamo3` do not say that these are weights.
        let behind = |b: &mut Binder<'_, W>, name| match hp.arch {
            "plamo3" => b.plain_vector(name, n_embd),
            _ => b.vector(name, n_embd),
        };
        let layers = b.layers(hp.n_layer, |b| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv(hp)?,
                qk_norm: Norms::bind(hp, b)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                post_attention_norm: behind(b, "post_attention_norm")?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn_up: b.fused("ffn_up", n_embd, [n_ff, n_ff])?,
                ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
                post_ffw_norm: behind(b, "post_ffw_norm")?,
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
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            let [attn_q, attn_k, attn_v] = &l.attn_qkv;
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
            l.qk_norm.rope(b, il, eps);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.rms_norm(Xn, Xn, &l.post_attention_norm, eps);
            b.note("post_attn_norm", il, Xn);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            let [ffn_gate, ffn_up] = &l.ffn_up;
            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Gate, ffn_gate), (Up, ffn_up)], Xn);
            b.swiglu(Gate, Up);
            b.note("ffn_swiglu", il, Gate);
            b.mul_mats([(Xn, &l.ffn_down)], Gate);
            b.rms_norm(Xn, Xn, &l.post_ffw_norm, eps);
            b.note("post_mlp_norm", il, Xn);
            b.add(X, Xn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
