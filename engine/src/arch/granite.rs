//! `granite`: Granite 3. Llama with factors: of the embeddings, the attention scores, what a block adds, and the logits. `granitemoe` has
//! the same layers with experts; in `granitehybrid` most have a state space in place of attention, and in `minicpm3` it is latent.

use super::deepseek2::Latents;
use super::ffn::Ffn;
use super::keys::Keys;
use super::mamba2::Mamba2;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    k.no_experts(hp)?;
    rotates_if_it_says_so(k, hp)?;
    factors(k, hp, [0.0, 0.0], None)
}

/// Models in which nothing rotates say that it was not tuned.
pub(super) fn rotates_if_it_says_so(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    if !k.flag("rope.scaling.finetuned")?.unwrap_or(true) {
        for l in &mut hp.layers {
            l.rope = None;
        }
    }
    Ok(())
}

/// The factors of embeddings and of what blocks add, and the divisor of logits, which are `unsaid` and `divisor` where files do not say.
pub(super) fn factors(
    k: &Keys<'_>,
    hp: &mut HParams,
    unsaid: [f32; 2],
    divisor: Option<f32>,
) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    // Zero stands for none, except that logits are divided by their factor.
    let factor = |name, unsaid| match k.float(name)?.unwrap_or(unsaid) {
        0.0 => Ok(1.0),
        x if x.is_finite() => Ok(x),
        x => Err(k.bad(name, x, "a number".to_owned())),
    };
    hp.embedding_scale = factor("embedding_scale", unsaid[0])?;
    hp.residual_scale = factor("residual_scale", unsaid[1])?;
    let divisor = match (k.float("logit_scale")?, divisor) {
        (Some(0.0), Some(none)) => none,
        _ => k.positive("logit_scale", divisor)?,
    };
    hp.logit_scale = 1.0 / divisor;
    if !hp.logit_scale.is_finite() {
        return Err(k.bad("logit_scale", divisor, "a larger number".to_owned()));
    }
    if !(1.0 / hp.residual_scale).is_finite() {
        let expected = "a larger number".to_owned();
        return Err(k.bad("residual_scale", hp.residual_scale, expected));
    }
    Ok(())
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    residual_scale: f32,
    token_embd: Embedding<W>,
    layers: Layers<Layer<W>>,
    output_norm: W,
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
        attn_sinks: Option<W>,
        attn_output: Linear<W>,
    },
    Latents(Latents<W>),
    Mamba2(Mamba2<W>),
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
                mixer: match hp.layers[il].past.state() {
                    None if hp.latent.is_some() => Mixer::Latents(Latents::bind(hp, b)?),
                    None => Mixer::Attention {
                        attn_qkv: b.qkv(hp)?,
                        attn_sinks: b.optional_vector("attn_sinks.weight", hp.n_head)?,
                        attn_output: b.linear("attn_output", n_q, n_embd)?,
                    },
                    Some(_) => Mixer::Mamba2(Mamba2::bind(hp, b)?),
                },
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
            residual_scale: hp.residual_scale,
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
            l.mixer.forward(b, il, eps);
            b.note("attn_out", il, Xn);
            b.scale(Xn, self.residual_scale);
            b.add(X, Xn);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            // The block adds to the stream, which is what is scaled then, there and back.
            b.scale(X, 1.0 / self.residual_scale);
            l.ffn.forward(b, il);
            b.scale(X, self.residual_scale);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> Mixer<W> {
    /// `Xn = mixer(Xn)`
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        match self {
            Mixer::Attention {
                attn_qkv: [attn_q, attn_k, attn_v],
                attn_sinks,
                attn_output,
            } => {
                b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
                b.rope(Q, K, il);
                b.note("Qcur", il, Q);
                b.note("Kcur", il, K);
                b.note("Vcur", il, V);
                b.attention(Att, [Q, K, V], il, attn_sinks.as_ref());
                b.note("kqv_out", il, Att);
                b.mul_mats([(Xn, attn_output)], Att);
            }
            Mixer::Latents(attention) => {
                attention.attend(b, il, eps);
                b.mul_mats([(Xn, &attention.attn_output)], Vh);
            }
            Mixer::Mamba2(block) => {
                block.forward(b, il, eps);
                b.mul_mats([(Xn, &block.ssm_out)], Z);
            }
        }
    }
}
