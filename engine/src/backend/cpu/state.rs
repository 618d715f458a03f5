//! What the workers of a pass share: made ready before it, and read after.

use lemma_cpu::{KvLayer, PageRef, Place, Shared};

use super::State;
use super::pool::moved;
use crate::backend::{Buf, Outputs};
use crate::kv::{self, Cache, Part};

impl State {
    pub(super) fn prepare(&mut self, tokens: &[u32], cache: &Cache, outputs: Outputs) {
        let n = tokens.len();
        let first = cache.pos() - n as u32;
        self.states.fresh = first == 0;
        let step = &mut self.step;
        step.tokens.clear();
        step.tokens.extend_from_slice(tokens);
        step.positions.clear();
        step.positions.extend(first..first + n as u32);
        for (kind, angles) in step.angles.iter_mut().enumerate() {
            self.rope
                .fill(kind, first, n, self.rope.n_rot_of(kind), angles);
        }
        step.heat.clear();
        let heat = self.hp.heat.iter();
        step.heat
            .extend(heat.flat_map(|h| step.positions.iter().map(|p| h.at(f64::from(*p)) as f32)));
        for (il, (pages, places)) in step.pages.iter_mut().zip(&mut step.places).enumerate() {
            let (layout, ranges) = (cache.layout(), &mut step.tables[il]);
            pages.clear();
            places.clear();
            ranges.clear();
            for table in &cache.tables()[layout.tables_of(il)] {
                let first = pages.len();
                pages.extend(table.spans(layout).map(|s| PageRef {
                    tier: s.tier,
                    slot: s.slot,
                    row: s.row,
                    first_pos: s.first_pos,
                    len: s.len,
                }));
                if layout.groups > 1 {
                    ranges.push((first as u32, pages.len() as u32));
                }
                places.extend(table.places.iter().map(|p| Place {
                    slot: p.slot,
                    row: p.row,
                }));
            }
        }
        self.memory.follow(&mut self.kv, cache);
        step.moves.clear();
        let demoted = cache.demoted().iter();
        let moves = demoted.flat_map(|d| moved(&self.layout, &self.layers, d));
        step.moves.extend(moves);
        for (il, b) in step.bounds.iter_mut().enumerate() {
            b.fill(cache, il);
        }
        step.outputs = Some(outputs);
        step.wants_mass = n == 1 && cache.wants_mass();
        self.n_outputs = match outputs {
            Outputs::None => 0,
            Outputs::Last => 1,
            Outputs::All => n,
        };
        let wanted = self.n_outputs * self.hp.n_vocab;
        if self.logits.len() < wanted {
            self.logits = Shared::zeroed(wanted);
        }
    }

    pub(super) fn read(
        &mut self,
        part: Part,
        il: usize,
        head: usize,
        p: kv::Place,
        row: &mut [f32],
    ) {
        let layer = &mut self.kv[self.layout.region_of(il) * self.layout.n_tiers()];
        let (slot, plane) = (p.slot, layer.shape().plane(head));
        let place = Place { slot, row: p.row };
        match part {
            Part::V if self.hp.latent.is_none() => layer.read_v(place, plane, row),
            _ => layer.read_k(place, plane, row),
        }
    }

    /// Hands the page masses of the step to the cache.
    pub(super) fn leave_masses(&mut self, cache: &mut Cache) {
        for il in self.layers.clone() {
            let mass = &mut self.mass[il];
            let n_head = self.hp.heads_of_pool(il).n / self.layout.groups;
            let mut rest: &[f32] = mass.as_mut_slice();
            for t in self.layout.tables_of(il) {
                let (mine, more) = rest.split_at(cache.tables()[t].n_spans() * n_head);
                cache.end_table(t, mine, n_head);
                rest = more;
            }
        }
    }

    pub(super) fn buf(&self, b: Buf) -> &Shared<f32> {
        &self.bufs[b as usize]
    }

    /// The tiers of layer `il`.
    pub(super) fn tiers(&self, il: usize) -> &[KvLayer] {
        let n = self.layout.n_tiers();
        &self.kv[self.layout.region_of(il) * n..][..n]
    }
}
