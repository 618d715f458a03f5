//! From messages to a prompt, and from a reply to thinking and answer.
//!
//! [`ChatTemplate`] renders the Jinja template that comes with a model ([`render`](ChatTemplate::render)), the way
//! Hugging Face transformers does: `trim_blocks` and `lstrip_blocks`, `break` and `continue`, the `generation` tag,
//! `raise_exception`, `strftime_now`, `tojson` with the formatting of Python's `json.dumps`, and the methods of
//! Python's strings and dictionaries. Where Python raises a `TypeError` on `None` or undefined values, rendering may
//! go on instead.
//!
//! A template is a program from a file that nobody has vetted. It runs with a budget of instructions and bytes that
//! grows with the input, a limit on nesting and a limit on the size of source and output; passing any of them is an
//! ordinary error. It sees the messages, the tools and the variables passed to it, and nothing of the machine but
//! the date.
//!
//! [`ThinkTags`] finds how a model marks its thinking, [`ThinkSplitter`] sorts the reply accordingly, and
//! [`ReasoningSwitch`] knows how to turn thinking on and off.

mod json;
mod named;
mod pycompat;
mod splitter;
mod switch;
mod template;
mod thinking;
mod time;

#[cfg(test)]
mod tests;

pub use named::{TEMPLATE_NAMES, named_template};
pub use splitter::{Part, Piece, ThinkSplitter};
pub use switch::{Reasoning, ReasoningSwitch};
pub use template::{ChatTemplate, Message, RenderInput, ToolCall};
pub use thinking::ThinkTags;
pub use time::CivilTime;

/// Why a chat template could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The source is longer than any template has reason to be.
    #[error("chat template is {found} bytes long, at most {limit} are accepted")]
    SourceTooLong {
        /// Length of the source in bytes.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The source is not a valid template.
    #[error("chat template does not parse: {0}")]
    Syntax(String),
    /// The template refused the conversation (`raise_exception`).
    #[error("chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template ran into an error.
    #[error("chat template failed: {0}")]
    Failed(String),
    /// There is no memory for the stack that templates run on.
    #[error("chat template: a thread with a stack of {}, {found}", crate::memory::show(*.stack))]
    NoThread {
        /// Bytes of the stack.
        stack: u64,
        /// What the system says.
        found: String,
    },
    /// The template used up its budget, or went too deep.
    #[error("chat template was stopped: {0}")]
    Limit(&'static str),
    /// The messages are not what a template can take.
    #[error("messages: {0}")]
    BadMessages(String),
    /// There is no built-in template of this name.
    #[error("unknown chat template {found:?}, expected one of: {expected}")]
    UnknownName {
        /// The name asked for.
        found: String,
        /// All names, separated by commas.
        expected: String,
    },
}

impl From<ChatError> for crate::error::Error {
    fn from(e: ChatError) -> Self {
        match e {
            ChatError::SourceTooLong { .. } | ChatError::Syntax(_) => Self::malformed(e),
            ChatError::BadMessages(_) | ChatError::UnknownName { .. } => Self::usage(e),
            ChatError::NoThread { .. } => Self::memory(e),
            ChatError::Refused(_) | ChatError::Failed(_) | ChatError::Limit(_) => Self::runtime(e),
        }
    }
}
