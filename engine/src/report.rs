//! Errors in the one form that people read: what was found, what was expected.

use std::fmt::Display;

use crate::error::Error;

fn line(found: impl Display, expected: impl Display) -> String {
    format!("{found}, expected {expected}")
}

/// [`Error::Malformed`] of a file.
pub(crate) fn malformed(file: &str, found: impl Display, expected: impl Display) -> Error {
    Error::malformed_in(file, line(found, expected))
}

/// [`Error::Unsupported`] of a file.
pub(crate) fn unsupported(file: &str, found: impl Display, expected: impl Display) -> Error {
    Error::unsupported_in(file, line(found, expected))
}

/// [`Error::Usage`].
pub(crate) fn usage(found: impl Display, expected: impl Display) -> Error {
    Error::usage(line(found, expected))
}

/// [`Error::Memory`].
pub(crate) fn memory(found: impl Display, expected: impl Display) -> Error {
    Error::memory(line(found, expected))
}

/// [`Error::PromptTooLong`].
pub(crate) fn prompt_too_long(found: impl Display, expected: impl Display) -> Error {
    Error::prompt_too_long(line(found, expected))
}
