//! Feed-forward blocks: dense, with a gate or without, or a mixture of experts with or without some that every token is sent to.

use super::{Binder, HParams};
use crate::backend::{Activation, Backend, Buf, Buf::*, Linear, Moe};
use crate::error::Error;

/// The feed-forward block of a layer.
#[derive(Debug)]
pub(super) enum Ffn<W> {
    Dense {
        ffn_gate: Linear<W>,
        ffn_up: Linear<W>,
        ffn_down: Linear<W>,
    },
    /// Without a gate.
    Plain {
        ffn_up: Linear<W>,
        by: Activation,
        ffn_down: Linear<W>,
    },
    Moe {
        experts: Moe<W>,
        latent: Option<Latent<W>>,
        shared: Option<Shared<W>>,
    },
}

/// What stands before and behind experts that are of another width than the residual stream.
#[derive(Debug)]
pub(super) struct Latent<W> {
    /// The router, which reads the stream.
    ffn_gate_inp: Linear<W>,
    ffn_latent_down: Linear<W>,
    ffn_latent_up: Linear<W>,
}

/// Experts that every token is sent to, as one.
#[derive(Debug)]
pub(super) struct Shared<W> {
    /// How much of it is taken, where that is not all.
    ffn_gate_inp_shexp: Option<Linear<W>>,
    ffn_up_shexp: Linear<W>,
    /// What becomes of that.
    by: Hidden<W>,
    ffn_down_shexp: Linear<W>,
}

/// What makes a hidden layer of what goes up.
#[derive(Debug)]
enum Hidden<W> {
    /// A gate.
    Gate(Linear<W>),
    /// An activation alone.
    Alone(Activation),
}

impl<W> Ffn<W> {
    /// The block of layer `il`: experts if the model has some and the layer is not one of the first that have none.
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>, il: usize) -> Result<Self, Error> {
        let (n_embd, n_ff, n_sh) = (hp.n_embd, hp.n_ff, hp.n_ff_shexp);
        let alone = hp.activations.get(il).copied();
        if hp.n_expert == 0 || il < hp.routing.n_dense {
            return Ok(match alone {
                Some(by) => Self::Plain {
                    ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
                    by,
                    ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
                },
                None => Self::dense(b, n_embd, n_ff)?,
            });
        }
        Ok(Self::Moe {
            experts: b.moe(hp)?,
            latent: match hp.n_expert_latent {
                Some(n) => Some(Latent {
                    ffn_gate_inp: b.linear("ffn_gate_inp", n_embd, hp.n_expert)?,
                    ffn_latent_down: b.linear("ffn_latent_down", n_embd, n)?,
                    ffn_latent_up: b.linear("ffn_latent_up", n, n_embd)?,
                }),
                None => None,
            },
            shared: if n_sh > 0 {
                Some(Shared {
                    ffn_gate_inp_shexp: match hp.routing.gates_shared {
                        true => Some(b.row("ffn_gate_inp_shexp", n_embd)?),
                        false => None,
                    },
                    ffn_up_shexp: b.linear("ffn_up_shexp", n_embd, n_sh)?,
                    by: match alone {
                        Some(by) => Hidden::Alone(by),
                        None => Hidden::Gate(b.linear("ffn_gate_shexp", n_embd, n_sh)?),
                    },
                    ffn_down_shexp: b.linear("ffn_down_shexp", n_sh, n_embd)?,
                })
            } else {
                None
            },
        })
    }

    /// A block with a gate, `n_ff` wide.
    pub(super) fn dense(b: &mut Binder<'_, W>, n_embd: usize, n_ff: usize) -> Result<Self, Error> {
        Ok(Self::Dense {
            ffn_gate: b.linear("ffn_gate", n_embd, n_ff)?,
            ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
            ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
        })
    }

    /// `X += ffn(Xn)`
    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize) {
        match self {
            Self::Moe {
                experts,
                latent: Some(l),
                ..
            } => {
                b.mul_mats([(Route, &l.ffn_gate_inp), (Lat, &l.ffn_latent_down)], Xn);
                b.moe_ffn_routed(Y, [Lat, Route], experts);
                b.mul_mat_add(X, &l.ffn_latent_up, Y);
            }
            Self::Moe { experts, .. } => b.moe_ffn(X, Xn, experts),
            _ => {}
        }
        if let Some((down, hidden)) = self.hidden(b, il) {
            b.mul_mat_add(X, down, hidden);
        }
    }

    /// `out = ffn(Xn)`; experts have some beside them that every token is sent to.
    pub(super) fn forward_into<B: Backend<Weight = W>>(&self, b: &mut B, out: Buf, il: usize) {
        if let Some((down, hidden)) = self.hidden(b, il) {
            b.mul_mats([(out, down)], hidden);
        }
        if let Self::Moe { experts, .. } = self {
            b.moe_ffn(out, Xn, experts);
        }
    }

    /// What every token is sent to, but for the last matrix: that, and what it is multiplied with.
    fn hidden<B: Backend<Weight = W>>(&self, b: &mut B, il: usize) -> Option<(&Linear<W>, Buf)> {
        match self {
            Self::Dense {
                ffn_gate,
                ffn_up,
                ffn_down,
            } => {
                b.mul_mats([(Gate, ffn_gate), (Up, ffn_up)], Xn);
                b.swiglu(Gate, Up);
                b.note("ffn_swiglu", il, Gate);
                Some((ffn_down, Gate))
            }
            Self::Plain {
                ffn_up,
                by,
                ffn_down,
            } => {
                b.mul_mats([(Up, ffn_up)], Xn);
                b.activate(Up, *by);
                Some((ffn_down, Up))
            }
            Self::Moe { shared, .. } => {
                let s = shared.as_ref()?;
                let up = &s.ffn_up_shexp;
                match (&s.by, &s.ffn_gate_inp_shexp) {
                    (Hidden::Alone(by), _) => {
                        b.mul_mats([(GateSh, up)], Xn);
                        b.activate(GateSh, *by);
                    }
                    (Hidden::Gate(gate), None) => {
                        b.mul_mats([(GateSh, gate), (UpSh, up)], Xn);
                        b.swiglu(GateSh, UpSh);
                    }
                    (Hidden::Gate(gate), Some(share)) => {
                        b.mul_mats([(GateSh, gate), (UpSh, up), (Share, share)], Xn);
                        b.swiglu(GateSh, UpSh);
                        // The product that follows is linear: its input can be gated as well as what it gives.
                        b.sigmoid_mul(GateSh, Share);
                    }
                }
                Some((&s.ffn_down_shexp, GateSh))
            }
        }
    }
}
