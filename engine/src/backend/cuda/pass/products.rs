//! Products of matrices, norms, and what becomes of gate and up.

use std::sync::Arc;

use lemma_cuda::View;
use lemma_cuda::ops::{self, Glu, Half, MatVec, Mode};

use super::super::CudaWeight;
use super::{Done, Pass};
use crate::backend::{Activation, Buf, Linear};

/// An activation as kernels have it.
pub(in super::super) fn on_device(by: Activation) -> ops::Activation {
    match by {
        Activation::ReluSqr => ops::Activation::ReluSqr,
        Activation::Gelu => ops::Activation::Gelu,
        Activation::Xielu {
            alpha_n,
            alpha_p,
            beta,
            eps,
        } => ops::Activation::Xielu {
            alpha_n,
            alpha_p,
            beta,
            eps,
        },
    }
}

impl Pass {
    /// Products with each token of the pass by itself: the one that there is, as a rule.
    pub(super) fn mat_vec(&mut self, parts: &[ops::Part<'_>], x: Buf, mode: Mode) -> Done {
        let wanted = parts.iter().any(|p| p.0.wants_q8());
        let quant = if wanted { self.fresh_quant(x)? } else { None };
        let call = MatVec {
            parts,
            x: self.view(x),
            quant,
            columns: self.n,
            per_input: 1,
            experts: None,
            mode,
        };
        ops::mat_vec(&self.gpu, &call)
    }

    /// Products with the tokens of a batch.
    pub(super) fn batch(&self, parts: &[ops::Part<'_>], x: Buf, add: bool) -> Done {
        let (gpu, x) = (&self.gpu, self.view(x));
        if let Some(half) = self.half.as_ref().filter(|_| self.n >= Half::MIN_TOKENS) {
            return half.mul_mats(gpu, parts, x, self.n, add);
        }
        for &(w, bias, out) in parts {
            ops::mul_mat(gpu, out, w, bias, x, self.n, add)?;
        }
        Ok(())
    }

    pub(super) fn products(&mut self, outs: &[(Buf, &Linear<CudaWeight>)], x: Buf) -> Done {
        self.flush()?;
        for (out, _) in outs {
            self.fresh[*out as usize] = false;
            if let (Buf::Qkv, Some(states)) = (out, &mut self.states) {
                states.convolved = false;
            }
        }
        let bias = |w: &Linear<CudaWeight>| w.bias.as_ref().map(CudaWeight::vec);
        if self.n > 1 {
            // A router is not rounded to f16: what it chooses is the same for any batch.
            let is_router = |out: &(Buf, _)| out.0 == Buf::Route;
            if let Some((out, w)) = outs.iter().find(|o| is_router(o)) {
                let call = [(&**w.w.mat(), bias(w), self.view(*out))];
                self.mat_vec(&call, x, Mode::Store)?;
            }
            let outs: Vec<_> = outs.iter().filter(|o| !is_router(o)).collect();
            if outs.is_empty() {
                return Ok(());
            }
            let part = |(out, w): &&(Buf, &Linear<CudaWeight>)| {
                (Arc::clone(w.w.mat()), bias(w), self.view(*out))
            };
            let parts: Vec<_> = outs.iter().map(part).collect();
            let parts: Vec<ops::Part<'_>> =
                parts.iter().map(|(w, b, out)| (&**w, *b, *out)).collect();
            return self.batch(&parts, x, false);
        }
        if let [(Buf::Gate, g), (Buf::Up, u)] = outs
            && (g.w.mat().ty(), g.w.mat().n_row()) == (u.w.mat().ty(), u.w.mat().n_row())
        {
            let part = |out, w: &Linear<CudaWeight>| (Arc::clone(w.w.mat()), bias(w), out);
            self.pending.ffn = Some(([part(Buf::Gate, g), part(Buf::Up, u)], x));
            return Ok(());
        }
        if let [(out @ (Buf::Up | Buf::GateSh), w)] = outs
            && self.hp.activations.contains(&Activation::ReluSqr)
        {
            self.pending.up = Some(((Arc::clone(w.w.mat()), bias(w), *out), x));
            return Ok(());
        }
        for four in outs.chunks(4) {
            let parts: Vec<_> = four
                .iter()
                .map(|(out, w)| (&**w.w.mat(), bias(w), self.view(*out)))
                .collect();
            self.mat_vec(&parts, x, Mode::Store)?;
        }
        Ok(())
    }

    pub(super) fn norm(&mut self, out: Buf, x: View, w: View, n: usize, eps: f32) -> Done {
        // One token's norm feeds mat-vecs, which may want it quantized; a batch goes to tensor cores.
        let width = self.widths.get(out);
        let quant = self.quant(out).filter(|_| n == 1);
        self.fresh[out as usize] = quant.is_some() && self.n == 1;
        let (gpu, out) = (&self.gpu, self.view(out));
        ops::rms_norm(gpu, out, x, w, quant, n, width, eps)
    }

    pub(super) fn logits(
        &mut self,
        w: &Linear<CudaWeight>,
        norm: &CudaWeight,
        x: Buf,
        eps: f32,
    ) -> Done {
        self.flush()?;
        let n = self.n_outputs;
        if n == 0 {
            return Ok(());
        }
        let rows = self.rows(x, self.n - n, n);
        self.norm(Buf::Xn, rows, norm.vec(), n, eps)?;
        let (mat, bias, out) = (
            w.w.mat(),
            w.bias.as_ref().map(CudaWeight::vec),
            self.logits[0].view(),
        );
        if n > 1 {
            ops::mul_mat(&self.gpu, out, mat, bias, self.view(Buf::Xn), n, false)?;
        } else {
            let call = MatVec {
                parts: &[(mat, bias, out)],
                x: self.view(Buf::Xn),
                quant: self.quant(Buf::Xn),
                columns: 1,
                per_input: 1,
                experts: None,
                mode: Mode::Store,
            };
            ops::mat_vec(&self.gpu, &call)?;
        }
        let n = n * self.hp.n_vocab;
        if self.hp.logit_scale != 1.0 {
            ops::add_scaled(&self.gpu, out, self.hp.logit_scale, None, n)?;
        }
        match self.hp.logit_softcap {
            None => Ok(()),
            Some(cap) => ops::soft_cap(&self.gpu, out, cap, n),
        }
    }

    /// What a block without a gate makes of each element, with the product if that waits for it.
    pub(super) fn activation(&mut self, x: Buf, by: Activation) -> Done {
        self.fresh[x as usize] = false;
        let by = on_device(by);
        let waits = self.pending.up.take_if(|(part, _)| part.2 == x);
        if let (Some((part, input)), ops::Activation::ReluSqr) = (&waits, by) {
            return self.up_product(part.clone(), *input, Mode::ReluSqr);
        }
        self.pending.up = waits.or(self.pending.up.take());
        self.flush()?;
        let n = self.n * self.widths.get(x);
        ops::activate(&self.gpu, self.view(x), by, n)
    }

    /// What becomes of gate and up, with their products if those wait for it.
    pub(super) fn glu(&mut self, kind: Glu, gate: Buf, up: Buf) -> Done {
        self.fresh[gate as usize] = false;
        if let (Glu::Swiglu, Buf::Dn, Some(norm)) = (kind, up, self.pending.delta_norm) {
            self.pending.delta_norm = None;
            return self.gated_norm(gate, up, norm);
        }
        if let (Glu::Swiglu, Buf::Dn, Some(_)) = (kind, up, self.hp.ssm) {
            self.flush()?;
            self.pending.scan_gate = Some([gate, up]);
            return Ok(());
        }
        match self.pending.ffn.take() {
            Some(([(g, gb, Buf::Gate), (u, ub, Buf::Up)], x))
                if (gate, up) == (Buf::Gate, Buf::Up) =>
            {
                let out = self.view(gate);
                self.mat_vec(&[(&g, gb, out), (&u, ub, out)], x, Mode::Gated(kind))
            }
            other => {
                self.pending.ffn = other;
                let n = self.n * self.widths.get(gate);
                self.flush()?;
                ops::glu(&self.gpu, kind, self.view(gate), self.view(up), n)
            }
        }
    }
}
