//! `grok`: Grok 1 and 2. What attention and experts give is normed before it is added; scores and, in Grok 2, logits are bounded by soft caps;
//! experts have GELU. In Grok 2 half of what a layer's experts add comes from a dense block beside them.
//!
//! The keys `router_logit_softcapping` and `attention.temperature_length` are not read: llama.cpp has no use for them either.

use super::keys::{Keys, MAX_DIM};
use super::{Binder, HParams, Layers, RopeScaling, Shape};
use crate::backend::{Act, Backend, Buf::*, Embedding, Linear, Moe, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.norms_ffn = true;
    hp.routes_apart = true;
    k.only_experts(hp)?;
    let width = "expert_feed_forward_length";
    if k.optional(width)?.is_some_and(|n| n > 0) {
        hp.n_ff_exp = k.count(width, MAX_DIM)?;
    }
    // What the first of these models have, whose files do not say.
    let factor = |name, unsaid: f64| k.positive(name, Some(unsaid as f32));
    hp.logit_scale = factor("logit_scale", 0.577_350_269_189_625_7)?;
    hp.embedding_scale = factor("embedding_scale", 78.383_671_769_061_69)?;
    hp.attn_scale = factor("attention.output_scale", 0.088_388_347_648_318_45)?;
    hp.attn_softcap = Some(factor("attn_logit_softcapping", 30.0)?);
    hp.logit_softcap = k.softcap("final_logit_softcapping", 0.0)?;
    yarn(k, hp)
}

/// Rotations at which extrapolation is full are fewer than elsewhere where a file does not say; and where it says that nothing is extrapolated, it may
/// state the magnitude.
fn yarn(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    let rope = &mut hp.ropes[0];
    let RopeScaling::Yarn {
        beta_fast,
        ext_factor,
        ..
    } = &mut rope.scaling
    else {
        return Ok(());
    };
    if !k.has("rope.scaling.yarn_beta_fast") {
        *beta_fast = 8.0;
    }
    if *ext_factor == 0.0 {
        rope.magnitude *= k.positive("rope.scaling.yarn_attn_factor", Some(1.0))?;
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
    attn_output: Linear<W>,
    attn_output_norm: W,
    ffn_norm: W,
    ffn_gate_inp: Linear<W>,
    experts: Moe<W>,
    dense: Option<Dense<W>>,
    post_ffw_norm: W,
}

/// The block beside experts.
#[derive(Debug)]
struct Dense<W> {
    ffn_gate: Linear<W>,
    ffn_up: Linear<W>,
    ffn_down: Linear<W>,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_ff,
            n_vocab,
            ..
        } = hp.shape();
        let layers = b.layers(hp.n_layer, |b| {
            let behind = match b.has("layer_output_norm") {
                true => "layer_output_norm",
                false => "post_ffw_norm",
            };
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_qkv: b.qkv(hp)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                attn_output_norm: b.vector("attn_output_norm", n_embd)?,
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn_gate_inp: b.linear("ffn_gate_inp", n_embd, hp.n_expert)?,
                experts: Moe {
                    act: Act::Geglu,
                    ..b.moe(hp)?
                },
                dense: match b.has("ffn_up") {
                    true => Some(Dense {
                        ffn_gate: b.linear("ffn_gate", n_embd, n_ff)?,
                        ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
                        ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
                    }),
                    false => None,
                },
                post_ffw_norm: b.vector(behind, n_embd)?,
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
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.rms_norm(Xn, Xn, &l.attn_output_norm, eps);
            b.note("attn_out_norm", il, Xn);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Route, &l.ffn_gate_inp)], Xn);
            b.moe_ffn_routed(Y, [Xn, Route], &l.experts);
            b.note("ffn_moe_out", il, Y);
            if let Some(d) = &l.dense {
                b.mul_mats([(Gate, &d.ffn_gate), (Up, &d.ffn_up)], Xn);
                b.geglu(Gate, Up);
                b.mul_mat_add(Y, &d.ffn_down, Gate);
                b.scale(Y, std::f32::consts::FRAC_1_SQRT_2);
            }
            b.rms_norm(Y, Y, &l.post_ffw_norm, eps);
            b.note("ffn_post_norm", il, Y);
            b.add(X, Y);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}
