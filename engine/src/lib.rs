//! The engine.

pub mod error;
pub mod gguf;
