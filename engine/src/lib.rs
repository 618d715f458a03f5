//! The engine.

pub mod error;
pub mod gguf;
pub mod sampling;
pub mod tokenizer;
pub mod synth;
