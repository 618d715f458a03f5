//! Layers with recurrent states as launches: gated delta nets, state spaces, gated short convolutions.

use lemma_cuda::ops::{self, DeltaHeads, DeltaNet, RawDelta, ScanHeads, SsmConv, SsmScan};
use lemma_cuda::{CudaError, View};

use super::super::super::{Buf, Scan};
use super::super::CudaWeight;
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

    /// Sends [`Buf::Qkv`] through a convolution: what it holds lies elsewhere then. Between two gates for those that have some.
    pub(super) fn conv(&mut self, x: Buf, gates: Option<[Buf; 2]>, w: View, il: usize) -> Done {
        self.flush()?;
        let states = self.states()?;
        let call = SsmConv {
            out: states.conv(),
            x: self.bufs[x as usize].view(),
            w,
            past: states.of(&self.hp, il)[0],
            pos: self.first_pos(),
        };
        let (gpu, n, width, d_conv) = (&self.gpu, self.n, states.shape.width, states.shape.d_conv);
        let mut fresh = false;
        match gates {
            None => ops::ssm_conv(gpu, &call, n, width, d_conv)?,
            Some(gates) => {
                let quant = self.quant(x).filter(|_| n == 1);
                fresh = quant.is_some();
                let gates = gates.map(|b| self.view(b));
                ops::short_conv(gpu, &call, gates, quant, n, width, d_conv)?;
            }
        }
        self.fresh[x as usize] = fresh;
        if let Some(states) = &mut self.states {
            states.convolved = true;
        }
        Ok(())
    }

    pub(super) fn scan(
        &mut self,
        out: Buf,
        [xbc, dt]: [Buf; 2],
        w: &Scan<CudaWeight>,
        il: usize,
    ) -> Done {
        self.flush()?;
        self.fresh[out as usize] = false;
        let (states, Some(s)) = (self.states()?, self.hp.ssm) else {
            return Err(CudaError("a model without state spaces".to_owned()));
        };
        let heads = ScanHeads {
            n_head: s.n_head,
            head_dim: s.head_dim,
            n_group: s.n_group,
            d_state: s.d_state,
        };
        let call = SsmScan {
            out: self.view(out),
            xbc: self.view(xbc),
            dt: self.view(dt),
            state: states.of(&self.hp, il)[1],
            pos: self.first_pos(),
            a: w.a.vec(),
            bias: w.dt.vec(),
            d: w.d.vec(),
        };
        ops::ssm_scan(&self.gpu, &call, heads, self.n)
    }

    /// Norms parts of the rows of a buffer, and gates them first where that waits for it.
    pub(super) fn group_norm(&mut self, x: Buf, w: View, n_group: usize, eps: f32) -> Done {
        let gated = self.pending.scan_gate.take_if(|gate| gate[0] == x);
        self.flush()?;
        let part = self.widths.get(x) / n_group;
        let quant = self.quant(x);
        let quant = quant.filter(|_| self.n == 1 && part.is_multiple_of(32));
        self.fresh[x as usize] = quant.is_some();
        let (gpu, up) = (&self.gpu, gated.map(|[_, up]| self.view(up)));
        ops::rms_norm_groups(gpu, self.view(x), up, w, quant, self.n, n_group, eps)
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
        let Some(d) = self.hp.delta else {
            return Err(CudaError("a model without delta nets".to_owned()));
        };
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
