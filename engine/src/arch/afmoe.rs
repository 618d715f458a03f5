//! `afmoe`: Trinity. Norms before and behind attention and feed-forward block, a norm over each head of queries and keys, a gate on what
//! attention gives; a window in three of four layers, and three of four rotate. A few dense layers, then mixtures of experts: a sigmoid of each,
//! something added to it where they are chosen, and some that every token is sent to.

use super::decoder::Norms;
use super::ffn::Ffn;
use super::keys::Keys;
use super::routing::{expert_width, shared_width};
use super::{Binder, HParams, Layers, QkNorm, RopeParams, Routing, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Gating, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.qk_norm = QkNorm::Heads;
    hp.gates_attention = true;
    hp.norms_ffn = true;
    hp.embedding_scale = (hp.n_embd as f32).sqrt();
    if let Some(window) = k.optional_window()? {
        let local = RopeParams {
            freq_base: k.positive("rope.freq_base_swa", Some(hp.ropes[0].freq_base))?,
            ..hp.ropes[0]
        };
        hp.windows(window, &k.window_pattern(hp.n_layer, 4)?, local);
    }
    for l in hp.layers.iter_mut().skip(3).step_by(4) {
        l.rope = None;
    }
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = shared_width(k, hp.n_ff_exp)?;
    hp.routing = Routing::read(k, hp, Gating::Sigmoid)?;
    if hp.routing.n_dense < hp.n_layer && hp.n_ff_shexp == 0 {
        return Err(k.bad("expert_shared_count", 0, "1 or more".to_owned()));
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
    attn_norm: W,
    attn_qkv: [Linear<W>; 3],
    attn_gate: Linear<W>,
    qk_norm: Norms<W>,
    attn_output: Linear<W>,
    post_attention_norm: W,
    ffn_norm: W,
    ffn: Ffn<W>,
    post_ffw_norm: W,
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
                attn_gate: b.linear("attn_gate", n_embd, n_q)?,
                qk_norm: Norms::bind(hp, b)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                post_attention_norm: b.vector("post_attention_norm", n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
                post_ffw_norm: b.vector("post_ffw_norm", n_embd)?,
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
            let inputs = [(Q, attn_q), (K, attn_k), (V, attn_v), (Ag, &l.attn_gate)];
            b.mul_mats(inputs, Xn);
            l.qk_norm.rope(b, il, eps);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.sigmoid_mul(Att, Ag);
            b.note("attn_gated", il, Att);
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.rms_norm(Xn, Xn, &l.post_attention_norm, eps);
            b.note("attn_post_norm", il, Xn);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward_into(b, Y, il);
            b.rms_norm(Y, Y, &l.post_ffw_norm, eps);
            b.note("ffn_post_norm", il, Y);
            b.add(X, Y);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
