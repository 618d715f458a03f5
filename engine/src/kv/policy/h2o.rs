//! `h2o`: recycle the page that has received the least attention since it was written (H2O, arXiv 2306.14048), by pages
//! instead of tokens and with the prompt pinned.
//!
//! Masses are summed over the steps. Old pages have had more time to collect, which is the method's known bias; recent
//! pages are protected by the cache as under every policy.

use super::{PageMeta, Policy, PolicyInfo};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "h2o",
    summary: "recycle the page that has received the least attention in all (H2O)",
    whole_context: false,
    new: |_, n_layer| {
        Box::new(H2o {
            sums: vec![Vec::new(); n_layer],
        })
    },
};

/// What the page in a slot has received.
#[derive(Clone, Copy, Default)]
struct Sum {
    /// Tells the page from an earlier one in the same slot.
    first_pos: u32,
    mass: f32,
}

struct H2o {
    /// By layer and slot.
    sums: Vec<Vec<Sum>>,
}

impl H2o {
    fn mass(&self, il: usize, page: &PageMeta) -> f32 {
        let sum = self.sums[il][page.slot as usize];
        if sum.first_pos == page.first_pos {
            sum.mass
        } else {
            0.0
        }
    }
}

impl Policy for H2o {
    fn wants_mass(&self) -> bool {
        true
    }

    fn refresh(&mut self, il: usize, pages: &mut [PageMeta], now: u32) {
        for p in pages {
            let mass = self.mass(il, p) + p.w;
            self.sums[il][p.slot as usize] = Sum {
                first_pos: p.first_pos,
                mass,
            };
            p.stamp = now;
        }
    }

    fn victim(
        &mut self,
        il: usize,
        pages: &[PageMeta],
        may: &dyn Fn(usize) -> bool,
    ) -> Option<usize> {
        let mass = |i: usize| self.mass(il, &pages[i]);
        (0..pages.len())
            .filter(|&i| may(i))
            .min_by(|&a, &b| mass(a).total_cmp(&mass(b)).then(a.cmp(&b)))
    }

    fn reserve(&mut self, n_slots: usize) {
        for layer in &mut self.sums {
            layer.resize(n_slots, Sum::default());
        }
    }

    fn reset(&mut self) {
        for layer in &mut self.sums {
            layer.fill(Sum::default());
        }
    }
}
