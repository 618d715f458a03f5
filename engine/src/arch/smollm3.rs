//! `smollm3`: SmolLM3. Llama with every fourth layer left as it is where the others rotate (arXiv 2501.18795).

use super::keys::Keys;
use super::{Binder, HParams, Shape};
use crate::backend::{Backend, Buf::*, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(_: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    for l in hp.layers.iter_mut().skip(3).step_by(4) {
        l.rope = None;
    }
    Ok(())
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
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
            token_embd: b.matrix("token_embd", n_embd, n_vocab)?,
            layers,
            output_norm: b.vector("output_norm", n_embd)?,
            output: b.output(n_embd, n_vocab)?,
        })
    }

    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
        let eps = self.eps;
        b.embed(X, &self.token_embd);
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
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Gate, &l.ffn_gate), (Up, &l.ffn_up)], Xn);
            b.swiglu(Gate, Up);
            b.note("ffn_swiglu", il, Gate);
            b.mul_mat_add(X, &l.ffn_down, Gate);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
