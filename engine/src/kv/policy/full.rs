//! `full`: keep everything. The pool is as large as the context; the accuracy that the others are measured against.

use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "full",
    summary: "keep every page; the pool is as large as the context",
    whole_context: true,
    selects: false,
    new: |_| Box::new(Full),
};

struct Full;

impl Policy for Full {
    fn value(&mut self, page: &PageMeta, _: u32) -> Value {
        Value(f64::from(page.first_pos), 0.0)
    }
}
