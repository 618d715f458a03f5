//! Mixtures of experts. A column is a pair of token and chosen expert; where a batch has many of them they are sorted by expert and go to tensor
//! cores, and each is a mat-vec otherwise.

use lemma_cuda::ops::{self, Choice, Chosen, Columns, Experts, Glu, Grouped, MatVec, Mode, Quant};
use lemma_cuda::{Buffer, CudaError, View, Weight};

use super::super::CudaWeight;
use super::{Done, Pass};
use crate::backend::{Act, Buf, Gating, Moe};

/// A matrix, or those of all experts, and its bias.
pub(in super::super) type Biased<'a> = (&'a Weight, Option<View>);

/// What a mixture is made of.
pub(in super::super) struct Parts<'a> {
    pub(in super::super) router: Biased<'a>,
    /// And what becomes of it and what goes up. Without one what is positive there is squared.
    pub(in super::super) gate: Option<(Biased<'a>, Glu)>,
    pub(in super::super) up: Biased<'a>,
    pub(in super::super) down: Biased<'a>,
    n_expert: usize,
    pub(in super::super) used: usize,
    n_ff: usize,
}

impl<'a> Parts<'a> {
    pub(in super::super) fn of(moe: &'a Moe<CudaWeight>) -> Self {
        let bias = moe.bias.as_ref();
        let with = |w: &'a CudaWeight, b: Option<&CudaWeight>| (&**w.mat(), b.map(CudaWeight::vec));
        let kind = match moe.act {
            Act::Swiglu => Some(Glu::Swiglu),
            Act::SwigluOai => Some(Glu::SwigluOai),
            Act::Reglu => Some(Glu::Reglu),
            Act::Geglu => Some(Glu::Geglu),
            Act::ReluSqr => None,
        };
        Self {
            router: with(&moe.gate_inp, bias.map(|b| &b.gate_inp)),
            gate: kind
                .zip(moe.gate_exps.as_ref())
                .map(|(kind, w)| (with(w, bias.map(|b| &b.gate_exps)), kind)),
            up: with(&moe.up_exps, bias.map(|b| &b.up_exps)),
            down: with(&moe.down_exps, bias.map(|b| &b.down_exps)),
            n_expert: moe.n_expert,
            used: moe.n_expert_used,
            n_ff: moe.n_ff,
        }
    }
}

/// How experts are chosen, in the words of the kernels.
pub(in super::super) fn choice(moe: &Moe<CudaWeight>) -> Choice {
    Choice {
        sigmoid: moe.gating == Gating::Sigmoid,
        bias: moe.exp_probs_b.as_ref().map(CudaWeight::vec),
        n_group: moe.n_group,
        n_group_used: moe.n_group_used,
        norm: moe.norm_topk,
        scale: moe.weights_scale,
    }
}

/// Room is made for what the parameters of a model speak of.
pub(super) fn no_room() -> CudaError {
    CudaError("experts in a model without any".to_owned())
}

/// Some tokens of a batch: their inputs, expert and weight of each of their columns, and where it goes or what it is added to.
struct Chunk {
    tokens: usize,
    columns: usize,
    x: View,
    quant: Option<Quant>,
    ids: View,
    weights: View,
    out: View,
    add: bool,
}

impl Pass {
    /// `out += experts(x)`, or `out = experts(x)` where a router's products are there already: `route`.
    pub(super) fn experts(
        &mut self,
        out: Buf,
        x: Buf,
        route: Option<Buf>,
        moe: &Moe<CudaWeight>,
    ) -> Done {
        self.flush()?;
        self.fresh[out as usize] = false;
        if matches!(moe.up_exps, CudaWeight::Host(_)) {
            return self.hosted_experts(out, x, route, moe);
        }
        let m = Parts::of(moe);
        let (n, used, width) = (self.n, m.used, self.widths.get(x));
        let many = self.moe.as_ref().map_or(0, |s| s.many(n, &m));
        // What is left of a batch behind large chunks may be for mat-vecs.
        let all_large = many > 0 && (n % many == 0 || (n % many) * used >= least(&m));
        let gate_wants = m.gate.is_some_and(|(gate, _)| gate.0.wants_q8());
        let wants_q8 = route.is_none() && m.router.0.wants_q8()
            || !all_large && (gate_wants || m.up.0.wants_q8());
        let quant = if wants_q8 { self.fresh_quant(x)? } else { None };
        let Some(s) = &self.moe else {
            return Err(no_room());
        };
        let gpu = &self.gpu;

        // The router is not rounded to f16, whatever the batch: its decisions are the same for any batch.
        let chosen = Chosen {
            logits: route.map_or(s.logits.view(), |b| self.view(b)),
            ids: s.ids.view(),
            weights: s.weights.view(),
            arrived: s.arrived.view(),
            n_used: used,
            choice: choice(moe),
        };
        match route {
            None => ops::moe_router(gpu, m.router, self.view(x), quant, &chosen, n)?,
            Some(_) => ops::moe_choose(gpu, &chosen, n, m.n_expert)?,
        }

        let mut first = 0;
        while first < n {
            let large = many > 0 && (n - first) * used >= least(&m);
            let tokens = (n - first).min(if large { many } else { s.tokens });
            let columns = tokens * used;
            let chosen = |b: &Buffer| b.view().slice(first * used * 4, columns * 4);
            let chunk = Chunk {
                tokens,
                columns,
                out: self.rows(out, first, tokens),
                add: route.is_none(),
                x: self.rows(x, first, tokens),
                quant: quant.map(|q| Quant {
                    q: q.q.slice(first * width, tokens * width),
                    ds: q.ds.slice(first * width / 4, tokens * width / 4),
                }),
                ids: chosen(&s.ids),
                weights: chosen(&s.weights),
            };
            if large {
                self.grouped_products(&m, &chunk)?;
            } else {
                self.column_products(&m, &chunk)?;
            }
            first += tokens;
        }
        Ok(())
    }

    /// Adds what the chosen experts say, a mat-vec for each column.
    fn column_products(&self, m: &Parts<'_>, c: &Chunk) -> Done {
        let (gpu, Some(s)) = (&self.gpu, &self.moe) else {
            return Err(no_room());
        };
        let [hidden, other] = s.hidden.each_ref().map(Buffer::view);
        let experts = Experts {
            ids: c.ids,
            n: m.n_expert,
        };
        let up = (m.up.0, m.up.1, other);
        let same = |gate: &Weight| (gate.ty(), gate.n_row()) == (m.up.0.ty(), m.up.0.n_row());
        let (parts, mode) = match m.gate {
            None => (vec![(up.0, up.1, hidden)], Mode::ReluSqr),
            Some(((gate, bias), kind)) if same(gate) => {
                (vec![(gate, bias, hidden), up], Mode::Gated(kind))
            }
            Some(((gate, bias), _)) => (vec![(gate, bias, hidden), up], Mode::Store),
        };
        let call = MatVec {
            parts: &parts,
            x: c.x,
            quant: c.quant,
            columns: c.columns,
            per_input: m.used,
            experts: Some(experts),
            mode,
        };
        ops::mat_vec(gpu, &call)?;
        if let (Mode::Store, Some((_, kind))) = (mode, m.gate) {
            ops::glu(gpu, kind, hidden, other, c.columns * m.n_ff)?;
        }
        let q8 = s.q8.as_ref().filter(|_| m.down.0.wants_q8());
        let quant = q8.map(|(q, ds)| Quant {
            q: q.view(),
            ds: ds.view(),
        });
        if let Some(q) = quant {
            ops::quantize(gpu, q, hidden, c.columns * m.n_ff)?;
        }
        let (x, shape) = ((hidden, quant), (c.tokens, m.used));
        ops::moe_down(gpu, m.down, x, (c.out, c.add), c.weights, experts, shape)
    }

    /// The same of columns sorted by expert, on tensor cores.
    fn grouped_products(&self, m: &Parts<'_>, c: &Chunk) -> Done {
        let (gpu, Some(s)) = (&self.gpu, &self.moe) else {
            return Err(no_room());
        };
        let Some(sorted) = &s.sorted else {
            return Err(no_room());
        };
        let [hidden, other] = s.hidden.each_ref().map(Buffer::view);
        let (n, given) = (c.columns, Columns::Given(m.used));
        let (grouped, y) = (&sorted.grouped, sorted.y.view());
        grouped.sort(gpu, c.ids, n)?;
        match m.gate {
            Some(((gate, bias), kind)) => {
                let parts = [(gate, bias, hidden), (m.up.0, m.up.1, other)];
                grouped.mul_mats(gpu, &parts, c.x, n, given, Columns::Sorted)?;
                ops::glu(gpu, kind, hidden, other, n * m.n_ff)?;
            }
            None => {
                let parts = [(m.up.0, m.up.1, hidden)];
                grouped.mul_mats(gpu, &parts, c.x, n, given, Columns::Sorted)?;
                ops::activate(gpu, hidden, ops::Activation::ReluSqr, n * m.n_ff)?;
            }
        }
        let parts = [(m.down.0, m.down.1, y)];
        let given = Columns::Given(1);
        grouped.mul_mats(gpu, &parts, hidden, n, Columns::Sorted, given)?;
        let width = m.down.0.n_row() / m.n_expert;
        ops::moe_sum(gpu, (c.out, c.add), y, c.weights, c.tokens, m.used, width)
    }
}

/// Columns from which they are sorted by expert.
fn least(m: &Parts<'_>) -> usize {
    Grouped::min_columns(m.n_expert)
}

impl super::super::buffers::Moe {
    /// Tokens that are sorted by expert at once in a batch of `n`; 0 where that does not pay.
    fn many(&self, n: usize, m: &Parts<'_>) -> usize {
        let sorted = self.sorted.as_ref().filter(|_| n * m.used >= least(m));
        sorted.map_or(0, |s| s.tokens)
    }
}
