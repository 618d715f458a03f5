//! Gated delta nets as launches.

use lemma_cuda::ops::{self, DeltaHeads, DeltaNet, RawDelta, SsmConv};
use lemma_cuda::{CudaError, View};

use super::super::super::Buf;
use super::super::recurrent::States;
use super::{Done, Pass};

/// What comes before the rule of a delta net and waits for it.
#[derive(Default)]
pub(super) struct Before {
    /// A buffer, its first heads and their width, epsilon.
    norm: Option<(Buf, [usize; 2], f32)>,
    /// What gates are made of, and parameters.
    gates: Option<([Buf; 2], [View; 2])>,
}

impl Pass {
    fn states(&self) -> Result<&States, CudaError> {
        let none = || CudaError("a model without recurrent states asks for one".to_owned());
        self.states.as_ref().ok_or_else(none)
    }

    /// Position of the first token.
    fn first_pos(&self) -> View {
        self.step_words(0, 1)
    }

    pub(super) fn split(&mut self, outs: [Buf; 2], x: Buf) -> Done {
        self.flush()?;
        for out in outs {
            self.fresh[out as usize] = false;
        }
        let (n_head, d) = (self.n * self.hp.n_head, self.hp.head_dim);
        ops::split_heads(
            &self.gpu,
            outs.map(|b| self.view(b)),
            self.view(x),
            n_head,
            d,
        )
    }

    pub(super) fn conv(&mut self, x: Buf, w: View, il: usize) -> Done {
        self.flush()?;
        let states = self.states()?;
        let call = SsmConv {
            out: states.conv(),
            x: self.view(x),
            w,
            past: states.of(&self.hp, il)[0],
            pos: self.first_pos(),
        };
        let shape = states.shape;
        ops::ssm_conv(&self.gpu, &call, self.n, shape.n_qkv(), shape.d_conv)?;
        if let Some(states) = &mut self.states {
            states.convolved = true;
        }
        Ok(())
    }

    /// Norms the first heads of a buffer; for one token that waits for the rule.
    pub(super) fn l2_norm(&mut self, x: Buf, heads: [usize; 2], eps: f32) -> Done {
        self.flush()?;
        self.fresh[x as usize] = false;
        if self.n == 1 {
            self.pending.delta.norm = Some((x, heads, eps));
            return Ok(());
        }
        self.l2_norm_now(x, heads, eps)
    }

    fn l2_norm_now(&self, x: Buf, heads: [usize; 2], eps: f32) -> Done {
        let (view, width) = (self.view(x), self.widths.get(x));
        ops::l2_norm_first(&self.gpu, view, self.n, width, heads, eps)
    }

    /// Makes the gates; for one token that waits for the rule, if the norms do.
    pub(super) fn gates(&mut self, gates: [Buf; 2], params: [View; 2]) -> Done {
        if self.pending.delta.norm.is_some() && self.pending.delta.gates.is_none() {
            self.pending.delta.gates = Some((gates, params));
            return Ok(());
        }
        self.flush()?;
        self.gates_now(gates, params)
    }

    fn gates_now(&self, gates: [Buf; 2], params: [View; 2]) -> Done {
        let (n_head, views) = (self.widths.get(gates[0]), gates.map(|b| self.view(b)));
        ops::delta_gates(&self.gpu, views, params, self.n, n_head)
    }

    /// Does what waited for a rule, or for what gates its result, and was not fused after all.
    pub(super) fn flush_delta(&mut self) -> Done {
        let before = std::mem::take(&mut self.pending.delta);
        if let Some((x, heads, eps)) = before.norm {
            self.l2_norm_now(x, heads, eps)?;
        }
        if let Some((gates, params)) = before.gates {
            self.gates_now(gates, params)?;
        }
        if let Some((w, eps)) = self.pending.delta_norm.take() {
            let (x, d) = (self.view(Buf::Dn), w.bytes() / 4);
            let rows = self.n * self.widths.get(Buf::Dn) / d;
            ops::rms_norm(&self.gpu, x, x, w, None, rows, d, eps)?;
        }
        Ok(())
    }

    /// `gate = silu(gate) * norm(x)`, head by head.
    pub(super) fn gated_norm(&mut self, gate: Buf, x: Buf, (w, eps): (View, f32)) -> Done {
        self.flush()?;
        let d = w.bytes() / 4;
        let quant = self
            .quant(gate)
            .filter(|_| self.n == 1 && d.is_multiple_of(32));
        self.fresh[gate as usize] = quant.is_some();
        let heads = self.n * self.widths.get(x) / d;
        let (gate, x) = (self.view(gate), self.view(x));
        ops::gated_norm(&self.gpu, gate, x, w, quant, heads, eps)
    }

    pub(super) fn delta_rule(&mut self, out: Buf, qkv: Buf, gates: [Buf; 2], il: usize) -> Done {
        let before = std::mem::take(&mut self.pending.delta);
        let d = self.states()?.shape;
        let raw = match (before.norm, before.gates) {
            (Some((x, heads, eps)), Some((made, [a, dt])))
                if x == qkv && made == gates && heads == [2 * d.n_head_k, d.head_dim] =>
            {
                Some(RawDelta { eps, a, dt })
            }
            _ => {
                self.pending.delta = before;
                None
            }
        };
        self.flush()?;
        self.fresh[out as usize] = false;
        let states = self.states()?;
        let heads = DeltaHeads {
            n_head_k: d.n_head_k,
            n_head_v: d.n_head_v,
            head_dim: d.head_dim,
            side_by_side: d.side_by_side,
        };
        let [alpha, beta] = gates.map(|b| self.view(b));
        let call = DeltaNet {
            out: self.view(out),
            qkv: self.view(qkv),
            alpha,
            beta,
            state: states.of(&self.hp, il)[1],
            pos: self.first_pos(),
            raw,
        };
        ops::gated_delta_net(&self.gpu, &call, heads, self.n)
    }
}
