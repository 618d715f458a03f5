//! Which pages of the pool deserve to stay.
//!
//! A policy is asked two things: after a step, which pages mattered ([`Policy::refresh`]); and when the pool of a layer is full,
//! which page gives its slot away ([`Policy::victim`]). Everything else (pinning, recent pages, slots) belongs to the
//! [cache](super::Cache) and is the same for all, so policies differ in nothing but their judgement.
//!
//! A policy is one file here and one line in [`POLICIES`]; the command line, its completion and the tests read that table.

mod full;
mod h2o;
mod raas;
mod random;
mod window;

use super::PageMeta;
use crate::options::KvOptions;

/// The judgement of a KV policy. One object serves every layer of a sequence.
pub trait Policy: Send {
    /// Whether [`Policy::refresh`] wants page masses; if not, a backend need not leave them.
    fn wants_mass(&self) -> bool {
        false
    }

    /// Whether its decisions depend on a seed.
    fn draws(&self) -> bool {
        false
    }

    /// After step `now`, `pages` of layer `il` (live, in position order) carry their new masses in `w`.
    fn refresh(&mut self, il: usize, pages: &mut [PageMeta], now: u32) {
        let _ = (il, pages, now);
    }

    /// Index in `pages` of the one to recycle in layer `il`, or `None` if no page may be. `may(i)` tells whether page `i` is
    /// neither pinned nor recent.
    fn victim(
        &mut self,
        il: usize,
        pages: &[PageMeta],
        may: &dyn Fn(usize) -> bool,
    ) -> Option<usize>;

    /// Makes room for tables of `n_slots` pages, so that a step allocates nothing.
    fn reserve(&mut self, n_slots: usize) {
        let _ = n_slots;
    }

    /// Forgets everything: a new sequence begins.
    fn reset(&mut self) {}
}

/// A line of the policy table.
pub struct PolicyInfo {
    /// The value of `--kv-policy`.
    pub name: &'static str,
    /// One sentence for `--help`.
    pub summary: &'static str,
    /// Whether the pool is as large as the context, so that nothing is ever recycled.
    pub whole_context: bool,
    /// Makes the policy for a model of `n_layer` layers.
    pub new: fn(&KvOptions, n_layer: usize) -> Box<dyn Policy>,
}

/// Every KV policy.
pub static POLICIES: &[PolicyInfo] = &[
    raas::INFO,
    full::INFO,
    window::INFO,
    random::INFO,
    h2o::INFO,
];

/// Looks a policy up by name.
pub fn find(name: &str) -> Option<&'static PolicyInfo> {
    POLICIES.iter().find(|p| p.name == name)
}
