//! Turning a prompt into an answer: sample, split thinking from answer, look for the end.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::chat::{Part, Piece, ThinkSplitter, ThinkTags};
use crate::conversation::MARK;
use crate::error::Error;
use crate::grammar::{Constraint, Grammar};
use crate::options::Pin;
use crate::repeat::{Circle, circle};
use crate::sampling::{Choice, Sampled, Sampler, log_prob};
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// When a reply ends.
#[derive(Clone, Debug, Default)]
pub struct GenOptions {
    /// Most tokens, thinking included; `None` for no limit.
    pub n_predict: Option<usize>,
    /// Strings of the answer that end it; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after an end-of-generation token.
    pub ignore_eos: bool,
    /// Most tokens of thinking; the thinking is then closed and the answer begins.
    pub think_budget: Option<usize>,
    /// Keep the log-probability of every token: that of the model, before anything is done to its logits.
    pub logprobs: bool,
    /// What the answer keeps to. Thinking is free. When the grammar is complete and nothing may follow, the reply ends.
    pub grammar: Option<Grammar>,
    /// What of the answer was said before; the grammar goes on behind it.
    pub said: String,
}

/// What happens during a reply.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Tokens of the prompt processed, and their number.
    Prefill {
        /// Processed.
        done: usize,
        /// In all.
        total: usize,
    },
    /// Thinking.
    Think(&'a str),
    /// Answer.
    Text(&'a str),
    /// The reply repeats itself, word for word, since pages were recycled. Told once.
    Circle(Circle),
    /// The pool is full for the first time: pages are recycled from this position on.
    Recycle {
        /// Position.
        pos: u32,
    },
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-generation token.
    Eos,
    /// A stop string.
    Stop,
    /// The most tokens asked for.
    Length,
    /// The end of the context.
    Position,
    /// Nothing in the pool may be recycled.
    Budget,
    /// The caller.
    Interrupt,
}

impl Finish {
    /// The word in JSON records and the stats line.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Eos => "eos",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Position => "position",
            Finish::Budget => "budget",
            Finish::Interrupt => "interrupt",
        }
    }
}

/// A reply.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The answer.
    pub text: String,
    /// The thinking before it.
    pub thinking: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt, and how many of them the session held already.
    pub n_prompt: usize,
    /// Tokens of the prompt that were reused.
    pub n_cached: usize,
    /// Tokens of thinking, tags included.
    pub n_think: usize,
    /// Tokens of the answer.
    pub n_answer: usize,
    /// Whether the reply ended inside the thinking.
    pub still_thinking: bool,
    /// Seconds for the prompt.
    pub prefill_s: f64,
    /// Seconds for the tokens after the first.
    pub decode_s: f64,
    /// Seconds from the start to the first token.
    pub ttft_s: f64,
    /// Ids and log-probabilities, if asked for: of all tokens, those that closed the thinking and the one that ended the reply too.
    pub logprobs: Vec<(u32, f32)>,
    /// The last token, where it was sampled but did not enter the session.
    pub pending: Option<u32>,
}

/// What a reply begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Ids.
    pub tokens: Vec<u32>,
    /// The text of a rendered prompt, whose end says whether the model is thinking; empty for plain text.
    pub text: String,
    /// Leading tokens that belong to the system message; what [`Pin::System`] pins.
    pub n_system: usize,
}

impl Prompt {
    /// Tokenizes rendered text, control tokens on except across marks.
    pub fn from_marked(tokenizer: &Tokenizer, marked: &str) -> Self {
        let mut text = String::with_capacity(marked.len());
        let mut marks = Vec::new();
        for c in marked.chars() {
            if c == MARK {
                marks.push(text.len());
            } else {
                text.push(c);
            }
        }
        // Templates usually write the beginning-of-sequence token themselves.
        let bos = tokenizer
            .bos()
            .and_then(|id| tokenizer.token_text(id))
            .unwrap_or_default();
        let has_bos = !bos.is_empty() && text.as_bytes().starts_with(bos);
        let tokens = tokenizer.encode_marked(&text, &marks, !has_bos);
        Self {
            tokens,
            text,
            n_system: 0,
        }
    }

    /// Tokenizes plain text to be continued.
    pub fn raw(tokenizer: &Tokenizer, text: &str, parse_special: bool) -> Self {
        Self {
            tokens: tokenizer.encode(text, true, parse_special),
            text: String::new(),
            n_system: 0,
        }
    }
}

/// Tokens between two looks for repetition.
const CHECK_EVERY: usize = 32;

/// Processes `prompt.tokens[kept..]` and samples until something ends the reply.
///
/// # Errors
/// Those of [`Session::prefill`]; of sampling when the model's logits are not numbers.
pub fn generate(
    session: &mut Session,
    prompt: &Prompt,
    kept: usize,
    sampler: &mut Sampler,
    tags: Option<&ThinkTags>,
    o: &GenOptions,
    sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Outcome, Error> {
    let out = reply(session, prompt, kept, sampler, tags, o, sink);
    session.follow(Choice::Open);
    out
}

/// [`generate`], which no device works ahead of afterwards.
fn reply(
    session: &mut Session,
    prompt: &Prompt,
    kept: usize,
    sampler: &mut Sampler,
    tags: Option<&ThinkTags>,
    o: &GenOptions,
    sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Outcome, Error> {
    let start = Instant::now();
    let model = session.model().clone();
    let tokenizer = model.tokenizer();
    let mut out = Outcome {
        text: String::new(),
        thinking: String::new(),
        finish: Finish::Interrupt,
        n_prompt: prompt.tokens.len(),
        n_cached: kept,
        n_think: 0,
        n_answer: 0,
        still_thinking: false,
        prefill_s: 0.0,
        decode_s: 0.0,
        ttft_s: 0.0,
        logprobs: Vec::new(),
        pending: None,
    };
    // A grammar forbids tokens, and which ones is known only when the one before has come. What the model thinks of a token is
    // in the whole row.
    let choice = |sampler: &Sampler| match o.grammar {
        None if !o.logprobs => sampler.choice(),
        _ => Choice::Open,
    };
    session.follow(choice(sampler));
    let fresh = &prompt.tokens[kept..];
    let mut stopped = false;
    if !fresh.is_empty() {
        let n_pinned = match session.pin() {
            Pin::Prompt => fresh.len(),
            Pin::System => prompt.n_system.saturating_sub(kept),
            Pin::None => 0,
        };
        session.prefill(fresh, n_pinned, &mut |done, total| {
            let flow = sink(Event::Prefill { done, total });
            stopped = flow.is_break() && done < total;
            flow
        })?;
    }
    for &t in &prompt.tokens {
        sampler.accept(t);
    }
    out.prefill_s = start.elapsed().as_secs_f64();
    if stopped {
        return Ok(out);
    }

    let mut splitter = ThinkSplitter::new(tags, &prompt.text);
    let mut bound = Bound::new(o, tags, prompt)?;
    let mut detokenizer = tokenizer.detokenizer(false);
    let mut pieces: Vec<Piece> = Vec::new();
    let mut forced: std::collections::VecDeque<u32> = std::collections::VecDeque::new();
    let mut closed = false;
    let mut writer = Writer {
        stop: &o.stop,
        held: String::new(),
    };
    let mut told = session.first_recycle().is_some();
    let mut circling = false;
    let decode_start = Instant::now();
    loop {
        if bound.is_done() {
            out.finish = Finish::Eos;
            break;
        }
        if o.n_predict == Some(out.n_think + out.n_answer) {
            out.finish = Finish::Length;
            break;
        }
        let budget_spent = o.think_budget.is_some_and(|b| out.n_think >= b);
        if splitter.part() == Part::Thinking && budget_spent && !closed {
            closed = true;
            forced.extend(
                tags.map(|t| tokenizer.encode(t.close_sequence(), false, true))
                    .unwrap_or_default(),
            );
        }
        let before = splitter.part();
        let id = match forced.pop_front() {
            Some(id) => id,
            None => {
                let s = match choice(sampler) {
                    Choice::Best => session.best().map(|id| Sampled { id, logprob: 0.0 }),
                    Choice::Draw(d) => Some(sampler.sample_top(|list| session.top(d.top_k, list))?),
                    Choice::Open => None,
                };
                match s {
                    Some(s) => s.id,
                    None => bound.sample(sampler, session.logits(), before)?.id,
                }
            }
        };
        if o.logprobs {
            out.logprobs.push((id, log_prob(session.logits(), id)));
        }
        sampler.accept(id);
        if out.n_think + out.n_answer == 0 {
            out.ttft_s = start.elapsed().as_secs_f64();
        }
        // Behind the end of a grammar there is nothing to go on with.
        if tokenizer.is_eog(id) && (!o.ignore_eos || bound.holds(before)) {
            out.finish = Finish::Eos;
            break;
        }
        let part = splitter.push(id, detokenizer.push(id), &mut pieces);
        bound.leave_thinking(before, &pieces)?;
        let (flow, hit) = deliver(&mut pieces, &mut writer, &mut out, sink);
        if part == Part::Answer {
            out.n_answer += 1;
        } else {
            out.n_think += 1;
        }
        out.pending = Some(id);
        if hit {
            out.finish = Finish::Stop;
            break;
        }
        if flow.is_break() {
            out.finish = Finish::Interrupt;
            break;
        }
        if bound.is_done() {
            // The last token need not enter the session: there is nothing to go on with.
            (out.finish, out.pending) = (Finish::Eos, None);
            break;
        }
        if session.pos() >= session.n_ctx() {
            out.finish = Finish::Position;
            break;
        }
        if o.n_predict == Some(out.n_think + out.n_answer) {
            out.finish = Finish::Length;
            break;
        }
        session.follow(choice(sampler));
        match session.decode(id) {
            Ok(()) => out.pending = None,
            Err(Error::PromptTooLong(_)) => {
                out.finish = Finish::Budget;
                break;
            }
            Err(e) => return Err(e),
        }
        let n = out.n_think + out.n_answer;
        if !circling && told && n.is_multiple_of(CHECK_EVERY) {
            let from = session.tokens().len() - n.min(session.tokens().len());
            if let Some(found) = circle(&session.tokens()[from..]) {
                circling = true;
                if sink(Event::Circle(found)).is_break() {
                    out.finish = Finish::Interrupt;
                    break;
                }
            }
        }
        if !told && let Some(pos) = session.first_recycle() {
            told = true;
            if sink(Event::Recycle { pos }).is_break() {
                out.finish = Finish::Interrupt;
                break;
            }
        }
    }
    out.still_thinking = splitter.part() != Part::Answer;
    // What was held back in case it became a tag, a stop string or the rest of a character.
    if out.finish != Finish::Stop {
        let rest = detokenizer.finish().to_owned();
        splitter.push(u32::MAX, &rest, &mut pieces);
        splitter.finish(&mut pieces);
        let _ = deliver(&mut pieces, &mut writer, &mut out, sink);
        if !writer.held.is_empty() {
            out.text.push_str(&writer.held);
            let _ = sink(Event::Text(&writer.held));
        }
    }
    out.decode_s = decode_start.elapsed().as_secs_f64();
    Ok(out)
}

/// The grammar of a reply, if it has one.
struct Bound {
    constraint: Option<Constraint>,
    /// The token that opens thinking, as long as it may still come.
    open: Option<u32>,
}

impl Bound {
    fn new(o: &GenOptions, tags: Option<&ThinkTags>, prompt: &Prompt) -> Result<Self, Error> {
        let mut constraint = o.grammar.as_ref().map(Grammar::start);
        if let Some(c) = &mut constraint {
            c.accept_text(&o.said)?;
        }
        // Some models open their thinking themselves, as the first thing they say. Where the prompt holds an empty thought they
        // are not meant to.
        let open = tags
            .filter(|t| o.said.is_empty() && !prompt.text.trim_end().ends_with(t.close()))
            .and_then(ThinkTags::open_id);
        Ok(Self { constraint, open })
    }

    /// Whether the grammar rules what comes next; `part` is what the reply is in.
    fn holds(&self, part: Part) -> bool {
        self.constraint.is_some() && part == Part::Answer
    }

    /// Draws a token that the grammar allows and tells it.
    fn sample(
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
    fn leave_thinking(&mut self, before: Part, pieces: &[Piece]) -> Result<(), Error> {
        if let Some(c) = self.constraint.as_mut().filter(|_| before != Part::Answer) {
            let answer = pieces.iter().filter(|p| p.part == Part::Answer);
            for piece in answer {
                c.accept_text(&piece.text)?;
            }
        }
        Ok(())
    }

    /// The answer is complete and nothing may follow.
    fn is_done(&self) -> bool {
        self.constraint.as_ref().is_some_and(Constraint::is_done)
    }
}

/// Hands pieces of the reply to the caller; tells whether it wants to go on, and whether a stop string was met.
fn deliver(
    pieces: &mut Vec<Piece>,
    writer: &mut Writer<'_>,
    out: &mut Outcome,
    sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> (ControlFlow<()>, bool) {
    let mut flow = ControlFlow::Continue(());
    for Piece { part, text } in pieces.drain(..) {
        let now = match part {
            Part::Tag => continue,
            Part::Thinking => {
                out.thinking.push_str(&text);
                sink(Event::Think(&text))
            }
            Part::Answer => {
                let (shown, hit) = writer.push(&text);
                out.text.push_str(&shown);
                let now = if shown.is_empty() {
                    flow
                } else {
                    sink(Event::Text(&shown))
                };
                if hit {
                    return (now, true);
                }
                now
            }
        };
        if now.is_break() {
            flow = now;
        }
    }
    (flow, false)
}

/// Holds back the tail of the answer that may be the beginning of a stop string.
struct Writer<'a> {
    stop: &'a [String],
    held: String,
}

impl Writer<'_> {
    /// What can be shown now, and whether a stop string was met.
    fn push(&mut self, text: &str) -> (String, bool) {
        if self.stop.iter().all(String::is_empty) {
            return (text.to_owned(), false);
        }
        self.held.push_str(text);
        let found = self
            .stop
            .iter()
            .filter(|s| !s.is_empty())
            .filter_map(|s| self.held.find(s.as_str()))
            .min();
        if let Some(at) = found {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            return (shown, true);
        }
        let keep = self
            .stop
            .iter()
            .map(|s| overlap(&self.held, s))
            .max()
            .unwrap_or(0);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_are_found_across_pieces() {
        let stop = vec!["END".to_owned(), "\n\n".to_owned()];
        let mut w = Writer {
            stop: &stop,
            held: String::new(),
        };
        assert_eq!(w.push("one E"), ("one ".to_owned(), false));
        assert_eq!(w.push("N"), (String::new(), false));
        assert_eq!(w.push("x\n"), ("ENx".to_owned(), false));
        assert_eq!(w.push("y E"), ("\ny ".to_owned(), false));
        assert_eq!(w.push("ND more"), (String::new(), true));
    }
}
