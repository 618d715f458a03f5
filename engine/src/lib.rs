//! The engine.

pub mod error;
pub mod gguf;
pub mod tokenizer;
