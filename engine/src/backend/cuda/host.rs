//! What steps differ in, on its way to the device, and what comes back.

use lemma_cuda::{CudaError, Gpu, Pinned, ops};

use super::super::Buf;
use super::buffers::Pool;
use super::pass::Pass;
use crate::arch::HParams;
use crate::error::Error;
use crate::kv::{Cache, PAGE};

/// Page-locked memory that steps travel through.
pub(super) struct Host {
    step: Pinned,
    pub(super) tables: Pinned,
    pub(super) masses: Pinned,
    pub(super) logits: Pinned,
    /// Live pages of each layer as the device knows them.
    pub(super) n_pages: Vec<usize>,
    /// The residual stream of layers that are not on the device.
    rows: Pinned,
    /// Cosines and sines of a pass.
    angles: Vec<f32>,
}

impl Host {
    pub(super) fn new(
        gpu: &Gpu,
        hp: &HParams,
        pool: &Pool,
        n_ubatch: usize,
        is_behind: bool,
    ) -> Result<Self, CudaError> {
        let rows = if is_behind {
            n_ubatch * hp.n_embd * 4
        } else {
            0
        };
        Ok(Self {
            step: gpu.pinned(StepLayout::new(hp, n_ubatch).bytes())?,
            tables: gpu.pinned(pool.tables.view().bytes())?,
            masses: gpu.pinned(pool.masses.view().bytes())?,
            logits: gpu.pinned(hp.n_vocab * 4)?,
            rows: gpu.pinned(rows)?,
            n_pages: vec![0; hp.n_layer_kv()],
            angles: vec![0.0; n_ubatch * hp.head_dim],
        })
    }

    /// Brings the data of a pass to the device.
    ///
    /// `rows`: what layers before those on the device have left, if there are some.
    pub(super) fn prepare(
        &mut self,
        p: &Pass,
        rows: &[f32],
        tokens: &[u32],
        cache: &Cache,
    ) -> Result<(), Error> {
        let (n, l) = (tokens.len(), p.layout);
        let first = cache.pos() - n as u32;
        let step = &mut self.step.bytes_mut()?[..l.bytes()];
        put(step, 0, [first]);
        put(
            step,
            1,
            (0..l.n_layer).map(|il| cache.layer(il).pages.len() as u32),
        );
        put(step, l.tokens(), tokens.iter().copied());
        for il in 0..l.n_layer {
            let places = cache.layer(il).places.iter();
            put(
                step,
                l.places(il),
                places.map(|p| p.slot * PAGE as u32 + p.row),
            );
        }
        // The rotations go where the device reads them; computing them in f64 here is what every backend does.
        let angles = &mut self.angles[..n * p.hp.head_dim];
        for table in 0..l.n_rope {
            p.rope.fill(table, first, n, p.hp.head_dim, angles);
            put(step, l.rope(table), angles.iter().map(|x| x.to_bits()));
        }
        self.step.upload(0, p.step.view().slice(0, l.bytes()))?;
        if !rows.is_empty() {
            let bytes = size_of_val(rows);
            put(self.rows.bytes_mut()?, 0, rows.iter().map(|x| x.to_bits()));
            self.rows.upload(0, p.view(Buf::X).slice(0, bytes))?;
        }
        self.send_tables(p, cache)
    }

    /// Uploads the page tables if any page came or went.
    pub(super) fn send_tables(&mut self, p: &Pass, cache: &Cache) -> Result<(), Error> {
        let max_pages = p.pool.max_pages;
        let tables = self.tables.bytes_mut()?;
        let mut changed = false;
        for (il, n_pages) in self.n_pages.iter_mut().enumerate() {
            let pages = &cache.layer(il).pages;
            changed |= *n_pages != pages.len();
            *n_pages = pages.len();
            let row = &mut tables[il * max_pages * 8..][..pages.len() * 8];
            for (entry, page) in row.as_chunks_mut::<8>().0.iter_mut().zip(pages) {
                // Two words, in one piece: the device waits for this.
                let slot = u64::from(ops::slot_of(page.tier, page.slot));
                let new = (u64::from(page.first_pos) << 32 | slot).to_le_bytes();
                changed |= *entry != new;
                *entry = new;
            }
        }
        if changed {
            self.tables.upload(0, p.pool.tables.view())?;
        }
        Ok(())
    }
}

/// Writes words into what travels, from word `at` on.
pub(super) fn put(step: &mut [u8], at: usize, words: impl IntoIterator<Item = u32>) {
    for (to, w) in step[at * 4..].chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&w.to_le_bytes());
    }
}

/// Where the data of a pass of `n` tokens lies, in words of 32 bits: position, live pages of each layer, tokens, places of each layer,
/// rotations of each kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepLayout {
    n: usize,
    n_layer: usize,
    head_dim: usize,
    n_rope: usize,
}

impl StepLayout {
    pub(super) fn new(hp: &HParams, n: usize) -> Self {
        Self {
            n,
            n_layer: hp.n_layer_kv(),
            head_dim: hp.head_dim,
            n_rope: hp.n_rope_tables(),
        }
    }

    pub(super) fn tokens(&self) -> usize {
        1 + self.n_layer
    }

    pub(super) fn places(&self, il: usize) -> usize {
        self.tokens() + self.n + il * self.n
    }

    /// Pairs of floats of a kind of rotation: at an even word, since heads have an even width.
    pub(super) fn rope(&self, table: usize) -> usize {
        self.places(self.n_layer).next_multiple_of(2) + table * self.n * self.head_dim
    }

    pub(super) fn bytes(&self) -> usize {
        self.rope(self.n_rope) * 4
    }
}
