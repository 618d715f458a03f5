//! The lemma command.
fn main() {}
