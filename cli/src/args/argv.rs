//! llama.cpp's way of writing flags, in clap's.
//!
//! llama.cpp has long names behind a single dash (`-ngl`, `-ctk`, `-no-cnv`), which clap would read as a row of short flags, and a
//! number of flags that mean nothing here but stand in everybody's scripts. This pass runs before clap: it spells the former out,
//! drops the latter, and binds each value to its flag (`-p -1` becomes `--prompt=-1`), so that a value may begin with a dash.
//!
//! Because it knows every name, it is also the place that answers an unknown one with the nearest there is.

use std::ffi::{OsStr, OsString};

use clap::{Arg, ArgAction, Command};

use super::habits;
use crate::fail::{Failure, Result};

pub(crate) use lemma_engine::spelling::nearest;

/// Single-dash names of more than one letter.
const SHORT_NAMES: &[(&str, &str)] = &[
    ("-cmoe", "--cpu-moe"),
    ("-cnv", "--conversation"),
    ("-co", "--color"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-dev", "--device"),
    ("-jf", "--json-schema-file"),
    ("-ncmoe", "--n-cpu-moe"),
    ("-ngl", "--gpu-layers"),
    ("-no-cnv", "--no-conversation"),
    ("-rea", "--reasoning"),
    ("-st", "--single-turn"),
    ("-sys", "--system-prompt"),
    ("-sysf", "--system-prompt-file"),
    ("-ub", "--ubatch-size"),
    // Not llama.cpp's, but within a slip of the finger.
    ("-help", "--help"),
    ("-version", "--version"),
    ("--usage", "--help"),
];

/// How many values a flag that is dropped takes along.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Values {
    None,
    One,
    /// One if the next word is a switch position (`-fa`, `-fa on`).
    Switch,
}

/// llama.cpp's flags that change nothing here.
const IGNORED: &[(&str, Values)] = &[
    ("--check-tensors", Values::None),
    ("--context-shift", Values::None),
    ("--no-context-shift", Values::None),
    ("-cb", Values::None),
    ("--cont-batching", Values::None),
    ("-nocb", Values::None),
    ("--no-cont-batching", Values::None),
    ("--cpu-mask", Values::One),
    ("-C", Values::One),
    ("--cpu-range", Values::One),
    ("-Cr", Values::One),
    ("--cpu-strict", Values::One),
    ("-dt", Values::One),
    ("--defrag-thold", Values::One),
    ("-dio", Values::None),
    ("--direct-io", Values::None),
    ("--no-direct-io", Values::None),
    ("--display-prompt", Values::None),
    ("--no-display-prompt", Values::None),
    ("-fa", Values::Switch),
    ("--flash-attn", Values::Switch),
    ("-fit", Values::Switch),
    ("--fit", Values::Switch),
    ("-fitt", Values::One),
    ("--fit-target", Values::One),
    ("-fitc", Values::One),
    ("--fit-ctx", Values::One),
    ("-i", Values::None),
    ("--interactive", Values::None),
    ("-if", Values::None),
    ("--interactive-first", Values::None),
    ("--jinja", Values::None),
    ("--no-jinja", Values::None),
    ("--keep", Values::One),
    ("-kvo", Values::None),
    ("--kv-offload", Values::None),
    ("-nkvo", Values::None),
    ("--no-kv-offload", Values::None),
    ("-kvu", Values::None),
    ("--kv-unified", Values::None),
    ("-no-kvu", Values::None),
    ("--no-kv-unified", Values::None),
    ("--log-colors", Values::Switch),
    ("--log-disable", Values::None),
    ("--log-file", Values::One),
    ("--log-prefix", Values::None),
    ("--no-log-prefix", Values::None),
    ("--log-timestamps", Values::None),
    ("--no-log-timestamps", Values::None),
    ("-lv", Values::One),
    ("--verbosity", Values::One),
    ("--log-verbosity", Values::One),
    ("-mg", Values::One),
    ("--main-gpu", Values::One),
    ("-mli", Values::None),
    ("--multiline-input", Values::None),
    ("--mlock", Values::None),
    ("--mmap", Values::None),
    ("--no-mmap", Values::None),
    ("--no-host", Values::None),
    ("--no-mmproj", Values::None),
    ("--numa", Values::One),
    ("--offline", Values::None),
    ("--op-offload", Values::None),
    ("--no-op-offload", Values::None),
    ("--perf", Values::None),
    ("--no-perf", Values::None),
    ("--poll", Values::One),
    ("--poll-batch", Values::One),
    ("--prio", Values::One),
    ("--prio-batch", Values::One),
    ("--reasoning-format", Values::One),
    ("--repack", Values::None),
    ("--no-repack", Values::None),
    ("-nr", Values::None),
    ("--show-timings", Values::None),
    ("--no-show-timings", Values::None),
    ("--simple-io", Values::None),
    ("-sm", Values::One),
    ("--split-mode", Values::One),
    ("--swa-full", Values::None),
    ("-tb", Values::One),
    ("--threads-batch", Values::One),
    ("-ts", Values::One),
    ("--tensor-split", Values::One),
    ("--warmup", Values::None),
    ("--no-warmup", Values::None),
];

const SWITCH: &[&str] = &[
    "on", "off", "auto", "0", "1", "true", "false", "enabled", "disabled",
];

/// Rewrites `argv` (the program's name first) into what `root` parses.
pub(crate) fn normalize(argv: Vec<OsString>, root: &Command) -> Result<Vec<OsString>> {
    let mut words = argv.into_iter();
    let mut out: Vec<OsString> = words.next().into_iter().collect();
    let mut words: Vec<OsString> = words.collect();
    habits::foreign(&words)?;
    // `lemma help`, `lemma help score`.
    if words.first().is_some_and(|w| w == "help") {
        words.remove(0);
        words.push("--help".into());
    }

    // A command may stand behind flags that it takes itself (`lemma -m FILE score`): it goes to the front.
    let mut command = root;
    if let Some(at) = find_command(&words, root) {
        let name = words.remove(at);
        command = find_subcommand(root, &name).unwrap_or(root);
        out.push(name);
        // `lemma kv eval`: a command of commands.
        if let Some(at) = find_command(&words, command) {
            let name = words.remove(at);
            command = find_subcommand(command, &name).unwrap_or(command);
            out.push(name);
        }
    }

    let mut words = words.into_iter().peekable();
    while let Some(word) = words.next() {
        let Some(text) = word.to_str().filter(|t| t.len() > 1 && t.starts_with('-')) else {
            out.push(word);
            continue;
        };
        if text == "--" {
            out.push(word);
            out.extend(words);
            break;
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        if is_number(name) && value.is_none() {
            out.push(word);
            continue;
        }
        if let Some(flag) = resolve(name, command) {
            match (flag.takes_value, value) {
                (false, None) => out.push(flag.long.into()),
                (false, Some(_)) => return Err(Failure::usage(format!("{name} takes no value"))),
                (true, Some(value)) => out.push(format!("{}={value}", flag.long).into()),
                // A bare --color was a flag of its own in llama.cpp for long.
                (true, None)
                    if flag.long == "--color"
                        && words.peek().is_none_or(|w| {
                            w.to_str()
                                .is_some_and(|w| w.starts_with('-') && w.len() > 1)
                        }) =>
                {
                    out.push("--color=auto".into());
                }
                (true, None) => match words.next() {
                    Some(value) => {
                        let mut bound = OsString::from(format!("{}=", flag.long));
                        bound.push(value);
                        out.push(bound);
                    }
                    None => {
                        return Err(Failure::usage(format!("{name} needs a value"))
                            .hint(usage_hint(command)));
                    }
                },
            }
        } else if let Some(&(_, values)) = IGNORED.iter().find(|(n, _)| *n == name) {
            let mut next_is_switch = || {
                words
                    .peek()
                    .and_then(|w| w.to_str())
                    .is_some_and(|w| SWITCH.contains(&w))
            };
            if value.is_none()
                && (values == Values::One || (values == Values::Switch && next_is_switch()))
            {
                words.next();
            }
        } else if let Some(expanded) = glued(text, command) {
            out.extend(expanded);
        } else {
            return Err(unknown(name, command));
        }
    }
    Ok(out)
}

/// A flag of a command, ready for clap.
struct Flag {
    /// `--long`, or `-s` if it has no long name.
    long: String,
    takes_value: bool,
}

fn find_subcommand<'c>(root: &'c Command, word: &OsStr) -> Option<&'c Command> {
    root.get_subcommands().find(|c| word == c.get_name())
}

/// Whether a line that names no command has a flag, even if the line cannot be understood.
pub(crate) fn has_flag(argv: &[OsString], flag: &str, root: &Command) -> bool {
    let words = argv.get(1..).unwrap_or_default();
    let mut flags = words.iter().take_while(|w| *w != "--");
    flags.any(|w| w == flag) && find_command(words, root).is_none()
}

/// Index of the word that names a command: the first that is neither a flag nor its value.
fn find_command(words: &[OsString], root: &Command) -> Option<usize> {
    let mut at = 0;
    while at < words.len() {
        let text = words[at].to_str().unwrap_or("x");
        if text == "--" {
            return None;
        }
        if text.len() > 1 && text.starts_with('-') {
            // Flags before the command may be those of any command.
            let inner = || root.get_subcommands().flat_map(Command::get_subcommands);
            let everywhere = || {
                std::iter::once(root)
                    .chain(root.get_subcommands())
                    .chain(inner())
            };
            let takes_value = !text.contains('=')
                && (everywhere()
                    .find_map(|c| resolve(text, c))
                    .is_some_and(|f| f.takes_value)
                    || IGNORED.iter().any(|(n, v)| *n == text && *v == Values::One));
            at += 1 + usize::from(takes_value);
            continue;
        }
        return find_subcommand(root, &words[at]).map(|_| at);
    }
    None
}

fn resolve(name: &str, command: &Command) -> Option<Flag> {
    let name = SHORT_NAMES
        .iter()
        .find(|(short, _)| *short == name)
        .map_or(name, |(_, long)| long);
    let matches = |arg: &&Arg| match name.strip_prefix("--") {
        Some(long) => {
            arg.get_long() == Some(long) || arg.get_all_aliases().is_some_and(|a| a.contains(&long))
        }
        None => arg
            .get_short()
            .is_some_and(|s| name.strip_prefix('-').is_some_and(|n| n.chars().eq([s]))),
    };
    if let Some(arg) = command.get_arguments().find(matches) {
        let long = arg
            .get_long()
            .map_or_else(|| name.to_owned(), |l| format!("--{l}"));
        return Some(Flag {
            long,
            takes_value: matches!(arg.get_action(), ArgAction::Set | ArgAction::Append),
        });
    }
    // clap adds these when it builds the command.
    let long = match name {
        "-h" | "--help" => name,
        "-V" | "--version" if command.get_version().is_some() => "--version",
        _ => return None,
    };
    Some(Flag {
        long: long.to_owned(),
        takes_value: false,
    })
}

/// `-t4`: a short flag with its value in one word.
fn glued(text: &str, command: &Command) -> Option<Vec<OsString>> {
    let mut chars = text.strip_prefix('-')?.chars();
    let first = chars.next().filter(|c| *c != '-')?;
    let flag = resolve(&format!("-{first}"), command)?;
    let value = chars.as_str();
    // Only numbers: "-temp" is a slip for "--temp", not "-t emp".
    (flag.takes_value && is_number(&format!("-{value}")))
        .then(|| vec![format!("{}={value}", flag.long).into()])
}

fn is_number(text: &str) -> bool {
    text.strip_prefix('-').is_some_and(|t| {
        t.starts_with(|c: char| c.is_ascii_digit() || c == '.') && t.parse::<f64>().is_ok()
    })
}

fn usage_hint(command: &Command) -> String {
    match command.get_name() {
        "lemma" => "'lemma --help' lists the flags".to_owned(),
        name @ ("eval" | "replay" | "facts") => format!("'lemma kv {name} --help' lists the flags"),
        name => format!("'lemma {name} --help' lists the flags"),
    }
}

fn unknown(name: &str, command: &Command) -> Failure {
    let failure = Failure::usage(format!("unknown flag {}", crate::term::escape(name)));
    if let Some(why) = habits::absent(name) {
        return failure.hint(why);
    }
    let mut names: Vec<String> = SHORT_NAMES
        .iter()
        .filter(|(_, long)| resolve(long, command).is_some())
        .map(|(s, _)| (*s).to_owned())
        .collect();
    for arg in command.get_arguments() {
        names.extend(arg.get_long().map(|l| format!("--{l}")));
        names.extend(
            arg.get_all_aliases()
                .unwrap_or_default()
                .iter()
                .map(|l| format!("--{l}")),
        );
    }
    match nearest(name, names.iter().map(String::as_str)) {
        Some(near) => failure.hint(format!("did you mean {near}?")),
        None => failure.hint(usage_hint(command)),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::typed::Cli;

    fn run(line: &[&str]) -> Result<Vec<String>> {
        let argv = std::iter::once("lemma")
            .chain(line.iter().copied())
            .map(OsString::from)
            .collect();
        let out = normalize(argv, &Cli::command())?;
        Ok(out
            .into_iter()
            .skip(1)
            .map(|w| w.to_string_lossy().into_owned())
            .collect())
    }

    #[test]
    fn spells_llama_names_out() {
        assert_eq!(
            run(&["-ngl", "99", "-ctk", "q8_0", "-no-cnv", "-t", "4"]).unwrap(),
            [
                "--gpu-layers=99",
                "--cache-type-k=q8_0",
                "--no-conversation",
                "--threads=4"
            ]
        );
        assert_eq!(
            run(&["-t8", "-n", "-1"]).unwrap(),
            ["--threads=8", "--predict=-1"]
        );
        assert_eq!(
            run(&["--n-predict", "3", "--temperature=0"]).unwrap(),
            ["--predict=3", "--temp=0"]
        );
    }

    #[test]
    fn a_value_may_look_like_a_flag() {
        assert_eq!(run(&["-p", "-ngl"]).unwrap(), ["--prompt=-ngl"]);
        assert_eq!(run(&["-p", "--help"]).unwrap(), ["--prompt=--help"]);
        assert_eq!(run(&["-p", "score", "x"]).unwrap(), ["--prompt=score", "x"]);
        assert_eq!(run(&["--", "-ngl"]).unwrap(), ["--", "-ngl"]);
    }

    #[test]
    fn drops_what_means_nothing_here() {
        assert_eq!(
            run(&[
                "-fa", "-p", "x", "--mlock", "-lv", "3", "-fa", "on", "--numa", "isolate", "-i"
            ])
            .unwrap(),
            ["--prompt=x"]
        );
    }

    #[test]
    fn a_command_may_follow_its_flags() {
        assert_eq!(
            run(&["-m", "x.gguf", "score", "--top", "3"]).unwrap(),
            ["score", "--model=x.gguf", "--top=3"]
        );
        assert_eq!(run(&["--top", "3", "score"]).unwrap(), ["score", "--top=3"]);
        assert_eq!(
            run(&["-m", "x", "kv", "eval", "a.jsonl", "--limit", "3"]).unwrap(),
            ["kv", "eval", "--model=x", "a.jsonl", "--limit=3"]
        );
        assert_eq!(
            run(&["bench", "-p", "256", "-n", "48", "-r", "3"]).unwrap(),
            ["bench", "--n-prompt=256", "--n-gen=48", "--repetitions=3"]
        );
    }

    #[test]
    fn the_nearest_flag() {
        let hint = |line: &[&str]| run(line).unwrap_err().hint.unwrap();
        assert_eq!(hint(&["--tmep", "1"]), "did you mean --temp?");
        assert_eq!(hint(&["-temp", "1"]), "did you mean --temp?");
        assert_eq!(hint(&["--kv-buget", "1"]), "did you mean --kv-budget?");
        assert_eq!(
            hint(&["--reverse-promt", "1"]),
            "did you mean --reverse-prompt?"
        );
        assert_eq!(hint(&["-nlg", "1"]), "did you mean -ngl?");
        assert_eq!(hint(&["--zzzzzz"]), "'lemma --help' lists the flags");
        assert_eq!(hint(&["--gramar", "x"]), "did you mean --grammar?");
        assert_eq!(hint(&["score", "--tpo", "1"]), "did you mean --top?");
    }

    #[test]
    fn habits_from_elsewhere_are_answered() {
        let hint = |line: &[&str]| run(line).unwrap_err().hint.unwrap();
        assert!(hint(&["-hf", "a/b", "-p", "x"]).contains("-m FILE"));
        assert!(hint(&["-ot", "x"]).contains("-ncmoe"));
        assert_eq!(hint(&["-bf", "x"]), "did you mean -f?");
        assert!(hint(&["--model-url", "http://x"]).contains("-m FILE"));
        assert_eq!(hint(&["--max-tokens", "5"]), "did you mean -n?");
        assert!(hint(&["run", "llama3"]).contains("-m FILE"));
        assert!(hint(&["serve"]).contains("no server"));
        assert_eq!(run(&["help"]).unwrap(), ["--help"]);
        assert_eq!(run(&["help", "score"]).unwrap(), ["score", "--help"]);
        assert_eq!(
            run(&["--color", "-p", "x", "--color"]).unwrap(),
            ["--color=auto", "--prompt=x", "--color=auto"]
        );
        // Neither a flag nor a value is a command.
        assert_eq!(run(&["-p", "run"]).unwrap(), ["--prompt=run"]);
        assert_eq!(
            run(&["-ncmoe", "4", "-C", "ff", "-p", "x"]).unwrap(),
            ["--n-cpu-moe=4", "--prompt=x"]
        );
    }

    #[test]
    fn no_ignored_flag_shadows_one_of_ours() {
        let root = Cli::command();
        for (name, _) in IGNORED {
            for command in std::iter::once(&root).chain(root.get_subcommands()) {
                assert!(
                    resolve(name, command).is_none(),
                    "{name} of {} is also on the list of ignored flags",
                    command.get_name()
                );
            }
        }
        for (_, long) in SHORT_NAMES {
            assert!(resolve(long, &root).is_some(), "{long}");
        }
    }
}
