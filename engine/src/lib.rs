//! The engine.

pub mod error;
