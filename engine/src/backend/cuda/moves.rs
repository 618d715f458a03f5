//! Pages that move to lower tiers before a pass.
//!
//! [`Cache::demoted`] lists moves in order: one may go where another has just left. Those that have nothing in common are
//! launched together, so that a step which takes a page in every layer waits for two or three launches and not for one a page.

use lemma_cuda::ops::{self, Heads, TierTable, Tiers};
use lemma_cuda::{Buffer, CudaError, Gpu, Pinned};

use crate::kv::{Cache, Layout};

/// Bytes of a move.
const SIZE: usize = 16;

pub(super) struct Moves {
    table: TierTable,
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
            first,
            launches: vec![0; slots],
            list: Vec::with_capacity(room),
            host: gpu.pinned(room * SIZE)?,
            device: gpu.alloc(room * SIZE)?,
        })
    }

    /// Makes the moves of the step that begins.
    pub(super) fn run(&mut self, gpu: &Gpu, h: Heads, cache: &Cache) -> Result<(), CudaError> {
        if cache.demoted().is_empty() {
            return Ok(());
        }
        self.plan(cache);
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
            ops::move_pages(gpu, h, &self.table, moves, n)?;
            at += n;
        }
        Ok(())
    }

    /// Lists the moves of a step, launch after launch.
    fn plan(&mut self, cache: &Cache) {
        let layout = cache.layout();
        self.list.clear();
        for d in cache.demoted() {
            let down = [(d.page.tier, d.page.slot), (d.tier, d.slot)];
            self.add(layout, d.il, down);
            if let Some(h) = d.heir {
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
