//! `falcon-h1`: Falcon-H1. Every layer looks back in two ways side by side: it attends, and it has a state space (Mamba-2). The factors that its paper
//! gives many of its matrices are in the weights of files.

use super::ffn::Ffn;
use super::keys::Keys;
use super::mamba2::Mamba2;
use super::{Binder, HParams, Layers, Shape, StateSpace};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.no_experts(hp)?;
    hp.rope_mode = RopeMode::Neox;
    hp.ssm = Some(StateSpace::read(k)?);
    hp.keep(k, "block_count", std::iter::repeat([true; 2]))
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
    mamba2: Mamba2<W>,
    ffn_norm: W,
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
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                mamba2: Mamba2::bind(hp, b)?,
                // Files have it without the usual end of a name.
                ffn_norm: match b.optional_vector("ffn_norm", n_embd)? {
                    Some(norm) => norm,
                    None => b.vector("ffn_norm", n_embd)?,
                },
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
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
            b.rope(Q, K, il);
            b.note("Qcur-post-rope", il, Q);
            b.note("Kcur-post-rope", il, K);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            l.mamba2.forward(b, il, eps);
            b.mul_mat_add(X, &l.attn_output, Att);
            b.mul_mat_add(X, &l.mamba2.ssm_out, Z);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
