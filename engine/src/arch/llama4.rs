//! `llama4`: Llama 4 Scout and Maverick. Of four layers three rotate and look no further back than to the beginning of their part of the text, and
//! the fourth does neither: its queries grow with their position instead. Rotated queries and keys are normed over each head without weights (but not
//! in Maverick). Experts, in every layer or every other one, read what a sigmoid has weighed; beside them is one that every token is sent to.

use super::decoder::Norms;
use super::ffn::Ffn;
use super::hparams::Temperature;
use super::keys::{Keys, MAX_LAYERS};
use super::routing::expert_width;
use super::{Binder, HParams, Layers, RopeParams, Routing, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Gating, Linear, RopeMode};
use crate::error::Error;

/// Tokens of a part of the text, and of a step by which queries grow: files do not state it.
const CHUNK: u32 = 8192;
/// Experts of Maverick, by which it is known.
const MAVERICK: usize = 128;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    hp.cpu_only = Some("attention within parts of the text");
    k.only_experts(hp)?;
    let name = "attention.sliding_window";
    if let Some(n) = k.optional(name)?.filter(|n| *n != CHUNK) {
        return Err(k.bad(name, n, CHUNK.to_string()));
    }
    hp.ropes.push(RopeParams {
        freq_base: k.positive("rope.freq_base_swa", Some(hp.ropes[0].freq_base))?,
        ..hp.ropes[0]
    });
    let chunks = k.window_pattern(hp.n_layer, 4)?;
    for (l, _) in hp.layers.iter_mut().zip(chunks).filter(|(_, has)| *has) {
        (l.chunk, l.rope) = (Some(CHUNK), Some(1));
    }
    for l in hp.layers.iter_mut().skip(3).step_by(4) {
        l.rope = None;
    }
    hp.heat = Some(Temperature {
        scale: 0.1,
        n_floor: CHUNK,
        offset: 1,
    });
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = hp.n_ff_exp;
    hp.routing = Routing {
        gating: Gating::Sigmoid,
        norm_topk: false,
        weighs_input: true,
        step: k.count("interleave_moe_layer_step", MAX_LAYERS)?,
        ..Routing::SOFTMAX
    };
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
    /// Whether queries grow with their position; nothing rotates then.
    heats: bool,
    qk_norm: Norms<W>,
    attn_output: Linear<W>,
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
            let rotates = hp.layers[il].rope.is_some();
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv(hp)?,
                heats: !rotates,
                qk_norm: match rotates && hp.n_expert != MAVERICK {
                    true => Norms::RotatedHeads([b.ones(hp.head_dim)?, b.ones(hp.head_dim)?]),
                    false => Norms::None,
                },
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
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
            l.qk_norm.rope(b, il, eps);
            if l.heats {
                b.heat(Q);
            }
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
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
