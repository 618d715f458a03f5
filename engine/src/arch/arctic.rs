//! `arctic`: Snowflake Arctic. Llama whose feed-forward blocks are as wide as the residual stream; beside a whole layer stands a mixture of experts,
//! which reads what the layer reads, by a norm of its own.

use super::ffn::Ffn;
use super::keys::Keys;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, Moe, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    k.only_experts(hp)?;
    hp.routes_apart = true;
    hp.n_ff_exp = hp.n_ff;
    if hp.n_ff > 0 {
        hp.n_ff = hp.n_embd;
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
    ffn_norm_exps: W,
    ffn_gate_inp: Linear<W>,
    experts: Moe<W>,
    attn_norm: W,
    attn_qkv: [Linear<W>; 3],
    attn_output: Linear<W>,
    ffn_norm: W,
    ffn: Ffn<W>,
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
        let layers = b.layers(hp.n_layer, |b| {
            Ok(Layer {
                ffn_norm_exps: b.vector("ffn_norm_exps", n_embd)?,
                ffn_gate_inp: b.linear("ffn_gate_inp", n_embd, hp.n_expert)?,
                experts: b.moe(hp)?,
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv(hp)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: Ffn::dense(b, n_embd, n_ff)?,
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
            b.rms_norm(Xn, X, &l.ffn_norm_exps, eps);
            b.note("ffn_norm_exps", il, Xn);
            b.mul_mats([(Route, &l.ffn_gate_inp)], Xn);
            b.moe_ffn_routed(Y, [Xn, Route], &l.experts);
            b.note("ffn_moe_out", il, Y);

            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
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
            l.ffn.forward(b, il);
            b.add(X, Y);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
