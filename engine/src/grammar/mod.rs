//! Answers that keep to a grammar or a JSON schema.
//!
//! A [`Grammar`] is compiled once for a model; each reply walks it with a [`Constraint`], which says before every token which ones
//! may come ([`Constraint::mask`]) and is told which one came ([`Constraint::accept`]). Thinking is not constrained, the answer is.
//!
//! ```text
//! GBNF ─ gbnf ─► Lark ─┐
//! JSON schema ─────────┴─► llguidance ─► a bit for each token of the vocabulary ─► Sampler::sample_masked
//! ```
//!
//! The machinery is llguidance (an Earley parser over a lexer of lazy derivatives). Grammars come from anybody, so all of it works
//! under limits: on the text, the grammar, the lexer, and the work for one token.

mod gbnf;
mod schema;
mod vocabulary;

use std::sync::Arc;

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::SimpleVob;
use llguidance::{Matcher, TokenParser};

use crate::error::Error;
use crate::memory::show;
use crate::model::Model;
pub(crate) use vocabulary::Vocabulary;

/// Stack for compiling: definitions that lead to each other are followed by recursion. Only what is used takes memory.
const STACK: usize = 256 << 20;
/// What an answer has to keep to, as the user wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrammarSource {
    /// A grammar in GBNF, the notation of llama.cpp. Its rule `root` is the whole answer.
    Gbnf(String),
    /// A JSON schema. The answer is a JSON value that it describes.
    JsonSchema(String),
}

/// A grammar compiled for one model; cheap to share.
#[derive(Clone)]
pub struct Grammar {
    start: Arc<TokenParser>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

/// The limits under which grammars are compiled and used.
fn limits() -> ParserLimits {
    ParserLimits {
        max_grammar_size: 200_000,
        // Grammars that are read character by character make many items: up to some 100 ms for a token.
        step_max_items: 2_000_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

impl Grammar {
    /// Compiles a grammar for the vocabulary of a model.
    ///
    /// # Errors
    /// [`Error::Grammar`] with what was found where and what was expected.
    pub fn compile(model: &Model, source: &GrammarSource) -> Result<Self, Error> {
        let grammar = match source {
            GrammarSource::Gbnf(text) => {
                let lark =
                    gbnf::to_lark(text).map_err(|p| Error::grammar(p.what).with_hint(p.hint))?;
                TopLevelGrammar::from_lark(lark)
            }
            GrammarSource::JsonSchema(text) => {
                TopLevelGrammar::from_json_schema(schema::read(text)?)
            }
        };
        let vocabulary = model.vocabulary()?;
        let compile = || vocabulary.factory.create_parser(grammar);
        let done = std::thread::scope(|s| {
            let thread = std::thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(s, compile);
            thread.map(|t| t.join())
        });
        let parser = match done {
            Ok(Ok(parser)) => parser,
            Ok(Err(_)) => return Err(Error::runtime("compiling the grammar failed")),
            Err(e) => {
                return Err(Error::memory(format!(
                    "a thread to compile the grammar with a stack of {}, {e}",
                    show(STACK as u64)
                )));
            }
        };
        let parser = parser.map_err(|e| refused(source, &e.to_string()))?;
        let grammar = Self {
            start: Arc::new(parser),
        };
        // A grammar that allows nothing at all is found out here rather than by the first token.
        grammar
            .start()
            .mask()
            .map_err(|e| refused(source, e.report().what()))?;
        Ok(grammar)
    }

    /// A walk through the grammar for one answer.
    pub fn start(&self) -> Constraint {
        let parser = self.start.deep_clone();
        let eos = parser.token_env.tok_trie().eos_tokens().to_vec();
        Constraint {
            matcher: Matcher::new(Ok(parser)),
            mask: None,
            eos,
        }
    }
}

/// What the constraint engine says against a grammar, in one line.
fn refused(source: &GrammarSource, message: &str) -> Error {
    let line = match first_line(message) {
        // What the constraint engine calls a place from which no text leads on.
        line if line.contains("NoExtensionBias") => {
            "no text fits it; does something in it contain itself in any case?".to_owned()
        }
        line => line,
    };
    match source {
        GrammarSource::Gbnf(_) => Error::grammar(format!("the grammar: {line}"))
            .with_hint("a smaller grammar, or fewer repetitions"),
        GrammarSource::JsonSchema(_) => Error::grammar(format!("the schema: {line}")).with_hint(
            "what is not supported has to be left out; nothing in a schema is ignored silently",
        ),
    }
}

/// The line of a message that tells most. Errors of regular expressions draw the place first and tell what is wrong last.
fn first_line(message: &str) -> String {
    let mut lines = message
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('<'));
    let first = lines.next().unwrap_or("not accepted");
    match lines.find_map(|l| l.strip_prefix("error: ")) {
        Some(error) if first.ends_with(':') => format!("{first} {error}"),
        _ => first.to_owned(),
    }
}

/// A walk through a [`Grammar`].
pub struct Constraint {
    matcher: Matcher,
    /// What may come next, once asked for.
    mask: Option<SimpleVob>,
    /// Tokens that end generation.
    eos: Vec<u32>,
}

impl Constraint {
    /// Computes which tokens may come next, once a step: text that keeps to the grammar, and the end where it is complete.
    ///
    /// # Errors
    /// [`Error::Runtime`] when no token may come (the vocabulary cannot write what the grammar asks for), or when the grammar
    /// takes too much work.
    pub fn mask(&mut self) -> Result<Mask<'_>, Error> {
        if self.mask.is_none() {
            let mask = self.matcher.compute_mask();
            let stuck = self.matcher.stop_reason() == StopReason::NoExtensionBias;
            self.mask = Some(mask.map_err(|e| {
                if stuck {
                    Error::runtime("the vocabulary of this model has no token for what the grammar asks for next")
                } else {
                    too_much(&e.to_string())
                }
            })?);
        }
        match &self.mask {
            Some(bits) if !bits.is_zero() => Ok(Mask { bits }),
            _ => Err(Error::runtime("the grammar allows no token")),
        }
    }

    /// Tells that a token came. It must be one that the mask allows.
    ///
    /// # Errors
    /// [`Error::Runtime`] if it was none of them.
    pub fn accept(&mut self, id: u32) -> Result<(), Error> {
        self.mask = None;
        if self.eos.contains(&id) && self.is_done() {
            return Ok(());
        }
        self.matcher
            .consume_token(id)
            .map_err(|e| too_much(&e.to_string()))
    }

    /// Takes text that was said already, in whatever tokens.
    ///
    /// # Errors
    /// [`Error::Runtime`] if it does not keep to the grammar.
    pub fn accept_text(&mut self, text: &str) -> Result<(), Error> {
        let env = self
            .matcher
            .tok_env()
            .map_err(|e| too_much(&e.to_string()))?;
        for id in env.tokenize_bytes(text.as_bytes()) {
            self.accept(id)?;
        }
        Ok(())
    }

    /// The answer is complete and nothing may follow.
    pub fn is_done(&self) -> bool {
        self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }
}

fn too_much(message: &str) -> Error {
    Error::runtime(format!("the grammar: {}", first_line(message)))
        .with_hint("a simpler grammar or schema takes less work for each token")
}

/// A bit for each token.
#[derive(Clone, Copy)]
pub struct Mask<'c> {
    bits: &'c SimpleVob,
}

impl Mask<'_> {
    /// Whether a token may come next.
    pub fn allows(&self, id: u32) -> bool {
        (id as usize) < self.bits.len() && self.bits.is_allowed(id)
    }

    /// Sets the logits of all tokens that may not come next to minus infinity, but for `also`; `[n_vocab]`.
    pub fn apply(&self, logits: &mut [f32], also: Option<u32>) {
        let words = self.bits.as_slice().iter().chain(std::iter::repeat(&0));
        for (i, (part, &word)) in logits.chunks_mut(32).zip(words).enumerate() {
            let word = match also {
                Some(id) if id as usize / 32 == i => word | 1 << (id % 32),
                _ => word,
            };
            if word == u32::MAX {
                continue;
            }
            for (bit, x) in part.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
    }
}
