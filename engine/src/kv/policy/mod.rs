//! Which pages of the pool deserve to stay.
//!
//! A policy is asked two things: after a step, which pages mattered ([`Policy::refresh`]); and what a page is worth
//! ([`Policy::value`]): when the pool is full, the one worth least gives its slot away. Everything else (pinning, recent pages,
//! slots) belongs to the [cache](super::Cache) and is the same for all, so policies differ in nothing but their judgement. What they note about
//! a page stands in its [`PageMeta`] and goes with it.
//!
//! A policy is one file here and one line in [`POLICIES`]; the command line, its completion and the tests read that table.

mod full;
mod h2o;
mod hits;
mod lag;
mod lrfu;
mod quest;
mod raas;
mod random;
mod window;

use super::PageMeta;
use super::take::{Asked, Candidate};
use crate::options::KvOptions;

/// What a page is worth: by the first number, among equals by the second. What is left equal is decided by position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value(pub f64, pub f64);

impl Value {
    /// Whether this is less than `other`; a total order.
    #[inline]
    pub fn order(&self, other: &Self) -> std::cmp::Ordering {
        let first = self.0.total_cmp(&other.0);
        first.then(self.1.total_cmp(&other.1))
    }
}

/// The judgement of a KV policy. One object serves every table of a sequence.
pub trait Policy: Send {
    /// Whether [`Policy::refresh`] wants page masses; if not, a backend need not leave them.
    fn wants_mass(&self) -> bool {
        false
    }

    /// Whether its decisions depend on a seed.
    fn draws(&self) -> bool {
        false
    }

    /// After step `now`, the `pages` of a table (live, in position order) carry their new masses in `w`.
    fn refresh(&mut self, pages: &mut [PageMeta], now: u32) {
        let _ = (pages, now);
    }

    /// What a page is worth at step `now`. Comparable between tables.
    fn value(&mut self, page: &PageMeta, now: u32) -> Value;

    /// The page worth least at step `now` among those of a table that are asked to go. For no policy to define: it stands here so that
    /// there is a loop for each, and one virtual call a table where there were two a page, for which a GPU waits.
    fn least(&mut self, pages: &[PageMeta], asked: &Asked, now: u32) -> Option<Candidate> {
        let asked = asked.among(pages, |p| self.value(p, now));
        asked.reduce(|least, c| if c.order(&least).is_lt() { c } else { least })
    }

    /// The last pages of a table that stay in any case, if it has `room` slots for pages that are not pinned; the cache's own number
    /// holds if that is more.
    fn recent(&self, room: usize) -> usize {
        let _ = room;
        0
    }

    /// Makes room for tables of `n_pages` pages, so that a step allocates nothing.
    fn reserve(&mut self, n_pages: usize) {
        let _ = n_pages;
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
    /// Whether a step attends only to the best pages, as many as the budget has.
    pub selects: bool,
    /// Makes the policy.
    pub new: fn(&KvOptions) -> Box<dyn Policy>,
}

/// Every KV policy.
pub static POLICIES: &[PolicyInfo] = &[
    raas::INFO,
    full::INFO,
    window::INFO,
    random::INFO,
    h2o::INFO,
    lrfu::INFO,
    lag::INFO,
    quest::INFO,
];

/// Looks a policy up by name.
pub fn find(name: &str) -> Option<&'static PolicyInfo> {
    POLICIES.iter().find(|p| p.name == name)
}
