//! `phi3`: Phi-3, Phi-3.5, Phi-4 and their mini models. Queries, keys and values are one matrix, gate and up another; part of a head may
//! rotate, by divisors that depend on the size of the context (longrope, arXiv 2402.13753).
//!
//! The key `attention.sliding_window` is not read: the files have one that the models do not follow in every layer, and llama.cpp runs
//! them without a window as well.

use super::keys::Keys;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(_: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
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
    attn_output: Linear<W>,
    ffn_norm: W,
    /// Gate and up.
    ffn_up: [Linear<W>; 2],
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
                attn_qkv: b.fused("attn_qkv", n_embd, [n_q, n_kv, n_kv])?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn_up: b.fused("ffn_up", n_embd, [n_ff, n_ff])?,
                ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
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
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            let [ffn_gate, ffn_up] = &l.ffn_up;
            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Gate, ffn_gate), (Up, ffn_up)], Xn);
            b.swiglu(Gate, Up);
            b.note("ffn_swiglu", il, Gate);
            b.mul_mat_add(X, &l.ffn_down, Gate);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
