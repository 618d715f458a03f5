//! `qwen35`: Qwen3.5. Three layers of four are gated delta nets (arXiv 2412.06464): a recurrent state of fixed size in place of keys and
//! values. The others attend as in `qwen3`, with a part of each head rotated and a gate on what comes out. Mixtures of experts,
//! `qwen35moe` and `qwen3next`, have the same layers.

use super::ffn::Ffn;
use super::keys::{Keys, MAX_DIM, MAX_HEADS};
use super::recurrent::DeltaNet;
use super::recurrent::d_conv;
use super::{Binder, HParams, Layers, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    if hp.n_expert > 0 {
        let expected = "none (qwen35moe has experts)".to_owned();
        return Err(k.bad("expert_count", hp.n_expert, expected));
    }
    hp.rope_sections = Some(k.rope_sections()?);
    delta_layers(k, hp)
}

/// What is said of layers that attend and layers that do not.
pub(super) fn delta_layers(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.partial_rotary = true;
    hp.gates_attention = true;

    let recurrent = "attention.recurrent_layers";
    let interval = "full_attention_interval";
    let (name, is_recurrent) = match k.layer_flags(recurrent, hp.n_layer)? {
        Some(all) => (recurrent, all),
        None => {
            let n = k.optional_count(interval, u32::MAX)?.unwrap_or(4);
            let all = (0..hp.n_layer).map(|il| (il + 1) % n != 0).collect();
            (interval, all)
        }
    };
    hp.keep(k, name, is_recurrent.into_iter().map(|r| [!r, r]))?;
    hp.delta = Some(delta_net(k)?);
    Ok(())
}

fn delta_net(k: &Keys<'_>) -> Result<DeltaNet, Error> {
    let d = DeltaNet {
        n_head_k: k.count("ssm.group_count", MAX_HEADS)?,
        n_head_v: k.count("ssm.time_step_rank", MAX_HEADS)?,
        head_dim: k.count("ssm.state_size", MAX_DIM)?,
        d_conv: d_conv(k, "ssm.conv_kernel")?,
        side_by_side: false,
        apart: false,
    };
    if !d.head_dim.is_multiple_of(16) {
        return Err(k.bad("ssm.state_size", d.head_dim, "a multiple of 16".to_owned()));
    }
    if !d.n_head_v.is_multiple_of(d.n_head_k) {
        let expected = format!("a divisor of time_step_rank {}", d.n_head_v);
        return Err(k.bad("ssm.group_count", d.n_head_k, expected));
    }
    // Both factors are bounded, so the products do not overflow.
    let most = MAX_DIM as usize;
    if d.n_qkv() > most || d.state_len() > 16 * most {
        let expected = format!("a state of {} numbers at most", 16 * most);
        return Err(k.bad("ssm.state_size", d.head_dim, expected));
    }
    let inner = k.count("ssm.inner_size", MAX_DIM)?;
    if inner != d.n_v() {
        let expected = format!("state_size times time_step_rank, {}", d.n_v());
        return Err(k.bad("ssm.inner_size", inner, expected));
    }
    Ok(d)
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    delta: DeltaNet,
    token_embd: Embedding<W>,
    layers: Layers<Layer<W>>,
    output_norm: W,
    output: Linear<W>,
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    mixer: Mixer<W>,
    post_attention_norm: W,
    ffn: Ffn<W>,
}

/// How a layer looks back.
#[derive(Debug)]
enum Mixer<W> {
    Attention {
        /// Queries and gates, head by head.
        attn_q: Linear<W>,
        attn_k: Linear<W>,
        attn_v: Linear<W>,
        attn_q_norm: W,
        attn_k_norm: W,
        attn_output: Linear<W>,
    },
    Delta {
        attn_qkv: Linear<W>,
        attn_gate: Linear<W>,
        ssm_conv1d: W,
        ssm_alpha: Linear<W>,
        ssm_beta: Linear<W>,
        ssm_a: W,
        ssm_dt: W,
        ssm_norm: W,
        ssm_out: Linear<W>,
    },
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_kv,
            n_vocab,
            ..
        } = hp.shape();
        let k = Keys {
            file: b.file(),
            arch: hp.arch,
        };
        let Some(d) = hp.delta else {
            return Err(k.missing("ssm.state_size"));
        };
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                mixer: match hp.layers[il].past.state() {
                    None => Mixer::Attention {
                        attn_q: b.linear("attn_q", n_embd, 2 * n_q)?,
                        attn_k: b.linear("attn_k", n_embd, n_kv)?,
                        attn_v: b.linear("attn_v", n_embd, n_kv)?,
                        attn_q_norm: b.vector("attn_q_norm", hp.head_dim)?,
                        attn_k_norm: b.vector("attn_k_norm", hp.head_dim)?,
                        attn_output: b.linear("attn_output", n_q, n_embd)?,
                    },
                    Some(_) => {
                        let [attn_qkv, attn_gate] = inputs(b, n_embd, d)?;
                        let [ssm_beta, ssm_alpha] = gates(b, n_embd, d)?;
                        Mixer::Delta {
                            attn_qkv,
                            attn_gate,
                            ssm_conv1d: b.conv1d("ssm_conv1d", d.d_conv, d.n_qkv())?,
                            ssm_alpha,
                            ssm_beta,
                            ssm_a: b.plain_vector("ssm_a", d.n_head_v)?,
                            ssm_dt: b.plain_vector("ssm_dt.bias", d.n_head_v)?,
                            ssm_norm: b.vector("ssm_norm", d.head_dim)?,
                            ssm_out: b.linear("ssm_out", d.n_v(), n_embd)?,
                        }
                    }
                },
                post_attention_norm: b.vector("post_attention_norm", n_embd)?,
                ffn: Ffn::bind(hp, b, il)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
            delta: d,
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
            l.mixer.forward(b, il, self.delta, eps);
            b.note("attn_residual", il, X);

            b.rms_norm(Xn, X, &l.post_attention_norm, eps);
            b.note("attn_post_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

/// What makes queries, keys and values, and what makes the gate of the output. In early files of Qwen3-Next they are one matrix, key head by
/// key head.
fn inputs<W>(b: &mut Binder<'_, W>, n_embd: usize, d: DeltaNet) -> Result<[Linear<W>; 2], Error> {
    if d.side_by_side && b.has("ssm_in") && !b.has("attn_qkv") {
        let v = d.n_v() / d.n_head_k;
        let parts = [d.head_dim, d.head_dim, v, v];
        return b.taking_turns("ssm_in", n_embd, d.n_head_k, &parts, [&[0, 1, 2], &[3]]);
    }
    Ok([
        b.linear("attn_qkv", n_embd, d.n_qkv())?,
        b.linear("attn_gate", n_embd, d.n_v())?,
    ])
}

/// What makes `beta` and `alpha`: two matrices, or in Qwen3-Next one, key head by key head.
fn gates<W>(b: &mut Binder<'_, W>, n_embd: usize, d: DeltaNet) -> Result<[Linear<W>; 2], Error> {
    if d.side_by_side {
        let parts = [d.n_head_v / d.n_head_k; 2];
        return b.taking_turns("ssm_ba", n_embd, d.n_head_k, &parts, [&[0], &[1]]);
    }
    Ok([
        b.linear("ssm_beta", n_embd, d.n_head_v)?,
        b.linear("ssm_alpha", n_embd, d.n_head_v)?,
    ])
}

impl<W> Mixer<W> {
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, d: DeltaNet, eps: f32) {
        match self {
            Mixer::Attention {
                attn_q,
                attn_k,
                attn_v,
                attn_q_norm,
                attn_k_norm,
                attn_output,
            } => {
                b.mul_mats([(Qg, attn_q), (K, attn_k), (V, attn_v)], Xn);
                b.split_heads([Q, Ag], Qg);
                b.rms_norm_heads(Q, attn_q_norm, eps);
                b.rms_norm_heads(K, attn_k_norm, eps);
                b.note("Qcur_normed", il, Q);
                b.note("Kcur_normed", il, K);
                b.rope(Q, K, il);
                b.note("Qcur", il, Q);
                b.note("Kcur", il, K);
                b.note("Vcur", il, V);
                b.attention(Att, [Q, K, V], il, None);
                b.note("attn_pregate", il, Att);
                b.sigmoid_mul(Att, Ag);
                b.note("attn_gated", il, Att);
                b.mul_mat_add(X, attn_output, Att);
            }
            Mixer::Delta {
                attn_qkv,
                attn_gate,
                ssm_conv1d,
                ssm_alpha,
                ssm_beta,
                ssm_a,
                ssm_dt,
                ssm_norm,
                ssm_out,
            } => {
                let inputs = [
                    (Qkv, attn_qkv),
                    (Z, attn_gate),
                    (Alpha, ssm_alpha),
                    (Beta, ssm_beta),
                ];
                b.mul_mats(inputs, Xn);
                b.note("linear_attn_qkv_mixed", il, Qkv);
                b.note("z", il, Z);
                b.ssm_conv(Qkv, ssm_conv1d, il);
                b.note("conv_output_silu", il, Qkv);
                // Queries and keys come first.
                b.l2_norm_first(Qkv, 2 * d.n_head_k, d.head_dim, eps);
                b.delta_gates(Alpha, Beta, ssm_a, ssm_dt);
                b.gated_delta_net(Dn, Qkv, [Alpha, Beta], il);
                b.note("attn_output", il, Dn);
                b.rms_norm_heads(Dn, ssm_norm, eps);
                b.swiglu(Z, Dn);
                b.note("final_output", il, Z);
                b.mul_mat_add(X, ssm_out, Z);
            }
        }
    }
}
