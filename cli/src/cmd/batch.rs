//! `lemma batch`: one request a line in, one result a line out.
//!
//! A line that fails gives an error record and the run goes on; the exit code says at the end that some did (9). With `-o` the run
//! can be repeated: results are appended, and requests that the file already answers are skipped. Those that failed are tried again,
//! since they may have been mended; what fails as it did before is not noted again. A line of the file that was cut when a run was killed
//! is removed first. Requests without an id go by the number of their line. An id is there once: a second request with it fails, since its
//! result could not be told from the first one's, and a run that is repeated would take it for done. The record of that failure has
//! no id, so that who looks an id up finds the answer.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Seek as _, Write as _};
use std::path::Path;

use lemma_engine::conversation::{Conversation, PromptOptions, Role, takes_system};
use lemma_engine::generate::{Prompt, generate};
use lemma_engine::grammar::Grammar;
use lemma_engine::options::{KvBudget, LoadOptions};
use lemma_engine::session::Session;
use serde_json::Value;

use super::{Line, Lines, verdict};
use crate::args::Invocation;
use crate::args::config::{self, Generate};
use crate::args::tools::BatchArgs;
use crate::fail::{Failure, INTERRUPT, Result};
use crate::load::{self, Loaded};
use crate::reply::{Mode, Pool, Printer};
use crate::request::{Request, id_of, message};
use crate::signals::{self, Polling};
use crate::term::{Style, Term};
use crate::trace::Trace;
use crate::{out, record, run, sampling};

/// What every request of a run shares.
struct Batch<'a> {
    args: &'a BatchArgs,
    loaded: Loaded,
    load: LoadOptions,
    generate: Generate,
    term: Term,
    base_seed: Option<u64>,
    /// It has been said that system messages are lost.
    told_system: bool,
    trace: Option<Trace>,
    /// What requests that name nothing else keep to.
    grammar: Option<Grammar>,
    /// A session over the pool of the command line, kept from request to request.
    conversation: Option<Conversation>,
}

pub(crate) fn run(args: &BatchArgs, invocation: &Invocation, term: Term) -> Result {
    let source =
        config::model_source(args.model.model.as_ref(), invocation.model_from_env(), None)?;
    let load = config::load_options(&args.model, &args.kv, &args.compute)?;
    let generate = config::generate(&args.generate, config::sampling(&invocation.matches)?)?;
    let mut lines = Lines::open(args.input.as_deref())?;
    if let Some(path) = &args.output
        && lines.is_file(path)
    {
        let name = crate::term::escape_path(path);
        return Err(Failure::usage(format!(
            "{name}: the file of the requests, expected another one for the results"
        )));
    }
    let mut output = Output::open(args.output.as_deref())?;
    if output.file.is_none() {
        out::check()?;
    }
    let loaded = load::model(&source, &load)?;
    let grammar = run::compile(&loaded.model, generate.constraint.as_ref())?;
    let mut batch = Batch {
        args,
        grammar,
        loaded,
        load,
        generate,
        term,
        base_seed: None,
        told_system: false,
        trace: Trace::open(args.kv.kv_trace.as_deref())?,
        conversation: None,
    };

    let polling = Polling::begin();
    let (mut done, mut failed) = (0, 0);
    // Where ids were first.
    let mut seen: HashMap<String, u64> = HashMap::new();
    while let Some(Line { number, text }) = lines.next()? {
        let id = text.as_ref().ok().and_then(|t| id_of(t));
        // The frame of a record needs an id to be found again: the number of the line, unless somebody else has that.
        let id = id.unwrap_or_else(|| match seen.contains_key(&number.to_string()) {
            true => format!("line {number}").into(),
            false => number.into(),
        });
        let mut twice = false;
        let result = match seen.entry(id.to_string()) {
            Entry::Occupied(first) => {
                twice = true;
                Err(Failure::usage(format!(
                    "the id {} is that of line {}, expected one of its own",
                    crate::term::escape(first.key()),
                    first.get()
                )))
            }
            Entry::Vacant(place) => {
                place.insert(number);
                if output.has(&id) {
                    continue;
                }
                text.and_then(|t| Request::parse(&t))
                    .and_then(|r| batch.answer(&r, &id))
            }
        };
        if signals::interrupted() {
            break;
        }
        let (record, ok) = match result {
            Ok(record) => {
                let ok = record["ok"] == true;
                (record, ok)
            }
            Err(f) if f.is_quiet() => return Err(f),
            Err(f) => {
                let id = Some(&id).filter(|_| !twice);
                (record::error(id, &lines.locate(number, f)), false)
            }
        };
        done += 1;
        failed += usize::from(!ok);
        if ok || !output.failed.contains(&failure_of(&record)) {
            output.write(&record)?;
        }
        if args.output.is_some() {
            out::transient(
                &term,
                &format!("{done} done, {failed} failed"),
                Style::default(),
            );
        }
    }
    if term.can_redraw() && args.output.is_some() && done > 0 {
        out::err("\n");
    }
    let interrupted = signals::interrupted();
    drop(polling);
    if interrupted {
        return Err(Failure::quiet(INTERRUPT));
    }
    verdict(failed, done)
}

impl Batch<'_> {
    fn answer(&mut self, r: &Request, id: &Value) -> Result<Value> {
        let model = self.loaded.model.clone();
        let mut generate_options = run::gen_options(&self.generate);
        let n_predict = r.n.unwrap_or(self.generate.n_predict);
        generate_options.n_predict = usize::try_from(n_predict).ok();
        generate_options.logprobs = r.logprobs;
        generate_options.grammar = match &r.constraint {
            Some(_) => run::compile(&model, r.constraint.as_ref())?,
            None => self.grammar.clone(),
        };
        if let Some(stop) = &r.stop {
            generate_options.stop.clone_from(stop);
        }
        if let Some(n) = r.think_budget {
            generate_options.think_budget = Some(n as usize);
        }
        let resolved = sampling::resolve(&self.generate.sampling, Some(&r.sampling), &model);
        // Without a seed the run draws one, and every record names it.
        let seed = resolved
            .params
            .seed
            .unwrap_or_else(|| *self.base_seed.get_or_insert_with(|| run::seed(&resolved)));
        let mut sampler = resolved.sampler(&model, seed)?;

        // The pool of the command line serves every request; a request with its own budget gets a pool of its own.
        let mut conversation = match (r.kv_budget, self.conversation.take()) {
            (Some(tokens), kept) => {
                self.conversation = kept;
                let mut load = self.load.clone();
                load.kv.budget = KvBudget::Tokens(tokens);
                Conversation::new(Session::new(model.clone(), &load)?)
            }
            (None, Some(kept)) => kept,
            (None, None) => Conversation::new(Session::new(model.clone(), &self.load)?),
        };
        if let Some(trace) = &self.trace {
            let label = ("request", id.clone());
            trace.install(conversation.session_mut(), Some(label));
        }
        // Requests do not depend on what was asked before, not even in the last bit of a logit.
        conversation.session_mut().clear();

        let chat = !self.args.no_conversation && (model.has_template() || r.prompt.is_none());
        let mut printer = Printer::new(
            &self.term,
            Mode::Silent,
            Some(crate::args::typed::ThinkShow::Hide),
            false,
            Pool::default(),
        );
        let outcome = if chat {
            let mut messages = r.messages.clone();
            if let Some(system) = self
                .args
                .system
                .as_ref()
                .filter(|_| r.prompt.is_some() && messages[0].role != Role::System)
            {
                messages.insert(0, message(Role::System, system.clone()));
            }
            if messages[0].role == Role::System && !self.told_system && !takes_system(&model) {
                self.told_system = true;
                run::note_lost_system(self.term.err_style);
            }
            conversation.set_messages(messages);
            let reasoning = r.think.or(run::reasoning(self.generate.reasoning));
            let o = PromptOptions {
                reasoning,
                ..PromptOptions::default()
            };
            conversation.reply(&mut sampler, &o, &generate_options, &mut |e| {
                printer.event(e)
            })
        } else if let Some(text) = &r.prompt {
            let prompt = Prompt::raw(model.tokenizer(), text, true);
            generate(
                conversation.session_mut(),
                &prompt,
                0,
                &mut sampler,
                None,
                &generate_options,
                &mut |e| printer.event(e),
            )
        } else {
            return Err(
                Failure::usage("\"messages\" need the chat template, \"prompt\" does not")
                    .hint("leave -no-cnv out, or send a prompt"),
            );
        };
        let kv = conversation.session().kv();
        if r.kv_budget.is_none() {
            self.conversation = Some(conversation);
        }
        let outcome = outcome?;
        let failure = record::no_answer(&outcome, n_predict);
        let outcome = if chat { run::tidy(outcome) } else { outcome };
        let name = model.name();
        let context = record::Context {
            id: Some(id),
            kv: &kv,
            load_ms: self.loaded.load_ms,
            seed,
            model: &name,
            sampling: None,
        };
        Ok(record::reply(&outcome, failure.as_ref(), &context))
    }
}

/// How every record begins.
const RECORD: &str = "{\"v\":1,\"id\":";

/// Where results go.
#[derive(Default)]
struct Output {
    /// `None`: stdout.
    file: Option<(File, std::path::PathBuf)>,
    done: HashSet<String>,
    /// What failed, as far as it would fail in the same way again.
    failed: HashSet<String>,
}

/// What two records of the same failure have in common.
fn failure_of(record: &Value) -> String {
    let mut record = record.clone();
    if let Some(r) = record.as_object_mut() {
        r.remove("timing");
    }
    record.to_string()
}

impl Output {
    fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path.filter(|p| p.as_os_str() != "-") else {
            return Ok(Self::default());
        };
        let failed = |e: std::io::Error| Failure::file(path, &e);
        // A pipe or a device has nothing to go on from.
        if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
            let file = OpenOptions::new().append(true).open(path).map_err(failed)?;
            return Ok(Self {
                file: Some((file, path.to_owned())),
                ..Self::default()
            });
        }
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let mut file = open.map_err(failed)?;
        let mut output = Self::default();
        let (whole, rest) = output.read(&file).map_err(failed)?;
        // What a run left that was killed goes; a text that somebody wrote does not.
        let head = RECORD.as_bytes();
        if !rest.starts_with(head) && !head.starts_with(&rest) {
            return Err(Failure::usage(format!(
                "{}: the last line is no result, expected a file of results",
                crate::term::escape_path(path)
            ))
            .hint("take another name with -o"));
        }
        file.set_len(whole)
            .and_then(|()| file.seek(std::io::SeekFrom::End(0)))
            .map_err(failed)?;
        output.file = Some((file, path.to_owned()));
        Ok(output)
    }

    /// Notes what is done; returns the length of the file up to its last whole line, and what follows.
    fn read(&mut self, file: &File) -> std::io::Result<(u64, Vec<u8>)> {
        let mut whole = 0;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line)?;
            if n == 0 || line.last() != Some(&b'\n') {
                return Ok((whole, line));
            }
            whole += n as u64;
            match serde_json::from_slice::<Value>(&line) {
                Ok(v) if v["ok"] == true => drop(self.done.insert(v["id"].to_string())),
                Ok(v) => drop(self.failed.insert(failure_of(&v))),
                Err(_) => {}
            }
        }
    }

    fn has(&self, id: &Value) -> bool {
        self.done.contains(&id.to_string())
    }

    fn write(&mut self, record: &Value) -> Result {
        match &mut self.file {
            None => out::json(record),
            // One write: a run that is killed leaves whole lines, or one that is recognised as cut.
            Some((file, path)) => file
                .write_all(format!("{}\n", record::text(record)).as_bytes())
                .map_err(|e| Failure::file(path, &e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_results_are_gone_on_with() {
        let path = std::env::temp_dir().join(format!("lemma-notes-{}.txt", std::process::id()));
        std::fs::write(&path, "a line\nprecious").unwrap();
        let failure = Output::open(Some(&path)).err().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let _ = std::fs::remove_file(&path);
        assert_eq!(failure.code, crate::fail::USAGE);
        assert_eq!(text, "a line\nprecious");
        assert!(
            record::error(None, &failure)
                .to_string()
                .starts_with(RECORD)
        );
        // A device never comes to an end.
        if Path::new("/dev/full").exists() {
            assert!(Output::open(Some(Path::new("/dev/full"))).is_ok_and(|o| o.done.is_empty()));
        }
    }

    #[test]
    fn resumes_after_whole_lines() {
        let path = std::env::temp_dir().join(format!("lemma-batch-{}.jsonl", std::process::id()));
        std::fs::write(&path, "{\"v\":1,\"id\":\"a\",\"ok\":true}\n{\"v\":1,\"id\":2,\"ok\":false}\n{\"v\":1,\"id\":\"c\",\"ok\":tr").unwrap();
        let mut output = Output::open(Some(&path)).unwrap();
        assert!(output.has(&"a".into()) && !output.has(&2.into()) && !output.has(&"c".into()));
        output
            .write(&serde_json::json!({ "id": "c", "ok": true }))
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let _ = std::fs::remove_file(&path);
        assert_eq!(text.lines().count(), 3);
        assert!(text.ends_with("{\"id\":\"c\",\"ok\":true}\n"));
    }
}
