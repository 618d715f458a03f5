//! The command line, in two layers: what was [typed] and what it [means](config).
//!
//! In between stand [`argv`], which knows llama.cpp's spelling, and clap. All errors of usage leave here as a
//! [`Failure`] with exit code 2, in the same two lines as every other error, rather than in clap's own layout.

pub(crate) mod argv;
pub(crate) mod config;
mod habits;
pub(crate) mod help;
pub(crate) mod kv;
mod names;
pub(crate) mod tools;
pub(crate) mod typed;

use std::ffi::OsString;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _};

use crate::fail::{Failure, Result};
use crate::term::escape;
use typed::Cli;

/// A command line that was understood.
pub(crate) enum Parsed {
    /// Text that was asked for instead of an action: help, version.
    Text(String),
    Run(Box<Invocation>),
}

/// The parsed arguments and the matches that know where each came from.
pub(crate) struct Invocation {
    pub(crate) cli: Cli,
    /// Matches of the command that runs: the subcommand's, or the root's.
    pub(crate) matches: ArgMatches,
    /// Flags that the environment has set, and the variables.
    from_env: Vec<(String, String)>,
}

impl Invocation {
    /// Whether the model was named by the environment alone.
    pub(crate) fn model_from_env(&self) -> bool {
        self.matches.value_source("model") == Some(ValueSource::EnvVariable)
    }

    /// An error of usage that names a flag names the variable, if that is where the value is from.
    pub(crate) fn name_variable(&self, mut failure: Failure) -> Failure {
        for (flag, variable) in &self.from_env {
            if let Some(rest) = failure.message.strip_prefix(flag)
                && rest.starts_with([' ', ':'])
            {
                failure.message = format!("{variable}{rest}");
                break;
            }
        }
        failure
    }

    /// The flags that every command takes.
    pub(crate) fn common(&self) -> Option<&typed::CommonArgs> {
        use typed::Command as C;
        Some(match &self.cli.command {
            None => &self.cli.run.common,
            Some(C::Batch(a)) => &a.common,
            Some(C::Score(a)) => &a.common,
            Some(C::Perplexity(a)) => &a.common,
            Some(C::Bench(a)) => &a.common,
            Some(C::Tokenize(a)) => &a.common,
            Some(C::Detokenize(a)) => &a.common,
            Some(C::Template(a)) => &a.common,
            Some(C::Inspect(a)) => &a.common,
            Some(C::Check(a)) => &a.common,
            Some(C::Quantize(a)) => &a.common,
            Some(C::Synth(a)) => &a.common,
            Some(C::Devices(a)) => &a.common,
            Some(C::Kv(a)) => match &a.command {
                kv::KvCommand::Eval(a) => &a.common,
                kv::KvCommand::Replay(a) => &a.common,
                kv::KvCommand::Facts(a) => &a.common,
            },
            Some(C::Completions(_)) => return None,
        })
    }
}

/// The whole command line, where a flag that several commands share means something else in one of them.
fn command() -> clap::Command {
    let greedy = "Temperature; 0: always the most likely token [default: 0]";
    let eval = |c: clap::Command| c.mut_arg("temp", |a| a.help(greedy));
    Cli::command().mut_subcommand("kv", |kv| kv.mut_subcommand("eval", eval))
}

/// Parses the arguments of the process.
pub(crate) fn parse(argv: Vec<OsString>) -> Result<Parsed> {
    let root = without_empty_variables(command());
    let argv = argv::normalize(argv, &root)?;
    let command = command_of(&argv, &root);
    let variables = variables(&argv, &root);
    let matches = match root.try_get_matches_from(argv) {
        Ok(matches) => matches,
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Parsed::Text(e.render().to_string()));
        }
        Err(e) => return Err(usage(&e, &command, &variables)),
    };
    let cli = Cli::from_arg_matches(&matches).map_err(|e| usage(&e, &command, &variables))?;
    let mut matches = matches;
    while let Some((_, sub)) = matches.subcommand() {
        matches = sub.clone();
    }
    Ok(Parsed::Run(Box::new(Invocation {
        cli,
        matches,
        from_env: variables,
    })))
}

/// Whether a line asks for one answer with this flag. It need not be one that [`parse`] understands.
pub(crate) fn asks(argv: &[OsString], flag: &str) -> bool {
    argv::has_flag(argv, flag, &command())
}

/// The flags of a line's command that are not on the line and whose variables are set.
fn variables(argv: &[OsString], root: &clap::Command) -> Vec<(String, String)> {
    let given = |flag: &str| {
        let words = argv.iter().filter_map(|w| w.to_str());
        words
            .filter_map(|w| w.strip_prefix(flag))
            .any(|rest| rest.is_empty() || rest.starts_with('='))
    };
    let set = |arg: &clap::Arg| {
        let variable = arg.get_env().filter(|v| std::env::var_os(v).is_some())?;
        let flag = format!("--{}", arg.get_long()?);
        (!given(&flag)).then(|| (flag, variable.to_string_lossy().into_owned()))
    };
    let command = innermost(argv, root).last().copied().unwrap_or(root);
    command.get_arguments().filter_map(set).collect()
}

/// A variable that is set to nothing (`LEMMA_MODEL= lemma`) counts as one that is not set, as in git.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &std::ffi::OsStr| std::env::var_os(name).is_some_and(|v| v.is_empty());
    command
        .mut_args(|arg| match arg.get_env() {
            Some(name) if is_empty(name) => arg.env(Resettable::Reset),
            _ => arg,
        })
        .mut_subcommands(without_empty_variables)
}

/// The command that a line names, with its words: "lemma kv eval".
fn command_of(argv: &[OsString], root: &clap::Command) -> String {
    let names = innermost(argv, root).into_iter().map(|c| c.get_name());
    let names: Vec<&str> = std::iter::once(root.get_name()).chain(names).collect();
    names.join(" ")
}

/// The commands that a line names, each in the one before.
fn innermost<'c>(argv: &[OsString], root: &'c clap::Command) -> Vec<&'c clap::Command> {
    let mut path = Vec::new();
    let mut command = root;
    for word in argv.iter().skip(1) {
        match command.get_subcommands().find(|c| word == c.get_name()) {
            Some(inner) => command = inner,
            None => break,
        }
        path.push(command);
    }
    path
}

/// clap's error as a failure: its first line, and its tips as the hint.
fn usage(e: &clap::Error, command: &str, variables: &[(String, String)]) -> Failure {
    let flag = |shown: &str| {
        let flag = flag(shown);
        let set = variables.iter().find(|(f, _)| f == flag);
        set.map_or(flag, |(_, variable)| variable).to_owned()
    };
    let text = |kind| match e.get(kind) {
        Some(ContextValue::String(s)) => Some(s.clone()),
        Some(ContextValue::Strings(s)) if !s.is_empty() => Some(s.join(", ")),
        _ => None,
    };
    let rendered = e.render().to_string();
    let first = rendered
        .lines()
        .next()
        .unwrap_or("")
        .trim_start_matches("error: ")
        .to_owned();
    let message = match (
        e.kind(),
        text(ContextKind::InvalidArg),
        text(ContextKind::InvalidValue),
    ) {
        (ErrorKind::InvalidValue, Some(arg), Some(value)) => match text(ContextKind::ValidValue) {
            Some(valid) => format!("{}: {:?}, expected {valid}", flag(&arg), value),
            None => first,
        },
        (ErrorKind::ValueValidation, Some(arg), Some(value)) => {
            let why = rendered
                .lines()
                .next()
                .and_then(|l| l.rsplit_once(": "))
                .map_or("not valid", |(_, why)| why);
            format!("{}: {value:?}, {}", flag(&arg), number(why))
        }
        (ErrorKind::InvalidSubcommand, ..) => {
            let word = text(ContextKind::InvalidSubcommand).unwrap_or_default();
            let word = escape(&word);
            return if command == "lemma" {
                Failure::usage(format!("one argument too many: {word}")).hint(
                    "a prompt goes behind -p, in quotes; 'lemma --help' lists flags and commands",
                )
            } else {
                Failure::usage(format!("no command '{command} {word}'"))
                    .hint(format!("'{command} --help' lists them"))
            };
        }
        (ErrorKind::ArgumentConflict, Some(arg), _) => match text(ContextKind::PriorArg) {
            Some(prior) => format!("{} and {} exclude each other", flag(&arg), flag(&prior)),
            None => first,
        },
        (
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand,
            ..,
        ) => format!("'{command}' needs a command"),
        (ErrorKind::MissingRequiredArgument, Some(args), _) => format!("missing: {args}"),
        (ErrorKind::UnknownArgument, Some(arg), _) => format!("one argument too many: {arg}"),
        _ => first,
    };
    let failure = Failure::usage(escape(&message));
    match text(ContextKind::SuggestedValue) {
        Some(near) => failure.hint(format!("did you mean {near}?")),
        None => failure.hint(format!("'{command} --help' explains the flags")),
    }
}

/// What the standard library says of a number, in words for people.
fn number(why: &str) -> String {
    let range = why
        .split_once(" is not in ")
        .and_then(|(_, range)| range.split_once("..="));
    match (why, range) {
        (_, Some((low, high))) => format!("expected a whole number from {low} to {high}"),
        ("number too large to fit in target type", _) => "expected a smaller number".to_owned(),
        ("number too small to fit in target type", _) => "expected a larger number".to_owned(),
        ("invalid digit found in string" | "cannot parse integer from empty string", _) => {
            "expected a whole number".to_owned()
        }
        _ => why.to_owned(),
    }
}

/// `--temp <F>` → `--temp`.
fn flag(shown: &str) -> &str {
    shown.split([' ', '=', '[']).next().unwrap_or(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &[&str]) -> Result<Parsed> {
        parse(
            std::iter::once("lemma")
                .chain(line.iter().copied())
                .map(OsString::from)
                .collect(),
        )
    }

    fn run(line: &[&str]) -> Box<Invocation> {
        match parse_line(line) {
            Ok(Parsed::Run(run)) => run,
            Ok(Parsed::Text(text)) => panic!("{text}"),
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn clap_is_content() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_word_is_a_model_and_a_name_a_command() {
        assert_eq!(
            run(&["x.gguf", "-p", "hi"])
                .cli
                .run
                .positional
                .unwrap()
                .to_str(),
            Some("x.gguf")
        );
        assert!(matches!(
            run(&["score", "-m", "x.gguf"]).cli.command,
            Some(typed::Command::Score(_))
        ));
    }

    #[test]
    fn sampling_flags() {
        let line = run(&[
            "--temp",
            "0.5",
            "--temp",
            "0.25",
            "--dry-sequence-breaker",
            "a",
            "--dry-sequence-breaker",
            "b",
            "--mirostat-lr",
            "0.2",
            "-s",
            "-1",
        ]);
        let s = config::sampling(&line.matches).unwrap();
        assert_eq!(
            (
                s.flags.temp,
                s.flags.mirostat_eta,
                s.flags.top_k,
                s.flags.seed
            ),
            (Some(0.25), Some(0.2), None, Some(None))
        );
        assert_eq!(s.flags.dry_sequence_breakers.unwrap(), ["a", "b"]);
        assert_eq!(
            config::sampling(&run(&["--temp", "warm"]).matches)
                .unwrap_err()
                .code,
            crate::fail::USAGE
        );
    }

    #[test]
    fn every_sampling_parameter_has_a_flag() {
        let root = Cli::command();
        for name in lemma_engine::sampling::SamplerParams::NAMES {
            assert!(root.get_arguments().any(|a| a.get_id() == name), "{name}");
        }
    }

    #[test]
    fn numbers_are_asked_for_in_words() {
        let message = |line: &[&str]| match parse_line(line) {
            Err(e) => e.message,
            Ok(_) => panic!("{line:?} was accepted"),
        };
        assert_eq!(
            message(&["-n", "many"]),
            "--predict: \"many\", expected a whole number"
        );
        assert_eq!(
            message(&["-c", "-1"]),
            "--ctx-size: \"-1\", expected a whole number from 0 to 4294967295"
        );
        assert_eq!(
            message(&["-n", "99999999999999999999"]),
            "--predict: \"99999999999999999999\", expected a smaller number"
        );
        assert_eq!(message(&["What", "is", "it"]), "one argument too many: is");
        assert_eq!(message(&["kv"]), "'lemma kv' needs a command");
        assert_eq!(message(&["kv", "evla"]), "no command 'lemma kv evla'");
        let hint = |line: &[&str]| parse_line(line).err().unwrap().hint.unwrap();
        assert_eq!(
            hint(&["kv", "eval"]),
            "'lemma kv eval --help' explains the flags"
        );
        assert_eq!(hint(&["-n", "many"]), "'lemma --help' explains the flags");
    }

    #[test]
    fn errors_are_two_lines_at_most() {
        for line in [
            &["-n", "many"][..],
            &["--kv-pin", "everything"],
            &["--json", "--stream-json"],
            &["--kv-budget", "1", "--kv-mem", "1"],
            &["synth"],
            &["tokenize", "a", "b"],
            &["completions", "tcsh"],
            &["-n"],
            &["a", "b"],
        ] {
            let Err(e) = parse_line(line) else {
                panic!("{line:?} was accepted")
            };
            assert_eq!(e.code, crate::fail::USAGE, "{line:?}");
            assert!(
                !e.message.contains('\n') && !e.message.is_empty(),
                "{line:?}: {}",
                e.message
            );
            assert!(!e.hint.unwrap_or_default().contains('\n'));
        }
    }
}
