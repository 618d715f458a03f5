//! `raas`: recycle the page whose time stamp is oldest (arXiv 2502.11147, section 4).
//!
//! A page is stamped when it is opened and whenever it is among the pages that matter. Two rules say what matters: the best half
//! of the live pages by mass (the authors' adaptive rule), or every page whose mass exceeds alpha. The paper scores pages with
//! Quest's min/max bound; here the mass is exact, since every live page is attended anyway.

use super::hits::Hits;
use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "raas",
    summary: "recycle the page that has not mattered for the longest time (RaaS time stamps)",
    whole_context: false,
    selects: false,
    new: |o| {
        Box::new(Raas {
            hits: Hits::new(o.refresh),
        })
    },
};

struct Raas {
    hits: Hits,
}

impl Policy for Raas {
    fn wants_mass(&self) -> bool {
        true
    }

    fn refresh(&mut self, pages: &mut [PageMeta], now: u32) {
        self.hits.each(pages, |p| p.stamp = now);
    }

    fn value(&mut self, page: &PageMeta, _: u32) -> Value {
        Value(f64::from(page.stamp), f64::from(page.w))
    }

    fn reserve(&mut self, n_pages: usize) {
        self.hits.reserve(n_pages);
    }
}
