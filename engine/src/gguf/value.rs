//! Metadata values as they lie in the file: their types, and iterators that read them in place.

use super::guard::{le_u32, le_u64};

/// Type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ValueKind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueKind {
    /// The type with the number `id` of the GGUF specification.
    pub fn from_id(id: u32) -> Option<Self> {
        use ValueKind::*;
        [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ]
        .get(id as usize)
        .copied()
    }

    /// The number of the type in a file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// Short lower-case name, as errors and listings show it.
    pub fn name(self) -> &'static str {
        match self {
            ValueKind::U8 => "u8",
            ValueKind::I8 => "i8",
            ValueKind::U16 => "u16",
            ValueKind::I16 => "i16",
            ValueKind::U32 => "u32",
            ValueKind::I32 => "i32",
            ValueKind::F32 => "f32",
            ValueKind::Bool => "bool",
            ValueKind::String => "string",
            ValueKind::Array => "array",
            ValueKind::U64 => "u64",
            ValueKind::I64 => "i64",
            ValueKind::F64 => "f64",
        }
    }

    /// Size in bytes of a scalar; of strings and arrays, the fewest bytes one can take.
    pub(super) fn min_bytes(self) -> u64 {
        match self {
            ValueKind::U8 | ValueKind::I8 | ValueKind::Bool => 1,
            ValueKind::U16 | ValueKind::I16 => 2,
            ValueKind::U32 | ValueKind::I32 | ValueKind::F32 => 4,
            ValueKind::U64 | ValueKind::I64 | ValueKind::F64 | ValueKind::String => 8,
            ValueKind::Array => 12,
        }
    }

    pub(super) fn is_integer(self) -> bool {
        use ValueKind::*;
        matches!(self, U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
    }
}

/// A metadata value, read in place.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum Value<'a> {
    /// Any of the integer types.
    Int {
        kind: ValueKind,
        value: i128,
    },
    F32(f32),
    F64(f64),
    Bool(bool),
    /// Text; usually UTF-8, but nobody has checked.
    Str(&'a [u8]),
    Array(Array<'a>),
}

impl Value<'_> {
    /// Type of the value in the file.
    pub fn kind(&self) -> ValueKind {
        match self {
            Value::Int { kind, .. } => *kind,
            Value::F32(_) => ValueKind::F32,
            Value::F64(_) => ValueKind::F64,
            Value::Bool(_) => ValueKind::Bool,
            Value::Str(_) => ValueKind::String,
            Value::Array(_) => ValueKind::Array,
        }
    }

    /// Type for errors: `u32`, or `array of 4 f32`.
    pub(super) fn describe(&self) -> String {
        match self {
            Value::Array(a) => format!("array of {} {}", a.len, a.elem.name()),
            v => v.kind().name().to_owned(),
        }
    }
}

/// An array of a metadata value, read in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Array<'a> {
    pub(super) elem: ValueKind,
    pub(super) len: usize,
    pub(super) bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Type of the elements.
    pub fn elem(&self) -> ValueKind {
        self.elem
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as byte strings; `None` unless this is an array of strings.
    pub fn strings(&self) -> Option<Strings<'a>> {
        (self.elem == ValueKind::String).then_some(Strings {
            bytes: self.bytes,
            left: self.len,
        })
    }

    /// The elements as f32; `None` unless they are f32.
    pub fn f32s(&self) -> Option<impl ExactSizeIterator<Item = f32> + Clone + use<'a>> {
        let words = self.bytes.chunks_exact(4);
        (self.elem == ValueKind::F32).then(|| words.map(|b| f32::from_bits(le_u32(b))))
    }

    /// The elements as integers of any type; `None` unless they are integers.
    pub fn ints(&self) -> Option<impl ExactSizeIterator<Item = i128> + Clone + use<'a>> {
        let kind = self.elem;
        let size = kind.min_bytes() as usize;
        kind.is_integer()
            .then(|| self.bytes.chunks_exact(size).map(move |b| int(kind, b)))
    }

    /// The elements as bools; `None` unless they are bools.
    pub fn bools(&self) -> Option<impl ExactSizeIterator<Item = bool> + Clone + use<'a>> {
        (self.elem == ValueKind::Bool).then(|| self.bytes.iter().map(|b| *b != 0))
    }

    /// All elements as values; arrays in arrays are left out (no known file has them).
    pub fn values(&self) -> Box<dyn Iterator<Item = Value<'a>> + 'a> {
        let kind = self.elem;
        match kind {
            ValueKind::Array => Box::new(std::iter::empty()),
            ValueKind::String => Box::new(
                Strings {
                    bytes: self.bytes,
                    left: self.len,
                }
                .map(Value::Str),
            ),
            _ => Box::new(
                self.bytes
                    .chunks_exact(kind.min_bytes() as usize)
                    .map(move |b| scalar(kind, b)),
            ),
        }
    }
}

/// Iterator over the byte strings of an array, such as the tokens of a vocabulary.
#[derive(Debug, Clone)]
pub struct Strings<'a> {
    bytes: &'a [u8],
    left: usize,
}

impl Strings<'_> {
    /// Bytes that are left, those of lengths among them.
    pub(crate) fn n_bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        // The guard has walked these lengths; `get` keeps a mistake (or a file that changes) from becoming a panic.
        let len = usize::try_from(le_u64(self.bytes.get(..8)?)).ok()?;
        let text = self.bytes.get(8..)?.get(..len)?;
        self.bytes = &self.bytes[8 + len..];
        Some(text)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// An integer of `kind` in `b`, which has its size.
pub(super) fn int(kind: ValueKind, b: &[u8]) -> i128 {
    match kind {
        ValueKind::U8 => i128::from(b[0]),
        ValueKind::I8 => i128::from(b[0] as i8),
        ValueKind::U16 => i128::from(u16::from_le_bytes([b[0], b[1]])),
        ValueKind::I16 => i128::from(i16::from_le_bytes([b[0], b[1]])),
        ValueKind::U32 => i128::from(le_u32(b)),
        ValueKind::I32 => i128::from(le_u32(b) as i32),
        ValueKind::I64 => i128::from(le_u64(b) as i64),
        _ => i128::from(le_u64(b)),
    }
}

/// A scalar (not a string, not an array) of `kind` in `b`, which has its size.
pub(super) fn scalar<'a>(kind: ValueKind, b: &[u8]) -> Value<'a> {
    match kind {
        ValueKind::F32 => Value::F32(f32::from_bits(le_u32(b))),
        ValueKind::F64 => Value::F64(f64::from_bits(le_u64(b))),
        ValueKind::Bool => Value::Bool(b[0] != 0),
        kind => Value::Int {
            kind,
            value: int(kind, b),
        },
    }
}
