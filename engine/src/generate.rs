//! Turning a prompt into an answer: sample, split thinking from answer, look for the end.

use std::ops::ControlFlow;
use std::time::Instant;

use crate::chat::{Part, Piece, ThinkTags};
use crate::conversation::MARK;
use crate::error::Error;
use crate::grammar::Grammar;
use crate::options::Pin;
use crate::repeat::{Circle, circle};
use crate::sampling::{Choice, Sampled, Sampler, log_prob};
use crate::session::Session;
use crate::tokenizer::Tokenizer;

mod state;

pub(crate) use state::Cut;
use state::{State, Tail};

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
}

/// What a reply begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    let (out, _) = generate_from(Start::Prompt(prompt, kept), session, sampler, tags, o, sink)?;
    Ok(out)
}

/// Where a reply begins.
pub(crate) enum Start<'a> {
    /// Behind a prompt, of which the session holds so many tokens.
    Prompt(&'a Prompt, usize),
    /// Where another was cut. The session is behind that.
    Cut(Box<Cut>),
}

/// [`generate`] from anywhere; also where the reply was cut, if there is something to go on with. What it says then is what follows the
/// [final](Cut::provisional) part of what was said.
///
/// # Errors
/// As [`generate`].
pub(crate) fn generate_from(
    start: Start<'_>,
    session: &mut Session,
    sampler: &mut Sampler,
    tags: Option<&ThinkTags>,
    o: &GenOptions,
    sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<(Outcome, Option<Cut>), Error> {
    let out = reply(start, session, sampler, tags, o, sink);
    session.follow(Choice::Open);
    out
}

/// [`generate_from`], which no device works ahead of afterwards.
fn reply(
    from: Start<'_>,
    session: &mut Session,
    sampler: &mut Sampler,
    tags: Option<&ThinkTags>,
    o: &GenOptions,
    sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<(Outcome, Option<Cut>), Error> {
    let start = Instant::now();
    let model = session.model().clone();
    let tokenizer = model.tokenizer();
    let nothing = Prompt::default();
    let (prompt, kept, cut) = match from {
        Start::Prompt(prompt, kept) => (prompt, kept, None),
        Start::Cut(cut) => (&nothing, 0, Some(cut)),
    };
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
    };
    // A grammar forbids tokens, and which ones is known only when the one before has come. What the model thinks of a token is
    // in the whole row.
    let is_bound = cut.as_deref().map_or(o.grammar.is_some(), Cut::is_bound);
    let choice = |sampler: &Sampler| match is_bound || o.logprobs {
        false => sampler.choice(),
        true => Choice::Open,
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
    let before = match &cut {
        Some(_) => session.tokens(),
        None => &prompt.tokens,
    };
    before.iter().for_each(|&t| sampler.accept(t));
    out.prefill_s = start.elapsed().as_secs_f64();
    if stopped {
        return Ok((out, None));
    }

    let (mut state, mut shown) = match cut {
        Some(cut) => cut.go_on(),
        None => (State::new(o, tags, &prompt.text), Tail::default()),
    };
    let mut detokenizer = tokenizer.detokenizer_from(false, std::mem::take(&mut state.carry));
    let mut pieces: Vec<Piece> = Vec::new();
    let mut pending = None;
    let mut told = session.first_recycle().is_some();
    let mut circling = false;
    let decode_start = Instant::now();
    loop {
        if state.bound.is_done() {
            out.finish = Finish::Eos;
            break;
        }
        if o.n_predict == Some(out.n_think + out.n_answer) {
            out.finish = Finish::Length;
            break;
        }
        let budget_spent = o
            .think_budget
            .is_some_and(|b| state.n_think + out.n_think >= b);
        if state.splitter.part() == Part::Thinking && budget_spent && !state.closed {
            state.closed = true;
            state.forced.extend(
                tags.map(|t| tokenizer.encode(t.close_sequence(), false, true))
                    .unwrap_or_default(),
            );
        }
        let before = state.splitter.part();
        let id = match state.forced.pop_front() {
            Some(id) => id,
            None => {
                let s = match choice(sampler) {
                    Choice::Best => session.best().map(|id| Sampled { id, logprob: 0.0 }),
                    Choice::Draw(d) => Some(sampler.sample_top(|list| session.top(d.top_k, list))?),
                    Choice::Open => None,
                };
                match s {
                    Some(s) => s.id,
                    None => state.bound.sample(sampler, session.logits(), before)?.id,
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
        if tokenizer.is_eog(id) && (!o.ignore_eos || state.bound.holds(before)) {
            out.finish = Finish::Eos;
            break;
        }
        let part = state.splitter.push(id, detokenizer.push(id), &mut pieces);
        state.bound.leave_thinking(before, &pieces)?;
        let (flow, hit) = deliver(&mut pieces, &mut state, &mut shown, &o.stop, &mut out, sink);
        if part == Part::Answer {
            out.n_answer += 1;
        } else {
            out.n_think += 1;
        }
        pending = Some(id);
        if hit {
            out.finish = Finish::Stop;
            break;
        }
        if flow.is_break() {
            out.finish = Finish::Interrupt;
            break;
        }
        if state.bound.is_done() {
            // The last token need not enter the session: there is nothing to go on with.
            (out.finish, pending) = (Finish::Eos, None);
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
            Ok(()) => pending = None,
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
    out.still_thinking = state.splitter.part() != Part::Answer;
    state.n_think += out.n_think;
    let settled = [out.thinking.len(), out.text.len()];
    let (splitter, held) = (state.splitter.clone(), state.held.clone());
    state.carry = detokenizer.carry().clone();
    // What was held back in case it became a tag, a stop string or the rest of a character.
    if out.finish != Finish::Stop {
        let rest = detokenizer.finish().to_owned();
        state.splitter.push(u32::MAX, &rest, &mut pieces);
        state.splitter.finish(&mut pieces);
        let _ = deliver(&mut pieces, &mut state, &mut shown, &o.stop, &mut out, sink);
        pieces.push(Piece {
            part: Part::Answer,
            text: std::mem::take(&mut state.held),
        });
        let _ = deliver(&mut pieces, &mut state, &mut shown, &[], &mut out, sink);
    }
    out.decode_s = decode_start.elapsed().as_secs_f64();
    (state.splitter, state.held) = (splitter, held);
    let provisional = [&out.thinking[settled[0]..], &out.text[settled[1]..]];
    let cut = pending.map(|token| Cut::new(token, state, provisional));
    Ok((out, cut))
}

/// Hands pieces of the reply to the caller; tells whether it wants to go on, and whether a stop string was met.
fn deliver(
    pieces: &mut Vec<Piece>,
    state: &mut State,
    shown: &mut Tail,
    stop: &[String],
    out: &mut Outcome,
    sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> (ControlFlow<()>, bool) {
    let mut flow = ControlFlow::Continue(());
    for Piece { part, text } in pieces.drain(..) {
        let (text, hit) = match part {
            Part::Answer => state.write(stop, &text),
            Part::Thinking | Part::Tag => (text, false),
        };
        let event = match part {
            Part::Tag => continue,
            Part::Thinking => {
                out.thinking.push_str(&text);
                Event::Think(shown.of_thinking(&text))
            }
            Part::Answer => {
                out.text.push_str(&text);
                Event::Text(shown.of_answer(&text))
            }
        };
        if !matches!(event, Event::Think("") | Event::Text("")) {
            let now = sink(event);
            if now.is_break() {
                flow = now;
            }
        }
        if hit {
            return (flow, true);
        }
    }
    (flow, false)
}
