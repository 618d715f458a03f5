//! What sessions see of the CPU.

use lemma_cpu::{Limits, allocating};

use super::machine::workers;
use super::pool::{bound_bytes, layer_spans, masses, max_spans, n_bounds};
use super::{CpuPass, CpuRunner};
use crate::backend::{Ceiling, Outputs, Runner};
use crate::error::Error;
use crate::kv::{Cache, Layout};
use crate::memory::make_room;

impl Runner for CpuRunner {
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error> {
        let s = &mut self.state;
        allocating(|| s.prepare(tokens, cache, outputs))?;
        let (model, state) = (&self.model, &self.state);
        self.ops.run_some(tokens.len(), |pass| {
            pass.kv_move(&state.kv, &state.step.moves, state.layout.page);
            model.forward(&mut CpuPass { pass, s: state })
        });
        if self.state.step.wants_mass {
            self.state.leave_masses(cache);
        }
        if cache.wants_description() {
            let s = &mut self.state;
            cache.describe(tokens.len(), &mut |part, il, head, place, row| {
                s.read(part, il, head, place, row);
            });
        }
        Ok(())
    }

    fn logits(&mut self) -> &[f32] {
        &self.state.logits.as_mut_slice()[..self.state.n_outputs * self.state.hp.n_vocab]
    }

    fn save_state(&mut self) {
        self.state.states.save();
    }

    fn restore_state(&mut self) {
        self.state.states.restore();
    }

    fn grow(&mut self, layout: &Layout) -> Result<(), Error> {
        let s = &mut self.state;
        for (i, kv) in s.kv.iter_mut().enumerate() {
            let (r, tier) = (i / layout.n_tiers(), i % layout.n_tiers());
            kv.grow(layout.region(tier, r).n_blocks);
        }
        for (il, (mass, pages)) in s.mass.iter_mut().zip(&mut s.step.pages).enumerate() {
            mass.grow(masses(layout, il, &s.hp));
            make_room(pages, layer_spans(layout, il));
        }
        for (r, bounds) in s.bounds.iter_mut().enumerate() {
            bounds.grow(n_bounds(layout, layout.region(0, r)));
        }
        for (il, b) in s.step.bounds.iter_mut().enumerate() {
            let n = layer_spans(layout, il);
            make_room(&mut b.slots, n);
            make_room(&mut b.forced, n);
        }
        s.keep.grow(max_spans(layout));
        s.order.grow(max_spans(layout));
        s.layout = layout.clone();
        let limits = Limits {
            max_pages: max_spans(layout),
            ..*self.ops.limits()
        };
        self.ops.set_limits(limits);
        Ok(())
    }

    fn pool_bytes(&self, layout: &Layout) -> u64 {
        let regions = (0..layout.n_regions()).map(|r| {
            let shape = self.state.kv[r * layout.n_tiers()].shape();
            (layout.region(0, r).n_blocks * shape.slot_size()) as u64
        });
        regions.sum::<u64>() + layout.bytes(0, bound_bytes(&self.state.hp))
    }

    fn ceiling(&mut self) -> Result<Option<Ceiling>, Error> {
        let gbps = lemma_cpu::ceiling::read_gbps(self.ops.team(), 1 << 30);
        Ok(Some(Ceiling {
            read: gbps * 1e9,
            copy: None,
        }))
    }

    fn describe(&self) -> String {
        format!("cpu ({})", workers(&self.ops))
    }
}
