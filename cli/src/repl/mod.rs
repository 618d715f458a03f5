//! The conversation on a terminal.
//!
//! A loop of three steps: read a line, do what it says, show what came of it. Replies go to stdout, everything that is about them
//! (banner, statistics, notes, what commands print) to stderr, so that `lemma 2> notes` keeps the two apart.
//!
//! While a reply is being made the terminal neither echoes nor edits; what is typed then waits for the editor. Ctrl-C stops the
//! reply and keeps what was said, and pressed again it does nothing more; Ctrl-\ ends the program at any time.

mod actions;
mod commands;
mod files;
mod input;
pub(crate) mod kv;
mod pins;
mod transcript;
mod why;

use std::sync::Arc;

use lemma_engine::conversation::{Conversation, PromptOptions, takes_system};
use lemma_engine::generate::{Finish, Outcome};
use lemma_engine::grammar::Grammar;
use lemma_engine::model::Model;
use lemma_engine::session::Session;

use crate::args::config::ModelSource;
use crate::fail::{Failure, MEMORY, PROMPT, Result};
use crate::load::Loaded;
use crate::reply::{Mode, Pool, Printer};
use crate::run::{Config, compile, note_lost_system};
use crate::sampling;
use crate::signals::{Polling, TypeAhead};
use crate::stats::{Stats, grouped};
use crate::term::filter::Filter;
use crate::term::{Term, row};
use crate::trace::Trace;
use crate::{bundled, out};
use commands::Line;
use input::{Input, Reader};
use kv::Spans;
use why::Recent;

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    lemma_engine::memory::show(bytes)
}

/// The last reply.
struct Last {
    outcome: Outcome,
    stats: Stats,
}

/// Whether the loop goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Go,
    Leave,
}

pub(crate) struct Repl {
    config: Config,
    model: Arc<Model>,
    load_ms: f64,
    conversation: Conversation,
    reader: Reader,
    last: Option<Last>,
    spans: Spans,
    /// Replies made so far: each takes the next seed, so that a fixed seed does not mean a fixed reply.
    n_replies: u64,
    base_seed: Option<u64>,
    /// The note about recycling has been shown.
    told_recycling: bool,
    /// The note about a system message that the template has no place for has been shown.
    told_system: bool,
    /// Where recycled pages are written, for a session that is made anew as well.
    trace: Option<Trace>,
    /// What was recycled last.
    recent: Recent,
    /// Pages that /pin has pinned, by their first positions.
    pins: Vec<u32>,
    /// What replies keep to, compiled for the present model.
    grammar: Option<Grammar>,
}

impl Repl {
    pub(crate) fn new(config: Config, loaded: Loaded) -> Result<Self> {
        if config.prompt.chat == Some(false) {
            return Err(
                Failure::usage("-no-cnv continues one text, and there is none")
                    .hint("give it with -p TEXT, -f FILE or on stdin"),
            );
        }
        // A model without a template, or with a broken one, is found out before the first message is typed.
        loaded.model.template()?;
        let grammar = compile(&loaded.model, config.generate.constraint.as_ref())?;
        let mut session = Session::new(loaded.model.clone(), &config.load)?;
        let trace = Trace::open(config.kv_trace.as_deref())?;
        let recent = Recent::default();
        recent.watch(&mut session, trace.as_ref());
        let mut conversation = Conversation::new(session);
        conversation.set_system(config.prompt.system.clone());
        let reader = Reader::new(config.term.out_style)?;
        Ok(Self {
            config,
            model: loaded.model,
            load_ms: loaded.load_ms,
            conversation,
            reader,
            last: None,
            spans: Spans::default(),
            n_replies: 0,
            base_seed: None,
            told_recycling: false,
            told_system: false,
            trace,
            recent,
            pins: Vec::new(),
            grammar,
        })
    }

    /// The loop. `first` is answered before the first prompt.
    pub(crate) fn run(mut self, first: Option<String>) -> Result {
        self.banner();
        self.look_at_system();
        if let Some(text) = first {
            // It may come from a file.
            let shown = Filter::default().clean(&text);
            out::put(&format!("> {shown}\n"))?;
            self.guarded(|r| r.say(text))?;
        }
        loop {
            let next = match self.reader.read()? {
                Input::Line(line) => self.guarded(|r| r.line(&line))?,
                Input::Literal(text) if text.trim().is_empty() => continue,
                Input::Literal(text) => self.guarded(|r| r.say(text))?,
                Input::Cleared => continue,
                Input::End => break,
            };
            if next == Next::Leave || (self.config.prompt.single_turn && self.n_replies > 0) {
                break;
            }
        }
        Ok(())
    }

    /// Runs a step; a failure is shown and the conversation goes on, unless stdout is gone.
    fn guarded(&mut self, step: impl FnOnce(&mut Self) -> Result<Next>) -> Result<Next> {
        match step(self) {
            Ok(next) => Ok(next),
            Err(f) if f.is_quiet() => Err(f),
            Err(f) => {
                out::failure(&f, self.config.term.err_style);
                Ok(Next::Go)
            }
        }
    }

    fn line(&mut self, line: &str) -> Result<Next> {
        match commands::parse(line) {
            Line::Empty => Ok(Next::Go),
            Line::Message(text) => self.say(text),
            Line::Command(action, rest) => self.act(action, rest),
            Line::TooMuch(name) => Err(Failure::usage(format!("{name} takes nothing behind it"))),
            Line::Unknown(name) => {
                let f = Failure::usage(format!("unknown command {}", crate::term::escape(name)));
                Err(match commands::nearest(name) {
                    Some(near) => f.hint(format!("did you mean {near}? A message that begins with a slash is sent with //")),
                    None => f.hint("/help lists the commands; a message that begins with a slash is sent with //"),
                })
            }
        }
    }

    /// Says it if the system message is lost on this model.
    fn look_at_system(&mut self) {
        if self.conversation.system().is_some() && !self.told_system && !takes_system(&self.model) {
            self.told_system = true;
            note_lost_system(self.config.term.err_style);
        }
    }

    fn banner(&self) {
        let style = self.config.term.err_style;
        let (dim, bold, reset) = (style.dim(), style.bold(), style.reset());
        let kv = self.conversation.session().kv();
        let mut text = format!(
            "{bold}lemma {}{reset}  {}",
            env!("CARGO_PKG_VERSION"),
            self.model.name()
        );
        let session = self.conversation.session();
        let facts = [
            self.model.arch().to_string(),
            format!("{} of weights", size(session.plan().weights)),
            format!("{} positions", grouped(u64::from(session.n_ctx()))),
            format!(
                "KV pool {} ({} tokens, {})",
                size(kv.bytes),
                grouped((kv.n_slots * kv.page) as u64),
                kv.policy
            ),
        ];
        text.push_str(&format!("\n{dim}{}{reset}\n", row(&facts, Term::width())));
        if self.config.source == ModelSource::Bundled {
            let [a, b] = bundled::EXAMPLES;
            text.push_str(&format!(
                "This is {}. For instance:\n  {a}\n  {b}\n",
                bundled::ABOUT
            ));
            text.push_str(&format!("{dim}lemma MODEL.gguf talks to another model. /help lists commands, Ctrl-D leaves.{reset}\n"));
        } else {
            text.push_str(&format!(
                "{dim}/help lists commands, Ctrl-D leaves.{reset}\n"
            ));
        }
        out::note(&text);
    }

    /// Sends a message and shows the reply.
    fn say(&mut self, text: String) -> Result<Next> {
        self.conversation.push_user(text);
        let result = self.reply(false);
        if let Err(f) = &result
            && !f.is_quiet()
        {
            // A message that could not be answered is not part of the conversation.
            self.conversation.undo();
        }
        result
    }

    /// Makes a reply to what is there, or goes on with one that was cut.
    fn reply(&mut self, resume: bool) -> Result<Next> {
        let resolved = sampling::resolve(&self.config.generate.sampling, None, &self.model);
        let base = resolved.params.seed.unwrap_or_else(|| {
            *self
                .base_seed
                .get_or_insert_with(|| crate::run::seed(&resolved))
        });
        let seed = base.wrapping_add(self.n_replies);
        let mut sampler = resolved.sampler(&self.model, seed)?;
        let mut options = crate::run::gen_options(&self.config.generate);
        options.grammar.clone_from(&self.grammar);
        let prompt_options = self.prompt_options();
        let before = self.conversation.session().kv();
        let held = self.conversation.session().pos();
        let mut printer = Printer::new(
            &self.config.term,
            Mode::Text,
            self.config.generate.think,
            false,
            Pool::of(&before),
        );

        let quiet = TypeAhead::begin();
        let polling = Polling::of_conversation();
        let told = self.told_recycling;
        let mut recycling = false;
        let mut sink = |e: lemma_engine::generate::Event<'_>| match e {
            lemma_engine::generate::Event::Recycle { .. } if told => {
                std::ops::ControlFlow::Continue(())
            }
            lemma_engine::generate::Event::Recycle { .. } => {
                recycling = true;
                printer.event(e)
            }
            e => printer.event(e),
        };
        let mut result = if resume {
            self.conversation.resume(&mut sampler, &options, &mut sink)
        } else {
            self.conversation
                .reply(&mut sampler, &prompt_options, &options, &mut sink)
                .map(Some)
        };
        self.told_recycling |= recycling;
        if let Ok(Some(outcome)) = &mut result {
            printer.take_pauses_off(outcome);
        }
        let shown = printer.finish();
        drop(polling);
        drop(quiet);
        let Some(outcome) = result.map_err(|e| self.explain(e.into()))? else {
            return Err(Failure::usage(
                "nothing to continue: the last reply was not cut",
            ));
        };
        shown?;
        self.n_replies += 1;
        self.after(outcome, seed, resume, before.recycled > 0 && held > 0);
        Ok(Next::Go)
    }

    /// What follows a reply on stderr.
    fn after(&mut self, outcome: Outcome, seed: u64, resume: bool, had_recycled: bool) {
        let style = self.config.term.err_style;
        let (dim, reset) = (style.dim(), style.reset());
        if resume {
            self.spans.n_think += outcome.n_think as u32;
        } else {
            self.spans = Spans {
                n_prompt: outcome.n_prompt as u32,
                n_think: outcome.n_think as u32,
            };
            if had_recycled && outcome.n_cached == 0 {
                out::note(&format!(
                    "{dim}note: pages were recycled since; {} tokens were read again{reset}",
                    grouped(outcome.n_prompt as u64)
                ));
            }
        }
        let kv = self.conversation.session().kv();
        let stats = Stats::new(&outcome, &kv, seed);
        if self.config.term.err_tty || self.config.verbose {
            let width = if self.config.term.err_tty {
                Term::width()
            } else {
                usize::MAX
            };
            out::note(&format!("{dim}{}{reset}", stats.line(width)));
        }
        let note = match outcome.finish {
            Finish::Interrupt if outcome.n_think + outcome.n_answer == 0 => {
                Some("stopped before a reply; /regen asks again, /undo takes it back")
            }
            Finish::Interrupt => Some("stopped; /continue goes on, /undo takes it back"),
            Finish::Length => Some("-n was reached; /continue goes on"),
            Finish::Position => Some("the context is full; /clear begins anew"),
            Finish::Budget => Some("the KV pool is full of pinned pages; /clear begins anew"),
            Finish::Eos if self.said().trim().is_empty() => {
                Some("the model said nothing; /regen asks again")
            }
            Finish::Eos | Finish::Stop => None,
        };
        if let Some(note) = note {
            out::note(&format!("{dim}{note}{reset}"));
        }
        out::err("\n");
        self.last = Some(Last { outcome, stats });
    }

    /// The last reply, without its thinking.
    fn said(&self) -> &str {
        let last = self.conversation.messages().last();
        last.map_or("", |m| m.content.as_str())
    }

    fn prompt_options(&self) -> PromptOptions {
        PromptOptions {
            reasoning: crate::run::reasoning(self.config.generate.reasoning),
            ..PromptOptions::default()
        }
    }

    /// Says what can be done in a conversation about an error whose own hint is about flags.
    fn explain(&self, f: Failure) -> Failure {
        match f.code {
            PROMPT if f.hint.is_none() => {
                f.hint("/clear begins anew; a larger --kv-budget or -c makes room")
            }
            MEMORY if f.hint.is_none() => {
                f.hint("a smaller --kv-budget, or -ctk q8_0 -ctv q8_0, takes less")
            }
            _ => f,
        }
    }
}
