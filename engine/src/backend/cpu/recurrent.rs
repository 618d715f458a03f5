//! Recurrent states: what layers without keys and values keep of the tokens before.

use lemma_cpu::{DeltaShape, DeltaState};

use crate::arch::{HParams, Past};

/// The states of a sequence.
pub(super) struct States {
    now: Vec<DeltaState>,
    /// A copy of all, to go back to.
    saved: Vec<DeltaState>,
    /// Whether the pass in progress is the first of its sequence, which no state knows anything of.
    pub(super) fresh: bool,
}

impl States {
    pub(super) fn new(hp: &HParams) -> Self {
        let shape = hp.delta.map(|d| DeltaShape {
            n_head_k: d.n_head_k,
            n_head_v: d.n_head_v,
            dim: d.head_dim,
            d_conv: d.d_conv,
            side_by_side: d.side_by_side,
        });
        let all = || {
            let layers = shape.iter().flat_map(|s| vec![*s; hp.n_layer_state()]);
            layers.map(DeltaState::new).collect()
        };
        Self {
            now: all(),
            saved: all(),
            fresh: true,
        }
    }

    /// The state of layer `il`.
    pub(super) fn of(&self, hp: &HParams, il: usize) -> &DeltaState {
        match hp.layers[il].past {
            Past::State(i) => &self.now[i],
            Past::Pages(_) => unreachable!("the layer has pages"),
        }
    }

    pub(super) fn save(&mut self) {
        copy(&mut self.saved, &mut self.now);
    }

    pub(super) fn restore(&mut self) {
        copy(&mut self.now, &mut self.saved);
    }
}

fn copy(to: &mut [DeltaState], from: &mut [DeltaState]) {
    for (to, from) in to.iter_mut().zip(from) {
        to.copy_from(from);
    }
}
