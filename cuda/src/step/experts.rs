//! Phases of a mixture of experts: the router, gate and up of those that it chooses, down.

use super::{Builder, First, Products, want};
use crate::args::{Matrix, Phase};
use crate::gpu::View;
use crate::ops::{Choice, Glu, Mode};
use crate::weight::Weight;

/// Experts that a token uses at most.
pub(super) const MAX_USED: usize = 16;
/// Experts that it has to choose from at most, for which there is room in shared memory.
const MAX_EXPERTS: usize = 1024;

/// A mixture of experts that all have gate, up and down: `acc += sum over the chosen of weight * down(glu(gate x, up x))`.
#[derive(Clone, Copy, Debug)]
pub struct Mixture<'a> {
    /// `[n_in]`
    pub src: View,
    /// What is done to the input first.
    pub first: First,
    /// `[n_in]` weights of a norm of the input, and its epsilon.
    pub norm: Option<(View, f32)>,
    /// What chooses, with its bias: `[n_expert, n_in]`.
    pub router: (&'a Weight, Option<View>),
    /// `[n_expert, n_ff, n_in]` and `[n_expert, n_ff]`
    pub gate: (&'a Weight, Option<View>),
    /// The same shapes.
    pub up: (&'a Weight, Option<View>),
    /// `[n_expert, n_in, n_ff]` and `[n_expert, n_in]`
    pub down: (&'a Weight, Option<View>),
    /// What becomes of gate and up.
    pub glu: Glu,
    /// Experts of a token.
    pub n_used: usize,
    /// How they are chosen.
    pub choice: Choice,
    /// Room for `[n_expert]`: what the router says.
    pub logits: View,
    /// Room for `[n_used, n_ff]`
    pub hidden: View,
    /// `[n_in]`
    pub acc: View,
}

impl Builder {
    /// Products with one input, whose matrices are those of the experts that are chosen first.
    pub fn experts(&mut self, e: &Mixture<'_>) {
        let (n_in, n_expert, n_used) = (e.router.0.n_in(), e.router.0.n_row(), e.n_used);
        let n_ff = e.gate.0.n_row() / n_expert;
        let same = |a: &Weight, b: &Weight| (a.ty(), a.n_row()) == (b.ty(), b.n_row());
        let fits = n_expert <= MAX_EXPERTS && (1..=MAX_USED).contains(&n_used);
        self.want(fits, || format!("{n_used} of {n_expert} experts"));
        self.want(e.choice.n_group <= 1, || "groups of experts".to_owned());
        assert!(e.choice.bias.is_none_or(|b| b.bytes() >= n_expert * 4));
        self.want(same(e.gate.0, e.up.0), || {
            "gate and up of different types".to_owned()
        });
        if self.refused.is_some() {
            return;
        }
        self.any = true;
        assert!(e.logits.bytes() >= n_expert * 4 && e.hidden.bytes() >= n_used * n_ff * 4);
        self.products(&Products {
            parts: &[(e.router.0, e.router.1, e.logits)],
            src: e.src,
            first: e.first,
            norm: e.norm,
            mode: Mode::Store,
        });
        let chosen_in = self.phases.len() as u32;
        let chosen = |phase: Phase| Phase {
            n_expert: n_expert as u32,
            n_used: n_used as u32,
            chosen_in,
            ..phase
        };

        // The sum stands there now; what the mean is taken off does not.
        let again = match e.first {
            First::Add { .. } => First::Nothing,
            first => first,
        };
        let mut phase = Phase {
            logits: self.read(e.logits, n_expert * 4),
            gated: 1 + e.glu as u32,
            experts: 1,
            lean: e.choice.bias.map_or(0, |b| b.at),
            sigmoid: u32::from(e.choice.sigmoid),
            norm_chosen: u32::from(e.choice.norm),
            weights_scale: e.choice.scale,
            ..chosen(self.input(e.src, n_in, again, e.norm))
        };
        for (to, part) in phase.m.iter_mut().zip([e.gate, e.up]) {
            *to = self.expert_matrix(part, n_expert, n_in);
        }
        want(&mut phase, e.gate.0);
        phase.m[0].out = self.write(e.hidden, n_used * n_ff * 4);
        self.push_products(phase, 1);

        let mut phase = Phase {
            experts: 2,
            width: n_ff as u32,
            ..chosen(self.input(e.hidden, n_used * n_ff, First::Nothing, None))
        };
        let mut m = self.expert_matrix(e.down, n_expert, n_ff);
        want(&mut phase, e.down.0);
        m.add = self.read(e.acc, n_in * 4);
        m.out = self.write(e.acc, n_in * 4);
        phase.m[0] = m;
        self.push_products(phase, 1);
    }

    /// The matrices of all experts.
    fn expert_matrix(
        &mut self,
        (w, bias): (&Weight, Option<View>),
        n_expert: usize,
        n_in: usize,
    ) -> Matrix {
        let n_out = w.n_row() / n_expert;
        let bytes = n_out * w.row_bytes();
        self.want(u32::try_from(bytes).is_ok(), || {
            format!("experts of {bytes} bytes")
        });
        assert!(w.n_in() == n_in && n_out * n_expert == w.n_row());
        Matrix {
            expert_bytes: bytes as u32,
            ..self.weights(w, bias, n_out)
        }
    }
}
