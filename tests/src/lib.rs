//! Cross-crate tests: helpers shared by the files in `tests/`.
