//! Who gives way when a page needs a slot.
//!
//! New pages go to the first tier. When it has no free slot, the page worth least in it moves to the next tier, which makes room in the
//! same way; what has to leave the last tier is deleted. As long as lower tiers have no free slot either, the first gives slots away
//! to them, from its end; a page that lies there takes the place of one that moves down. Pinned pages move but are never deleted. If
//! nothing may leave the tiers below, a tier deletes a page of its own. The last pages of a table stay where they are as long as
//! there are others; the one that is being written, and those that the step in progress fills, stay in any case: there is
//! nothing to move yet.

use std::ops::Range;

use super::policy::Value;
use super::table::{Demoted, Heir, NONE, PageMeta, Recycled};
use super::{Cache, Layout, PAGE, PoolFull};

/// A page that may go: its worth and where it is.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// 0 for redundant pages, 2 for guarded ones, 1 for others.
    class: u8,
    value: Value,
    first_pos: u32,
    index: usize,
    tier: u8,
}

impl Candidate {
    /// Whether this goes before `other`; a total order.
    #[inline]
    pub(super) fn order(&self, other: &Self) -> std::cmp::Ordering {
        let worth = self
            .class
            .cmp(&other.class)
            .then(self.value.order(&other.value));
        worth.then(self.first_pos.cmp(&other.first_pos))
    }
}

/// Which pages are asked to go.
#[derive(Clone, Copy)]
struct Ask {
    /// Those of this tier.
    tier: usize,
    /// To the next tier; if not, they are deleted.
    demote: bool,
    /// Not the recent ones.
    spared: bool,
}

/// Which pages of a table that is.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    tier: u8,
    demote: bool,
    /// How many pages the table begins with that are not recent ones.
    old: usize,
    /// Tokens that have been stored.
    stored: u32,
    /// The range of values from which on pages are guarded.
    guarded: f32,
}

impl Asked {
    /// Those among the pages of the table, in position order, with their worth.
    #[inline]
    pub(super) fn among(
        &self,
        pages: &[PageMeta],
        mut worth: impl FnMut(&PageMeta) -> Value,
    ) -> impl Iterator<Item = Candidate> {
        let old = &pages[..self.old.min(pages.len())];
        old.iter().enumerate().filter_map(move |(index, p)| {
            let stored = p.first_pos + p.len <= self.stored;
            let asked = p.tier == self.tier && (self.demote || !p.pinned) && stored;
            asked.then(|| Candidate {
                class: match p {
                    p if p.double != NONE => 0,
                    p if p.range >= self.guarded => 2,
                    _ => 1,
                },
                value: worth(p),
                first_pos: p.first_pos,
                index,
                tier: p.tier,
            })
        })
    }
}

/// Questions that [`Cache::least`] remembers the answers to.
pub(super) fn n_asks(layout: &Layout) -> usize {
    2 * layout.n_tiers() * layout.n_tables()
}

impl Cache {
    /// A slot of the first tier for the next page of table `t`.
    pub(super) fn take(&mut self, t: usize, step: u32) -> Result<u32, PoolFull> {
        let full = PoolFull {
            n_slots: self.layout.all_slots(),
            held: self.tables[t].pages.len(),
        };
        if full.held >= self.layout.max_pages(t) {
            // One of its own pages has to go, wherever it is.
            let mut tiers = (0..self.layout.n_tiers()).rev();
            let (tier, slot) = tiers
                .find_map(|tier| {
                    let spared = self.delete(tier, t..t + 1, true, step);
                    let slot = spared.or_else(|| self.delete(tier, t..t + 1, false, step))?;
                    Some((tier, slot))
                })
                .ok_or(full)?;
            self.free[self.layout.list_of(tier, t)].push(slot);
        }
        // In a pool so small that the recent pages are all there is, only the current one is protected.
        let slot = self.slot_in(0, t, true, step);
        let slot = slot.or_else(|| self.slot_in(0, t, false, step));
        slot.map(|(_, slot)| slot).ok_or(full)
    }

    /// A slot for a page of table `t` in a tier, or in the next one that has any.
    fn slot_in(&mut self, tier: usize, t: usize, spared: bool, step: u32) -> Option<(u8, u32)> {
        if tier == self.layout.n_tiers() {
            return None;
        }
        let list = self.layout.list_of(tier, t);
        let from = self.layout.sharing(t);
        let mut below = tier + 1..self.layout.n_tiers();
        let has_below =
            below.any(|tier| self.layout.slots_of_list(self.layout.list_of(tier, t)) > 0);
        let down = Ask {
            tier,
            demote: true,
            spared,
        };
        loop {
            if let Some(slot) = self.free[list].pop() {
                return Some((tier as u8, slot));
            }
            let down = has_below.then(|| self.least(from.clone(), down, step));
            let Some((t, i)) = down.flatten() else { break };
            // Pages may go below meanwhile, and indices change.
            let first_pos = self.tables[t].pages[i].first_pos;
            let gives = tier == 0 && self.layout.n_tiers() > 1 && self.give_slot(t);
            let Some(to) = self.slot_in(tier + 1, t, spared, step) else {
                break;
            };
            let left = self.demote(t, first_pos, to, step);
            if !gives {
                return Some((tier as u8, left));
            }
            self.close(t, left);
        }
        // Nothing here can move: what comes goes further down.
        let below = tier + 1;
        if tier > 0
            && let Some(to) = self.slot_in(below, t, spared, step)
        {
            return Some(to);
        }
        let slot = self.delete(tier, from, spared, step)?;
        Some((tier as u8, slot))
    }

    /// Whether the first tier of table `t` has to give a slot away for a page that moves down, and can: there is a free slot in some tier
    /// below then.
    fn give_slot(&mut self, t: usize) -> bool {
        let first = self.layout.list_of(0, t);
        let mut below = (1..self.layout.n_tiers()).map(|tier| self.layout.list_of(tier, t));
        let room = below.any(|list| !self.free[list].is_empty());
        if room || self.open[first] <= self.layout.kept_of_list(first) {
            return false;
        }
        self.open[first] -= 1;
        let given = self.layout.slots_of_list(first) - self.open[first];
        let mut bytes = given as u64 * self.layout.cost;
        for tier in 1..self.layout.n_tiers() {
            let list = self.layout.list_of(tier, t);
            bytes -= self.open[list] as u64 * self.layout.cost_of_tier(tier);
        }
        // Slots are opened where the fewest of those at the end are.
        loop {
            let lists = (1..self.layout.n_tiers()).map(|tier| (tier, self.layout.list_of(tier, t)));
            let closed = lists.filter(|&(_, l)| self.open[l] < self.layout.slots_of_list(l));
            let behind = closed.min_by(|&(_, a), &(_, b)| {
                let share = |l| self.open[l] as f64 / self.layout.slots_of_list(l) as f64;
                share(a).total_cmp(&share(b))
            });
            let Some((tier, list)) = behind else { break };
            let Some(left) = bytes.checked_sub(self.layout.cost_of_tier(tier)) else {
                break;
            };
            bytes = left;
            self.free[list].push(self.open[list] as u32);
            self.open[list] += 1;
        }
        true
    }

    /// Moves the page in the slot that the first tier of table `t` has given away to the one that a demoted page has just `left`.
    fn close(&mut self, t: usize, left: u32) {
        let list = self.layout.list_of(0, t);
        let slot = self.open[list] as u32;
        if left == slot {
            return;
        }
        for t in self.layout.sharing(t) {
            let mut pages = self.tables[t].pages.iter_mut();
            let Some(page) = pages.find(|p| p.tier == 0 && p.slot == slot) else {
                continue;
            };
            page.slot = left;
            self.describe.moved((list, slot), (list, left));
            // It may be the one that the step in progress writes to.
            let size = self.layout.page as u32;
            for place in &mut self.tables[t].places {
                let at = place.slot * PAGE as u32 + place.row;
                if at / size == slot {
                    *place = self.layout.place(left, at % size);
                }
            }
            let (il, group) = (t / self.layout.groups, t % self.layout.groups);
            let demoted = self.demoted.last_mut();
            demoted.expect("a page was demoted").heir = Some(Heir { il, group, slot });
            return;
        }
        unreachable!("a slot that is open and not free holds a page");
    }

    /// Moves the page of table `t` that begins at `first_pos`; returns the slot that it leaves.
    fn demote(&mut self, t: usize, first_pos: u32, (tier, slot): (u8, u32), step: u32) -> u32 {
        let pages = &mut self.tables[t].pages;
        let i = pages.partition_point(|p| p.first_pos < first_pos);
        let page = pages[i];
        (pages[i].tier, pages[i].slot) = (tier, slot);
        let list = |tier| self.layout.list_of(usize::from(tier), t);
        self.describe
            .moved((list(page.tier), page.slot), (list(tier), slot));
        self.forget_least(t);
        self.last_loss = Some(step);
        let (il, group) = (t / self.layout.groups, t % self.layout.groups);
        self.demoted.push(Demoted {
            il,
            group,
            step,
            page,
            tier,
            slot,
            heir: None,
        });
        page.slot
    }

    /// Deletes the page worth least among those of a tier and some tables that may go; returns its slot.
    fn delete(&mut self, tier: usize, from: Range<usize>, spared: bool, step: u32) -> Option<u32> {
        let ask = Ask {
            tier,
            demote: false,
            spared,
        };
        let (t, i) = self.least(from, ask, step)?;
        let page = self.tables[t].pages.remove(i);
        self.forget_least(t);
        self.tables[t].recycled += 1;
        self.first_recycle.get_or_insert(step);
        self.last_loss = Some(step);
        let (il, group) = (t / self.layout.groups, t % self.layout.groups);
        self.recycled.push(Recycled {
            il,
            group,
            step,
            page,
        });
        Some(page.slot)
    }

    /// The last pages of table `t` that do not leave a tier.
    fn recent(&self, t: usize, tier: usize) -> usize {
        let above = self.tables[t].pages.iter();
        let pinned = above.filter(|p| p.pinned && usize::from(p.tier) <= tier);
        let below = (1..=tier).map(|tier| self.layout.slots_of_tier(tier));
        let slots = self.layout.kept + below.sum::<usize>();
        let room = slots.saturating_sub(pinned.count());
        self.recent.max(self.policy.recent(room))
    }

    /// Table `t` has changed.
    pub(super) fn forget_least(&mut self, t: usize) {
        let n = self.layout.n_tables();
        let asks = self.least.iter_mut().skip(t).step_by(n);
        asks.for_each(|least| *least = None);
    }

    /// The page worth least among those of some tables that are asked to go: table and index.
    fn least(&mut self, tables: Range<usize>, ask: Ask, now: u32) -> Option<(usize, usize)> {
        let mut least: Option<(Candidate, usize)> = None;
        for t in tables {
            let key = (2 * ask.tier + usize::from(ask.demote)) * self.layout.n_tables() + t;
            let known = self.least[key].filter(|_| ask.spared);
            let of_table = known.unwrap_or_else(|| self.least_of(t, ask, now));
            if ask.spared {
                self.least[key] = Some(of_table);
            }
            let Some(c) = of_table else { continue };
            if least.is_none_or(|(l, _)| c.order(&l).is_lt()) {
                least = Some((c, t));
            }
        }
        least.map(|(c, t)| (t, c.index))
    }

    fn least_of(&mut self, t: usize, ask: Ask, now: u32) -> Option<Candidate> {
        let asked = self.asked(t, ask)?;
        self.policy.least(&self.tables[t].pages, &asked, now)
    }

    /// Which pages of table `t` are asked to go, if any can.
    fn asked(&mut self, t: usize, ask: Ask) -> Option<Asked> {
        let last = ask.tier + 1 == self.layout.n_tiers();
        if self.keeps_all || ask.demote && last {
            return None;
        }
        let recent = if ask.spared {
            self.recent(t, ask.tier)
        } else {
            1
        };
        let pages = &self.tables[t].pages;
        Some(Asked {
            tier: ask.tier as u8,
            demote: ask.demote,
            old: pages.len().saturating_sub(recent),
            stored: self.pos,
            guarded: self.describe.guarded_from(pages),
        })
    }

    /// First positions of the pages of table `t` that may be recycled, the next to go first. `None` if that is drawn.
    pub fn order(&mut self, t: usize) -> Option<Vec<u32>> {
        if self.policy.draws() {
            return None;
        }
        let mut out = Vec::new();
        for tier in 0..self.layout.n_tiers() {
            let ask = Ask {
                tier,
                demote: false,
                spared: true,
            };
            let Some(asked) = self.asked(t, ask) else {
                continue;
            };
            let (policy, now) = (&mut self.policy, self.pos);
            out.extend(asked.among(&self.tables[t].pages, |p| policy.value(p, now)));
        }
        out.sort_by(|a, b| b.tier.cmp(&a.tier).then_with(|| a.order(b)));
        Some(out.iter().map(|c| c.first_pos).collect())
    }
}
