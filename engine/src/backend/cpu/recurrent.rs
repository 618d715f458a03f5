//! Recurrent states: what layers without keys and values, or beside them, keep of the tokens before.

use lemma_cpu::{DeltaShape, RecurrentState, ScanShape};

use super::CpuWeight;
use crate::arch::HParams;
use crate::backend::{Scan, Selective};

/// The states of a sequence.
pub(super) struct States {
    now: Vec<RecurrentState>,
    /// A copy of all, to go back to.
    saved: Vec<RecurrentState>,
    delta: Option<DeltaShape>,
    ssm: Option<ScanShape>,
    /// Whether the pass in progress is the first of its sequence, which no state knows anything of.
    pub(super) fresh: bool,
}

impl States {
    pub(super) fn new(hp: &HParams) -> Self {
        let all = || match hp.state() {
            Some(s) => (0..hp.n_layer_state())
                .map(|_| RecurrentState::new(s.width, s.d_conv, s.n))
                .collect(),
            None => Vec::new(),
        };
        Self {
            now: all(),
            saved: all(),
            delta: hp.delta.map(|d| DeltaShape {
                n_head_k: d.n_head_k,
                n_head_v: d.n_head_v,
                dim: d.head_dim,
                side_by_side: d.side_by_side,
                apart: d.apart,
            }),
            ssm: hp.ssm.map(|s| ScanShape {
                n_head: s.n_head,
                head_dim: s.head_dim,
                n_group: s.n_group,
                d_state: s.d_state,
            }),
            fresh: true,
        }
    }

    /// The state of layer `il`.
    pub(super) fn of(&self, hp: &HParams, il: usize) -> &RecurrentState {
        &self.now[hp.layer_of_state(il)]
    }

    /// The delta net of layer `il` and its state.
    pub(super) fn delta(&self, hp: &HParams, il: usize) -> (DeltaShape, &RecurrentState) {
        match self.delta {
            Some(shape) => (shape, self.of(hp, il)),
            None => unreachable!("the model has delta nets"),
        }
    }

    /// A state space in the words of the kernels.
    pub(super) fn scan<'a>(&self, w: &'a Scan<CpuWeight>) -> lemma_cpu::Scan<'a> {
        match self.ssm {
            Some(shape) => lemma_cpu::Scan {
                a: w.a.vec(),
                dt: w.dt.vec(),
                d: w.d.vec(),
                shape,
            },
            None => unreachable!("the model has state spaces"),
        }
    }

    pub(super) fn save(&mut self) {
        copy(&mut self.saved, &mut self.now);
    }

    pub(super) fn restore(&mut self) {
        copy(&mut self.now, &mut self.saved);
    }
}

/// A selective state space in the words of the kernels.
pub(super) fn selective(w: &Selective<CpuWeight>) -> lemma_cpu::Selective<'_> {
    lemma_cpu::Selective {
        a: w.a.vec(),
        d: w.d.vec(),
    }
}

fn copy(to: &mut [RecurrentState], from: &mut [RecurrentState]) {
    for (to, from) in to.iter_mut().zip(from) {
        to.copy_from(from);
    }
}
