//! `lfm2`: LFM2 and LFM2.5. Most layers are gated short convolutions (arXiv 2511.23404), which see a few tokens and keep nothing else; the others
//! attend, with norms of queries and keys. `lfm2moe` has the same layers with experts.

use super::decoder::Norms;
use super::ffn::Ffn;
use super::keys::Keys;
use super::{Binder, HParams, Layers, QkNorm, Shape, ShortConv};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;
use crate::report;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.no_experts(hp)?;
    conv_layers(k, hp)
}

/// What is said of layers that attend and layers that do not.
pub(super) fn conv_layers(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    if k.flag("attention.causal")? == Some(false) {
        let expected = "a model that writes";
        let found = format!("key {}.attention.causal is false", hp.arch);
        return Err(report::unsupported(k.file.name(), found, expected));
    }
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.short_conv = Some(ShortConv::read(k, hp.n_embd)?);
    hp.keep_by_heads(k)?;
    if let Some(window) = k.optional_window()? {
        for l in &mut hp.layers {
            l.window = Some(window);
        }
    }
    Ok(())
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    token_embd: Embedding<W>,
    layers: Layers<Layer<W>>,
    token_embd_norm: W,
    output: Linear<W>,
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    mixer: Mixer<W>,
    ffn_norm: W,
    ffn: Ffn<W>,
}

/// How a layer looks back.
#[derive(Debug)]
enum Mixer<W> {
    Attention {
        attn_qkv: [Linear<W>; 3],
        qk_norm: Norms<W>,
        attn_output: Linear<W>,
    },
    Conv {
        /// Both gates, and what they are for.
        in_proj: [Linear<W>; 3],
        conv: W,
        out_proj: Linear<W>,
    },
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_vocab,
            ..
        } = hp.shape();
        let d_conv = hp.short_conv.map_or(0, |c| c.d_conv);
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                mixer: match hp.layers[il].past.state() {
                    None => Mixer::Attention {
                        attn_qkv: b.qkv(hp)?,
                        qk_norm: Norms::bind(hp, b)?,
                        attn_output: b.linear("attn_output", n_q, n_embd)?,
                    },
                    Some(_) => Mixer::Conv {
                        in_proj: b.fused("shortconv.in_proj", n_embd, [n_embd; 3])?,
                        conv: b.conv1d("shortconv.conv", d_conv, n_embd)?,
                        out_proj: b.linear("shortconv.out_proj", n_embd, n_embd)?,
                    },
                },
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
            token_embd: b.embedding(hp)?,
            layers,
            // It is the norm of the output, whatever files call it.
            token_embd_norm: b.vector("token_embd_norm", n_embd)?,
            output: b.output(n_embd, n_vocab)?,
        })
    }

    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
        let eps = self.eps;
        b.embed(X, &self.token_embd);
        for (il, l) in self.layers.iter() {
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            l.mixer.forward(b, il, eps);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.token_embd_norm, X, eps);
    }
}

impl<W> Mixer<W> {
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        match self {
            Mixer::Attention {
                attn_qkv: [attn_q, attn_k, attn_v],
                qk_norm,
                attn_output,
            } => {
                b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
                qk_norm.rope(b, il, eps);
                b.note("Qcur", il, Q);
                b.note("Kcur", il, K);
                b.note("Vcur", il, V);
                b.attention(Att, [Q, K, V], il, None);
                b.note("kqv_out", il, Att);
                b.mul_mat_add(X, attn_output, Att);
            }
            Mixer::Conv {
                in_proj: [before, behind, x],
                conv,
                out_proj,
            } => {
                b.mul_mats([(Z, before), (Dn, behind), (Qkv, x)], Xn);
                b.note("conv_in", il, Qkv);
                b.short_conv(Qkv, [Z, Dn], conv, il);
                b.note("conv_out", il, Qkv);
                b.mul_mat_add(X, out_proj, Qkv);
            }
        }
    }
}
