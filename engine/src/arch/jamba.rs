//! `jamba`: Jamba (arXiv 2403.19887). Most layers have a selective state space (Mamba), whose step sizes and what it writes and reads with are
//! normed; the others attend, and nothing rotates. Some layers of large models have experts, whose weights are those of all.

use super::ffn::Ffn;
use super::keys::Keys;
use super::{Binder, HParams, Layers, Routing, SelectiveSpace, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, Selective};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.cpu_only = Some("state spaces");
    hp.selective = Some(SelectiveSpace::read(k)?);
    hp.partial_rotary = true;
    for l in &mut hp.layers {
        l.rope = None;
    }
    hp.n_ff_exp = hp.n_ff;
    hp.routing = Routing {
        norm_topk: false,
        ..Routing::SOFTMAX
    };
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
    Attention {
        attn_qkv: [Linear<W>; 3],
        attn_output: Linear<W>,
    },
    Mamba {
        /// What goes through the convolution, and gates.
        ssm_in: [Linear<W>; 2],
        ssm_conv1d: W,
        /// What step sizes are made of, and what the state is written and read with.
        ssm_x: [Linear<W>; 3],
        ssm_dt_norm: W,
        ssm_b_norm: W,
        ssm_c_norm: W,
        ssm_dt: Linear<W>,
        scan: Selective<W>,
        ssm_out: Linear<W>,
    },
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
        let Some(s) = hp.selective else {
            unreachable!("the architecture has state spaces");
        };
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                mixer: match hp.layers[il].past.state() {
                    None => Mixer::Attention {
                        attn_qkv: b.qkv(hp)?,
                        attn_output: b.linear("attn_output", n_q, n_embd)?,
                    },
                    Some(_) => Mixer::Mamba {
                        ssm_in: b.fused("ssm_in", n_embd, [s.n_inner; 2])?,
                        ssm_conv1d: b.conv1d_biased("ssm_conv1d", s.d_conv, s.n_inner)?,
                        ssm_x: b.fused("ssm_x", s.n_inner, [s.dt_rank, s.d_state, s.d_state])?,
                        ssm_dt_norm: b.vector("ssm_dt_norm", s.dt_rank)?,
                        ssm_b_norm: b.vector("ssm_b_norm", s.d_state)?,
                        ssm_c_norm: b.vector("ssm_c_norm", s.d_state)?,
                        ssm_dt: b.linear("ssm_dt", s.dt_rank, s.n_inner)?,
                        scan: Selective {
                            a: b.turned("ssm_a", [s.d_state, s.n_inner])?,
                            d: b.plain_vector("ssm_d", s.n_inner)?,
                        },
                        ssm_out: b.linear("ssm_out", s.n_inner, n_embd)?,
                    },
                },
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn: match hp.n_expert > 0 && b.has("ffn_gate_inp") {
                    true => Ffn::bind(hp, b, il)?,
                    false => Ffn::dense(b, n_embd, n_ff)?,
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
            l.mixer.forward(b, il, eps);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> Mixer<W> {
    /// `X += mixer(Xn)`
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        match self {
            Mixer::Attention {
                attn_qkv: [attn_q, attn_k, attn_v],
                attn_output,
            } => {
                b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
                b.attention(Att, [Q, K, V], il, None);
                b.note("kqv_out", il, Att);
                b.mul_mat_add(X, attn_output, Att);
            }
            Mixer::Mamba {
                ssm_in: [x, z],
                ssm_conv1d,
                ssm_x: [dt, write, read],
                ssm_dt_norm,
                ssm_b_norm,
                ssm_c_norm,
                ssm_dt,
                scan,
                ssm_out,
            } => {
                b.mul_mats([(Qkv, x), (Z, z)], Xn);
                b.ssm_conv(Qkv, ssm_conv1d, il);
                b.mul_mats([(Dt, dt), (Sb, write), (Sc, read)], Qkv);
                b.rms_norm(Dt, Dt, ssm_dt_norm, eps);
                b.rms_norm(Sb, Sb, ssm_b_norm, eps);
                b.rms_norm(Sc, Sc, ssm_c_norm, eps);
                b.mul_mats([(Alpha, ssm_dt)], Dt);
                b.selective_scan(Dn, [Qkv, Alpha, Sb, Sc], scan, il);
                b.note("mamba_y", il, Dn);
                b.swiglu(Z, Dn);
                b.mul_mat_add(X, ssm_out, Z);
            }
        }
    }
}
