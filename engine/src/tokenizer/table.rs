//! Token texts in one arena, and the way back from a text to its id.

use std::hash::BuildHasher as _;

use foldhash::quality::RandomState;

use super::source::TokenizerError;

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

/// A slot of a [`TokenMap`] that nothing is in.
const EMPTY: u64 = u64::MAX;

/// Open-addressing table from text to id over an [`Arena`]: no string is stored twice.
///
/// The hash is keyed at random, so a vocabulary cannot be made to collide.
#[derive(Debug)]
pub(super) struct TokenMap {
    /// The upper half of a text's hash, and its id: few texts need be looked at that are not the one.
    slots: Vec<u64>,
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
        let cap = (texts.len() + texts.len() / 2).next_power_of_two().max(16);
        let mut map = Self {
            slots: vec![EMPTY; cap],
            mask: cap - 1,
            hasher: RandomState::default(),
            n_duplicates: 0,
            max_len: 0,
        };
        let n = texts.len() as u32;
        for first in (0..n).step_by(BATCH) {
            let ids = first..(first + BATCH as u32).min(n);
            let hashes: [u64; BATCH] =
                std::array::from_fn(|i| map.hash(texts.get(first + i as u32)));
            // The slots of a batch are read all at once; one after the other each would be waited for.
            let seen = hashes.iter().map(|h| map.slots[*h as usize & map.mask]);
            std::hint::black_box(seen.fold(0, |all, slot| all ^ slot));
            for (id, hash) in ids.zip(hashes) {
                let text = texts.get(id);
                map.max_len = map.max_len.max(text.len());
                let (slot, found) = map.probe(texts, text, hash);
                map.n_duplicates += usize::from(found.is_some());
                map.slots[slot] = hash & TAG | u64::from(id);
            }
        }
        map
    }

    /// The hasher of the standard library takes several times as long for texts as short as these.
    fn hash(&self, text: &[u8]) -> u64 {
        self.hasher.hash_one(text)
    }

    /// The slot where `text` is or belongs, and the id in it.
    fn probe(&self, texts: &Arena, text: &[u8], hash: u64) -> (usize, Option<u32>) {
        let mut slot = hash as usize & self.mask;
        // At most two of three slots are used, so an empty one ends the walk.
        loop {
            let (tag, id) = (self.slots[slot] & TAG, self.slots[slot] as u32);
            match self.slots[slot] {
                EMPTY => return (slot, None),
                _ if tag == hash & TAG && texts.get(id) == text => return (slot, Some(id)),
                _ => slot = (slot + 1) & self.mask,
            }
        }
    }

    /// Id of `text`.
    pub(super) fn get(&self, texts: &Arena, text: &[u8]) -> Option<u32> {
        if text.len() > self.max_len {
            return None;
        }
        self.probe(texts, text, self.hash(text)).1
    }
}

/// Texts whose hashes are found together.
const BATCH: usize = 32;

/// The part of a hash that a [`TokenMap`] keeps.
const TAG: u64 = 0xffff_ffff_0000_0000;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_is_found_and_no_other() {
        // Lengths around those of words, with bytes that differ at either end, more than a batch of them.
        let text =
            |i: usize| format!("{}{i:04}{}", "<".repeat(i % 9), ">".repeat(i % 7)).into_bytes();
        let mut texts = Arena::default();
        for i in 0..1000 {
            texts.push("", &text(i)).unwrap();
        }
        texts.push("", &text(17)).unwrap();
        let map = TokenMap::new(&texts);
        assert_eq!((map.n_duplicates, map.max_len), (1, 18));
        for i in 0..1000 {
            let id = if i == 17 { 1000 } else { i as u32 };
            assert_eq!(map.get(&texts, &text(i)), Some(id));
        }
        for i in 1000..2000 {
            assert_eq!(map.get(&texts, &text(i)), None);
        }
        assert_eq!(map.get(&texts, b""), None);
        assert_eq!(TokenMap::new(&Arena::default()).get(&texts, b"0"), None);
    }
}
