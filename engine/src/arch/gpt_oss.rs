//! `gpt-oss`: sliding windows in every other layer, attention sinks, biases everywhere, experts with a bounded SwiGLU.

use super::keys::Keys;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Act, Backend, Buf::*, Embedding, Linear, Moe, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.n_ff = k.expert_width(hp)?;
    let window = k.window()?;
    for l in hp.layers.iter_mut().step_by(2) {
        l.window = Some(window);
    }
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
    attn_q: Linear<W>,
    attn_k: Linear<W>,
    attn_v: Linear<W>,
    attn_sinks: W,
    attn_output: Linear<W>,
    post_attention_norm: W,
    ffn: Moe<W>,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_kv,
            n_vocab,
            ..
        } = hp.shape();
        let layers = b.layers(hp.n_layer, |b| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_q: b.linear("attn_q", n_embd, n_q)?,
                attn_k: b.linear("attn_k", n_embd, n_kv)?,
                attn_v: b.linear("attn_v", n_embd, n_kv)?,
                attn_sinks: b.vector("attn_sinks", hp.n_head)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                post_attention_norm: b.vector("post_attention_norm", n_embd)?,
                // Softmax over the chosen experts alone is that over all, made to sum to one.
                ffn: Moe {
                    bias: Some(b.moe_bias(hp)?),
                    act: Act::SwigluOai,
                    ..b.moe(hp)?
                },
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
            b.mul_mats([(Q, &l.attn_q), (K, &l.attn_k), (V, &l.attn_v)], Xn);
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, Some(&l.attn_sinks));
            b.note("kqv_out", il, Att);
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.post_attention_norm, eps);
            b.note("attn_post_norm", il, Xn);
            b.moe_ffn(X, Xn, &l.ffn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
