//! `cohere2`: Command R7B, Command A. Attention and feed-forward block read the same norm and are added together. Norms take the mean off
//! first; a window in three of four layers, and only those rotate; the embedding is the output matrix.
//!
//! A norm that takes the mean off does not see a number that is added to all elements. So the mean is taken off the residual stream itself,
//! which is otherwise only added to.

use super::decoder::Norms;
use super::ffn::Ffn;
use super::keys::Keys;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.logit_scale = match k.float("logit_scale")? {
        None => return Err(k.missing("logit_scale")),
        Some(0.0) => 1.0,
        Some(x) if x.is_finite() => x,
        Some(x) => return Err(k.bad("logit_scale", x, "a number".to_owned())),
    };
    hp.rotate_in_windows(k.window()?, &k.window_pattern(hp.n_layer, 4)?);
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
    attn_qkv: [Linear<W>; 3],
    qk_norm: Norms<W>,
    attn_output: Linear<W>,
    ffn: Ffn<W>,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_vocab,
            ..
        } = hp.shape();
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv(hp)?,
                qk_norm: Norms::bind(hp, b)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
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
            b.center(X);
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
            l.qk_norm.rope(b, il, eps);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mat_add(X, &l.attn_output, Att);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.center(X);
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
