//! `quest`: keep everything, attend to the pages that promise most (Quest, arXiv 2406.10774).
//!
//! Each step estimates the mass of every page from the bounds of its keys (see [`Score::Bound`](crate::options::Score::Bound); the largest
//! over the query heads of a layer counts) and attends to as many as the budget has: the prompt and the current page in any case,
//! then the best. Time per token follows the budget, memory the context: the accuracy that a policy which forgets can hope for.

use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "quest",
    summary: "keep every page, attend to the best within the budget (Quest); memory as full",
    whole_context: true,
    selects: true,
    new: |_| Box::new(Quest),
};

struct Quest;

impl Policy for Quest {
    fn value(&mut self, page: &PageMeta, _: u32) -> Value {
        Value(f64::from(page.first_pos), 0.0)
    }
}
