//! `granite`: Granite 3. Llama with factors: of the embeddings, the attention scores, what a block adds, and the logits.

use super::keys::Keys;
use super::{Binder, HParams, Shape};
use crate::backend::{Backend, Buf::*, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    // Zero stands for none, except that logits are divided by their factor.
    let factor = |name| match k.float(name)?.unwrap_or(0.0) {
        0.0 => Ok(1.0),
        x if x.is_finite() => Ok(x),
        x => Err(k.bad(name, x, "a number".to_owned())),
    };
    hp.embedding_scale = factor("embedding_scale")?;
    hp.residual_scale = factor("residual_scale")?;
    let divisor = k.positive("logit_scale", None)?;
    hp.logit_scale = 1.0 / divisor;
    if !hp.logit_scale.is_finite() {
        return Err(k.bad("logit_scale", divisor, "a larger number".to_owned()));
    }
    if hp.n_expert > 0 {
        return Err(k.bad("expert_count", hp.n_expert, "none".to_owned()));
    }
    if !k.flag("rope.scaling.finetuned")?.unwrap_or(true) {
        for l in &mut hp.layers {
            l.rope = None;
        }
    }
    Ok(())
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    embedding_scale: f32,
    residual_scale: f32,
    token_embd: W,
    layers: Vec<Layer<W>>,
    output_norm: W,
    output: Linear<W>,
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    attn_q: Linear<W>,
    attn_k: Linear<W>,
    attn_v: Linear<W>,
    attn_output: Linear<W>,
    ffn_norm: W,
    ffn_gate: Linear<W>,
    ffn_up: Linear<W>,
    ffn_down: Linear<W>,
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
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn_gate: b.linear("ffn_gate", n_embd, n_ff)?,
                ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
                ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
            embedding_scale: hp.embedding_scale,
            residual_scale: hp.residual_scale,
            token_embd: b.matrix("token_embd", n_embd, n_vocab)?,
            layers,
            output_norm: b.vector("output_norm", n_embd)?,
            output: b.output(n_embd, n_vocab)?,
        })
    }

    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
        let eps = self.eps;
        b.embed(X, &self.token_embd);
        b.scale(X, self.embedding_scale);
        for (il, l) in self.layers.iter().enumerate() {
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, &l.attn_q), (K, &l.attn_k), (V, &l.attn_v)], Xn);
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.note("attn_out", il, Xn);
            b.scale(Xn, self.residual_scale);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Gate, &l.ffn_gate), (Up, &l.ffn_up)], Xn);
            b.swiglu(Gate, Up);
            b.note("ffn_swiglu", il, Gate);
            b.mul_mats([(Xn, &l.ffn_down)], Gate);
            b.note("ffn_out", il, Xn);
            b.scale(Xn, self.residual_scale);
            b.add(X, Xn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
