//! `gemma4`: Gemma 4. As `gemma3`, and layers are of two kinds: those with a window have narrower heads and more of them, the others rotate
//! a part of each head and may have no values but their keys. Values are normed, scores have no factor. The last layers of small models
//! look at the keys and values of an earlier one, and every layer takes in an embedding of its own; large ones have experts beside each
//! feed-forward block.

use super::keys::{Keys, MAX_DIM};
use super::routing::expert_width;
use super::{Binder, HParams, Heads, Layers, Past, RopeParams};
use crate::backend::{Act, Backend, Buf::*, Embedding, Linear, Moe, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Neox;
    hp.attn_scale = 1.0;
    hp.embedding_scale = (hp.n_embd as f32).sqrt();
    hp.logit_softcap = k.softcap("final_logit_softcapping", 0.0)?;
    layers(k, hp)?;
    let name = "embedding_length_per_layer_input";
    hp.n_embd_layer = k.optional(name)?.unwrap_or(0) as usize;
    if hp.n_embd_layer > MAX_DIM as usize / hp.n_layer {
        let expected = format!("at most {}", MAX_DIM as usize / hp.n_layer);
        return Err(k.bad(name, hp.n_embd_layer, expected));
    }
    if hp.n_expert > 0 {
        hp.n_ff_exp = expert_width(k)?;
        hp.routes_apart = true;
    }
    hp.cpu_only = Some("Gemma 4");
    Ok(())
}

/// Windows, rotations and heads of layers, and which of them look at the keys and values of others.
fn layers(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    let name = "attention.sliding_window_pattern";
    let Some(windows) = k.layer_flags(name, hp.n_layer)? else {
        return Err(k.missing(name));
    };
    let width =
        |name, all| -> Result<usize, Error> { Ok(k.optional_count(name, MAX_DIM)?.unwrap_or(all)) };
    let [dim, dim_v] = [
        width("attention.key_length_swa", hp.head_dim)?,
        width("attention.value_length_swa", hp.head_dim_v)?,
    ];
    let local = RopeParams {
        n_rot: Some(width("rope.dimension_count_swa", hp.n_rot)?),
        undivided: true,
        ..RopeParams::plain(k.positive("rope.freq_base_swa", Some(10_000.0))?)
    };
    hp.windows(k.window()?, &windows, local);
    hp.ropes[0].n_rot = Some(hp.n_rot);
    hp.n_rot = hp.n_rot.max(local.n_rot.unwrap_or(0));

    let n = k.layer_counts("attention.head_count", hp.n_layer)?;
    let n_kv = k.layer_counts("attention.head_count_kv", hp.n_layer)?;
    let heads = |il: usize| Heads {
        n: n[il] as usize,
        n_kv: n_kv[il] as usize,
        dim: if windows[il] { dim } else { hp.head_dim },
        dim_v: if windows[il] { dim_v } else { hp.head_dim_v },
    };
    let heads: Vec<Heads> = (0..hp.n_layer).map(heads).collect();
    let name = "attention.shared_kv_layers";
    let n_borrow = k.optional(name)?.unwrap_or(0) as usize;
    if n_borrow > 0 {
        // The last two layers before are one of each kind.
        let own = match hp.n_layer.checked_sub(n_borrow) {
            Some(own) if own >= 2 => own,
            _ => return Err(k.bad(name, n_borrow, format!("at most {} less 2", hp.n_layer))),
        };
        for il in own..hp.n_layer {
            let of = own - if windows[il] { 2 } else { 1 };
            let keys = |h: Heads| (h.n_kv, h.dim, h.dim_v);
            if windows[of] != windows[il] || keys(heads[of]) != keys(heads[il]) {
                let found = format!("{n_borrow}, so that layer {il} would look at layer {of}");
                return Err(k.bad(name, found, "one of its own kind".to_owned()));
            }
            hp.layers[il].past = Past::Pages(of);
            hp.layers[il].borrows = true;
        }
    }
    hp.unlike_heads(k, &heads)
}

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    token_embd: Embedding<W>,
    per_layer: Option<PerLayer<W>>,
    layers: Layers<Layer<W>>,
    output_norm: W,
    output: Linear<W>,
}

/// What makes the inputs of all layers: an embedding, and a product of what the residual stream begins with.
#[derive(Debug)]
struct PerLayer<W> {
    per_layer_token_embd: Embedding<W>,
    per_layer_model_proj: Linear<W>,
    per_layer_proj_norm: W,
    /// Factors of the embedding, of the product, and of their sum.
    scales: [f32; 2],
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    attn_q: Linear<W>,
    attn_q_norm: W,
    kv: Option<KeysAndValues<W>>,
    attn_output: Linear<W>,
    post_attention_norm: W,
    experts: Option<Experts<W>>,
    ffn_norm: W,
    ffn_gate: Linear<W>,
    ffn_up: Linear<W>,
    ffn_down: Linear<W>,
    post_ffw_norm: W,
    input: Option<Input<W>>,
    layer_output_scale: Option<f32>,
}

#[derive(Debug)]
struct KeysAndValues<W> {
    attn_k: Linear<W>,
    /// The same as keys come from, in layers without.
    attn_v: Linear<W>,
    attn_k_norm: W,
    /// Ones.
    attn_v_norm: W,
}

/// Experts that stand beside the feed-forward block, with norms of their own; so does the router.
#[derive(Debug)]
struct Experts<W> {
    ffn_gate_inp: Linear<W>,
    ffn_gate_inp_norm: W,
    pre_ffw_norm_2: W,
    experts: Moe<W>,
    post_ffw_norm_2: W,
    post_ffw_norm_1: W,
}

/// How a layer takes in its own input.
#[derive(Debug)]
struct Input<W> {
    inp_gate: Linear<W>,
    proj: Linear<W>,
    post_norm: W,
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let (n_embd, n_vocab, n_each) = (hp.n_embd, hp.n_vocab, hp.n_embd_layer);
        let k = Keys {
            file: b.file(),
            arch: hp.arch,
        };
        let n_ff = k.layer_counts("feed_forward_length", hp.n_layer)?;
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            let (h, n_ff) = (hp.heads(il), n_ff[il].max(1) as usize);
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attn_q: b.linear("attn_q", n_embd, h.n_q())?,
                attn_q_norm: b.vector("attn_q_norm", h.dim)?,
                kv: match hp.layers[il].borrows {
                    true => None,
                    false => Some(KeysAndValues {
                        attn_k: b.linear("attn_k", n_embd, h.n_k())?,
                        attn_v: match b.has("attn_v") {
                            true => b.linear("attn_v", n_embd, h.n_v())?,
                            false => b.linear("attn_k", n_embd, h.n_v())?,
                        },
                        attn_k_norm: b.vector("attn_k_norm", h.dim)?,
                        attn_v_norm: b.ones(h.dim_v)?,
                    }),
                },
                attn_output: b.linear("attn_output", h.n_att(), n_embd)?,
                post_attention_norm: b.vector("post_attention_norm", n_embd)?,
                experts: match b.has("ffn_gate_inp") && hp.n_expert > 0 {
                    true => Some(Experts::bind(hp, b)?),
                    false => None,
                },
                ffn_norm: b.vector("ffn_norm", n_embd)?,
                ffn_gate: b.linear("ffn_gate", n_embd, n_ff)?,
                ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
                ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
                post_ffw_norm: b.vector("post_ffw_norm", n_embd)?,
                input: match n_each {
                    0 => None,
                    _ => Some(Input {
                        inp_gate: b.linear("inp_gate", n_embd, n_each)?,
                        proj: b.linear("proj", n_each, n_embd)?,
                        post_norm: b.vector("post_norm", n_embd)?,
                    }),
                },
                layer_output_scale: b.number("layer_output_scale.weight")?,
            })
        })?;
        let n_all = hp.n_layer * n_each;
        Ok(Self {
            eps: hp.eps,
            token_embd: b.embedding(hp)?,
            per_layer: match n_each {
                0 => None,
                _ => Some(PerLayer {
                    per_layer_token_embd: Embedding {
                        positions: None,
                        w: Some(b.matrix("per_layer_token_embd", n_all, n_vocab)?),
                        scale: (n_each as f32).sqrt(),
                    },
                    per_layer_model_proj: b.linear("per_layer_model_proj", n_embd, n_all)?,
                    per_layer_proj_norm: b.vector("per_layer_proj_norm", n_each)?,
                    scales: [1.0 / (n_embd as f32).sqrt(), 0.5f32.sqrt()],
                }),
            },
            layers,
            output_norm: b.vector("output_norm", n_embd)?,
            output: b.output(n_embd, n_vocab)?,
        })
    }

    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
        let (eps, n_layer) = (self.eps, self.layers.n);
        b.embed(X, &self.token_embd);
        if let Some(p) = &self.per_layer {
            p.forward(b, eps);
        }
        for (il, l) in self.layers.iter() {
            b.rms_norm(Xn, X, &l.attn_norm, eps);
            b.note("attn_norm", il, Xn);
            match &l.kv {
                Some(kv) => {
                    let outs = [(Q, &l.attn_q), (K, &kv.attn_k), (V, &kv.attn_v)];
                    b.mul_mats(outs, Xn);
                    b.rms_norm_heads(K, &kv.attn_k_norm, eps);
                    b.rms_norm_heads(V, &kv.attn_v_norm, eps);
                    b.note("Kcur_normed", il, K);
                    b.note("Vcur_normed", il, V);
                }
                None => b.mul_mats([(Q, &l.attn_q)], Xn),
            }
            b.rms_norm_heads(Q, &l.attn_q_norm, eps);
            b.note("Qcur_normed", il, Q);
            b.rope(Q, K, il);
            b.note("Qcur_pos", il, Q);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            b.mul_mats([(Xn, &l.attn_output)], Att);
            b.rms_norm(Xn, Xn, &l.post_attention_norm, eps);
            b.note("attn_post_norm", il, Xn);
            b.add(X, Xn);
            b.note("attn_out", il, X);

            if let Some(e) = &l.experts {
                b.rms_norm(Xn, X, &e.ffn_gate_inp_norm, eps);
                b.mul_mats([(Route, &e.ffn_gate_inp)], Xn);
                b.note("ffn_moe_logits", il, Route);
                b.rms_norm(Xn, X, &e.pre_ffw_norm_2, eps);
                b.moe_ffn_routed(Y, [Xn, Route], &e.experts);
                b.rms_norm(Y, Y, &e.post_ffw_norm_2, eps);
                b.note("ffn_moe", il, Y);
            }
            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            b.mul_mats([(Gate, &l.ffn_gate), (Up, &l.ffn_up)], Xn);
            b.geglu(Gate, Up);
            b.mul_mats([(Xn, &l.ffn_down)], Gate);
            if let Some(e) = &l.experts {
                b.rms_norm(Xn, Xn, &e.post_ffw_norm_1, eps);
                b.add(Xn, Y);
            }
            b.rms_norm(Xn, Xn, &l.post_ffw_norm, eps);
            b.note("ffn_post_norm", il, Xn);
            b.add(X, Xn);

            if let Some(i) = &l.input {
                b.mul_mats([(Lg, &i.inp_gate)], X);
                b.part(Lp, Li, il, n_layer);
                b.geglu(Lg, Lp);
                b.mul_mats([(Xn, &i.proj)], Lg);
                b.rms_norm(Xn, Xn, &i.post_norm, eps);
                b.note("per_layer_embd_out", il, Xn);
                b.add(X, Xn);
            }
            if let Some(scale) = l.layer_output_scale {
                b.scale(X, scale);
            }
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> PerLayer<W> {
    /// `Li`: the inputs of all layers, side by side.
    fn forward<B: Backend<Weight = W>>(&self, b: &mut B, eps: f32) {
        let [product, sum] = self.scales;
        b.embed(Le, &self.per_layer_token_embd);
        b.mul_mats([(Li, &self.per_layer_model_proj)], X);
        b.scale(Li, product);
        b.rms_norm_heads(Li, &self.per_layer_proj_norm, eps);
        b.add(Li, Le);
        b.scale(Li, sum);
    }
}

impl<W> Experts<W> {
    fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let n = hp.n_embd;
        Ok(Self {
            ffn_gate_inp: b.linear("ffn_gate_inp", n, hp.n_expert)?,
            ffn_gate_inp_norm: b.scaled("ffn_gate_inp.scale", n, 1.0 / (n as f32).sqrt())?,
            pre_ffw_norm_2: b.vector("pre_ffw_norm_2", n)?,
            experts: Moe {
                act: Act::Geglu,
                down_exps_s: b.optional_vector("ffn_down_exps.scale", hp.n_expert)?,
                ..b.moe(hp)?
            },
            post_ffw_norm_2: b.vector("post_ffw_norm_2", n)?,
            post_ffw_norm_1: b.vector("post_ffw_norm_1", n)?,
        })
    }
}
