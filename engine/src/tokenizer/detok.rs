//! From tokens back to text: whole sequences, and one token at a time.

use super::Tokenizer;
use super::vocab::{CONTROL, UNKNOWN};

impl Tokenizer {
    /// The bytes `id` stands for; empty for control and unknown tokens unless `special`, and for ids out of range.
    ///
    /// The bytes of one token need not be valid UTF-8.
    pub fn token_bytes(&self, id: u32, special: bool) -> &[u8] {
        if !special && self.vocab.bits(id) & (UNKNOWN | CONTROL) != 0 {
            return &[];
        }
        self.vocab.piece(id)
    }

    /// The bytes of a sequence, as llama.cpp's `llama_detokenize` gives them.
    ///
    /// `remove_special` drops the beginning- and end-of-sequence tokens that [`encode`](Self::encode) adds;
    /// `unparse_special` shows control tokens. A space that encoding put in front is removed, and vocabularies that ask
    /// for it have the space before punctuation and contractions removed.
    pub fn decode(&self, ids: &[u32], remove_special: bool, unparse_special: bool) -> Vec<u8> {
        let vocab = &self.vocab;
        let mut ids = ids;
        let mut remove_space = vocab.add_space_prefix;
        if remove_special
            && vocab.add_bos
            && let [first, rest @ ..] = ids
            && Some(*first) == vocab.ids.bos
        {
            remove_space = false;
            ids = rest;
        }
        if remove_special
            && vocab.add_eos
            && let [rest @ .., last] = ids
            && Some(*last) == vocab.ids.eos
        {
            ids = rest;
        }
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            let piece = self.token_bytes(id, unparse_special);
            let piece = if remove_space {
                piece.strip_prefix(b" ").unwrap_or(piece)
            } else {
                piece
            };
            remove_space = false;
            out.extend_from_slice(piece);
        }
        if vocab.clean_spaces {
            clean_spaces(out)
        } else {
            out
        }
    }

    /// A streaming detokenizer; `special` shows control tokens.
    pub fn detokenizer(&self, special: bool) -> Detokenizer<'_> {
        self.detokenizer_from(special, Utf8Carry::default())
    }

    /// One that goes on behind the beginning of a character.
    pub fn detokenizer_from(&self, special: bool, carry: Utf8Carry) -> Detokenizer<'_> {
        Detokenizer {
            tokenizer: self,
            special,
            carry,
        }
    }
}

/// Three passes, each over the result of the one before: spaces before `?!.,`, spaces on both sides of a lone
/// apostrophe, and spaces before `'s 'm 're 've`.
fn clean_spaces(text: Vec<u8>) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::with_capacity(text.len());
    for &x in &text {
        if matches!(x, b'?' | b'!' | b'.' | b',') && out.last() == Some(&b' ') {
            out.pop();
        }
        out.push(x);
    }

    let text = out;
    let mut out: Vec<u8> = Vec::with_capacity(text.len());
    let mut i = 0;
    let mut after_removed = false;
    while i < text.len() {
        let x = text[i];
        let lone = x == b'\''
            && i > 0
            && !after_removed
            && text[i - 1] == b' '
            && text.get(i + 1) == Some(&b' ');
        after_removed = lone;
        if lone {
            out.pop();
            i += 1;
        }
        out.push(x);
        i += 1;
    }

    let text = out;
    let mut out: Vec<u8> = Vec::with_capacity(text.len());
    for (i, &x) in text.iter().enumerate() {
        let contraction = x == b'\''
            && i > 0
            && text[i - 1] == b' '
            && matches!(
                (text.get(i + 1), text.get(i + 2)),
                (Some(b's' | b'm'), _) | (Some(b'r' | b'v'), Some(b'e'))
            );
        if contraction {
            out.pop();
        }
        out.push(x);
    }
    out
}

/// Gives text as soon as its characters are complete.
#[derive(Debug, Clone)]
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    special: bool,
    carry: Utf8Carry,
}

impl Detokenizer<'_> {
    /// Adds a token and returns the text that is complete now: whole characters, and U+FFFD for bytes that can no
    /// longer become one.
    pub fn push(&mut self, id: u32) -> &str {
        self.carry
            .push(self.tokenizer.token_bytes(id, self.special))
    }

    /// Ends the stream: an incomplete character becomes U+FFFD. The detokenizer can be used anew.
    pub fn finish(&mut self) -> &str {
        self.carry.finish()
    }

    /// Bytes of an incomplete character are waiting.
    pub fn is_pending(&self) -> bool {
        self.carry.is_pending()
    }

    /// Those bytes.
    pub fn carry(&self) -> &Utf8Carry {
        &self.carry
    }
}

/// The UTF-8 part of [`Detokenizer`], for those who have bytes.
#[derive(Debug, Clone, Default)]
pub struct Utf8Carry {
    /// At most three bytes: the beginning of a character.
    pending: Vec<u8>,
    text: String,
}

impl Utf8Carry {
    /// Adds bytes and returns the text that is complete now.
    pub fn push(&mut self, bytes: &[u8]) -> &str {
        self.text.clear();
        self.pending.extend_from_slice(bytes);
        let mut kept = self.pending.len();
        let mut consumed = 0;
        for chunk in self.pending.utf8_chunks() {
            self.text.push_str(chunk.valid());
            consumed += chunk.valid().len() + chunk.invalid().len();
            if chunk.invalid().is_empty() {
                continue;
            }
            // Only the last chunk can be a character that the next bytes complete.
            let at_end = consumed == self.pending.len();
            let unfinished =
                std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            if at_end && unfinished {
                kept = consumed - chunk.invalid().len();
            } else {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..kept);
        &self.text
    }

    /// Ends the stream: U+FFFD if a character is incomplete.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
        &self.text
    }

    /// Bytes of an incomplete character are waiting.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carry_emits_whole_characters_only() {
        let mut c = Utf8Carry::default();
        assert_eq!(c.push("é".as_bytes()), "é");
        assert_eq!(c.push(&[0xf0, 0x9f]), "");
        assert!(c.is_pending());
        assert_eq!(c.push(&[0x98]), "");
        assert_eq!(c.push(&[0x80, b'a']), "😀a");
        // A byte that cannot continue is replaced at once and the next character is not swallowed.
        assert_eq!(c.push(&[0xe2, 0x82]), "");
        assert_eq!(c.push(b"x"), "\u{fffd}x");
        assert_eq!(c.push(&[0xff, b'y', 0xc3]), "\u{fffd}y");
        assert_eq!(c.finish(), "\u{fffd}");
        assert_eq!(c.finish(), "");
    }

    #[test]
    fn cleaning_spaces() {
        let clean = |s: &str| String::from_utf8(clean_spaces(s.as_bytes().to_vec())).unwrap();
        assert_eq!(clean("Hi , there . Yes ! No ?"), "Hi, there. Yes! No?");
        assert_eq!(
            clean("it 's we 're I 'm they 've"),
            "it's we're I'm they've"
        );
        assert_eq!(clean("don 't we 'll he 'd"), "don 't we 'll he 'd");
        assert_eq!(clean("a ' b"), "a'b");
        assert_eq!(clean(""), "");
        assert_eq!(clean(" ."), ".");
    }
}
