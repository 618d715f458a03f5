//! `lrfu`: recycle the page whose hits, counted with decay, are worth least.
//!
//! Combined recency and frequency (LRFU; Lee et al., IEEE Transactions on Computers 50(12), 2001), as Crystal-KV uses it for
//! reasoning (arXiv 2601.16986):
//!
//! ```text
//! CRF <- lambda^dt * CRF + hit
//! ```
//!
//! where `dt` is the time since the last step in ticks of the clock (steps, or pages opened) and a hit is what RaaS would stamp. With
//! `lambda` 0 the page hit last is worth most, which is RaaS; with 1 the page hit most often, which is LFU.

use super::hits::Hits;
use super::{PageMeta, Policy, PolicyInfo, Value};
use crate::options::Clock;

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "lrfu",
    summary: "recycle the page with the least hits, older ones counting less (LRFU)",
    whole_context: false,
    selects: false,
    new: |o| {
        Box::new(Lrfu {
            hits: Hits::new(o.refresh),
            decay: match o.clock {
                Clock::Step => o.lambda,
                Clock::Page => o.lambda.powf(1.0 / o.page as f32),
            },
        })
    },
};

struct Lrfu {
    hits: Hits,
    /// Factor of a step.
    decay: f32,
}

impl Policy for Lrfu {
    fn wants_mass(&self) -> bool {
        true
    }

    fn refresh(&mut self, pages: &mut [PageMeta], now: u32) {
        for p in pages.iter_mut() {
            p.sum *= self.decay;
        }
        self.hits.each(pages, |p| {
            p.sum += 1.0;
            p.stamp = now;
        });
    }

    fn value(&mut self, page: &PageMeta, _: u32) -> Value {
        Value(f64::from(page.sum), f64::from(page.stamp))
    }

    fn reserve(&mut self, n_pages: usize) {
        self.hits.reserve(n_pages);
    }
}
