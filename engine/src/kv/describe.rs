//! What full pages look like: their mean keys and the range of their values, for the options that look at contents.
//!
//! * *Redundancy* (R-KV, arXiv 2505.24133): a chain of thought repeats itself. When a page is full, its mean key is compared with those
//!   of the earlier ones in its table; an earlier page whose cosine with it, averaged over heads, exceeds the threshold is redundant and
//!   goes before any that is not.
//! * *Guard* (VaSE, arXiv 2606.03928): tokens with an extreme range of values (largest minus smallest element of a head's value)
//!   must stay. The given share of a table's pages, those with the widest range, goes only when nothing else may.

use super::table::{NONE, PageMeta};
use super::{Cache, Place};

/// What is read from the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Keys.
    K,
    /// Values.
    V,
}

/// Reads a row of the pool: layer, key and value head, place, and where it goes, `[head_dim]`.
pub type ReadRow<'a> = dyn FnMut(Part, usize, usize, Place, &mut [f32]) + 'a;

/// Thresholds, and what is known about pages.
#[derive(Default)]
pub(super) struct Describe {
    /// Cosine above which a page is redundant; 1: never.
    redundancy: f32,
    /// Share of pages that is guarded.
    guard: f32,
    /// Mean keys of each list of slots, `[slot, heads, head_dim]`, of length 1 where they are not zero.
    means: Vec<Vec<f32>>,
    row: Vec<f32>,
    mean: Vec<f32>,
    ranges: Vec<f32>,
}

impl Describe {
    pub(super) fn new(redundancy: f32, guard: f32) -> Self {
        Self {
            redundancy,
            guard,
            ..Self::default()
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.redundancy < 1.0 || self.guard > 0.0
    }

    /// A page has moved from a list and slot to another.
    pub(super) fn moved(&mut self, from: (usize, u32), to: (usize, u32)) {
        if !self.is_on() {
            return;
        }
        let width = self.mean.len();
        let at = |slot: u32| slot as usize * width..(slot as usize + 1) * width;
        self.mean.copy_from_slice(&self.means[from.0][at(from.1)]);
        self.means[to.0][at(to.1)].copy_from_slice(&self.mean);
    }

    /// The range from which on pages are guarded.
    pub(super) fn guarded_from(&mut self, pages: &[PageMeta]) -> f32 {
        let n = (pages.len() as f64 * f64::from(self.guard)) as usize;
        if n == 0 {
            return f32::INFINITY;
        }
        self.ranges.clear();
        self.ranges.extend(pages.iter().map(|p| p.range));
        let (_, nth, _) = self
            .ranges
            .select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
        // Pages that are not full have no range yet.
        nth.max(f32::MIN_POSITIVE)
    }
}

impl Cache {
    /// Whether [`Cache::describe`] is to be called after each pass.
    pub fn wants_description(&self) -> bool {
        self.describe.is_on()
    }

    /// Makes room, so that a step allocates nothing.
    pub(super) fn reserve_descriptions(&mut self) {
        if !self.describe.is_on() {
            return;
        }
        let (l, d) = (&self.layout, &mut self.describe);
        let width = l.n_head_kv / l.groups * l.head_dim;
        d.means.resize(l.n_lists(), Vec::new());
        for (list, means) in d.means.iter_mut().enumerate() {
            means.resize(l.slots_of_list(list) * width, 0.0);
        }
        d.row.resize(l.head_dim, 0.0);
        d.mean.resize(width, 0.0);
        let most = (0..l.n_tables()).map(|t| l.max_pages(t)).max().unwrap_or(0);
        d.ranges.clear();
        d.ranges.reserve(most);
    }

    /// Looks at the pages that the last `n` tokens have filled.
    pub fn describe(&mut self, n: usize, read: &mut ReadRow<'_>) {
        let first = self.pos.saturating_sub(n as u32);
        for t in 0..self.tables.len() {
            for i in (0..self.tables[t].pages.len()).rev() {
                let p = self.tables[t].pages[i];
                if p.first_pos + p.len <= first {
                    break;
                }
                if p.len as usize == self.layout.page {
                    self.describe_page(t, i, read);
                }
            }
        }
    }

    fn describe_page(&mut self, t: usize, i: usize, read: &mut ReadRow<'_>) {
        let (l, d) = (&self.layout, &mut self.describe);
        let (il, group, heads) = (t / l.groups, t % l.groups, l.n_head_kv / l.groups);
        let pages = &mut self.tables[t].pages;
        // What has just been filled is in the first tier.
        let (slot, width) = (pages[i].slot, d.mean.len());
        d.mean.fill(0.0);
        let mut range = 0.0f32;
        for (h, mean) in d.mean.chunks_exact_mut(l.head_dim).enumerate() {
            let head = group * heads + h;
            for row in 0..pages[i].len {
                let place = l.place(slot, row);
                read(Part::V, il, head, place, &mut d.row);
                let least = d.row.iter().copied().fold(f32::INFINITY, f32::min);
                let greatest = d.row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                range = range.max(greatest - least);
                read(Part::K, il, head, place, &mut d.row);
                for (m, k) in mean.iter_mut().zip(&d.row) {
                    *m += k;
                }
            }
            let size = dot(mean, mean).sqrt();
            if size > 0.0 {
                mean.iter_mut().for_each(|m| *m /= size);
            }
        }
        pages[i].range = range;
        let at = |slot: u32| slot as usize * width..(slot as usize + 1) * width;
        d.means[l.list_of(0, t)][at(slot)].copy_from_slice(&d.mean);
        let later = pages[i].first_pos;
        for p in &mut pages[..i] {
            let full = p.len as usize == l.page && p.double == NONE;
            let mean = &d.means[l.list_of(usize::from(p.tier), t)][at(p.slot)];
            if full && dot(mean, &d.mean) / heads as f32 > d.redundancy {
                p.double = later;
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
