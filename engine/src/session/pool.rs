//! The pool of a session: how large it is, and what is in it.

use std::ops::Range;

use super::Session;
use crate::arch::HParams;
use crate::backend::cpu::bound_bytes;
use crate::error::Error;
use crate::kv::policy::PolicyInfo;
use crate::kv::{Attend, Layout, PAGE, PageMeta};
use crate::memory;
use crate::options::{DEFAULT_BUDGET, KvBudget, KvOptions};
use crate::report;

/// State of the pool, for people and for JSON.
#[derive(Clone, Debug)]
pub struct KvStats {
    /// Name of the policy.
    pub policy: &'static str,
    /// Slots of a layer, in all tiers.
    pub n_slots: usize,
    /// Live pages, the most of any layer; the mean where layers share their budget.
    pub pages: usize,
    /// Pinned pages, the most of any layer.
    pub pinned: usize,
    /// Pages recycled since the sequence began, the most of any layer; the mean where layers share their budget.
    pub recycled: u64,
    /// Tokens in a page.
    pub page: usize,
    /// Bytes of the pool.
    pub bytes: u64,
    /// Of these, the bytes of live pages.
    pub used: u64,
    /// Tiers of a pool whose pages are demoted; empty otherwise.
    pub tiers: Vec<TierStats>,
    /// Position at which the first page was recycled.
    pub first_recycle: Option<u32>,
}

/// State of a tier of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierStats {
    /// How keys and values are stored; the two of them, where they differ.
    pub name: String,
    /// Slots of a layer.
    pub n_slots: usize,
    /// Live pages of a layer, the mean.
    pub pages: usize,
}

impl Session {
    /// State of the pool.
    pub fn kv(&self) -> KvStats {
        // Dense layers have no budget to speak of, unless there is nothing else.
        let (all, layout) = (self.cache.tables(), self.cache.layout());
        let first = (layout.dense * layout.groups).min(all.len() - 1);
        let layers = || all[first..].iter();
        let n = if layout.shared { all.len() - first } else { 1 };
        let pages = layers().map(|l| l.pages.len());
        let bytes = self.runner.pool_bytes(layout);
        let recycled = layers().map(|l| l.recycled);
        KvStats {
            policy: self.policy.name,
            n_slots: self.cache.n_slots(),
            pages: if layout.shared {
                pages.sum::<usize>().div_ceil(n)
            } else {
                pages.max().unwrap_or(0)
            },
            pinned: layers()
                .map(|l| l.pages.iter().filter(|p| p.pinned).count())
                .max()
                .unwrap_or(0),
            recycled: if layout.shared {
                recycled.sum::<u64>().div_ceil(n as u64)
            } else {
                recycled.max().unwrap_or(0)
            },
            page: self.cache.layout().page,
            bytes,
            used: (bytes as f64 * self.used_share()).round() as u64,
            tiers: self.tiers(),
            first_recycle: self.cache.first_recycle(),
        }
    }

    /// The part of the pool's bytes that live pages have, dense layers left out; all of it once something was recycled.
    fn used_share(&self) -> f64 {
        let layout = self.cache.layout();
        let mut recycled = false;
        let mut used = 0;
        for (t, table) in self.cache.tables().iter().enumerate() {
            recycled |= table.recycled > 0;
            if t >= layout.dense * layout.groups {
                let costs = table.pages.iter().map(|p| usize::from(p.tier));
                used += costs.map(|tier| layout.cost_of_tier(tier)).sum::<u64>();
            }
        }
        let tables = layout.n_tables() - layout.dense * layout.groups;
        let all = layout.n_slots as u64 * layout.cost * tables as u64;
        if recycled || all == 0 {
            1.0
        } else {
            used as f64 / all as f64
        }
    }

    fn tiers(&self) -> Vec<TierStats> {
        let layout = self.cache.layout();
        if layout.tiers.is_empty() {
            return Vec::new();
        }
        let pages = |tier: usize| {
            let tables = &self.cache.tables()[layout.dense * layout.groups..];
            let pages = tables.iter().flat_map(|t| &t.pages);
            let n = pages.filter(|p| usize::from(p.tier) == tier).count();
            n.div_ceil(tables.len().max(1))
        };
        let name = |tier: usize| match (tier.checked_sub(1), self.types) {
            (Some(i), _) => layout.tiers[i].stored.name(),
            (None, [k, v]) if k == v => k.to_string(),
            (None, [k, v]) => format!("{k}/{v}"),
        };
        let tables = layout.n_tables() - layout.dense * layout.groups;
        let last = layout.n_regions() - 1;
        let one = |tier| TierStats {
            name: name(tier),
            n_slots: match layout.shared {
                true => self.cache.open(tier, last) / tables.max(1),
                false => self.cache.open(tier, last),
            },
            pages: pages(tier),
        };
        (0..layout.n_tiers()).map(one).collect()
    }

    /// Position at which the first page was recycled.
    pub fn first_recycle(&self) -> Option<u32> {
        self.cache.first_recycle()
    }

    /// Live pages of a page table in position order.
    pub fn kv_pages(&self, table: usize) -> &[PageMeta] {
        &self.cache.tables()[table].pages
    }

    /// Pins the pages that hold any of `positions` until they are [unpinned](Session::unpin) or dropped; returns the first positions of those
    /// that were not pinned before. What was recycled cannot be pinned.
    ///
    /// # Errors
    /// [`Error::Usage`] when too few pages would be left to take turns; nothing is pinned then.
    pub fn pin_positions(&mut self, positions: &Range<u32>) -> Result<Vec<u32>, Error> {
        self.cache.pin(positions).map_err(|full| {
            report::usage(
                format!("{} pages pinned in a pool of {}", full.held, full.n_slots),
                format!("at most {}", full.n_slots.saturating_sub(2)),
            )
        })
    }

    /// Lets pages go that were pinned by [`Session::pin_positions`], named by their first positions.
    pub fn unpin(&mut self, pages: &[u32]) {
        self.cache.unpin(pages);
    }

    /// First positions of the pages of a table that may be recycled, the next to go first. `None` if the policy draws.
    pub fn recycling_order(&mut self, table: usize) -> Option<Vec<u32>> {
        self.cache.order(table)
    }

    /// Leaves the attention mass of every page in [`PageMeta::w`] after each decode step, whatever the policy.
    pub fn watch_masses(&mut self) {
        self.cache.watch();
    }

    /// Page tables: one for each layer, or for each key and value head of each layer.
    pub fn n_tables(&self) -> usize {
        self.cache.tables().len()
    }

    /// Grows a pool of default size so that a prompt of `n` tokens leaves the default budget free, if memory allows.
    pub(super) fn grow_for(&mut self, n: usize) -> Result<(), Error> {
        let (page, n_slots) = (self.page(), self.cache.layout().n_slots);
        let pages = |tokens: usize| tokens.div_ceil(page);
        let pinned = self.kv().pinned * page;
        let wanted = pages((pinned + n + DEFAULT_BUDGET as usize).min(self.n_ctx as usize));
        let needed = pages(pinned + n) + 2;
        if wanted <= n_slots {
            return Ok(());
        }
        let layout = |n_slots| self.cache.layout().grown(n_slots);
        let more =
            self.runner.pool_bytes(&layout(wanted)) - self.runner.pool_bytes(&layout(n_slots));
        let n_slots = match memory::available() {
            Some(free) if more > free => {
                let slot = more / (wanted - n_slots) as u64;
                let fit = n_slots + (free / 2 / slot.max(1)) as usize;
                if fit < needed.min(wanted) {
                    return Err(report::memory(
                        format!("a KV pool of {} more", memory::show(more)),
                        format!("at most the {} that are free", memory::show(free)),
                    ));
                }
                fit.min(wanted)
            }
            _ => wanted,
        };
        if n_slots > self.cache.layout().n_slots {
            let grown = layout(n_slots);
            match memory::taking(|| self.runner.grow(&grown)) {
                Ok(()) => self.cache.grow(n_slots),
                // The prompt fits all the same, with less behind it.
                Err(e) if needed <= self.cache.layout().n_slots => {
                    log::warn!("the KV pool stays as it is: {e}");
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The pool that a session begins with; `row` is what [`Model::kv_row_bytes`] says.
pub(super) fn first_layout(
    policy: &PolicyInfo,
    kv: &KvOptions,
    hp: &HParams,
    n_ctx: u32,
    row: u64,
) -> Result<Layout, Error> {
    let mut layout = Layout::new(kv, hp.n_layer_kv(), hp.n_head_kv, 0, n_ctx as usize);
    layout.head_dim = hp.head_dim;
    if hp.latent.is_some() {
        layout.values_are_in_keys(kv.ty_k);
    }
    if !layout.tiers.is_empty() && layout.bounds {
        return Err(report::usage("--kv-demote with --kv-score bound", "exact"));
    }
    layout.bounds |= policy.selects;
    if layout.bounds && hp.has_unlike_heads() {
        let found = "bounds of keys (--kv-policy quest, --kv-score bound) with a model whose layers have different heads";
        return Err(report::usage(found, "--kv-score exact"));
    }
    if layout.bounds && hp.layers.iter().any(|l| l.borrows) {
        let found = "bounds of keys (--kv-policy quest, --kv-score bound) with a model whose layers share pages";
        return Err(report::usage(found, "--kv-score exact"));
    }
    if layout.bounds && layout.page > PAGE {
        return Err(report::usage(
            format!("pages of {} tokens with bounds of their keys", layout.page),
            format!("at most {PAGE}"),
        ));
    }
    if policy.selects && layout.groups > 1 {
        let found = format!("--kv-policy {} with --kv-scope head", policy.name);
        return Err(report::usage(found, "layer"));
    }
    // Tiers take no more bytes than the first alone would.
    let of = |n_slots| Layout {
        n_slots,
        tiers: Vec::new(),
        ..layout.clone()
    };
    let pages = |tokens: u32| tokens.div_ceil(kv.page) as usize;
    let n = match kv.budget {
        KvBudget::Default => pages(DEFAULT_BUDGET),
        KvBudget::Tokens(n) => pages(n),
        KvBudget::MiB(n) => {
            // What dense layers take is the same for every number of slots.
            let bytes = |n| of(n).bytes(row, bound_bytes(hp));
            let slot = ((bytes(1024) - bytes(0)) / 1024).max(1);
            ((u64::from(n) << 20).saturating_sub(bytes(0)) / slot) as usize
        }
    };
    if n < 2 && (policy.selects || !policy.whole_context) {
        return Err(report::usage(
            format!("a KV pool of {n} page{}", if n == 1 { "" } else { "s" }),
            format!("at least 2 pages of {} tokens", kv.page),
        ));
    }
    let all = pages(n_ctx);
    if policy.selects {
        layout.attend = Some(Attend {
            pages: n,
            beside_pinned: kv.budget == KvBudget::Default,
        });
    }
    Ok(layout.sized(if policy.whole_context {
        all
    } else {
        n.min(all)
    }))
}
