//! The engine: GGUF loading, tokenizer, chat templates, architectures, KV pool and policies, sampling, sessions.
//!
//! ```text
//! Model::load ──► Session ──► Conversation            (what a program uses)
//!   gguf, tokenizer,   │
//!   chat, hparams      ├─ kv::Cache + policy          (books of the pool)
//!                      └─ backend::Runner             (the pool, the weights, the passes)
//!                             arch::forward over Backend's verbs
//! ```
//!
//! Libraries are silent: what they have to say goes through [`log`], and failures are [`error::Error`]s of one line.

pub mod arch;
pub mod backend;
pub mod chat;
pub mod conversation;
pub mod error;
pub mod eval;
pub mod generate;
pub mod gguf;
pub mod grammar;
pub mod kv;
pub mod memory;
pub mod model;
pub mod options;
pub mod quantize;
pub mod repeat;
mod report;
pub mod sampling;
pub mod session;
pub mod spelling;
pub mod synth;
pub mod tokenizer;
