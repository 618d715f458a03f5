//! What a reply is in the middle of: enough to go on with one that was cut as if it had not been.

use std::collections::VecDeque;

use super::GenOptions;
use crate::chat::{Part, Piece, ThinkSplitter, ThinkTags};
use crate::error::Error;
use crate::grammar::{Constraint, Grammar};
use crate::sampling::{Sampled, Sampler};
use crate::tokenizer::Utf8Carry;

/// The middle of a reply.
pub(super) struct State {
    pub(super) splitter: ThinkSplitter,
    /// The beginning of a character.
    pub(super) carry: Utf8Carry,
    pub(super) bound: Bound,
    /// The tail of the answer that may be the beginning of a stop string.
    pub(super) held: String,
    /// Tokens that close the thinking, still to come.
    pub(super) forced: VecDeque<u32>,
    /// Whether they have begun to.
    pub(super) closed: bool,
    /// Tokens of thinking before the reply was last cut.
    pub(super) n_think: usize,
}

impl State {
    /// Where the rendered `prompt` ends.
    pub(super) fn new(o: &GenOptions, tags: Option<&ThinkTags>, prompt: &str) -> Self {
        Self {
            splitter: ThinkSplitter::new(tags, prompt),
            carry: Utf8Carry::default(),
            bound: Bound::new(o, tags, prompt),
            held: String::new(),
            forced: VecDeque::new(),
            closed: false,
            n_think: 0,
        }
    }

    /// Takes text of the answer; what can be shown now, and whether one of the stop strings was met.
    pub(super) fn write(&mut self, stop: &[String], text: &str) -> (String, bool) {
        self.held.push_str(text);
        let stop = || stop.iter().filter(|s| !s.is_empty());
        let found = stop().filter_map(|s| self.held.find(s.as_str())).min();
        if let Some(at) = found {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            return (shown, true);
        }
        let keep = stop().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Length of the longest tail of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(i, c)| i + c.len_utf8())
        .filter(|&n| n < stop.len() && text.ends_with(&stop[..n]))
        .max()
        .unwrap_or(0)
}

/// A reply that was cut.
pub(crate) struct Cut {
    token: u32,
    state: State,
    /// Of thinking and answer.
    provisional: Tail,
}

impl Cut {
    /// With a `token` that was sampled and shown, but did not enter the session, and what was shown of what the state holds back.
    pub(super) fn new(token: u32, state: State, [thinking, answer]: [&str; 2]) -> Self {
        let provisional = Tail {
            thinking: thinking.to_owned(),
            answer: answer.to_owned(),
        };
        Self {
            token,
            state,
            provisional,
        }
    }

    pub(super) fn go_on(self) -> (State, Tail) {
        (self.state, self.provisional)
    }

    /// Whether a grammar rules what comes.
    pub(super) fn is_bound(&self) -> bool {
        self.state.bound.constraint.is_some()
    }

    /// The token that is to enter the session first.
    pub(crate) fn token(&self) -> u32 {
        self.token
    }

    /// What thinking and answer ended in only because they were cut: half of a character, or what might have become a tag or a stop
    /// string. A reply that goes on says it again, as it is by then.
    pub(crate) fn provisional(&self) -> [&str; 2] {
        [&self.provisional.thinking, &self.provisional.answer]
    }
}

/// What was shown already of what comes next.
#[derive(Default)]
pub(super) struct Tail {
    thinking: String,
    answer: String,
}

impl Tail {
    /// What of `text` is new.
    pub(super) fn of_thinking<'t>(&mut self, text: &'t str) -> &'t str {
        new_of(&mut self.thinking, text)
    }

    /// What of `text` is new.
    pub(super) fn of_answer<'t>(&mut self, text: &'t str) -> &'t str {
        new_of(&mut self.answer, text)
    }
}

/// What of `text` was not `shown`, of which what it begins with is taken off.
fn new_of<'t>(shown: &mut String, text: &'t str) -> &'t str {
    if shown.starts_with(text) {
        shown.drain(..text.len());
        return "";
    }
    // It has turned out otherwise, or goes beyond.
    let shown = std::mem::take(shown);
    let both = shown.chars().zip(text.chars());
    let same = both.take_while(|(a, b)| a == b);
    &text[same.map(|(a, _)| a.len_utf8()).sum::<usize>()..]
}

/// The grammar of a reply, if it has one.
pub(super) struct Bound {
    constraint: Option<Constraint>,
    /// The token that opens thinking, as long as it may still come.
    open: Option<u32>,
}

impl Bound {
    fn new(o: &GenOptions, tags: Option<&ThinkTags>, prompt: &str) -> Self {
        // Some models open their thinking themselves, as the first thing they say. Where the prompt holds an empty thought they
        // are not meant to.
        let open = tags
            .filter(|t| !prompt.trim_end().ends_with(t.close()))
            .and_then(ThinkTags::open_id);
        Self {
            constraint: o.grammar.as_ref().map(Grammar::start),
            open,
        }
    }

    /// Whether the grammar rules what comes next; `part` is what the reply is in.
    pub(super) fn holds(&self, part: Part) -> bool {
        self.constraint.is_some() && part == Part::Answer
    }

    /// Draws a token that the grammar allows and tells it.
    pub(super) fn sample(
        &mut self,
        sampler: &mut Sampler,
        logits: &[f32],
        part: Part,
    ) -> Result<Sampled, Error> {
        let open = self.open.take();
        let Some(c) = self.constraint.as_mut().filter(|_| part == Part::Answer) else {
            return Ok(sampler.sample(logits)?);
        };
        let mask = c.mask()?;
        let s = sampler.sample_masked(logits, |row| mask.apply(row, open))?;
        if open != Some(s.id) {
            c.accept(s.id)?;
        }
        Ok(s)
    }

    /// A closing tag of several tokens may end inside one; what is left of that is answer.
    pub(super) fn leave_thinking(&mut self, before: Part, pieces: &[Piece]) -> Result<(), Error> {
        if let Some(c) = self.constraint.as_mut().filter(|_| before != Part::Answer) {
            let answer = pieces.iter().filter(|p| p.part == Part::Answer);
            for piece in answer {
                c.accept_text(&piece.text)?;
            }
        }
        Ok(())
    }

    /// The answer is complete and nothing may follow.
    pub(super) fn is_done(&self) -> bool {
        self.constraint.as_ref().is_some_and(Constraint::is_done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_are_found_across_pieces() {
        let stop = vec!["END".to_owned(), "\n\n".to_owned()];
        let mut s = State::new(&GenOptions::default(), None, "");
        let mut write = |text| s.write(&stop, text);
        assert_eq!(write("one E"), ("one ".to_owned(), false));
        assert_eq!(write("N"), (String::new(), false));
        assert_eq!(write("x\n"), ("ENx".to_owned(), false));
        assert_eq!(write("y E"), ("\ny ".to_owned(), false));
        assert_eq!(write("ND more"), (String::new(), true));
    }

    #[test]
    fn what_was_shown_is_not_shown_again() {
        let mut t = Tail {
            thinking: "\u{fffd}".to_owned(),
            answer: "EN".to_owned(),
        };
        assert_eq!(t.of_thinking("😀!"), "😀!");
        assert_eq!(t.of_thinking("\u{fffd}"), "\u{fffd}");
        assert_eq!(
            [t.of_answer("E"), t.of_answer(""), t.of_answer("Nx")],
            ["", "", "x"]
        );
        assert_eq!(t.of_answer("EN"), "EN");
    }
}
