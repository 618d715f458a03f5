//! `lemma completions SHELL`.

use clap::CommandFactory as _;

use crate::args::tools::CompletionsArgs;
use crate::args::typed::Cli;
use crate::fail::Result;
use crate::out;

pub(crate) fn run(args: &CompletionsArgs) -> Result {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lemma", &mut script);
    out::bytes(&script)
}
