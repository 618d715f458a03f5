//! No command: one answer, or a conversation.
//!
//! Which of the two is decided by what is there. A prompt (`-p`, `-f`, or a stdin that is not a terminal) makes it one shot; no
//! prompt and terminals on both sides make it a conversation.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::PathBuf;

use lemma_engine::conversation::{Conversation, PromptOptions, takes_system};
use lemma_engine::generate::{GenOptions, Outcome, Prompt as Tokens, generate};
use lemma_engine::grammar::Grammar;
use lemma_engine::model::Model;
use lemma_engine::options::LoadOptions;
use lemma_engine::session::Session;
use serde_json::json;

use crate::args::config::{self, Constraint, Generate, ModelSource, Prompt};
use crate::args::typed::OnOffAuto;
use crate::args::{self, Invocation};
use crate::fail::{Failure, INTERRUPT, PROMPT, Result};
use crate::load::{self, Loaded};
use crate::record;
use crate::reply::{Mode, Pool, Printer};
use crate::sampling::{self, Resolved};
use crate::signals::{self, Polling};
use crate::stats::Stats;
use crate::term::{Style, Term, escape};
use crate::text::{self, MAX_PROMPT};
use crate::{out, repl, trace};

/// Everything that a run without a command needs to know.
pub(crate) struct Config {
    pub(crate) source: ModelSource,
    pub(crate) load: LoadOptions,
    pub(crate) kv_trace: Option<PathBuf>,
    pub(crate) prompt: Prompt,
    pub(crate) generate: Generate,
    pub(crate) mode: Mode,
    pub(crate) json: bool,
    pub(crate) term: Term,
    pub(crate) verbose: bool,
}

impl Config {
    pub(crate) fn new(invocation: &Invocation, term: Term) -> Result<Self> {
        let args = &invocation.cli.run;
        Ok(Self {
            source: config::model_source(
                args.model.model.as_ref(),
                invocation.model_from_env(),
                args.positional.as_ref(),
            )?,
            load: config::load_options(&args.model, &args.kv, &args.compute)?,
            kv_trace: args.kv.kv_trace.clone(),
            prompt: config::prompt(&args.prompt)?,
            generate: config::generate(&args.generate, config::sampling(&invocation.matches)?)?,
            mode: match (args.output.json, args.output.stream_json) {
                (true, _) => Mode::Silent,
                (_, true) => Mode::Events,
                _ => Mode::Text,
            },
            json: args.output.json || args.output.stream_json,
            term,
            verbose: args.common.verbose,
        })
    }
}

/// Runs it. An error of a run with `--json` is a record on stdout as well.
pub(crate) fn run(invocation: &Invocation, term: Term) -> Result {
    let output = &invocation.cli.run.output;
    let result = answer(invocation, term).map_err(|f| invocation.name_variable(f));
    if let (true, Err(failure)) = (output.json || output.stream_json, &result)
        && !failure.is_quiet()
        && failure.code != crate::fail::NO_ANSWER
    {
        put_error(failure, output.stream_json)?;
    }
    result
}

/// The error of a line that was not understood, which is a record on stdout as well if the line asks for one.
pub(crate) fn refused(argv: &[OsString], failure: Failure) -> Failure {
    let [json, events] = ["--json", "--stream-json"].map(|flag| args::asks(argv, flag));
    // With both there is no telling which it should be.
    if json == events {
        return failure;
    }
    put_error(&failure, events).err().unwrap_or(failure)
}

fn put_error(failure: &Failure, as_event: bool) -> Result {
    let record = record::error(None, failure);
    out::json(&match as_event {
        true => end_event(record),
        false => record,
    })
}

fn answer(invocation: &Invocation, term: Term) -> Result {
    let config = Config::new(invocation, term)?;
    out::check()?;
    // A word that is no model was meant otherwise, whatever is wrong with the prompt.
    load::exists(&config.source)?;
    let text = prompt_text(&config)?;
    if text.is_none() && config.json {
        return Err(
            Failure::usage("JSON is for one answer, and there is no prompt")
                .hint("give one with -p TEXT, -f FILE or on stdin"),
        );
    }
    let p = &config.prompt;
    let terminals = term.in_tty && term.out_tty;
    let talk = match &text {
        None => true,
        Some(_) => p.chat == Some(true) && terminals && !config.json && !p.single_turn,
    };
    if talk {
        return converse(config, text);
    }
    one_shot(&config, text.unwrap_or_default()).map_err(|f| match f.code {
        PROMPT if f.hint.is_none() => f.hint(
            "-c N sets the context, more than the model was trained on only with --beyond-train",
        ),
        _ => f,
    })
}

/// The prompt that was given, if any: `-p`, `-f`, and a piped stdin, joined by blank lines.
fn prompt_text(config: &Config) -> Result<Option<String>> {
    let prompt = &config.prompt;
    let mut parts: Vec<String> = prompt.text.iter().cloned().collect();
    let mut stdin_read = false;
    if let Some(path) = &prompt.file {
        stdin_read = path.as_os_str() == "-";
        parts.push(text::chomp(if stdin_read {
            text::of_stdin(MAX_PROMPT)?
        } else {
            text::of_file(path, MAX_PROMPT)?
        }));
    }
    // A closed or empty stdin (a service, a cron job) is no prompt, but neither is it a terminal to talk on.
    if !config.term.in_tty && !stdin_read && stdin_is_data() {
        parts.push(text::chomp(text::of_stdin(MAX_PROMPT)?));
    }
    let given = !parts.is_empty() || !config.term.in_tty;
    parts.retain(|p| !p.is_empty());
    let text = parts.join("\n\n");
    if !given {
        return if config.term.out_tty {
            Ok(None)
        } else {
            Err(
                Failure::usage("no prompt, and stdout is not a terminal to talk on")
                    .hint("give one with -p TEXT, -f FILE or on stdin"),
            )
        };
    }
    if text.trim().is_empty() {
        return Err(Failure::usage("the prompt is empty")
            .hint("give one with -p TEXT, -f FILE or on stdin"));
    }
    Ok(Some(text))
}

/// Whether anything can come from stdin at all; `/dev/null` beside `-p` is no part of the prompt.
fn stdin_is_data() -> bool {
    !std::io::stdin().is_terminal()
}

/// `--reasoning` as the engine wants it.
pub(crate) fn reasoning(mode: OnOffAuto) -> Option<bool> {
    match mode {
        OnOffAuto::On => Some(true),
        OnOffAuto::Off => Some(false),
        OnOffAuto::Auto => None,
    }
}

/// The engine's options of a reply; the grammar is [compiled](compile) apart, since that takes time.
pub(crate) fn gen_options(g: &Generate) -> GenOptions {
    GenOptions {
        n_predict: usize::try_from(g.n_predict).ok(),
        stop: g.stop.clone(),
        ignore_eos: g.ignore_eos,
        think_budget: g.think_budget.map(|n| n as usize),
        ..GenOptions::default()
    }
}

/// Compiles what answers keep to.
pub(crate) fn compile(model: &Model, constraint: Option<&Constraint>) -> Result<Option<Grammar>> {
    let Some(c) = constraint else {
        return Ok(None);
    };
    let grammar = Grammar::compile(model, &c.source).map_err(|e| e.in_file(&c.name))?;
    Ok(Some(grammar))
}

/// The seed of a run: as given, or a new one that the record and the statistics name.
pub(crate) fn seed(resolved: &Resolved) -> u64 {
    resolved
        .params
        .seed
        .unwrap_or_else(|| lemma_engine::sampling::random_seed() & u64::from(u32::MAX))
}

/// Said once: a system message that nobody reads is worse than none.
pub(crate) fn note_lost_system(style: Style) {
    out::note(&format!(
        "{}note: this model's chat template has no place for a system message{}",
        style.dim(),
        style.reset()
    ));
}

fn converse(config: Config, first: Option<String>) -> Result {
    let loaded = load::model(&config.source, &config.load)?;
    repl::Repl::new(config, loaded)?.run(first)
}

fn one_shot(config: &Config, text: String) -> Result {
    let Loaded { model, load_ms } = load::model(&config.source, &config.load)?;
    let chat = config.prompt.chat.unwrap_or_else(|| model.has_template());
    let mut session = Session::new(model.clone(), &config.load)?;
    trace::install(&mut session, config.kv_trace.as_deref())?;
    let resolved = sampling::resolve(&config.generate.sampling, None, &model);
    let seed = seed(&resolved);
    let mut sampler = resolved.sampler(&model, seed)?;
    let mut options = gen_options(&config.generate);
    options.grammar = compile(&model, config.generate.constraint.as_ref())?;
    let pool = Pool::of(&session.kv());
    let mut printer = Printer::new(
        &config.term,
        config.mode,
        config.generate.think,
        !chat,
        pool,
    );
    if config.mode == Mode::Events {
        out::json(
            &json!({ "event": "start", "v": 1, "model": model.name(), "seed": seed, "load_ms": record::rounded(load_ms) }),
        )?;
    }

    let polling = Polling::begin();
    if chat && config.prompt.system.is_some() && !takes_system(&model) {
        note_lost_system(config.term.err_style);
    }
    let (mut outcome, kv) = if chat {
        let mut conversation = Conversation::new(session);
        conversation.set_system(config.prompt.system.clone());
        conversation.push_user(text);
        let o = PromptOptions {
            reasoning: reasoning(config.generate.reasoning),
            ..PromptOptions::default()
        };
        if config.prompt.verbose {
            show_prompt(&model, &conversation.prompt(&o)?.tokens);
        }
        let outcome = conversation.reply(&mut sampler, &o, &options, &mut |e| printer.event(e))?;
        (outcome, conversation.session().kv())
    } else {
        if config.prompt.system.is_some() {
            let failure = Failure::usage("a system message needs the chat template");
            return Err(failure.hint(if config.prompt.chat == Some(false) {
                "leave -no-cnv out, or write it into the prompt"
            } else {
                "this model has none; --chat-template gives it one"
            }));
        }
        let prompt = Tokens::raw(model.tokenizer(), &text, true);
        if config.prompt.verbose {
            show_prompt(&model, &prompt.tokens);
        }
        let outcome = generate(
            &mut session,
            &prompt,
            0,
            &mut sampler,
            None,
            &options,
            &mut |e| printer.event(e),
        )?;
        (outcome, session.kv())
    };
    printer.take_pauses_off(&mut outcome);
    let wrote = printer.finish()?;
    let interrupted = signals::interrupted();
    drop(polling);

    let failure = record::no_answer(&outcome, config.generate.n_predict);
    if config.json {
        let outcome = if chat {
            tidy(outcome.clone())
        } else {
            outcome.clone()
        };
        let context = record::Context {
            id: None,
            kv: &kv,
            load_ms,
            seed,
            model: &model.name(),
            sampling: Some(resolved.json()),
        };
        let mut record = record::reply(&outcome, failure.as_ref(), &context);
        if config.mode == Mode::Events {
            record = end_event(record);
        }
        out::json(&record)?;
    } else if failure.is_none() && !wrote {
        // An empty answer is an answer, and ends as every other.
        out::put("\n")?;
    }
    if config.verbose || (config.term.err_tty && config.mode == Mode::Text) {
        let style = config.term.err_style;
        let width = if config.term.err_tty {
            Term::width()
        } else {
            usize::MAX
        };
        out::note(&format!(
            "{}{}{}",
            style.dim(),
            Stats::new(&outcome, &kv, seed).line(width),
            style.reset()
        ));
    }
    match failure {
        _ if interrupted => Err(Failure::quiet(INTERRUPT)),
        Some(f) => Err(f),
        None => Ok(()),
    }
}

/// The last event: the record without what the events have already said.
fn end_event(mut record: serde_json::Value) -> serde_json::Value {
    let mut event = serde_json::Map::from_iter([("event".to_owned(), "end".into())]);
    if let Some(r) = record.as_object_mut() {
        // The order of the others stays.
        r.shift_remove("text");
        r.shift_remove("thinking");
        event.append(r);
    }
    serde_json::Value::Object(event)
}

/// Without the newlines that models put around thinking and answer.
pub(crate) fn tidy(mut o: Outcome) -> Outcome {
    let trim = |s: &str| s.trim_matches(['\n', '\r']).to_owned();
    o.text = trim(&o.text);
    o.thinking = trim(&o.thinking);
    o
}

/// `--verbose-prompt`: the text that the model sees, token by token.
fn show_prompt(model: &Model, tokens: &[u32]) {
    let tokenizer = model.tokenizer();
    for &id in tokens {
        out::note(&format!(
            "{id:>8}  {}",
            escape(&String::from_utf8_lossy(tokenizer.token_bytes(id, true)))
                .replace("\\u{a}", "\\n")
        ));
    }
    out::note(&format!("{} tokens of prompt", tokens.len()));
}
