//! `window`: prompt and most recent pages (StreamingLLM, arXiv 2309.17453, with the whole prompt as the sink).
//!
//! First in, first out. With the prompt pinned it is one of the two controls that any policy has to beat.

use super::{PageMeta, Policy, PolicyInfo};

pub(super) const INFO: PolicyInfo = PolicyInfo {
    name: "window",
    summary: "keep the prompt and the most recent pages",
    whole_context: false,
    new: |_, _| Box::new(Window),
};

struct Window;

impl Policy for Window {
    fn victim(
        &mut self,
        _: usize,
        pages: &[PageMeta],
        may: &dyn Fn(usize) -> bool,
    ) -> Option<usize> {
        (0..pages.len()).find(|&i| may(i))
    }
}
