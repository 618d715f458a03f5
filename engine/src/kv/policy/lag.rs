//! `lag`: recycle the page that is most overdue, measured by its own longest pause (LazyEviction, arXiv 2506.15969).
//!
//! Pages come back: most of what is attended was attended before, after a pause that says something about the next one. A page that
//! has been silent for less than its maximum recurrence interval may well return; the one whose silence is longest in terms of
//! that interval goes:
//!
//! ```text
//! hit:    MRI <- max(MRI, t - TS),  TS <- t
//! victim: max (t - TS) / max(MRI, 1)
//! ```
//!
//! A hit is what RaaS would stamp. LazyEviction works on tokens, with a threshold of attention; its observation window is what the cache
//! protects as recent pages.

use super::hits::Hits;
use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "lag",
    summary: "recycle the page that is most overdue by its own longest pause (LazyEviction)",
    whole_context: false,
    selects: false,
    new: |o| {
        Box::new(Lag {
            hits: Hits::new(o.refresh),
        })
    },
};

struct Lag {
    hits: Hits,
}

impl Policy for Lag {
    fn wants_mass(&self) -> bool {
        true
    }

    fn refresh(&mut self, pages: &mut [PageMeta], now: u32) {
        self.hits.each(pages, |p| {
            p.gap = p.gap.max(now.saturating_sub(p.stamp));
            p.stamp = now;
        });
    }

    fn value(&mut self, page: &PageMeta, now: u32) -> Value {
        let silent = now.saturating_sub(page.stamp);
        let overdue = f64::from(silent) / f64::from(page.gap.max(1));
        Value(-overdue, f64::from(page.w))
    }

    fn reserve(&mut self, n_pages: usize) {
        self.hits.reserve(n_pages);
    }
}
