//! `window`: prompt and most recent pages (StreamingLLM, arXiv 2309.17453, with the whole prompt as the sink).
//!
//! First in, first out. With the prompt pinned it is one of the two controls that any policy has to beat.

use super::{PageMeta, Policy, PolicyInfo, Value};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "window",
    summary: "keep the prompt and the most recent pages",
    whole_context: false,
    selects: false,
    new: |_| Box::new(Window),
};

struct Window;

impl Policy for Window {
    fn value(&mut self, page: &PageMeta, _: u32) -> Value {
        Value(f64::from(page.first_pos), 0.0)
    }
}
