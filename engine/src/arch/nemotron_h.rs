//! `nemotron_h`: Nemotron-H and Nemotron Nano 2. A layer is one thing: a state space (Mamba-2), attention in which nothing rotates, or a
//! feed-forward block without a gate, in which what is positive is squared. `nemotron_h_moe` has experts in place of the last.

use super::ffn::Ffn;
use super::keys::Keys;
use super::mamba2::Mamba2;
use super::{Binder, HParams, Layers, Past, Shape, StateSpace};
use crate::backend::{Activation, Backend, Buf::*, Embedding, Linear};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.no_experts(hp)?;
    mixed_layers(k, hp)
}

/// What is said of layers of three kinds.
pub(super) fn mixed_layers(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.without_gates(vec![Activation::ReluSqr; hp.n_layer]);
    hp.ssm = Some(StateSpace::read(k)?);
    hp.partial_rotary = true;
    for l in &mut hp.layers {
        l.rope = None;
    }
    let name = "attention.head_count_kv";
    let n_head_kv = k.layer_counts(name, hp.n_layer)?;
    let n_ff = k.layer_counts("feed_forward_length", hp.n_layer)?;
    let kinds = n_head_kv.iter().zip(&n_ff);
    // A layer that says both is a feed-forward block.
    let kinds = kinds.map(|(n_kv, n_ff)| [*n_ff == 0 && *n_kv > 0, *n_ff == 0 && *n_kv == 0]);
    hp.keep(k, name, kinds)
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
    block: Block<W>,
}

/// What a layer is.
#[derive(Debug)]
enum Block<W> {
    Attention {
        attn_qkv: [Linear<W>; 3],
        attn_output: Linear<W>,
    },
    Mamba2(Mamba2<W>),
    Ffn(Ffn<W>),
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
                block: match hp.layers[il].past {
                    Past::Nothing => Block::Ffn(Ffn::bind(hp, b, il)?),
                    Past::State(_) => Block::Mamba2(Mamba2::bind(hp, b)?),
                    Past::Pages(_) | Past::Both { .. } => Block::Attention {
                        attn_qkv: b.qkv(hp)?,
                        attn_output: b.linear("attn_output", n_q, n_embd)?,
                    },
                },
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
            match &l.block {
                Block::Attention {
                    attn_qkv: [attn_q, attn_k, attn_v],
                    attn_output,
                } => {
                    b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
                    b.attention(Att, [Q, K, V], il, None);
                    b.note("kqv_out", il, Att);
                    b.mul_mat_add(X, attn_output, Att);
                }
                Block::Mamba2(block) => {
                    block.forward(b, il, eps);
                    b.mul_mat_add(X, &block.ssm_out, Z);
                }
                Block::Ffn(ffn) => ffn.forward(b, il),
            }
            b.note("nemotron_h_block_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
