//! `deepseek2`: DeepSeek-V2, V3 and R1 and what was built like them. Latent attention: a token leaves one short key for all heads in the
//! pool, from which the matrices of a head would make its key and value; these are multiplied with the query and the result instead.
//! A few dense layers, then mixtures of experts with some that every token is sent to. Sources: arXiv 2405.04434, 2412.19437.

use super::ffn::Ffn;
use super::hparams::Latent;
use super::keys::{Keys, MAX_DIM};
use super::routing::{expert_width, shared_width};
use super::{Binder, HParams, Layers, RopeScaling, Routing, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Gating, Linear, RopeMode};
use crate::error::Error;

pub(super) fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    // Mistral's variant makes queries of late positions larger; newer files of it have a name of their own.
    if let Some(scale) = k
        .float("attention.temperature_scale")?
        .filter(|s| *s != 0.0)
    {
        return Err(k.bad("attention.temperature_scale", scale, "none".to_owned()));
    }
    latent_layers(k, hp)
}

/// What is said of latent attention and of experts.
pub(super) fn latent_layers(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
    hp.rope_mode = RopeMode::Norm;
    let head_dim = latent_heads(k, hp)?.head_dim;
    hp.attn_scale = attn_scale(k, hp, head_dim)?;
    hp.n_ff_exp = expert_width(k)?;
    hp.n_ff_shexp = shared_width(k, hp.n_ff_exp)?;
    // Files of DeepSeek-V2 do not say; nor do some of GLM-4.7-Flash, which is known by its shape.
    let unsaid = match (hp.n_layer, hp.n_vocab) {
        (47 | 48, 154_880) => Gating::Sigmoid,
        _ => Gating::Softmax,
    };
    hp.routing = Routing::read(k, hp, unsaid)?;
    Ok(())
}

/// What is said of latent attention.
pub(super) fn latent_heads(k: &Keys<'_>, hp: &mut HParams) -> Result<Latent, Error> {
    hp.partial_rotary = true;
    let kv_lora = k.count("attention.kv_lora_rank", MAX_DIM)?;
    let width = |name, default| -> Result<usize, Error> {
        Ok(k.optional_count(name, MAX_DIM)?.unwrap_or(default))
    };
    let l = Latent {
        q_lora: k.optional("attention.q_lora_rank")?.unwrap_or(0) as usize,
        // Older files have the widths of heads where newer ones have those of the pool, and one matrix for keys and values.
        head_dim: width("attention.key_length_mla", hp.head_dim)?,
        head_dim_v: width("attention.value_length_mla", hp.head_dim_v)?,
        kv_lora,
    };
    let most = MAX_DIM as usize / hp.n_head;
    for (name, n) in [
        ("attention.kv_lora_rank", kv_lora + hp.n_rot),
        ("attention.key_length_mla", l.head_dim),
        ("attention.value_length_mla", l.head_dim_v),
    ] {
        if n > most {
            return Err(k.bad(name, n, format!("at most {most} for {} heads", hp.n_head)));
        }
    }
    if l.q_lora > MAX_DIM as usize {
        return Err(k.bad(
            "attention.q_lora_rank",
            l.q_lora,
            format!("at most {MAX_DIM}"),
        ));
    }
    if l.head_dim <= hp.n_rot {
        let expected = format!("more than rope.dimension_count {}", hp.n_rot);
        return Err(k.bad("attention.key_length_mla", l.head_dim, expected));
    }
    (hp.n_head_kv, hp.head_dim, hp.head_dim_v) = (1, kv_lora + hp.n_rot, kv_lora);
    hp.latent = Some(l);
    Ok(l)
}

/// Factor of the scores. Where YaRN stretches the context, scores of all positions grow: by the square of `1 + 0.1 m ln(factor)`, of
/// which files state `0.1 m`. Rotation then leaves magnitudes alone; a file without it has the magnitude of plain YaRN in both places.
fn attn_scale(k: &Keys<'_>, hp: &mut HParams, head_dim: usize) -> Result<f32, Error> {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let rope = &mut hp.ropes[0];
    let RopeScaling::Yarn {
        factor, ext_factor, ..
    } = rope.scaling
    else {
        return Ok(scale);
    };
    if ext_factor == 0.0 {
        return Ok(scale);
    }
    let attn_factor = k.positive("rope.scaling.attn_factor", Some(1.0))?;
    let ln = factor.max(1.0).ln();
    let name = "rope.scaling.yarn_log_multiplier";
    let m = match k.float(name)?.unwrap_or(0.0) {
        x if !x.is_finite() => return Err(k.bad(name, x, "a number".to_owned())),
        0.0 => {
            rope.magnitude = attn_factor * (1.0 + 0.1 * ln);
            rope.magnitude
        }
        log_mul => {
            rope.magnitude = attn_factor;
            attn_factor * (1.0 + log_mul * ln)
        }
    };
    Ok(m * m * scale)
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
    attention: Latents<W>,
    ffn_norm: W,
    ffn: Ffn<W>,
}

/// Latent attention.
#[derive(Debug)]
pub(super) struct Latents<W> {
    /// Whether queries grow with their position.
    heats: bool,
    queries: Queries<W>,
    attn_kv_a_mqa: Linear<W>,
    attn_kv_a_norm: W,
    attn_k_b: W,
    attn_v_b: W,
    /// What follows.
    pub(super) attn_output: Linear<W>,
}

#[derive(Debug)]
enum Queries<W> {
    Full {
        attn_q: Linear<W>,
    },
    Low {
        attn_q_a: Linear<W>,
        attn_q_a_norm: W,
        attn_q_b: Linear<W>,
    },
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd, n_vocab, ..
        } = hp.shape();
        let layers = b.numbered_layers(hp.n_layer, |b, il| {
            Ok(Layer {
                attn_norm: b.vector("attn_norm", n_embd)?,
                attention: Latents::bind(hp, b)?,
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
            l.attention.forward(b, il, eps);
            b.note("ffn_inp", il, X);

            b.rms_norm(Xn, X, &l.ffn_norm, eps);
            b.note("ffn_norm", il, Xn);
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }
}

impl<W> Latents<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let k = Keys {
            file: b.file(),
            arch: hp.arch,
        };
        let Some(l) = hp.latent else {
            return Err(k.missing("attention.kv_lora_rank"));
        };
        let (n_embd, n_head, n_q) = (hp.n_embd, hp.n_head, hp.n_head * l.head_dim);
        let n_nope = l.head_dim - hp.n_rot;
        let in_one = b.has("attn_kv_b") || !b.has("attn_v_b");
        let [attn_k_b, attn_v_b] = if in_one && !b.has("attn_k_b") {
            b.heads_in_one("attn_kv_b", l.kv_lora, [n_nope, l.head_dim_v], n_head)?
        } else {
            [
                b.heads("attn_k_b", n_nope, l.kv_lora, n_head)?,
                b.heads("attn_v_b", l.kv_lora, l.head_dim_v, n_head)?,
            ]
        };
        Ok(Self {
            heats: hp.heat.is_some(),
            queries: if l.q_lora > 0 {
                Queries::Low {
                    attn_q_a: b.linear("attn_q_a", n_embd, l.q_lora)?,
                    attn_q_a_norm: b.vector("attn_q_a_norm", l.q_lora)?,
                    attn_q_b: b.linear("attn_q_b", l.q_lora, n_q)?,
                }
            } else {
                Queries::Full {
                    attn_q: b.linear("attn_q", n_embd, n_q)?,
                }
            },
            attn_kv_a_mqa: b.linear("attn_kv_a_mqa", n_embd, hp.head_dim)?,
            attn_kv_a_norm: b.vector("attn_kv_a_norm", l.kv_lora)?,
            attn_k_b,
            attn_v_b,
            attn_output: b.linear("attn_output", n_head * l.head_dim_v, n_embd)?,
        })
    }

    /// `X += attention(Xn)`
    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        self.attend(b, il, eps);
        b.mul_mat_add(X, &self.attn_output, Vh);
    }

    /// `Vh = attention(Xn)`, of which `attn_output` is to be taken.
    pub(super) fn attend<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        match &self.queries {
            Queries::Full { attn_q } => b.mul_mats([(Qh, attn_q), (K, &self.attn_kv_a_mqa)], Xn),
            Queries::Low {
                attn_q_a,
                attn_q_a_norm,
                attn_q_b,
            } => {
                b.mul_mats([(Ql, attn_q_a), (K, &self.attn_kv_a_mqa)], Xn);
                b.rms_norm(Ql, Ql, attn_q_a_norm, eps);
                b.mul_mats([(Qh, attn_q_b)], Ql);
            }
        }
        b.note("q", il, Qh);
        b.rms_norm_first(K, &self.attn_kv_a_norm, eps);
        // Queries come to the keys: what would make keys of the latent vector is multiplied with them.
        b.mul_mat_heads(Q, &self.attn_k_b, Qh);
        b.rope(Q, K, il);
        if self.heats {
            b.heat(Q);
        }
        b.note("Qcur", il, Q);
        b.note("Kcur", il, K);
        b.attention(Att, [Q, K, K], il, None);
        b.mul_mat_heads(Vh, &self.attn_v_b, Att);
        b.note("kqv_out", il, Vh);
    }
}
