//! What was typed, understood: names resolved, defaults filled in, contradictions refused.
//!
//! From here on nothing looks at the command line. The order in which sources win is flag, environment, the model's own
//! recommendation, built-in default; the first two meet here (clap reads both and says which it was), the last two where the
//! model is known.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use clap::ArgMatches;
use clap::parser::ValueSource;
use lemma_engine::chat::{ChatError, ChatTemplate, TEMPLATE_NAMES, named_template};
use lemma_engine::grammar::GrammarSource;
use lemma_engine::options::{BackendKind, KvBudget, KvOptions, LoadOptions};
use lemma_engine::sampling::{SamplerOverrides, SamplerParams};

use super::typed::{
    CommonArgs, ComputeArgs, GenerateArgs, KvArgs, ModelArgs, OnOffAuto, PromptArgs, ThinkShow,
};
use crate::fail::{Failure, NOT_FOUND, Result};
use crate::term::{Color, Term, escape_path};
use crate::text::{self, MAX_PROMPT};

/// More workers than this are a slip of the finger, which would take minutes to start.
const MAX_THREADS: i64 = 2048;

/// Where the weights come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ModelSource {
    Path(PathBuf),
    Bundled,
}

/// The sampling parameters that a command line and its environment set, and those that were set since.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sampling {
    pub(crate) set: SamplerOverrides,
    pub(crate) flags: SamplerOverrides,
    pub(crate) env: SamplerOverrides,
}

/// How replies are made.
#[derive(Clone, Debug)]
pub(crate) struct Generate {
    pub(crate) n_predict: i64,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) reasoning: OnOffAuto,
    pub(crate) think_budget: Option<u32>,
    /// `None`: show on a terminal, hide in a pipe.
    pub(crate) think: Option<ThinkShow>,
    pub(crate) sampling: Sampling,
    pub(crate) constraint: Option<Constraint>,
}

/// What answers have to keep to, and what errors call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Constraint {
    pub(crate) name: String,
    pub(crate) source: GrammarSource,
}

/// What the user says first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prompt {
    pub(crate) text: Option<String>,
    pub(crate) file: Option<PathBuf>,
    pub(crate) system: Option<String>,
    /// Apply the chat template. `None`: if the model has one.
    pub(crate) chat: Option<bool>,
    pub(crate) single_turn: bool,
    pub(crate) verbose: bool,
}

/// The sampling parameters of a command line; the fields of the flags bear the engine's names.
pub(crate) fn sampling(matches: &ArgMatches) -> Result<Sampling> {
    let mut out = Sampling::default();
    for &key in SamplerParams::NAMES {
        let source = matches.value_source(key);
        let layer = match source {
            Some(ValueSource::CommandLine) => &mut out.flags,
            Some(ValueSource::EnvVariable) => &mut out.env,
            _ => continue,
        };
        let values: Vec<String> = matches
            .get_raw(key)
            .into_iter()
            .flatten()
            .map(|v| v.to_string_lossy().into_owned())
            .collect();
        if key == "dry_sequence_breakers" {
            // These add up; "none" empties the list.
            layer.dry_sequence_breakers =
                Some(values.into_iter().filter(|v| v != "none").collect());
        } else if let Some(last) = values.last() {
            set(layer, key, last).map_err(|f| match source {
                Some(ValueSource::EnvVariable) => of_variable(key, last, f),
                _ => f,
            })?;
        }
    }
    Ok(out)
}

/// What is wrong with the value of a variable.
fn of_variable(key: &str, value: &str, failure: Failure) -> Failure {
    let expected = failure.message.rsplit_once(", expected ");
    let expected = expected.map_or("another value", |(_, e)| e);
    Failure::usage(format!(
        "LEMMA_{}: {:?}, expected {expected}",
        key.to_ascii_uppercase(),
        crate::term::escape(value)
    ))
}

/// Sets a sampling parameter by its name, in llama.cpp's spelling too.
pub(crate) fn set(layer: &mut SamplerOverrides, name: &str, value: &str) -> Result {
    let name = name.trim_start_matches('-').replace('-', "_");
    let name = match name.as_str() {
        "temperature" => "temp",
        "typical_p" => "typical",
        "top_nsigma" => "top_n_sigma",
        "dynatemp_exp" => "dynatemp_exponent",
        "mirostat_lr" => "mirostat_eta",
        "mirostat_ent" => "mirostat_tau",
        "dry_sequence_breaker" => "dry_sequence_breakers",
        other => other,
    };
    layer.set(name, value).map_err(|e| {
        let failure = Failure::usage(crate::term::escape(&e.to_string()));
        match super::argv::nearest(name, SamplerParams::NAMES.iter().copied()) {
            Some(near) if near != name => failure.hint(format!("did you mean {near}?")),
            _ => failure,
        }
    })
}

pub(crate) fn generate(args: &GenerateArgs, sampling: Sampling) -> Result<Generate> {
    Ok(Generate {
        n_predict: n_predict("--predict", args.n_predict)?,
        stop: args
            .stop
            .iter()
            .filter(|s| !s.is_empty())
            .cloned()
            .collect(),
        ignore_eos: args.ignore_eos,
        reasoning: args.reasoning,
        think_budget: tokens("--reasoning-budget", args.reasoning_budget.unwrap_or(-1))?,
        think: args.think,
        sampling,
        constraint: constraint(args)?,
    })
}

/// Tokens of a reply at most; -1 is no limit, and so is llama.cpp's -2.
pub(crate) fn n_predict(name: &str, n: i64) -> Result<i64> {
    match n {
        -2 => Ok(-1),
        -1.. => Ok(n),
        _ => Err(not_tokens(name, n)),
    }
}

/// A number of tokens; -1 is no limit.
pub(crate) fn tokens(name: &str, n: i64) -> Result<Option<u32>> {
    match n {
        -1 => Ok(None),
        n => u32::try_from(n).map(Some).map_err(|_| not_tokens(name, n)),
    }
}

fn not_tokens(name: &str, n: i64) -> Failure {
    Failure::usage(format!(
        "{name} {n}: expected a number of tokens, or -1 for no limit"
    ))
}

/// The one of four flags that says what answers keep to.
fn constraint(args: &GenerateArgs) -> Result<Option<Constraint>> {
    let of = |name: &str, source| {
        Some(Constraint {
            name: name.to_owned(),
            source,
        })
    };
    let read =
        |path: &PathBuf| -> Result<_> { Ok((escape_path(path), text::of_file(path, MAX_PROMPT)?)) };
    Ok(if let Some(text) = &args.grammar {
        of("--grammar", GrammarSource::Gbnf(text.clone()))
    } else if let Some(path) = &args.grammar_file {
        let (name, text) = read(path)?;
        of(&name, GrammarSource::Gbnf(text))
    } else if let Some(text) = &args.json_schema {
        of("--json-schema", GrammarSource::JsonSchema(text.clone()))
    } else if let Some(path) = &args.json_schema_file {
        let (name, text) = read(path)?;
        of(&name, GrammarSource::JsonSchema(text))
    } else {
        None
    })
}

/// The model that the arguments name; `positional` is the bare word.
pub(crate) fn model_source(
    named: Option<&PathBuf>,
    from_env: bool,
    positional: Option<&PathBuf>,
) -> Result<ModelSource> {
    let path = match (positional, named) {
        // A word on the command line says more than the environment.
        (Some(p), Some(m)) if !from_env && p != m => {
            return Err(Failure::usage(format!(
                "two models: {} and {}",
                escape_path(p),
                escape_path(m)
            ))
            .hint("name one, with -m or without"));
        }
        (Some(p), _) => p,
        (None, Some(m)) => m,
        (None, None) if crate::bundled::PRESENT => return Ok(ModelSource::Bundled),
        (None, None) => {
            return Err(Failure::new(NOT_FOUND, "no model: this build carries none")
                .hint("name a GGUF file with -m FILE or LEMMA_MODEL"));
        }
    };
    Ok(ModelSource::Path(path.clone()))
}

/// How many workers; as in llama.cpp anything below one means "as many as there are".
pub(crate) fn threads(n: i64) -> Result<Option<usize>> {
    if n > MAX_THREADS {
        return Err(Failure::usage(format!(
            "--threads {n}: expected at most {MAX_THREADS}"
        )));
    }
    Ok(usize::try_from(n).ok().filter(|&n| n > 0))
}

pub(crate) fn load_options(
    model: &ModelArgs,
    kv: &KvArgs,
    compute: &ComputeArgs,
) -> Result<LoadOptions> {
    let chat_template = chat_template(model)?;
    let gpu_layers = gpu_layers(compute.offload.gpu_layers.as_deref())?;
    Ok(LoadOptions {
        n_threads: threads(compute.threads.unwrap_or(0))?,
        isa: compute.isa.clone(),
        backend: backend(compute.device.as_deref(), gpu_layers)?,
        gpu_layers,
        cpu_experts: match compute.offload.cpu_moe {
            true => Some(u32::MAX),
            false => compute.offload.n_cpu_moe,
        },
        n_ctx: kv.ctx_size.filter(|&n| n > 0),
        // A smaller -b makes smaller passes, as in llama.cpp; the keyboard is looked at after each of them.
        n_batch: compute.batch_size.min(compute.ubatch_size).max(1),
        n_ubatch: compute.batch_size.min(compute.ubatch_size).max(1),
        kv: kv_options(kv)?,
        pre_override: model.pre.clone(),
        chat_template,
        on_upload: std::io::stderr()
            .is_terminal()
            .then_some(crate::load::show_upload as fn(u64, u64)),
    })
}

/// The source of the chat template that replaces the model's, if one was given: by name, in full, or in a file.
pub(crate) fn chat_template(args: &ModelArgs) -> Result<Option<String>> {
    if let Some(path) = &args.chat_template_file {
        let source = text::of_file(path, MAX_PROMPT)?;
        return compiling(&escape_path(path), source).map(Some);
    }
    let Some(given) = &args.chat_template else {
        return Ok(None);
    };
    if let Ok(source) = named_template(given) {
        return Ok(Some(source.to_owned()));
    }
    // A template without a tag says nothing about the conversation: a name that was misspelt.
    if !given.contains('{') {
        let name = crate::term::escape(given);
        let failure = Failure::usage(format!(
            "--chat-template {name}: expected a template, or one of {}",
            TEMPLATE_NAMES.join(", ")
        ));
        return Err(
            match super::argv::nearest(given, TEMPLATE_NAMES.iter().copied()) {
                Some(near) => failure.hint(format!("did you mean {near}?")),
                None => failure,
            },
        );
    }
    compiling("--chat-template", given.clone()).map(Some)
}

/// A template, if it is one. What is wrong with it is the fault of who gave it, and not of the model.
fn compiling(name: &str, source: String) -> Result<String> {
    match ChatTemplate::new(&source, "", "") {
        Ok(_) => Ok(source),
        Err(e @ ChatError::NoThread { .. }) => Err(lemma_engine::error::Error::from(e).into()),
        Err(e) => Err(Failure::usage(crate::term::escape(&format!("{name}: {e}")))),
    }
}

/// `-ngl`: nothing for as many as fit. As in llama.cpp, -1 is `auto`, and other negative numbers are `all`.
fn gpu_layers(given: Option<&str>) -> Result<Option<u32>> {
    match given {
        None | Some("auto") => Ok(None),
        Some("all") => Ok(Some(u32::MAX)),
        Some(n) => match n.parse::<i64>() {
            Ok(-1) => Ok(None),
            Ok(n) => Ok(Some(u32::try_from(n).unwrap_or(u32::MAX))),
            Err(_) => Err(Failure::usage(format!(
                "--gpu-layers {}: expected a number, auto or all",
                crate::term::escape(n)
            ))),
        },
    }
}

/// `--device` and `-ngl` together.
pub(crate) fn backend(device: Option<&str>, gpu_layers: Option<u32>) -> Result<BackendKind> {
    let on_cpu = gpu_layers == Some(0);
    let Some(name) = device else {
        return Ok(if on_cpu {
            BackendKind::Cpu
        } else {
            BackendKind::Auto
        });
    };
    let lower = name.to_ascii_lowercase();
    match lower.as_str() {
        "auto" => Ok(if on_cpu {
            BackendKind::Cpu
        } else {
            BackendKind::Auto
        }),
        "cpu" | "none" => Ok(BackendKind::Cpu),
        "trace" => Ok(BackendKind::Trace),
        _ => match lower.strip_prefix("cuda").map(|i| {
            if i.is_empty() {
                Ok(0)
            } else {
                i.trim_start_matches(':').parse::<u32>()
            }
        }) {
            Some(Ok(index)) => Ok(BackendKind::Cuda(index)),
            _ => Err(Failure::usage(format!(
                "--device {}: expected auto, cpu, cuda, cuda0 … or trace",
                crate::term::escape(name)
            ))
            .hint("'lemma devices' lists what there is")),
        },
    }
}

fn kv_options(args: &KvArgs) -> Result<KvOptions> {
    let mut o = KvOptions {
        beyond_train: args.beyond_train,
        ..KvOptions::default()
    };
    if let Some(spec) = &args.kv_policy {
        o.apply(spec)
            .map_err(|e| policy_failure(spec, &e.to_string()))?;
    }
    for (flag, key, value) in args.options() {
        let Some(value) = value else { continue };
        // The engine names the key; here it is the flag that was typed.
        o.set(key, value).map_err(|e| {
            let expected = e.to_string();
            let expected = expected.rsplit_once(", expected ").map_or("", |(_, e)| e);
            let shown = crate::term::escape(value);
            Failure::usage(format!("{flag} {shown}: expected {expected}"))
        })?;
    }
    match (args.kv_budget, args.kv_mem) {
        (Some(tokens), _) => o.budget = KvBudget::Tokens(tokens),
        (None, Some(mib)) => o.budget = KvBudget::MiB(mib),
        (None, None) => {}
    }
    Ok(o)
}

/// What is wrong with `--kv-policy`.
fn policy_failure(spec: &str, error: &str) -> Failure {
    let failure = Failure::usage(format!("--kv-policy: {error}"));
    let name = spec.split(':').next().unwrap_or(spec);
    let names = lemma_engine::kv::policy::POLICIES.iter().map(|p| p.name);
    match super::argv::nearest(name, names) {
        Some(near) if near != name => failure.hint(format!("did you mean {near}?")),
        _ => failure,
    }
}

pub(crate) fn prompt(args: &PromptArgs) -> Result<Prompt> {
    let unescaped = |s: &String| {
        if args.no_escape {
            s.clone()
        } else {
            unescape(s)
        }
    };
    let system = match (&args.system, &args.system_file) {
        (Some(s), _) => Some(unescaped(s)),
        (None, Some(path)) => Some(text::of_file(path, MAX_PROMPT)?),
        (None, None) => None,
    };
    Ok(Prompt {
        text: args.prompt.as_ref().map(unescaped),
        file: args.file.clone(),
        system: system.filter(|s| !s.is_empty()),
        chat: if args.no_conversation {
            Some(false)
        } else if args.conversation {
            Some(true)
        } else {
            None
        },
        single_turn: args.single_turn,
        verbose: args.verbose_prompt,
    })
}

pub(crate) fn term(args: &CommonArgs) -> Term {
    Term::detect(match args.color.as_str() {
        "always" | "on" => Color::Always,
        "never" | "off" => Color::Never,
        _ => Color::Auto,
    })
}

/// Backslash sequences as llama.cpp processes them; one that it does not know stays as it is.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        let (c, used) = match tail.chars().next() {
            Some('n') => ('\n', 1),
            Some('r') => ('\r', 1),
            Some('t') => ('\t', 1),
            Some(c @ ('\'' | '"' | '\\')) => (c, 1),
            Some('x') => match tail
                .get(1..3)
                .and_then(|h| u8::from_str_radix(h, 16).ok())
                .filter(u8::is_ascii)
            {
                Some(byte) => (char::from(byte), 3),
                None => ('\\', 0),
            },
            _ => ('\\', 0),
        };
        out.push(c);
        rest = &tail[used..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backslashes() {
        assert_eq!(
            unescape(r#"a\nb\t\"c\" \\n \q \x41 \xff \"#),
            "a\nb\t\"c\" \\n \\q A \\xff \\"
        );
        assert_eq!(unescape("é\\né"), "é\né");
    }

    #[test]
    fn devices() {
        assert_eq!(backend(None, None).unwrap(), BackendKind::Auto);
        assert_eq!(backend(None, Some(0)).unwrap(), BackendKind::Cpu);
        assert_eq!(backend(None, Some(99)).unwrap(), BackendKind::Auto);
        assert_eq!(
            backend(Some("CUDA1"), Some(99)).unwrap(),
            BackendKind::Cuda(1)
        );
        assert_eq!(backend(Some("cuda"), None).unwrap(), BackendKind::Cuda(0));
        assert_eq!(
            backend(Some("gpu"), None).unwrap_err().code,
            crate::fail::USAGE
        );
        assert_eq!(
            gpu_layers(Some("lots")).unwrap_err().code,
            crate::fail::USAGE
        );
        let layers = |given| gpu_layers(Some(given)).unwrap();
        assert_eq!(["auto", "-1", "20"].map(layers), [None, None, Some(20)]);
        assert_eq!(["all", "-2"].map(layers), [Some(u32::MAX); 2]);
    }

    #[test]
    fn one_model_is_enough() {
        let named = PathBuf::from("a");
        let named = Some(&named);
        assert!(model_source(named, false, Some(&"b".into())).is_err());
        assert_eq!(
            model_source(named, true, Some(&"b".into())).unwrap(),
            ModelSource::Path("b".into())
        );
        assert_eq!(
            model_source(named, true, None).unwrap(),
            ModelSource::Path("a".into())
        );
    }
}
