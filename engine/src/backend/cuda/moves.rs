//! Pages that move to lower tiers before a pass.
//!
//! [`Cache::demoted`] lists moves in order: one may go where another has just left. Those that have nothing in common are
//! launched together, so that a step which takes a page in every layer waits for two or three launches and not for one a page.

use std::ops::Range;

use lemma_cuda::ops::{self, Heads, TierTable, Tiers};
use lemma_cuda::{Buffer, CudaError, Gpu, Pinned};

use crate::kv::{Cache, Layout};

/// Bytes of a move.
const SIZE: usize = 16;

pub(super) struct Moves {
    table: TierTable,
    /// What pages are made of: keys and values, or keys alone.
    n_part: usize,
    /// Where the slots of each part (a tier of a region) begin when all are counted through.
    first: Vec<usize>,
    /// Of each slot: launches of this step that read or write it, up to the last.
    launches: Vec<u32>,
    /// Moves of a step, and the launch that makes them.
    list: Vec<(u32, [u32; 4])>,
    host: Pinned,
    device: Buffer,
}

impl Moves {
    pub(super) fn new(
        gpu: &Gpu,
        h: Heads,
        regions: &[Tiers],
        n_part: usize,
        layout: &Layout,
    ) -> Result<Self, CudaError> {
        let n_tiers = layout.n_tiers();
        let mut first = vec![0];
        for i in 0..layout.n_regions() * n_tiers {
            let n = layout.region(i % n_tiers, i / n_tiers).n_blocks;
            first.push(first[i] + n);
        }
        let slots = if n_tiers > 1 {
            first[first.len() - 1]
        } else {
            0
        };
        // A step that takes a page in each layer: one that leaves a tier, and one that takes its place.
        let room = 2 * layout.n_tables() * layout.tiers.len();
        Ok(Self {
            table: TierTable::new(gpu, h, regions)?,
            n_part,
            first,
            launches: vec![0; slots],
            list: Vec::with_capacity(room),
            host: gpu.pinned(room * SIZE)?,
            device: gpu.alloc(room * SIZE)?,
        })
    }

    /// Makes the moves of the step that begins, within some layers.
    pub(super) fn run(
        &mut self,
        gpu: &Gpu,
        h: Heads,
        cache: &Cache,
        layers: &Range<usize>,
    ) -> Result<(), CudaError> {
        self.plan(cache, layers);
        if self.list.is_empty() {
            return Ok(());
        }
        let bytes = self.list.len() * SIZE;
        if self.device.view().bytes() < bytes {
            self.host = gpu.pinned(2 * bytes)?;
            self.device = gpu.alloc(2 * bytes)?;
        }
        let words = self.host.bytes_mut()?.as_chunks_mut::<4>().0;
        for (to, w) in words.iter_mut().zip(self.list.iter().flat_map(|m| &m.1)) {
            *to = w.to_le_bytes();
        }
        self.host.upload(0, self.device.view().slice(0, bytes))?;
        let mut at = 0;
        for together in self.list.chunk_by(|a, b| a.0 == b.0) {
            let n = together.len();
            let moves = self.device.view().slice(at * SIZE, n * SIZE);
            ops::move_pages(gpu, h, &self.table, moves, n, self.n_part)?;
            at += n;
        }
        Ok(())
    }

    /// Lists the moves of a step, launch after launch.
    fn plan(&mut self, cache: &Cache, layers: &Range<usize>) {
        let layout = cache.layout();
        self.list.clear();
        for d in cache.demoted() {
            if layers.contains(&d.il) {
                let down = [(d.page.tier, d.page.slot), (d.tier, d.slot)];
                self.add(layout, d.il, down);
            }
            if let Some(h) = d.heir.filter(|h| layers.contains(&h.il)) {
                self.add(layout, h.il, [(0, h.slot), (0, d.page.slot)]);
            }
        }
        for i in 0..self.list.len() {
            let [region, from, to, _] = self.list[i].1;
            for slot in [from, to] {
                let (tier, slot) = ops::tier_and_slot(slot);
                let at = self.at(layout, region as usize, tier, slot);
                self.launches[at] = 0;
            }
        }
        self.list.sort_unstable_by_key(|m| m.0);
    }

    fn add(&mut self, layout: &Layout, il: usize, ends: [(u8, u32); 2]) {
        let region = layout.region_of(il);
        let at = ends.map(|(tier, slot)| self.at(layout, region, tier, slot));
        let launch = 1 + at
            .map(|at| self.launches[at])
            .into_iter()
            .max()
            .unwrap_or(0);
        at.iter().for_each(|&at| self.launches[at] = launch);
        let [from, to] = ends.map(|(tier, slot)| ops::slot_of(tier, slot));
        self.list.push((launch, [region as u32, from, to, 0]));
    }

    /// The number of a slot.
    fn at(&self, layout: &Layout, region: usize, tier: u8, slot: u32) -> usize {
        self.first[region * layout.n_tiers() + usize::from(tier)] + slot as usize
    }
}

#[cfg(all(test, feature = "cuda-emulate"))]
mod tests {
    use std::collections::HashMap;

    use lemma_cuda::ops::Tier;

    use super::*;
    use crate::kv::policy;
    use crate::options::KvOptions;

    type Slots = HashMap<(u32, u32), usize>;

    /// What is in a slot; a page that has no tokens yet may be moved as well.
    fn held(slots: &Slots, at: (u32, u32)) -> usize {
        slots.get(&at).copied().unwrap_or(usize::MAX)
    }

    #[test]
    fn moves_of_a_launch_have_nothing_in_common() {
        let gpu = Gpu::emulated(false);
        let h = Heads {
            n_head: 1,
            n_head_kv: 1,
            head_dim: 32,
        };
        let memory = gpu.alloc(1024).unwrap();
        let tiers = Tier::f16(memory.view(), memory.view()).alone();
        for spec in [
            "raas:demote=q8_0+q4_0+k4/v2",
            "random:demote=q8_0:0.2+k4/v2:0.7",
            "lrfu:demote=q8_0+k4/v2,budget_scope=model",
            "window:demote=q4_0,budget_scope=model",
        ] {
            let mut o = KvOptions::default();
            o.apply(spec).unwrap();
            o.recent = 2;
            let layout = Layout::new(&o, 4, 1, 12, 4096);
            let policy = policy::find(&o.policy).unwrap();
            let mut cache = Cache::with_layout(&o, policy, layout.clone());
            let regions = vec![tiers; layout.n_regions()];
            let mut moves = Moves::new(&gpu, h, &regions, 2, &layout).unwrap();
            let (mut together, mut launches) = (0, 0);
            // What is in each slot, by order and by launches.
            let mut slots = Slots::new();
            for step in 0..900 {
                let n = if step % 50 == 0 {
                    cache.batch().min(70)
                } else {
                    1
                };
                cache.begin(n, false).unwrap();
                moves.plan(&cache, &(0..4));
                let mut want = slots.clone();
                for d in cache.demoted() {
                    let region = layout.region_of(d.il) as u32;
                    let at = |tier, slot| (region, ops::slot_of(tier, slot));
                    let page = held(&want, at(d.page.tier, d.page.slot));
                    want.insert(at(d.tier, d.slot), page);
                    if let Some(h) = d.heir {
                        let page = held(&want, at(0, h.slot));
                        want.insert(at(0, d.page.slot), page);
                    }
                }
                for launch in moves.list.chunk_by(|a, b| a.0 == b.0) {
                    let ends = launch
                        .iter()
                        .flat_map(|m| [(m.1[0], m.1[1]), (m.1[0], m.1[2])]);
                    let mut ends: Vec<_> = ends.collect();
                    let all = ends.len();
                    ends.sort_unstable();
                    ends.dedup();
                    assert_eq!(ends.len(), all, "{spec}, step {step}");
                    together += launch.len();
                    launches += 1;
                    for (_, [region, from, to, _]) in launch {
                        let page = held(&slots, (*region, *from));
                        slots.insert((*region, *to), page);
                    }
                }
                assert_eq!(slots, want, "{spec}, step {step}");
                // New tokens are stored behind the moves.
                for (t, table) in cache.tables().iter().enumerate() {
                    let region = layout.region_of(t) as u32;
                    for p in &table.places {
                        slots.insert((region, p.slot), 1000 * step + t);
                    }
                }
                assert!(moves.launches.iter().all(|&n| n == 0));
                for t in 0..cache.tables().len() {
                    let n = cache.tables()[t].pages.len();
                    let mass: Vec<f32> = (0..n)
                        .map(|i| ((i * 7 + step + t) % 11) as f32 / 11.0)
                        .collect();
                    cache.end_table(t, &mass, 1);
                }
            }
            // How many there are of one launch is up to the policy: what has just come may go on at once.
            assert!(
                launches > 30 && together > launches,
                "{spec}: {together} in {launches}"
            );
        }
    }
}
