//! What a policy costs in right answers: problems, a grid of policies and budgets over them, and what comes of it.
//!
//! ```text
//! problem   a question and its answer, from JSON lines
//! answer    whether a reply says it
//! grid      policies × budgets × seeds
//! solve     one problem under one policy
//! workers   many of them side by side, one a core
//! replay    a given chain of tokens under a policy, beside full
//! facts     something said once, asked for thousands of tokens later
//! summary   shares, means, and paired bootstrap intervals
//! ```
//!
//! Nothing here depends on what runs beside it or in what order: a problem, a policy, a budget and a seed give one result.

pub mod answer;
pub mod facts;
pub mod grid;
pub mod problem;
pub mod replay;
pub mod solve;
pub mod summary;
pub mod workers;

use crate::model::Model;

/// FNV-1a, 64 bits.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// Tells models apart: names, types and shapes of all tensors, and the ends of their data. Not a checksum of the file.
pub fn fingerprint(model: &Model) -> String {
    const END: usize = 256;
    let mut h = Fnv::new();
    for t in model.gguf().tensors() {
        h.add(t.name.as_bytes());
        h.add(t.ty.name().as_bytes());
        for n in t.shape() {
            h.add(&n.to_le_bytes());
        }
        let data = t.data;
        h.add(&data[..data.len().min(END)]);
        h.add(&data[data.len().saturating_sub(END)..]);
    }
    format!("{:016x}", h.0)
}

/// Tells texts apart.
pub fn text_hash<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut h = Fnv::new();
    for t in texts {
        h.add(t.as_bytes());
        h.add(&[0xff]);
    }
    format!("{:016x}", h.0)
}
