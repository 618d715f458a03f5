//! `random`: prompt, recent pages and a random sample of the rest; seeded, drawn for each layer on its own.
//!
//! The second control: published work found it embarrassingly strong, since a random sample forgets evenly.

use rand_core::Rng;
use rand_pcg::Pcg32;

use super::{PageMeta, Policy, PolicyInfo};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "random",
    summary: "keep the prompt, recent pages and a random sample of the rest (seeded)",
    whole_context: false,
    new: |o, _| {
        Box::new(Random {
            seed: o.seed,
            rng: rng(o.seed),
        })
    },
};

struct Random {
    seed: u64,
    rng: Pcg32,
}

fn rng(seed: u64) -> Pcg32 {
    Pcg32::new(seed, 0x0a02_bdbf_7bb3_c0a7)
}

impl Policy for Random {
    fn draws(&self) -> bool {
        true
    }

    fn victim(
        &mut self,
        _: usize,
        pages: &[PageMeta],
        may: &dyn Fn(usize) -> bool,
    ) -> Option<usize> {
        let n = (0..pages.len()).filter(|&i| may(i)).count();
        if n == 0 {
            return None;
        }
        // Multiply-shift maps 32 random bits onto 0..n; the bias is below n / 2^32.
        let k = ((u64::from(self.rng.next_u32()) * n as u64) >> 32) as usize;
        (0..pages.len()).filter(|&i| may(i)).nth(k)
    }

    fn reset(&mut self) {
        self.rng = rng(self.seed);
    }
}
