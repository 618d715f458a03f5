//! `gemma3`: as `gemma2`, with a norm over each head of queries and keys in place of the soft caps; five layers of six have a window and
//! rotate with a base of their own, and only the others are stretched to long contexts. Source: arXiv 2503.19786.

use super::keys::Keys;
use super::{Binder, HParams, Layers, RopeParams, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

/// Layers of the model of 27 billion parameters, whose scores have a factor of their own that files do not state.
const LAYERS_27B: usize = 62;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.embedding_scale = (hp.n_embd as f32).sqrt();
    if let Some(window) = k.optional_window()? {
        let local = RopeParams::plain(k.positive("rope.freq_base_swa", Some(10_000.0))?);
        hp.windows(window, &k.window_pattern(hp.n_layer, 6)?, local);
    }
    hp.logit_softcap = k.softcap("final_logit_softcapping", 0.0)?;
    if hp.n_layer == LAYERS_27B && k.float("attention.scale")?.is_none() {
        hp.attn_scale = 1.0 / ((hp.n_embd / hp.n_head) as f32).sqrt();
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
    attn_q_norm: W,
    attn_k_norm: W,
    attn_output: Linear<W>,
    post_attention_norm: W,
    ffn_norm: W,
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
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_q: b.linear("attn_q", n_embd, n_q)?,
                attn_k: b.linear("attn_k", n_embd, n_kv)?,
                attn_v: b.linear("attn_v", n_embd, n_kv)?,
                attn_q_norm: b.vector("attn_q_norm", hp.head_dim)?,
                attn_k_norm: b.vector("attn_k_norm", hp.head_dim)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                post_attention_norm: b.vector("post_attention_norm", n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
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
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, &l.attn_q), (K, &l.attn_k), (V, &l.attn_v)], Xn);
            b.rms_norm_heads(Q, &l.attn_q_norm, eps);
            b.rms_norm_heads(K, &l.attn_k_norm, eps);
            b.note("Qcur_normed", il, Q);
            b.note("Kcur_normed", il, K);
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.rms_norm(Xn, Xn, &l.post_attention_norm, eps);
            b.note("attn_post_norm", il, Xn);
            b.add(X, Xn);
            b.note("sa_out", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Gate, &l.ffn_gate), (Up, &l.ffn_up)], Xn);
            b.geglu(Gate, Up);
            b.note("ffn_geglu", il, Gate);
            b.mul_mats([(Xn, &l.ffn_down)], Gate);
            b.rms_norm(Xn, Xn, &l.post_ffw_norm, eps);
            b.note("ffn_post_norm", il, Xn);
            b.add(X, Xn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
