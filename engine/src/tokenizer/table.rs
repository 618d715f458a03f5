//! Token texts in one arena, and the way back from a text to its id.

use super::source::TokenizerError;
use std::hash::{BuildHasher, RandomState};

/// A list of byte strings in one allocation.
#[derive(Debug, Default)]
pub(super) struct Arena {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Arena {
    /// An arena with room for `n` strings of `bytes` bytes in all.
    pub(super) fn with_capacity(n: usize, bytes: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(bytes),
            ends: Vec::with_capacity(n),
        }
    }

    /// Appends one string. Errors when the arena outgrows 32-bit offsets.
    pub(super) fn push(&mut self, what: &'static str, s: &[u8]) -> Result<(), TokenizerError> {
        self.bytes.extend_from_slice(s);
        let end = u32::try_from(self.bytes.len()).map_err(|_| TokenizerError::TooLarge {
            what,
            got: self.bytes.len(),
            limit: u32::MAX as usize,
        })?;
        self.ends.push(end);
        Ok(())
    }

    /// Number of strings.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// String `i`; empty when there is none.
    pub(super) fn get(&self, i: u32) -> &[u8] {
        let i = i as usize;
        let Some(&end) = self.ends.get(i) else {
            return &[];
        };
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// All strings in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.ends.len() as u32).map(|i| self.get(i))
    }
}

const EMPTY: u32 = u32::MAX;

/// Open-addressing table from text to id over an [`Arena`]: no string is stored twice.
///
/// The hash is keyed at random, so a vocabulary cannot be made to collide.
#[derive(Debug)]
pub(super) struct TokenMap {
    slots: Vec<u32>,
    mask: usize,
    hasher: RandomState,
    /// Ids whose text had been seen before.
    pub(super) n_duplicates: usize,
    /// Length in bytes of the longest text.
    pub(super) max_len: usize,
}

impl TokenMap {
    /// Indexes every text of `texts`. Of equal texts the last id wins, as in llama.cpp.
    pub(super) fn new(texts: &Arena) -> Self {
        let cap = (texts.len() * 2).next_power_of_two().max(16);
        let mut map = Self {
            slots: vec![EMPTY; cap],
            mask: cap - 1,
            hasher: RandomState::new(),
            n_duplicates: 0,
            max_len: 0,
        };
        for (id, text) in texts.iter().enumerate() {
            map.max_len = map.max_len.max(text.len());
            let (slot, found) = map.probe(texts, text);
            map.n_duplicates += usize::from(found.is_some());
            map.slots[slot] = id as u32;
        }
        map
    }

    /// The slot where `text` is or belongs, and the id in it.
    fn probe(&self, texts: &Arena, text: &[u8]) -> (usize, Option<u32>) {
        let mut slot = self.hasher.hash_one(text) as usize & self.mask;
        // At most half of the slots are used, so an empty one ends the walk.
        loop {
            match self.slots[slot] {
                EMPTY => return (slot, None),
                id if texts.get(id) == text => return (slot, Some(id)),
                _ => slot = (slot + 1) & self.mask,
            }
        }
    }

    /// Id of `text`.
    pub(super) fn get(&self, texts: &Arena, text: &[u8]) -> Option<u32> {
        if text.len() > self.max_len {
            return None;
        }
        self.probe(texts, text).1
    }
}

/// The character that stands for `byte` in byte-level vocabularies (GPT-2's printable alphabet).
pub(super) fn byte_to_char(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
        0xad => 0x143,
    };
    char::from_u32(code).unwrap_or('?')
}

/// Inverse of [`byte_to_char`].
pub(super) fn char_to_byte(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Value of a byte token, `<0xHH>`.
pub(super) fn parse_byte_token(text: &[u8]) -> Option<u8> {
    let hex = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    if hex.len() != 2 || !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()
}

/// Text of the byte token of `byte`.
pub(super) fn byte_token(byte: u8) -> [u8; 6] {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    [
        b'<',
        b'0',
        b'x',
        HEX[usize::from(byte >> 4)],
        HEX[usize::from(byte & 15)],
        b'>',
    ]
}
