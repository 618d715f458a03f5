//! Which pages mattered in a step: the rule of RaaS, shared by the policies that count or time its hits.

use super::PageMeta;
use crate::options::Refresh;

pub(super) struct Hits {
    rule: Refresh,
    /// Page indices in order of mass; kept between calls so that a step allocates nothing.
    rank: Vec<u32>,
}

impl Hits {
    pub(super) fn new(rule: Refresh) -> Self {
        Self {
            rule,
            rank: Vec::new(),
        }
    }

    pub(super) fn reserve(&mut self, n_pages: usize) {
        self.rank.clear();
        self.rank.reserve(n_pages);
    }

    /// Calls `hit` with every page that mattered.
    pub(super) fn each(&mut self, pages: &mut [PageMeta], mut hit: impl FnMut(&mut PageMeta)) {
        match self.rule {
            Refresh::Alpha(alpha) => pages.iter_mut().filter(|p| p.w > alpha).for_each(hit),
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
                    hit(&mut pages[i as usize]);
                }
            }
        }
    }
}
