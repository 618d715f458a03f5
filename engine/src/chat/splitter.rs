//! Sorting a streamed reply into thinking and answer.

use super::thinking::{Effect, Tag, ThinkTags};

/// What a piece of a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Thinking.
    Thinking,
    /// The answer.
    Answer,
    /// A tag or the header of a message; never passed on.
    Tag,
}

/// Text of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// [`Part::Thinking`] or [`Part::Answer`].
    pub part: Part,
    /// The text, not empty.
    pub text: String,
}

/// Sorts the tokens of a reply into thinking and answer while they arrive.
///
/// A tag that is a token of its own is recognised by its id, so the same characters written out in ordinary tokens
/// are just text. A tag that the vocabulary does not have is looked for in the text, across the borders of tokens;
/// as long as the end of the text could be the beginning of a tag it is held back.
///
/// White space around tags is dropped: at the beginning of thinking and of the answer.
#[derive(Debug, Clone)]
pub struct ThinkSplitter {
    tags: Vec<Tag>,
    part: Part,
    /// The header so far, while `part` is `Tag`.
    header: String,
    /// Whether the header is one line.
    in_line: bool,
    /// Text that may turn out to be the beginning of a tag.
    held: String,
    /// At the beginning of a part, where white space is dropped.
    at_start: bool,
}

impl ThinkSplitter {
    /// Starts where `prompt` ends: thinking if the template has opened it, else in the answer, which may still turn
    /// to thinking when the model opens it. Without tags all is answer.
    pub fn new(tags: Option<&ThinkTags>, prompt: &str) -> Self {
        let mut s = Self {
            tags: tags.map(|t| t.tags.clone()).unwrap_or_default(),
            part: Part::Answer,
            header: String::new(),
            in_line: false,
            held: String::new(),
            at_start: tags.is_some(),
        };
        let Some(tags) = tags else { return s };
        let end = prompt.trim_end();
        if !tags.has_channels() {
            if end.ends_with(tags.open()) {
                s.part = Part::Thinking;
            }
            return s;
        }
        // The last message of the prompt is open; its header tells.
        if let Some(at) = prompt.rfind("<|start|>") {
            let open = &prompt[at + "<|start|>".len()..];
            match open.split_once("<|message|>") {
                Some((header, _)) => s.part = channel(header),
                None => {
                    s.part = Part::Tag;
                    s.header = open.to_owned();
                }
            }
        }
        s
    }

    /// What the next text will be, unless a tag comes first.
    pub fn part(&self) -> Part {
        self.part
    }

    /// Takes a token with the text it adds to the reply and appends what can be shown now to `out`. Returns what the
    /// token counts as. For special tokens `text` may be empty.
    pub fn push(&mut self, id: u32, text: &str, out: &mut Vec<Piece>) -> Part {
        if let Some(tag) = self.tags.iter().position(|t| t.id == Some(id)) {
            self.flush(out);
            self.enter(tag);
            return Part::Tag;
        }
        let before = self.part;
        if self.tags.iter().all(|t| t.id.is_some()) {
            self.emit(text, out);
            return before;
        }
        self.held.push_str(text);
        let mut was_tag = false;
        while let Some((at, tag)) = self.find() {
            let rest = self.held.split_off(at);
            self.flush(out);
            self.held = rest[self.tags[tag].text.len()..].to_owned();
            self.enter_keeping_held(tag);
            was_tag = true;
        }
        let keep = self.partial();
        let rest = self.held.split_off(self.held.len() - keep);
        self.flush(out);
        self.held = rest;
        if was_tag { Part::Tag } else { before }
    }

    /// The reply is over: appends what was held back.
    pub fn finish(&mut self, out: &mut Vec<Piece>) {
        self.flush(out);
        // A header that never came to its end is what the model said.
        if std::mem::take(&mut self.in_line) {
            let header = std::mem::take(&mut self.header);
            self.part = Part::Answer;
            self.emit(&header, out);
        }
    }

    /// First tag in the held text among those that are not single tokens.
    fn find(&self) -> Option<(usize, usize)> {
        self.text_tags()
            .filter_map(|(i, t)| Some((self.held.find(t.text.as_str())?, i)))
            .min()
    }

    /// Length of the longest end of the held text with which a tag begins.
    fn partial(&self) -> usize {
        let held = self.held.as_bytes();
        self.text_tags()
            .flat_map(|(_, t)| {
                let tag = t.text.as_bytes();
                (1..tag.len().min(held.len() + 1)).filter(move |&n| held.ends_with(&tag[..n]))
            })
            .filter(|&n| self.held.is_char_boundary(self.held.len() - n))
            .max()
            .unwrap_or(0)
    }

    fn text_tags(&self) -> impl Iterator<Item = (usize, &Tag)> {
        self.tags.iter().enumerate().filter(|(_, t)| t.id.is_none())
    }

    fn flush(&mut self, out: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        self.emit(&held, out);
    }

    fn emit(&mut self, text: &str, out: &mut Vec<Piece>) {
        if self.part == Part::Tag {
            self.header.push_str(text);
            if self.in_line
                && let Some((name, rest)) = self.header.split_once('\n')
            {
                self.part = match name.trim() {
                    "thought" => Part::Thinking,
                    _ => Part::Answer,
                };
                let rest = rest.to_owned();
                (self.in_line, self.at_start) = (false, true);
                self.emit(&rest, out);
            }
            return;
        }
        let text = if self.at_start {
            text.trim_start()
        } else {
            text
        };
        if text.is_empty() {
            return;
        }
        self.at_start = false;
        match out.last_mut() {
            Some(last) if last.part == self.part => last.text.push_str(text),
            _ => out.push(Piece {
                part: self.part,
                text: text.to_owned(),
            }),
        }
    }

    fn enter(&mut self, tag: usize) {
        self.held.clear();
        self.enter_keeping_held(tag);
    }

    fn enter_keeping_held(&mut self, tag: usize) {
        self.in_line = false;
        match self.tags[tag].effect {
            Effect::Open => self.part = Part::Thinking,
            Effect::Close => self.part = Part::Answer,
            Effect::Silent if self.part == Part::Tag => {}
            Effect::Silent => {}
            Effect::Channel => {
                self.header.clear();
                (self.part, self.in_line) = (Part::Tag, true);
                return;
            }
            Effect::Header => {
                if self.part != Part::Tag {
                    self.header.clear();
                }
                self.header.push_str(&self.tags[tag].text);
                self.part = Part::Tag;
            }
            Effect::Message => {
                self.part = channel(&self.header);
                self.header.clear();
            }
        }
        self.at_start = true;
    }
}

/// What a message with this header holds. Only the final channel is meant for the user; a message without a channel
/// is from a model that does not use them.
fn channel(header: &str) -> Part {
    match header.rsplit_once("<|channel|>") {
        Some((_, name)) if !name.trim_start().starts_with("final") => Part::Thinking,
        _ => Part::Answer,
    }
}
