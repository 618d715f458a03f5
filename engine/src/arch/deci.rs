//! `deci`: Llama-Nemotron Super and Ultra (arXiv 2505.00949), Llamas of which a search has taken out what they could spare: layers may lack
//! attention, or have a matrix in its place, and feed-forward blocks are of different widths, or missing. In Nemotron 51B and DeciLM
//! layers also have fewer key and value heads than others.

use super::ffn::Ffn;
use super::keys::Keys;
use super::{Binder, HParams, Heads, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    k.no_experts(hp)?;
    let n_head = k.layer_counts("attention.head_count", hp.n_layer)?;
    let name = "attention.head_count_kv";
    let n_head_kv = k.layer_counts(name, hp.n_layer)?;
    let attends = n_head
        .iter()
        .zip(&n_head_kv)
        .map(|(q, kv)| *q > 0 && *kv > 0);
    hp.keep(k, name, attends.map(|a| [a, false]))?;
    let heads = |(n, n_kv): (&u32, &u32)| Heads {
        n: *n as usize,
        n_kv: *n_kv as usize,
        dim: hp.head_dim,
        dim_v: hp.head_dim_v,
    };
    let heads: Vec<Heads> = n_head.iter().zip(&n_head_kv).map(heads).collect();
    hp.unlike_heads(k, &heads)
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

/// A layer: what it has of a norm and a mixer, and of a norm and a feed-forward block.
#[derive(Debug)]
struct Layer<W> {
    mixer: Option<(W, Mixer<W>)>,
    ffn: Option<(W, Ffn<W>)>,
}

#[derive(Debug)]
enum Mixer<W> {
    Attention {
        attn_qkv: [Linear<W>; 3],
        attn_output: Linear<W>,
    },
    /// A matrix in its place.
    Matrix(Linear<W>),
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd, n_vocab, ..
        } = hp.shape();
        let k = Keys {
            file: b.file(),
            arch: hp.arch,
        };
        let n_head = k.layer_counts("attention.head_count", hp.n_layer)?;
        let n_ff = k.layer_counts("feed_forward_length", hp.n_layer)?;
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            let mixer = match (hp.layers[il].past.pages(), n_head[il]) {
                (_, 0) => None,
                (None, _) => Some(Mixer::Matrix(b.linear("attn_output", n_embd, n_embd)?)),
                (Some(_), _) => Some(Mixer::Attention {
                    attn_qkv: b.qkv_of(hp, hp.heads(il))?,
                    attn_output: b.linear("attn_output", hp.heads(il).n_att(), n_embd)?,
                }),
            };
            let ffn = match n_ff[il] {
                0 => None,
                n_ff => Some(Ffn::dense(b, n_embd, n_ff as usize)?),
            };
            Ok(Layer {
                mixer: match mixer {
                    Some(mixer) => Some((b.vector("attn_norm", n_embd)?, mixer)),
                    None => None,
                },
                ffn: match ffn {
                    Some(ffn) => Some((b.vector("ffn_norm", n_embd)?, ffn)),
                    None => None,
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
            if let Some((attn_norm, mixer)) = &l.mixer {
                b.rms_norm(Xn, X, attn_norm, eps);
                b.note("attn_norm", il, Xn);
                mixer.forward(b, il);
                b.note("ffn_inp", il, X);
            }
            if let Some((ffn_norm, ffn)) = &l.ffn {
                b.rms_norm(Xn, X, ffn_norm, eps);
                b.note("ffn_norm", il, Xn);
                ffn.forward(b, il);
            }
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> Mixer<W> {
    /// `X += mixer(Xn)`
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize) {
        match self {
            Mixer::Attention {
                attn_qkv: [attn_q, attn_k, attn_v],
                attn_output,
            } => {
                b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
                b.rope(Q, K, il);
                b.note("Qcur", il, Q);
                b.note("Kcur", il, K);
                b.note("Vcur", il, V);
                b.attention(Att, [Q, K, V], il, None);
                b.note("kqv_out", il, Att);
                b.mul_mat_add(X, attn_output, Att);
            }
            Mixer::Matrix(w) => b.mul_mat_add(X, w, Xn),
        }
    }
}
