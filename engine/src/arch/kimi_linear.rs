//! `kimi-linear`: Kimi Linear (arXiv 2510.26692). Three layers of four are delta nets in which each element of a key is forgotten in its own measure; the
//! others have latent attention, in which nothing rotates. A few dense layers, then mixtures of experts as in `deepseek2`.

use super::deepseek2::{Latents, latent_layers};
use super::ffn::Ffn;
use super::keys::{Keys, MAX_DIM};
use super::recurrent::DeltaNet;
use super::recurrent::d_conv;
use super::{Binder, HParams, Layers, Routing};
use crate::backend::{Backend, Buf::*, Embedding, Linear};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.cpu_only = Some("delta nets that forget elements apart");
    let n_head = hp.n_head;
    latent_layers(k, hp)?;
    hp.attn_scale = hp.latent.map_or(1.0, |l| 1.0 / (l.head_dim as f32).sqrt());
    hp.routing = Routing {
        norm_topk: true,
        ..hp.routing
    };
    for l in &mut hp.layers {
        l.rope = None;
    }
    let d = DeltaNet {
        n_head_k: n_head,
        n_head_v: n_head,
        head_dim: k.count("kda.head_dim", MAX_DIM)?,
        d_conv: d_conv(k, "ssm.conv_kernel")?,
        side_by_side: false,
        apart: true,
    };
    if !d.head_dim.is_multiple_of(16) {
        return Err(k.bad("kda.head_dim", d.head_dim, "a multiple of 16".to_owned()));
    }
    // Both factors are bounded, so the products do not overflow.
    let most = MAX_DIM as usize;
    if d.n_qkv() > most || d.state_len() > 16 * most {
        let expected = format!("a state of {} numbers at most", 16 * most);
        return Err(k.bad("kda.head_dim", d.head_dim, expected));
    }
    hp.delta = Some(d);
    hp.keep_by_heads(k)
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
    mixer: Mixer<W>,
    ffn_norm: W,
    ffn: Ffn<W>,
}

/// How a layer looks back.
#[derive(Debug)]
enum Mixer<W> {
    Attention(Latents<W>),
    Delta(Box<Delta<W>>),
}

#[derive(Debug)]
struct Delta<W> {
    shape: DeltaNet,
    inputs: Inputs<W>,
    /// Of queries, keys and values.
    ssm_conv1d: W,
    /// What decays are made of, and decays.
    ssm_f_a: Linear<W>,
    ssm_f_b: Linear<W>,
    ssm_beta: Linear<W>,
    /// For each element of a key of each head.
    ssm_a: W,
    ssm_dt: W,
    /// What gates are made of, and gates.
    ssm_g_a: Linear<W>,
    ssm_g_b: Linear<W>,
    ssm_norm: W,
    attn_output: Linear<W>,
}

/// What makes queries, keys and values.
#[derive(Debug)]
enum Inputs<W> {
    InOne(Linear<W>),
    Apart([Linear<W>; 3]),
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let (n_embd, n_vocab) = (hp.n_embd, hp.n_vocab);
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                mixer: match hp.layers[il].past.state() {
                    None => Mixer::Attention(Latents::bind(hp, b)?),
                    Some(_) => Mixer::Delta(Box::new(Delta::bind(hp, b)?)),
                },
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
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            match &l.mixer {
                Mixer::Attention(latents) => latents.forward(b, il, eps),
                Mixer::Delta(delta) => delta.forward(b, il, eps),
            }
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> Delta<W> {
    fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Some(d) = hp.delta else {
            unreachable!("the architecture has delta nets");
        };
        let (n_embd, n_v, dim) = (hp.n_embd, d.n_v(), d.head_dim);
        Ok(Self {
            shape: d,
            inputs: match b.has("attn_qkv") && !b.has("attn_q") {
                true => Inputs::InOne(b.linear("attn_qkv", n_embd, 3 * n_v)?),
                false => Inputs::Apart([
                    b.linear("attn_q", n_embd, n_v)?,
                    b.linear("attn_k", n_embd, n_v)?,
                    b.linear("attn_v", n_embd, n_v)?,
                ]),
            },
            ssm_conv1d: b.conv1d_parts(
                ["ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v"],
                d.d_conv,
                n_v,
            )?,
            ssm_f_a: b.linear("ssm_f_a", n_embd, dim)?,
            ssm_f_b: b.linear("ssm_f_b", dim, n_v)?,
            ssm_beta: b.linear("ssm_beta", n_embd, d.n_head_v)?,
            ssm_a: b.repeated("ssm_a", d.n_head_v, dim)?,
            ssm_dt: b.plain_vector("ssm_dt.bias", n_v)?,
            ssm_g_a: b.linear("ssm_g_a", n_embd, dim)?,
            ssm_g_b: b.linear("ssm_g_b", dim, n_v)?,
            ssm_norm: b.vector("ssm_norm", dim)?,
            attn_output: b.linear("attn_output", n_v, n_embd)?,
        })
    }

    /// `X += delta(Xn)`
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        let d = self.shape;
        match &self.inputs {
            Inputs::InOne(attn_qkv) => b.mul_mats([(Qkv, attn_qkv)], Xn),
            Inputs::Apart([q, k, v]) => {
                b.mul_mats([(Dn, q), (Z, k), (Alpha, v)], Xn);
                for (i, x) in [Dn, Z, Alpha].into_iter().enumerate() {
                    b.place(Qkv, x, i, 3);
                }
            }
        }
        let low = [
            (Dt, &self.ssm_f_a),
            (Sb, &self.ssm_g_a),
            (Beta, &self.ssm_beta),
        ];
        b.mul_mats(low, Xn);
        b.mul_mats([(Alpha, &self.ssm_f_b)], Dt);
        b.mul_mats([(Z, &self.ssm_g_b)], Sb);
        b.ssm_conv(Qkv, &self.ssm_conv1d, il);
        // Queries and keys come first.
        b.l2_norm_first(Qkv, 2 * d.n_head_k, d.head_dim, eps);
        b.delta_gates(Alpha, Beta, &self.ssm_a, &self.ssm_dt);
        b.gated_delta_net(Dn, Qkv, [Alpha, Beta], il);
        b.note("attn_output", il, Dn);
        b.rms_norm_heads(Dn, &self.ssm_norm, eps);
        b.sigmoid_mul(Dn, Z);
        b.note("kda_out", il, Dn);
        b.mul_mat_add(X, &self.attn_output, Dn);
    }
}
