//! Typed access to the metadata of a GGUF file.
//!
//! Values are read from their place in the file, by the type the file gives them: going through the decoder's JSON
//! values would lose the type, NaN, and every byte string that is not UTF-8, and cost a copy of the vocabulary.
//! Every getter comes in two forms: `u32(key)` fails if the key is missing, `opt_u32(key)` returns `None` then. A value
//! of the wrong type is an error in both, naming the key, the type found and the type expected.

use super::guard::{Header, KvSpan};
use super::value::{Array, Strings, Value, ValueKind, scalar};
use crate::error::{Error, NAME_MAX, Result, escape};

/// The metadata of one file; a cheap view.
#[derive(Debug, Clone, Copy)]
pub struct Meta<'a> {
    pub(super) file: &'a str,
    pub(super) bytes: &'a [u8],
    pub(super) header: &'a Header,
    /// Indices into `header.kv`, sorted by key.
    pub(super) sorted: &'a [u32],
}

/// Generates the required and the optional getter of one type from a conversion.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident $opt:ident -> $ty:ty, $expected:literal, $convert:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            /// [`Error::Malformed`] if the key is missing, of another type or out of range.
            pub fn $name(&self, key: &str) -> Result<$ty> {
                self.$opt(key)?.ok_or_else(|| self.missing(key, $expected))
            }

            $(#[$doc])*
            /// `None` if the key is missing.
            ///
            /// # Errors
            /// [`Error::Malformed`] if the value is of another type or out of range.
            pub fn $opt(&self, key: &str) -> Result<Option<$ty>> {
                let Some(value) = self.get(key) else { return Ok(None) };
                let convert: fn(Value<'a>) -> Option<$ty> = $convert;
                convert(value).map(Some).ok_or_else(|| self.wrong(key, &value, $expected))
            }
        )*
    };
}

impl<'a> Meta<'a> {
    /// Name of the file the metadata comes from.
    pub fn file(&self) -> &'a str {
        self.file
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.header.kv.len()
    }

    /// True if the file has no metadata.
    pub fn is_empty(&self) -> bool {
        self.header.kv.is_empty()
    }

    /// All keys and values, in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, Value<'a>)> + use<'a> {
        let meta = *self;
        self.header
            .kv
            .iter()
            .map(move |p| (meta.key_of(p), meta.value_of(p)))
    }

    /// All keys with the bytes of their pairs, in file order: what [`Builder::entry`](super::write::Builder::entry) takes.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        let meta = *self;
        let pairs = self.header.kv.iter();
        pairs.map(move |p| (meta.key_of(p), &meta.bytes[p.entry.clone()]))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        let kv = &self.header.kv;
        let found = self
            .sorted
            .binary_search_by(|i| self.key_of(&kv[*i as usize]).cmp(key))
            .ok()?;
        Some(self.value_of(&kv[self.sorted[found] as usize]))
    }

    getters! {
        /// A non-negative integer of any width that fits 32 bits.
        u32 opt_u32 -> u32, "u32", |v| match v { Value::Int { value, .. } => u32::try_from(value).ok(), _ => None };
        /// A non-negative integer of any width.
        u64 opt_u64 -> u64, "u64", |v| match v { Value::Int { value, .. } => u64::try_from(value).ok(), _ => None };
        /// A floating-point number; f64 is rounded.
        f32 opt_f32 -> f32, "f32", |v| match v {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => None,
        };
        /// A bool.
        bool opt_bool -> bool, "bool", |v| match v { Value::Bool(b) => Some(b), _ => None };
        /// A string that is UTF-8.
        str opt_str -> &'a str, "string (UTF-8)", |v| match v {
            Value::Str(s) => std::str::from_utf8(s).ok(),
            _ => None,
        };
        /// A string of any bytes.
        bytes opt_bytes -> &'a [u8], "string", |v| match v { Value::Str(s) => Some(s), _ => None };
        /// An array of any element type.
        array opt_array -> Array<'a>, "array", |v| match v { Value::Array(a) => Some(a), _ => None };
        /// The elements of an array of strings, in place: tokens, merges.
        strings opt_strings -> Strings<'a>, "array of string", |v| match v {
            Value::Array(a) => a.strings(),
            _ => None,
        };
    }

    /// The elements of an array of f32, in place: token scores. `None` if the key is missing.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the value is anything else.
    pub fn opt_f32s(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = f32> + Clone + use<'a>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value {
            Value::Array(a) => a.f32s(),
            _ => None,
        }
        .map(Some)
        .ok_or_else(|| self.wrong(key, &value, "array of f32"))
    }

    /// The elements of an array of integers that fit i32, in place: token types. `None` if the key is missing.
    /// A value beyond i32 is clamped to its range.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the value is anything else.
    pub fn opt_i32s(
        &self,
        key: &str,
    ) -> Result<Option<impl ExactSizeIterator<Item = i32> + Clone + use<'a>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let clamp = |v: i128| v.clamp(i128::from(i32::MIN), i128::from(i32::MAX)) as i32;
        match value {
            Value::Array(a) => a.ints().map(|ints| ints.map(clamp)),
            _ => None,
        }
        .map(Some)
        .ok_or_else(|| self.wrong(key, &value, "array of i32"))
    }

    /// A number per layer: an array of exactly `n`, or one number for all (`attention.head_count`,
    /// `feed_forward_length`). `None` if the key is missing.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the array has another length or a value is not a u32.
    pub fn opt_u32_per_layer(&self, key: &str, n: usize) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let expected = || format!("u32 or an array of {n}");
        match value {
            Value::Array(a) => {
                let ints = a.ints().filter(|ints| ints.len() == n);
                ints.and_then(|mut ints| {
                    ints.try_fold(Vec::with_capacity(n), |mut all, v| {
                        all.push(u32::try_from(v).ok()?);
                        Some(all)
                    })
                })
            }
            Value::Int { value, .. } => u32::try_from(value).ok().map(|v| vec![v; n]),
            _ => None,
        }
        .map(Some)
        .ok_or_else(|| self.wrong(key, &value, &expected()))
    }

    /// The error for a missing key.
    pub fn missing(&self, key: &str, expected: &str) -> Error {
        Error::malformed_in(
            self.file,
            format!(
                "metadata key '{}' is missing, expected {expected}",
                escape(key, NAME_MAX)
            ),
        )
    }

    /// The error for a value nobody can use, for checks beyond types: `key is VALUE, expected EXPECTED`.
    pub fn invalid(&self, key: &str, found: impl std::fmt::Display, expected: &str) -> Error {
        let (key, found) = (escape(key, NAME_MAX), escape(found.to_string(), NAME_MAX));
        Error::malformed_in(
            self.file,
            format!("metadata key '{key}' is {found}, expected {expected}"),
        )
    }

    fn wrong(&self, key: &str, found: &Value<'_>, expected: &str) -> Error {
        let found = match found {
            Value::Int { value, kind } => format!("{value} ({})", kind.name()),
            v => format!("of type {}", v.describe()),
        };
        self.invalid(key, found, expected)
    }

    fn key_of(&self, pair: &KvSpan) -> &'a str {
        // The guard has accepted the key as UTF-8; an empty key matches nothing should the file have changed since.
        std::str::from_utf8(&self.bytes[pair.key.clone()]).unwrap_or("")
    }

    fn value_of(&self, pair: &KvSpan) -> Value<'a> {
        let bytes = &self.bytes[pair.value.clone()];
        match (pair.kind, pair.array) {
            (ValueKind::String, _) => Value::Str(bytes),
            (ValueKind::Array, Some((elem, n))) => Value::Array(Array {
                elem,
                len: n as usize,
                bytes,
            }),
            (kind, _) => scalar(kind, bytes),
        }
    }
}
