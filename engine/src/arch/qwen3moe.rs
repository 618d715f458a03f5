//! `qwen3moe`: attention as in `qwen3`, and in every layer a mixture of experts without shared ones: softmax over all of them, the best
//! few made to sum to one.

use super::keys::Keys;
use super::{Binder, HParams, Shape};
use crate::backend::{Backend, Buf::*, Linear, Moe, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.n_ff = k.expert_width(hp)?;
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
    attn_q_norm: W,
    attn_k_norm: W,
    attn_output: Linear<W>,
    ffn_norm: W,
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
                attn_q_norm: b.vector("attn_q_norm", hp.head_dim)?,
                attn_k_norm: b.vector("attn_k_norm", hp.head_dim)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: b.moe(hp, true)?,
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
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.moe_ffn(X, Xn, &l.ffn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
