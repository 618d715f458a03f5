//! Mixtures of experts: mat-vecs with a column for each pair of token and chosen expert.

use lemma_cuda::ops::{self, Experts, Glu, MatVec, Mode, Quant};
use lemma_cuda::{Buffer, CudaError};

use super::super::CudaWeight;
use super::{Done, Pass};
use crate::backend::{Act, Buf, Moe};

impl Pass {
    /// `acc += experts(x)`
    pub(super) fn experts(&mut self, acc: Buf, x: Buf, moe: &Moe<CudaWeight>) -> Done {
        self.flush()?;
        self.fresh[acc as usize] = false;
        let (gate, up, down) = (moe.gate_exps.mat(), moe.up_exps.mat(), moe.down_exps.mat());
        let bias = moe.bias.as_ref().map(|b| {
            let of = CudaWeight::vec;
            [
                of(&b.gate_inp),
                of(&b.gate_exps),
                of(&b.up_exps),
                of(&b.down_exps),
            ]
        });
        let [router_bias, gate_bias, up_bias, down_bias] = match bias {
            Some(all) => all.map(Some),
            None => [None; 4],
        };
        let kind = match moe.act {
            Act::Swiglu => Glu::Swiglu,
            Act::SwigluOai => Glu::SwigluOai,
        };
        let wants_q8 = [gate, up, moe.gate_inp.mat()].iter().any(|w| w.wants_q8());
        let quant = if wants_q8 { self.fresh_quant(x)? } else { None };
        let Some(s) = &self.moe else {
            return Err(CudaError("experts in a model without any".to_owned()));
        };
        let (gpu, n, used, width) = (&self.gpu, self.n, moe.n_expert_used, self.widths.get(x));

        // The router is not rounded to f16, whatever the batch: its decisions are the same for any batch.
        let parts = [(&**moe.gate_inp.mat(), router_bias, s.logits.view())];
        let router = MatVec {
            parts: &parts,
            x: self.view(x),
            quant,
            columns: n,
            per_input: 1,
            experts: None,
            mode: Mode::Store,
        };
        ops::mat_vec(gpu, &router)?;
        ops::moe_route(
            gpu,
            s.ids.view(),
            s.weights.view(),
            s.logits.view(),
            n,
            moe.n_expert,
            used,
            moe.norm_topk,
        )?;

        for first in (0..n).step_by(s.tokens) {
            let tokens = s.tokens.min(n - first);
            let columns = tokens * used;
            let chosen = |b: &Buffer| b.view().slice(first * used * 4, columns * 4);
            let mut call = MatVec {
                parts: &[],
                x: self.rows(x, first, tokens),
                quant: quant.map(|q| Quant {
                    q: q.q.slice(first * width, tokens * width),
                    ds: q.ds.slice(first * width / 4, tokens * width / 4),
                }),
                columns,
                per_input: used,
                experts: Some(Experts {
                    ids: chosen(&s.ids),
                    n: moe.n_expert,
                }),
                mode: Mode::Store,
            };
            let parts = [
                (&**gate, gate_bias, s.hidden[0].view()),
                (&**up, up_bias, s.hidden[1].view()),
            ];
            call.parts = &parts;
            if (gate.ty(), gate.n_row()) == (up.ty(), up.n_row()) {
                call.mode = Mode::Gated(kind);
                ops::mat_vec(gpu, &call)?;
            } else {
                ops::mat_vec(gpu, &call)?;
                ops::gate_up(
                    gpu,
                    kind,
                    s.hidden[0].view(),
                    s.hidden[1].view(),
                    columns * moe.n_ff,
                )?;
            }
            let hidden =
                s.q8.as_ref()
                    .filter(|_| down.wants_q8())
                    .map(|(q, ds)| Quant {
                        q: q.view(),
                        ds: ds.view(),
                    });
            if let Some(q) = hidden {
                ops::quantize(gpu, q, s.hidden[0].view(), columns * moe.n_ff)?;
            }
            let parts = [(&**down, down_bias, s.y.view())];
            let call = MatVec {
                parts: &parts,
                x: s.hidden[0].view(),
                quant: hidden,
                per_input: 1,
                mode: Mode::Store,
                ..call
            };
            ops::mat_vec(gpu, &call)?;
            let acc = self.rows(acc, first, tokens);
            ops::moe_sum(
                gpu,
                acc,
                s.y.view(),
                chosen(&s.weights),
                tokens,
                used,
                width,
            )?;
        }
        Ok(())
    }
}
