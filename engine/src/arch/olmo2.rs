//! `olmo2`: OLMo 2 and OLMo 3. Nothing is normed before a block, but what it gives is; queries and keys are normed over all heads
//! together. OLMo 3 has a window in three of four layers, which rotate without the scaling of the others.

use super::decoder::Norms;
use super::keys::Keys;
use super::{Binder, HParams, Layers, QkNorm, RopeParams, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Whole;
    let Some(window) = k.optional_window()? else {
        return Ok(());
    };
    let local = RopeParams::plain(k.positive("rope.freq_base_swa", Some(hp.ropes[0].freq_base))?);
    hp.windows(window, &k.window_pattern(hp.n_layer, 4)?, local);
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
    attn_q: Linear<W>,
    attn_k: Linear<W>,
    attn_v: Linear<W>,
    qk_norm: Norms<W>,
    attn_output: Linear<W>,
    post_attention_norm: W,
    ffn_gate: Linear<W>,
    ffn_up: Linear<W>,
    ffn_down: Linear<W>,
    post_ffw_norm: W,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_kv,
            n_ff,
            n_vocab,
        } = hp.shape();
        let layers = b.layers(hp.n_layer, |b| {
            Ok(Layer {
                attn_q: b.linear("attn_q", n_embd, n_q)?,
                attn_k: b.linear("attn_k", n_embd, n_kv)?,
                attn_v: b.linear("attn_v", n_embd, n_kv)?,
                qk_norm: Norms::bind(hp, b)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                post_attention_norm: b.vector("post_attention_norm", n_embd)?,
                ffn_gate: b.linear("ffn_gate", n_embd, n_ff)?,
                ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
                ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
                post_ffw_norm: b.vector("post_ffw_norm", n_embd)?,
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
            b.mul_mats([(Q, &l.attn_q), (K, &l.attn_k), (V, &l.attn_v)], X);
            l.qk_norm.rope(b, il, eps);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.rms_norm(Xn, Xn, &l.post_attention_norm, eps);
            b.note("attn_post_norm", il, Xn);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            b.mul_mats([(Gate, &l.ffn_gate), (Up, &l.ffn_up)], X);
            b.swiglu(Gate, Up);
            b.note("ffn_swiglu", il, Gate);
            b.mul_mats([(Xn, &l.ffn_down)], Gate);
            b.rms_norm(Xn, Xn, &l.post_ffw_norm, eps);
            b.note("ffn_post_norm", il, Xn);
            b.add(X, Xn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
