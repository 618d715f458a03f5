//! A reply as it appears: thinking, answer, and the notes in between.
//!
//! The [`Printer`] takes the engine's events. It decides which stream sees what, passes everything that reaches a terminal through the
//! [filter](crate::term::filter), and keeps newlines back until text follows them, so that an answer begins at its first
//! character and ends with exactly one newline, whatever the model put around it.

use std::io::Write as _;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use lemma_engine::generate::{Event, Outcome};
use lemma_engine::memory::show;
use lemma_engine::session::KvStats;
use serde_json::json;

use crate::args::typed::ThinkShow;
use crate::fail::{Failure, Result};
use crate::out;
use crate::signals;
use crate::stats::grouped;
use crate::term::Term;
use crate::term::filter::Filter;

/// A transient line appears only for what takes longer than this.
const PATIENCE: Duration = Duration::from_millis(400);
/// And is redrawn no sooner than this.
const REDRAW: Duration = Duration::from_millis(100);

/// Where a piece of text goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    None,
    Think,
    Text,
}

/// What the printer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Text for people and pipes.
    Text,
    /// Nothing: the caller writes a record at the end.
    Silent,
    /// JSON events.
    Events,
}

/// What the note about recycling says of a pool.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pool {
    pub(crate) bytes: u64,
    pub(crate) policy: &'static str,
}

impl Pool {
    pub(crate) fn of(kv: &KvStats) -> Self {
        Self {
            bytes: kv.bytes,
            policy: kv.policy,
        }
    }

    /// How pages are chosen, in a few words.
    fn order(self) -> String {
        match self.policy {
            "raas" => "by time stamp".to_owned(),
            policy => format!("as {policy} chooses"),
        }
    }
}

pub(crate) struct Printer {
    term: Term,
    mode: Mode,
    think: ThinkShow,
    /// Leading newlines of the answer belong to the text (raw completion) and are kept.
    keep_leading: bool,
    filter: Filter,
    section: Section,
    /// Newlines and blanks of the section that wait for text to follow.
    held: String,
    /// Something of the answer reached stdout, or of the thinking.
    wrote: bool,
    styled: bool,
    started: Instant,
    /// When the transient line that is there was drawn.
    drawn: Option<Instant>,
    n_think: usize,
    /// How long the program was stopped while the prompt was read.
    paused: Duration,
    /// For the note about recycling.
    pool: Pool,
    failure: Option<Failure>,
}

impl Printer {
    pub(crate) fn new(
        term: &Term,
        mode: Mode,
        think: Option<ThinkShow>,
        keep_leading: bool,
        pool: Pool,
    ) -> Self {
        let think = think.unwrap_or(if term.out_tty {
            ThinkShow::Show
        } else {
            ThinkShow::Hide
        });
        Self {
            term: *term,
            mode,
            think,
            keep_leading,
            filter: Filter::default(),
            section: Section::None,
            held: String::new(),
            wrote: false,
            styled: false,
            started: Instant::now(),
            drawn: None,
            n_think: 0,
            paused: Duration::ZERO,
            pool,
            failure: None,
        }
    }

    /// Takes the time off a reply during which the program was stopped (Ctrl-Z).
    pub(crate) fn take_pauses_off(&self, outcome: &mut Outcome) {
        let before = self.paused.as_secs_f64();
        let after = signals::paused().as_secs_f64() - before;
        for (seconds, paused) in [
            (&mut outcome.prefill_s, before),
            (&mut outcome.ttft_s, before),
            (&mut outcome.decode_s, after),
        ] {
            *seconds = (*seconds - paused).max(0.0);
        }
    }

    /// Takes an event; breaks when the user or the reader of stdout has had enough.
    pub(crate) fn event(&mut self, event: Event<'_>) -> ControlFlow<()> {
        if let Event::Prefill { .. } = event {
            self.paused = signals::paused();
        }
        if let Err(failure) = self.write(event) {
            self.failure = Some(failure);
            return ControlFlow::Break(());
        }
        if signals::interrupted() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn write(&mut self, event: Event<'_>) -> Result {
        if self.mode == Mode::Events {
            return match event {
                Event::Prefill { .. } => Ok(()),
                Event::Think(t) => out::json(&json!({ "event": "think", "text": t })),
                Event::Text("") => Ok(()),
                Event::Text(t) => out::json(&json!({ "event": "text", "text": t })),
                // A matter for people.
                Event::Circle(_) => Ok(()),
                Event::Recycle { pos } => {
                    out::json(&json!({ "event": "kv", "recycling_from": pos }))
                }
            };
        }
        match event {
            Event::Prefill { done, total } => {
                if done < total {
                    self.transient(&format!(
                        "reading the prompt: {} of {} tokens",
                        grouped(done as u64),
                        grouped(total as u64)
                    ));
                }
                Ok(())
            }
            Event::Think(t) => self.thought(t),
            Event::Text(t) if self.mode == Mode::Text => self.text(t),
            Event::Text(_) => Ok(()),
            Event::Recycle { pos } => {
                self.note(&format!(
                    "KV pool full at token {}; recycling pages {} from here (memory stays {})",
                    grouped(u64::from(pos)),
                    self.pool.order(),
                    show(self.pool.bytes)
                ));
                Ok(())
            }
            Event::Circle(c) => {
                let block = match c.period {
                    1 => "the last token was".to_owned(),
                    n => format!("the last {} tokens were", grouped(n as u64)),
                };
                self.note(&format!(
                    "{block} said {} times over since pages were recycled; Ctrl-C stops it. A larger --kv-budget forgets less, \
                     --dry-multiplier 0.8 or another --seed leads elsewhere",
                    c.times
                ));
                Ok(())
            }
        }
    }

    fn thought(&mut self, text: &str) -> Result {
        self.n_think += 1;
        match self.think {
            ThinkShow::Hide => Ok(()),
            ThinkShow::Fold => {
                self.transient(&format!(
                    "thinking: {} tokens",
                    grouped(self.n_think as u64)
                ));
                Ok(())
            }
            ThinkShow::Show if self.mode == Mode::Text => {
                if let Some(ready) = self.enter(Section::Think, text, false) {
                    let clean = if self.term.out_tty {
                        self.filter.clean(&ready)
                    } else {
                        ready
                    };
                    self.dim(true)?;
                    self.wrote = true;
                    return out::put(&clean);
                }
                Ok(())
            }
            ThinkShow::Show => Ok(()),
            ThinkShow::Stderr => {
                if let Some(ready) = self.enter(Section::Think, text, false) {
                    let clean = if self.term.err_tty {
                        self.filter.clean(&ready)
                    } else {
                        ready
                    };
                    let style = self.term.err_style;
                    out::err(&format!("{}{clean}{}", style.dim(), style.reset()));
                }
                Ok(())
            }
        }
    }

    fn text(&mut self, text: &str) -> Result {
        let Some(ready) = self.enter(Section::Text, text, self.keep_leading) else {
            return Ok(());
        };
        self.dim(false)?;
        let clean = if self.term.out_tty {
            self.filter.clean(&ready)
        } else {
            ready
        };
        self.wrote = true;
        out::put(&clean)
    }

    /// Adds `text` to a section; returns what can be shown now. Leading and trailing newlines stay back.
    fn enter(&mut self, section: Section, text: &str, keep_leading: bool) -> Option<String> {
        if self.section != section {
            // The answer begins only with a visible character.
            if text.trim().is_empty() && !keep_leading {
                return None;
            }
            let gap = self.section != Section::None;
            self.finish_transient();
            self.held.clear();
            if gap {
                match self.think {
                    ThinkShow::Stderr => out::err("\n"),
                    // A blank line between the two, where both are on one stream.
                    _ => self.held.push_str("\n\n"),
                }
                self.filter = Filter::default();
            }
            self.section = section;
            if !keep_leading {
                return self.release(text.trim_start_matches(['\n', '\r']));
            }
        }
        self.release(text)
    }

    fn release(&mut self, text: &str) -> Option<String> {
        let solid = text.trim_end_matches(['\n', '\r']).len();
        if solid == 0 {
            self.held.push_str(text);
            return None;
        }
        let mut ready = std::mem::take(&mut self.held);
        ready.push_str(&text[..solid]);
        self.held.push_str(&text[solid..]);
        Some(ready)
    }

    fn dim(&mut self, on: bool) -> Result {
        if on == self.styled || !self.term.out_style.0 {
            return Ok(());
        }
        self.styled = on;
        if on {
            signals::dim(self.term.out_tty);
        }
        let put = out::put(if on {
            self.term.out_style.dim()
        } else {
            self.term.out_style.reset()
        });
        if !on {
            signals::dim(false);
        }
        put
    }

    /// A line on stderr that the next one replaces.
    fn transient(&mut self, text: &str) {
        let due = match self.drawn {
            None => self.started.elapsed() > PATIENCE,
            Some(at) => at.elapsed() > REDRAW,
        };
        if due && !self.wrote && self.term.can_redraw() {
            out::transient(&self.term, text, self.term.err_style);
            self.drawn = Some(Instant::now());
        }
    }

    fn finish_transient(&mut self) {
        if self.drawn.take().is_some() {
            out::erase(&self.term);
        }
        if self.think == ThinkShow::Fold
            && self.n_think > 0
            && self.term.err_tty
            && self.mode == Mode::Text
        {
            let style = self.term.err_style;
            // How many tokens these were is said by the line at the end, which knows of the tags as well.
            out::note(&format!(
                "{}thought for {:.1} s{}",
                style.dim(),
                self.started.elapsed().as_secs_f64(),
                style.reset()
            ));
            self.n_think = 0;
        }
    }

    /// A dim line on stderr about the reply that is being made.
    fn note(&mut self, what: &str) {
        if !self.term.err_tty && self.mode == Mode::Silent {
            return;
        }
        if self.drawn.take().is_some() {
            out::erase(&self.term);
        }
        // In the middle of a reply on the same terminal: a line of its own, and back to the colour of what goes on.
        let style = self.term.err_style;
        let inline = self.wrote && self.term.out_tty && self.term.err_tty;
        out::err(&format!(
            "{}{}{}note: {what}{}\n{}",
            if inline { "\n" } else { "" },
            style.reset(),
            style.dim(),
            style.reset(),
            if inline && self.styled {
                style.dim()
            } else {
                ""
            },
        ));
    }

    /// Ends the reply: the last newline, colours off. Says whether there was anything to end.
    pub(crate) fn finish(mut self) -> Result<bool> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        self.finish_transient();
        if self.mode != Mode::Text {
            return Ok(self.wrote);
        }
        self.dim(false)?;
        if self.section == Section::Think && self.think == ThinkShow::Stderr {
            out::err("\n");
        }
        if self.wrote {
            out::put("\n")?;
        }
        let _ = std::io::stdout().flush();
        Ok(self.wrote)
    }
}
