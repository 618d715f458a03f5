//! `bitnet`: BitNet b1.58 (arXiv 2402.17764). Llama in which what attention gives and what a feed-forward block holds are normed before they are
//! multiplied on. Matrices are of three values, and may have a factor of their own.

use super::keys::Keys;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    k.no_experts(hp)
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
    attn_q: Scaled<W>,
    attn_k: Scaled<W>,
    attn_v: Scaled<W>,
    attn_sub_norm: W,
    attn_output: Scaled<W>,
    ffn_norm: W,
    ffn_gate: Scaled<W>,
    ffn_up: Scaled<W>,
    ffn_sub_norm: W,
    ffn_down: Scaled<W>,
}

/// A matrix and the factor of its products.
#[derive(Debug)]
struct Scaled<W> {
    w: Linear<W>,
    scale: f32,
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
                attn_q: Scaled::bind(b, "attn_q", n_embd, n_q)?,
                attn_k: Scaled::bind(b, "attn_k", n_embd, n_kv)?,
                attn_v: Scaled::bind(b, "attn_v", n_embd, n_kv)?,
                attn_sub_norm: b.vector("attn_sub_norm", n_q)?,
                attn_output: Scaled::bind(b, "attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn_gate: Scaled::bind(b, "ffn_gate", n_embd, n_ff)?,
                ffn_up: Scaled::bind(b, "ffn_up", n_embd, n_ff)?,
                ffn_sub_norm: b.vector("ffn_sub_norm", n_ff)?,
                ffn_down: Scaled::bind(b, "ffn_down", n_ff, n_embd)?,
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
            products(b, [(Q, &l.attn_q), (K, &l.attn_k), (V, &l.attn_v)], Xn);
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.rms_norm(Att, Att, &l.attn_sub_norm, eps);
            b.note("attn_sub_norm", il, Att);
            products(b, [(Xn, &l.attn_output)], Att);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            products(b, [(Gate, &l.ffn_gate), (Up, &l.ffn_up)], Xn);
            b.swiglu(Gate, Up);
            b.rms_norm(Gate, Gate, &l.ffn_sub_norm, eps);
            b.note("ffn_sub_norm", il, Gate);
            products(b, [(Xn, &l.ffn_down)], Gate);
            b.add(X, Xn);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> Scaled<W> {
    fn bind(b: &mut Binder<'_, W>, name: &str, n_in: usize, n_out: usize) -> Result<Self, Error> {
        Ok(Self {
            w: b.linear(name, n_in, n_out)?,
            scale: b.number(&format!("{name}.scale"))?.unwrap_or(1.0),
        })
    }
}

/// `out_i = scale_i w_i x` for several matrices with one input.
fn products<B: Backend, const N: usize>(b: &mut B, outs: [(Buf, &Scaled<B::Weight>); N], x: Buf) {
    b.mul_mats(outs.map(|(out, m)| (out, &m.w)), x);
    for (out, m) in outs.into_iter().filter(|(_, m)| m.scale != 1.0) {
        b.scale(out, m.scale);
    }
}
