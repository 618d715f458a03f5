//! What a model writes must not drive the terminal.
//!
//! A model can emit any byte, by accident or because a document asked it to: an escape sequence that rewrites the title bar, reads
//! back the clipboard, moves the cursor over what was printed before, or a bidirectional override that shows code in another order
//! than it runs. The filter removes all of these and passes everything else, including every printable script.
//!
//! It is a state machine because text arrives in pieces: an escape at the end of one piece continues in the next. It works on
//! characters, so it cannot cut one in half. It is used only when stdout is a terminal; a pipe gets the text as it is.

/// Control strings (OSC, DCS, …) that were opened and never closed end after this many characters, so that a stray introducer
/// cannot hide the rest of an answer.
const MAX_STRING: usize = 4096;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Ground,
    /// After ESC.
    Escape,
    /// After ESC and an intermediate byte (`ESC ( B`).
    Intermediate,
    /// In a control sequence, up to its final byte.
    Csi,
    /// In a control string with this many characters seen, up to BEL or ST.
    Str(usize),
    /// In a control string after ESC: a backslash ends it.
    StrEscape(usize),
}

/// A stateful filter over pieces of text.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    state: State,
}

impl Filter {
    /// Appends what is safe of `text` to `out`.
    pub(crate) fn push(&mut self, text: &str, out: &mut String) {
        for c in text.chars() {
            self.state = match self.state {
                State::Ground => ground(c, out),
                State::Escape => match c {
                    '[' => State::Csi,
                    ']' | 'P' | 'X' | '^' | '_' => State::Str(0),
                    ' '..='/' => State::Intermediate,
                    '\u{1b}' => State::Escape,
                    '\n' => ground(c, out),
                    _ => State::Ground,
                },
                State::Intermediate => match c {
                    ' '..='/' => State::Intermediate,
                    '\u{1b}' => State::Escape,
                    '0'..='~' => State::Ground,
                    _ => ground(c, out),
                },
                State::Csi => match c {
                    // Parameters and intermediates.
                    ' '..='?' => State::Csi,
                    '@'..='~' => State::Ground,
                    // A terminal would give up the sequence here as well.
                    _ => ground(c, out),
                },
                State::Str(n) => match c {
                    '\u{7}' | '\u{9c}' | '\u{18}' | '\u{1a}' => State::Ground,
                    '\u{1b}' => State::StrEscape(n),
                    '\n' => ground(c, out),
                    _ if n >= MAX_STRING => State::Ground,
                    _ => State::Str(n + 1),
                },
                State::StrEscape(n) => match c {
                    '\\' => State::Ground,
                    '[' => State::Csi,
                    ']' | 'P' | 'X' | '^' | '_' => State::Str(n),
                    '\u{1b}' => State::StrEscape(n),
                    _ => State::Str(n + 1),
                },
            };
        }
    }

    /// The safe part of `text`.
    pub(crate) fn clean(&mut self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        self.push(text, &mut out);
        out
    }
}

fn ground(c: char, out: &mut String) -> State {
    match c {
        '\n' | '\t' => out.push(c),
        '\u{1b}' => return State::Escape,
        '\u{9b}' => return State::Csi,
        '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => return State::Str(0),
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' => {}
        // Bidirectional embeddings, overrides and isolates.
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
        _ => out.push(c),
    }
    State::Ground
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str) -> String {
        Filter::default().clean(text)
    }

    #[test]
    fn passes_text_of_every_script() {
        let text = "naïve — 数学 ∀x∈ℝ 👩‍👩‍👧 עברית العربية\n\ttabbed";
        assert_eq!(clean(text), text);
    }

    #[test]
    fn removes_sequences() {
        assert_eq!(clean("a\x1b[31mred\x1b[0mb"), "aredb");
        assert_eq!(clean("a\x1b[?1049hb"), "ab");
        assert_eq!(clean("a\x1b]0;title\x07b"), "ab");
        assert_eq!(clean("a\x1b]52;c;aGk=\x1b\\b"), "ab");
        assert_eq!(clean("a\x1bPq#0;2\x1b\\b"), "ab");
        assert_eq!(clean("a\x1b(Bb\x1b=c\x1bcd"), "abcd");
        assert_eq!(clean("a\u{9b}31mb\u{9d}0;x\u{9c}c\u{85}d"), "abcd");
    }

    #[test]
    fn removes_controls_and_overrides() {
        assert_eq!(clean("a\rb\x08c\0d\x7fe\x07"), "abcde");
        assert_eq!(clean("if \u{202e}}{\u{2066} ok\u{2069}"), "if }{ ok");
    }

    #[test]
    fn remembers_across_pieces() {
        let text = "a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ b\x1b[1;31mc é\u{9b}0md";
        let whole = clean(text);
        assert_eq!(whole, "alink bc éd");
        // Cut at every character boundary, and into single characters.
        for (cut, _) in text.char_indices() {
            let mut f = Filter::default();
            let mut out = String::new();
            f.push(&text[..cut], &mut out);
            f.push(&text[cut..], &mut out);
            assert_eq!(out, whole, "cut at {cut}");
        }
        let mut f = Filter::default();
        let mut out = String::new();
        for c in text.chars() {
            f.push(c.encode_utf8(&mut [0; 4]), &mut out);
        }
        assert_eq!(out, whole);
    }

    #[test]
    fn an_unclosed_string_does_not_hide_the_answer() {
        assert_eq!(clean("a\x1b]0;never closed\nthe answer"), "a\nthe answer");
        let long = format!("\x1b]{}tail", "x".repeat(MAX_STRING + 1));
        assert_eq!(clean(&long), "tail");
    }

    #[test]
    fn nothing_that_comes_out_is_a_control() {
        // Every pair of interesting characters, then text.
        let set = [
            '\x1b', '[', ']', 'P', '\\', '\x07', '\u{9b}', '\u{9c}', '\n', 'm', '(', '\u{18}',
            '\u{202e}', 'é', '0',
        ];
        for a in set {
            for b in set {
                for c in set {
                    let out = clean(&[a, b, c, 'x'].iter().collect::<String>());
                    assert!(
                        out.chars().all(|c| c == '\n' || !c.is_control()),
                        "{a:?} {b:?} {c:?} gave {out:?}"
                    );
                }
            }
        }
    }
}
