//! `raas`: recycle the page whose time stamp is oldest (arXiv 2502.11147, section 4).
//!
//! A page is stamped when it is opened and whenever it is among the pages that matter. Two rules say what matters: the best half
//! of the live pages by mass (the authors' adaptive rule and the default, since it has no scale to get wrong), or every page
//! whose mass exceeds alpha. The paper scores pages with Quest's min/max bound; here the mass is exact, since every live page
//! is attended anyway.

use super::{PageMeta, Policy, PolicyInfo};
use crate::options::Refresh;

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "raas",
    summary: "recycle the page that has not mattered for the longest time (RaaS time stamps)",
    whole_context: false,
    new: |o, _| {
        Box::new(Raas {
            refresh: o.refresh,
            rank: Vec::new(),
        })
    },
};

struct Raas {
    refresh: Refresh,
    /// Page indices in order of mass; kept between calls so that a step allocates nothing.
    rank: Vec<u32>,
}

impl Policy for Raas {
    fn wants_mass(&self) -> bool {
        true
    }

    fn refresh(&mut self, _: usize, pages: &mut [PageMeta], now: u32) {
        match self.refresh {
            Refresh::Alpha(alpha) => {
                for p in pages.iter_mut().filter(|p| p.w > alpha) {
                    p.stamp = now;
                }
            }
            Refresh::Rank(share) => {
                let best =
                    ((pages.len() as f64 * f64::from(share)).ceil() as usize).min(pages.len());
                if best == 0 {
                    return;
                }
                self.rank.clear();
                self.rank.extend(0..pages.len() as u32);
                if best < pages.len() {
                    // Equal masses rank by position, so that every backend takes the same decision.
                    self.rank.select_nth_unstable_by(best - 1, |&a, &b| {
                        let (pa, pb) = (&pages[a as usize], &pages[b as usize]);
                        pb.w.total_cmp(&pa.w).then(a.cmp(&b))
                    });
                }
                for &i in &self.rank[..best] {
                    pages[i as usize].stamp = now;
                }
            }
        }
    }

    fn reserve(&mut self, n_slots: usize) {
        self.rank.clear();
        self.rank.reserve(n_slots);
    }

    fn victim(
        &mut self,
        _: usize,
        pages: &[PageMeta],
        may: &dyn Fn(usize) -> bool,
    ) -> Option<usize> {
        (0..pages.len()).filter(|&i| may(i)).min_by(|&a, &b| {
            let (pa, pb) = (&pages[a], &pages[b]);
            pa.stamp
                .cmp(&pb.stamp)
                .then(pa.w.total_cmp(&pb.w))
                .then(a.cmp(&b))
        })
    }
}
