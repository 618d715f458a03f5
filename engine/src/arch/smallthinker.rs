//! `smallthinker`: SmallThinker (arXiv 2507.20984). A layer's router reads what comes into the layer, so that experts can be fetched while the layer
//! attends; their gates are cut off below zero. Of four layers the first sees everything and does not rotate, the others have a window.

use super::keys::Keys;
use super::routing::expert_width;
use super::{Binder, HParams, Layers, Routing, Shape};
use crate::backend::{Act, Backend, Buf::*, Embedding, Gating, Linear, Moe, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    k.only_experts(hp)?;
    hp.routes_apart = true;
    hp.n_ff_exp = expert_width(k)?;
    hp.routing = Routing {
        norm_topk: true,
        is_biased: false,
        n_dense: 0,
        ..Routing::read(k, hp, Gating::Softmax)?
    };
    if let Some(window) = k.optional_window()? {
        let name = "attention.sliding_window_pattern";
        let windows = match k.layer_flags(name, hp.n_layer)? {
            Some(all) => all,
            None => {
                let period = k.optional_count(name, u32::MAX)?.unwrap_or(4);
                (0..hp.n_layer).map(|il| il % period != 0).collect()
            }
        };
        hp.rotate_in_windows(window, &windows);
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
    ffn_gate_inp: Linear<W>,
    attn_norm: W,
    attn_qkv: [Linear<W>; 3],
    attn_output: Linear<W>,
    ffn_norm: W,
    experts: Moe<W>,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_vocab,
            ..
        } = hp.shape();
        let layers = b.layers(hp.n_layer, |b| {
            Ok(Layer {
                ffn_gate_inp: b.linear("ffn_gate_inp", n_embd, hp.n_expert)?,
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv(hp)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                experts: Moe {
                    act: Act::Reglu,
                    ..b.moe(hp)?
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
            let [attn_q, attn_k, attn_v] = &l.attn_qkv;
            b.mul_mats([(Route, &l.ffn_gate_inp)], X);
            b.note("ffn_moe_logits", il, Route);
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
            b.rope(Q, K, il);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.moe_ffn_routed(Y, [Xn, Route], &l.experts);
            b.note("ffn_out", il, Y);
            b.add(X, Y);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
