//! What most models are: a norm, attention, a norm, a feed-forward block, and what each block gives is added to the residual stream.
//! Architectures that are this page say in `hparams` what they make of it: how heads rotate, whether queries and keys are normed or kept
//! within a bound, what feed-forward blocks read, which layers have experts. Biases are added where a file has them.

use super::ffn::Ffn;
use super::{Binder, FfnReads, HParams, Layers, QkNorm, Shape};
use crate::backend::{Backend, Buf::*, Embedding, Linear};
use crate::error::Error;

/// Weights of the model.
#[derive(Debug)]
pub struct Model<W> {
    eps: f32,
    centers: bool,
    clamp_kqv: Option<f32>,
    /// Layers of a round, if what it leaves is normed.
    n_round: Option<usize>,
    token_embd: Embedding<W>,
    layers: Layers<Layer<W>>,
    output_norm: W,
    output: Linear<W>,
}

#[derive(Debug)]
struct Layer<W> {
    attn_norm: W,
    attn_qkv: [Linear<W>; 3],
    qk_norm: Norms<W>,
    attn_output: Linear<W>,
    ffn_norm: FfnNorm<W>,
    ffn: Ffn<W>,
}

/// The norm of what the feed-forward block reads.
#[derive(Debug)]
enum FfnNorm<W> {
    /// Of the stream with what attention gives.
    After(W),
    /// None: the block reads what attention reads.
    Same,
    /// Of the stream that attention finds.
    Beside(W),
}

/// Norms of queries and keys: `attn_q_norm`, `attn_k_norm`.
#[derive(Debug)]
pub(super) enum Norms<W> {
    /// None.
    None,
    /// Over each head.
    Heads([W; 2]),
    /// Over each head, after it has rotated.
    RotatedHeads([W; 2]),
    /// Over all heads together.
    Whole([W; 2]),
    /// Over each of so many heads, by weights of its own, with the mean taken off.
    Apart([(W, usize); 2]),
}

impl<W> Model<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Shape {
            n_embd,
            n_q,
            n_vocab,
            ..
        } = hp.shape();
        let layers = b.rounds(hp.n_layer, hp.n_round, |b, il| {
            Ok(Layer {
                attn_norm: b.norm(hp, hp.norm_names[0], n_embd)?,
                attn_qkv: b.qkv(hp)?,
                qk_norm: Norms::bind(hp, b)?,
                attn_output: b.linear("attn_output", n_q, n_embd)?,
                ffn_norm: match hp.ffn_reads {
                    FfnReads::After => FfnNorm::After(b.ffn_norm(hp)?),
                    FfnReads::Same => FfnNorm::Same,
                    FfnReads::Beside => FfnNorm::Beside(b.ffn_norm(hp)?),
                },
                ffn: Ffn::bind(hp, b, il)?,
            })
        })?;
        Ok(Self {
            eps: hp.eps,
            centers: hp.centers,
            clamp_kqv: hp.clamp_kqv,
            n_round: hp.norms_rounds.then_some(hp.n_round),
            token_embd: b.embedding(hp)?,
            layers,
            output_norm: b.norm(hp, "output_norm", n_embd)?,
            output: b.output(n_embd, n_vocab)?,
        })
    }

    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
        let eps = self.eps;
        b.embed(X, &self.token_embd);
        for (il, l) in self.layers.iter() {
            let [attn_q, attn_k, attn_v] = &l.attn_qkv;
            self.norm(b, &l.attn_norm);
            b.note("attn_norm", il, Xn);
            b.mul_mats([(Q, attn_q), (K, attn_k), (V, attn_v)], Xn);
            if let Some(most) = self.clamp_kqv {
                for x in [Q, K, V] {
                    b.clamp(x, most);
                }
            }
            l.qk_norm.rope(b, il, eps);
            b.note("Qcur", il, Q);
            b.note("Kcur", il, K);
            b.note("Vcur", il, V);
            b.attention(Att, [Q, K, V], il, None);
            b.note("kqv_out", il, Att);
            if let FfnNorm::Beside(ffn_norm) = &l.ffn_norm {
                self.norm(b, ffn_norm);
                b.note("ffn_norm", il, Xn);
            }
            b.mul_mat_add(X, &l.attn_output, Att);
            b.note("ffn_inp", il, X);

            if let FfnNorm::After(ffn_norm) = &l.ffn_norm {
                self.norm(b, ffn_norm);
                b.note("ffn_norm", il, Xn);
            }
            l.ffn.forward(b, il);
            b.note("l_out", il, X);
            let next = il + 1;
            if self.n_round.is_some_and(|n| next % n == 0) && next < self.layers.n {
                b.rms_norm(X, X, &self.output_norm, eps);
            }
        }
        if self.centers {
            b.center(X);
        }
        b.output(&self.output, &self.output_norm, X, eps);
    }

    /// `Xn = norm(X)`. A norm that takes the mean off does not see a number that is added to all elements, so the mean is taken off the residual
    /// stream itself, which is otherwise only added to.
    fn norm<B: Backend<Weight = W>>(&self, b: &mut B, w: &W) {
        if self.centers {
            b.center(X);
        }
        b.rms_norm(Xn, X, w, self.eps);
    }
}

impl<W> Norms<W> {
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        if hp.qk_norm == QkNorm::Apart {
            let mut norm = |name: &str, n| -> Result<(W, usize), Error> {
                Ok((b.table(&format!("{name}.weight"), &[hp.head_dim, n])?, n))
            };
            let q = norm("attn_q_norm", hp.n_head)?;
            return Ok(Self::Apart([q, norm("attn_k_norm", hp.n_head_kv)?]));
        }
        let mut norms = |n_q, n_k| -> Result<[W; 2], Error> {
            Ok([b.vector("attn_q_norm", n_q)?, b.vector("attn_k_norm", n_k)?])
        };
        let d = hp.head_dim;
        Ok(match hp.qk_norm {
            QkNorm::None | QkNorm::Apart => Self::None,
            QkNorm::Heads => Self::Heads(norms(d, d)?),
            QkNorm::RotatedHeads => Self::RotatedHeads(norms(d, d)?),
            QkNorm::Whole => Self::Whole(norms(hp.n_head * d, hp.n_head_kv * d)?),
        })
    }

    /// Norms queries and keys and rotates them.
    pub(super) fn rope<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        match self {
            Self::None => b.rope(Q, K, il),
            Self::Heads([q, k]) => {
                b.rms_norm_heads(Q, q, eps);
                b.rms_norm_heads(K, k, eps);
                b.note("Qcur_normed", il, Q);
                b.note("Kcur_normed", il, K);
                b.rope(Q, K, il);
            }
            Self::RotatedHeads([q, k]) => {
                b.rope(Q, K, il);
                b.rms_norm_heads(Q, q, eps);
                b.rms_norm_heads(K, k, eps);
            }
            Self::Apart([q, k]) => {
                for (x, (w, n)) in [(Q, q), (K, k)] {
                    b.center_heads(x);
                    b.rms_norm_groups(x, w, *n, eps);
                }
                b.rope(Q, K, il);
            }
            Self::Whole([q, k]) => {
                b.rms_norm(Q, Q, q, eps);
                b.rms_norm(K, K, k, eps);
                b.note("Qcur_normed", il, Q);
                b.note("Kcur_normed", il, K);
                b.rope(Q, K, il);
            }
        }
    }
}
