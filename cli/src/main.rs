//! The `lemma` command.
//!
//! What the user meets is decided in a few places, each of which has its module:
//!
//! * [`args`]: the command line, what was typed and what it means;
//! * [`run`]: an answer in a pipe, [`repl`]: a conversation on a terminal, [`cmd`]: everything that has a name of its own;
//! * [`out`] and [`term`]: who may write where, and what may reach a terminal;
//! * [`fail`]: how the program ends.
//!
//! The model is in the engine. This crate has no arithmetic and no threads, except one that waits for signals.

mod args;
mod bundled;
mod cmd;
mod fail;
mod load;
mod logging;
mod out;
mod record;
mod repl;
mod reply;
mod request;
mod run;
mod sampling;
mod signals;
mod stats;
mod term;
mod text;
mod trace;

use std::process::ExitCode;

use args::typed::Command;
use args::{Invocation, Parsed};
use fail::Result;
use term::{Color, Term};

fn main() -> ExitCode {
    install_panic_hook();
    signals::install();
    // Buffers that cannot be had are mostly met where they are made.
    let failure = match lemma_engine::memory::taking(real_main) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    out::failure(&failure, Term::detect(color_of_args()).err_style);
    ExitCode::from(failure.code)
}

fn real_main() -> Result {
    let argv: Vec<_> = std::env::args_os().collect();
    let parsed = args::parse(argv.clone()).map_err(|f| run::refused(&argv, f))?;
    let invocation = match parsed {
        Parsed::Text(text) => return out::put(&text),
        Parsed::Run(invocation) => invocation,
    };
    let common = invocation.common();
    let term = common.map_or_else(|| Term::detect(Color::Auto), args::config::term);
    logging::install(common.is_some_and(|c| c.verbose), term.err_style)?;
    act(&invocation, term).map_err(|f| invocation.name_variable(f))
}

fn act(invocation: &Invocation, term: Term) -> Result {
    match &invocation.cli.command {
        None => run::run(invocation, term),
        Some(Command::Batch(a)) => cmd::batch::run(a, invocation, term),
        Some(Command::Score(a)) => cmd::score::run(a, invocation),
        Some(Command::Perplexity(a)) => cmd::perplexity::run(a, invocation, term),
        Some(Command::Bench(a)) => cmd::bench::run(a, invocation, term),
        Some(Command::Kv(a)) => cmd::kv::run(a, invocation, term),
        Some(Command::Tokenize(a)) => cmd::vocab::tokenize(a, invocation, term),
        Some(Command::Detokenize(a)) => cmd::vocab::detokenize(a, invocation, term),
        Some(Command::Template(a)) => cmd::vocab::template(a, invocation, term),
        Some(Command::Inspect(a)) => cmd::inspect::run(a, invocation, term),
        Some(Command::Check(a)) => cmd::check::run(a, invocation, term),
        Some(Command::Quantize(a)) => cmd::quantize::run(a, term),
        Some(Command::Synth(a)) => cmd::synth::run(a, term),
        Some(Command::Devices(a)) => cmd::devices::run(a),
        Some(Command::Completions(a)) => cmd::completions::run(a),
    }
}

/// The colour of the error lines, also when the command line could not be understood.
fn color_of_args() -> Color {
    let mut words = std::env::args_os()
        .skip_while(|w| w != "--color" && w != "--color=never" && w != "--color=always");
    match (words.next(), words.next()) {
        (Some(flag), _) if flag == "--color=never" => Color::Never,
        (Some(flag), _) if flag == "--color=always" => Color::Always,
        (Some(_), Some(when)) if when == "never" => Color::Never,
        (Some(_), Some(when)) if when == "always" => Color::Always,
        _ => Color::Auto,
    }
}

/// A bug ends in one line and exit code 70, on whatever thread it happens.
fn install_panic_hook() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        signals::restore_terminal();
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0") {
            default(info);
        }
        let payload = info.payload();
        let what = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned());
        let place = info
            .location()
            .map_or_else(String::new, |l| format!(" ({}:{})", l.file(), l.line()));
        let failure = fail::Failure::new(
            fail::BUG,
            format!(
                "internal: {}{place}",
                term::escape(&what.unwrap_or_default())
            ),
        )
        .hint("this is a bug in lemma; RUST_BACKTRACE=1 shows where it happened");
        out::failure(&failure, Term::detect(color_of_args()).err_style);
        // Not a return: other threads may wait for this one forever.
        signal_hook::low_level::exit(i32::from(fail::BUG));
    }));
}
