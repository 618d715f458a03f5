//! `full`: keep everything. The pool is as large as the context; the accuracy that the others are measured against.

use super::{PageMeta, Policy, PolicyInfo};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "full",
    summary: "keep every page; the pool is as large as the context",
    whole_context: true,
    new: |_, _| Box::new(Full),
};

struct Full;

impl Policy for Full {
    fn victim(&mut self, _: usize, _: &[PageMeta], _: &dyn Fn(usize) -> bool) -> Option<usize> {
        None
    }
}
