//! `random`: prompt, recent pages and a random sample of the rest; seeded, drawn for each layer on its own.
//!
//! The second control: published work found it embarrassingly strong, since a random sample forgets evenly.

use rand_core::Rng;
use rand_pcg::Pcg32;

use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "random",
    summary: "keep the prompt, recent pages and a random sample of the rest (seeded)",
    whole_context: false,
    selects: false,
    new: |o| {
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

    fn value(&mut self, _: &PageMeta, _: u32) -> Value {
        // The least of equal draws is any page with equal chance.
        Value(f64::from(self.rng.next_u32()), 0.0)
    }

    fn reset(&mut self) {
        self.rng = rng(self.seed);
    }
}
