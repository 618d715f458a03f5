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
        clamp: Option<f32>,
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
    /// Factor of what it gives.
    scale: f32,
    /// How much of it is taken, where that is not all.
    ffn_gate_inp_shexp: Option<Linear<W>>,
    ffn_up_shexp: Linear<W>,
    /// What becomes of that.
    by: Hidden<W>,
    clamp: Option<f32>,
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
        let [clamp_exp, clamp] = [0, 1].map(|i| {
            let bound = hp.swiglu_clamp[i].get(il).copied();
            bound.filter(|b| *b > 1e-6)
        });
        if hp.n_expert == 0 || !hp.routing.has_experts(il) {
            return match alone {
                Some(by) => Ok(Self::Plain {
                    ffn_up: b.linear("ffn_up", n_embd, n_ff)?,
                    by,
                    ffn_down: b.linear("ffn_down", n_ff, n_embd)?,
                }),
                None => {
                    let gate_up = match hp.gate_in_up {
                        true => b.fused("ffn_up", n_embd, [n_ff; 2])?,
                        false => gate_and_up(b, n_embd, n_ff)?,
                    };
                    let ffn_down = b.linear("ffn_down", n_ff, n_embd)?;
                    Ok(Self::gated(gate_up, clamp, ffn_down))
                }
            };
        }
        Ok(Self::Moe {
            experts: Moe {
                clamp: clamp_exp,
                ..b.moe(hp)?
            },
            latent: match hp.n_expert_latent {
                Some(n) => Some(Latent {
                    ffn_gate_inp: b.linear("ffn_gate_inp", n_embd, hp.n_expert)?,
                    ffn_latent_down: b.linear("ffn_latent_down", n_embd, n)?,
                    ffn_latent_up: b.linear("ffn_latent_up", n, n_embd)?,
                }),
                None => None,
            },
            shared: if n_sh > 0 {
                let fused = alone.is_none() && b.has_rows("ffn_up_shexp", 2 * n_sh);
                let [gate, up] = match fused {
                    true => b.fused("ffn_up_shexp", n_embd, [n_sh; 2])?.map(Some),
                    false => [None, None],
                };
                Some(Shared {
                    scale: hp.routing.shared_scale,
                    clamp,
                    ffn_gate_inp_shexp: match hp.routing.gates_shared {
                        true => Some(b.row("ffn_gate_inp_shexp", n_embd)?),
                        false => None,
                    },
                    ffn_up_shexp: match up {
                        Some(up) => up,
                        None => b.linear("ffn_up_shexp", n_embd, n_sh)?,
                    },
                    by: match (alone, gate) {
                        (Some(by), _) => Hidden::Alone(by),
                        (None, Some(gate)) => Hidden::Gate(gate),
                        (None, None) => Hidden::Gate(b.linear("ffn_gate_shexp", n_embd, n_sh)?),
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
        let gate_up = gate_and_up(b, n_embd, n_ff)?;
        let ffn_down = b.linear("ffn_down", n_ff, n_embd)?;
        Ok(Self::gated(gate_up, None, ffn_down))
    }

    fn gated([ffn_gate, ffn_up]: [Linear<W>; 2], clamp: Option<f32>, ffn_down: Linear<W>) -> Self {
        Self::Dense {
            ffn_gate,
            ffn_up,
            clamp,
            ffn_down,
        }
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
                clamp,
                ffn_down,
            } => {
                b.mul_mats([(Gate, ffn_gate), (Up, ffn_up)], Xn);
                swiglu(b, [Gate, Up], *clamp);
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
                        swiglu(b, [GateSh, UpSh], s.clamp);
                    }
                    (Hidden::Gate(gate), Some(share)) => {
                        b.mul_mats([(GateSh, gate), (UpSh, up), (Share, share)], Xn);
                        b.swiglu(GateSh, UpSh);
                        // The product that follows is linear: its input can be gated as well as what it gives.
                        b.sigmoid_mul(GateSh, Share);
                    }
                }
                if s.scale != 1.0 {
                    b.scale(GateSh, s.scale);
                }
                Some((&s.ffn_down_shexp, GateSh))
            }
        }
    }
}

/// `gate = silu(gate) * up`, both bounded if there is a bound.
fn swiglu<B: Backend>(b: &mut B, [gate, up]: [Buf; 2], clamp: Option<f32>) {
    match clamp {
        Some(clamp) => b.swiglu_clamped(gate, up, clamp),
        None => b.swiglu(gate, up),
    }
}

/// A gate and what goes up beside it, in a tensor each.
fn gate_and_up<W>(
    b: &mut Binder<'_, W>,
    n_embd: usize,
    n_ff: usize,
) -> Result<[Linear<W>; 2], Error> {
    Ok([
        b.linear("ffn_gate", n_embd, n_ff)?,
        b.linear("ffn_up", n_embd, n_ff)?,
    ])
}
