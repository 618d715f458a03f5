//! `h2o`: recycle the page that has received the least attention since it was written (H2O, arXiv 2306.14048), by pages
//! instead of tokens and with the prompt pinned.
//!
//! Masses are summed over the steps. Old pages have had more time to collect, which is the method's known bias; so half of the room is
//! for the most recent pages, as in the paper.

use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "h2o",
    summary: "recycle the page that has received the least attention in all (H2O)",
    whole_context: false,
    selects: false,
    new: |_| Box::new(H2o),
};

struct H2o;

impl Policy for H2o {
    fn wants_mass(&self) -> bool {
        true
    }

    fn refresh(&mut self, pages: &mut [PageMeta], now: u32) {
        for p in pages {
            p.sum += p.w;
            p.stamp = now;
        }
    }

    fn value(&mut self, page: &PageMeta, _: u32) -> Value {
        Value(f64::from(page.sum), 0.0)
    }

    fn recent(&self, room: usize) -> usize {
        room / 2
    }
}
