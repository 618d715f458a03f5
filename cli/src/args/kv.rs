//! What was typed after `lemma kv`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

use super::typed::{CommonArgs, ComputeArgs, KvArgs, ModelArgs, SamplingArgs};

#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct KvCommandArgs {
    #[command(subcommand)]
    pub(crate) command: KvCommand,
}

#[derive(Debug, Subcommand)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one, and it lives as long as the program"
)]
pub(crate) enum KvCommand {
    /// Solve problems under a grid of policies and pool sizes: accuracy, lengths, memory, speed
    Eval(EvalArgs),
    /// Read given chains under a grid of policies, beside full: KL, likelihood, attention missed; the same numbers every time
    Replay(ReplayArgs),
    /// Plant facts, ask for them thousands of tokens later: share that each policy still knows, by age
    Facts(FactsArgs),
}

/// The grid of an evaluation.
#[derive(Debug, Args)]
pub(crate) struct GridArgs {
    /// Policies, with options: full,window,random,raas:alpha=1e-4,recent=8,… (full always runs)
    #[arg(
        long,
        value_name = "SPEC,…",
        default_value = "full,window,random,h2o,raas"
    )]
    pub(crate) policies: Vec<String>,
    /// Sizes of the pool, the prompt included: tokens (512), or shares of prompt and reply (1/4, 25%)
    #[arg(long, value_name = "N,…", default_value = "1/8,1/4,1/2")]
    pub(crate) budgets: Vec<String>,
    /// Only the first N problems of each file
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Problems to run side by side, each on one thread [default: physical cores]
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// Tokens of a reply at most [default: 1.5 × the reference + 64, or 8192 without one]
    #[arg(short = 'n', long = "predict", alias = "n-predict", value_name = "N")]
    pub(crate) n_predict: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Problems, one JSON object a line: {"prompt": …, "answer": …}
    #[arg(value_name = "FILE", required = true, value_hint = ValueHint::FilePath)]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) grid: GridArgs,
    /// Seeds for policies that draw (for all, if --temp is above 0)
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) seeds: u64,
    /// Also plant facts and ask for them later: N chains a variant (see lemma kv facts)
    #[arg(long, value_name = "N")]
    pub(crate) facts: Option<u64>,
    /// Keep a log here, to go on after an interruption, and write table.md, results.json and accuracy.png
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) output: Option<PathBuf>,
    /// One JSON object on stdout in place of the table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Problems as for eval (their "reply", or what full says to them), or recorded chains: {"tokens": […], "n_prompt": N}
    #[arg(value_name = "FILE", required = true, value_hint = ValueHint::FilePath)]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) grid: GridArgs,
    /// Seeds for policies that draw
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) seeds: u64,
    /// Write the chains here, to be read again
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) record: Option<PathBuf>,
    /// One JSON object on stdout in place of the table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FactForm {
    /// Sentences that any model can read
    Notes,
    /// The language of the bundled model
    Table,
}

#[derive(Debug, Args)]
pub(crate) struct FactsArgs {
    /// Policies, with options, as for eval (full always runs)
    #[arg(
        long,
        value_name = "SPEC,…",
        default_value = "full,window,random,h2o,raas"
    )]
    pub(crate) policies: Vec<String>,
    /// Sizes of the pool in tokens, the prompt included
    #[arg(long, value_name = "N,…", default_value = "1024")]
    pub(crate) budgets: Vec<String>,
    /// Tokens between a fact and its question; five at most
    #[arg(long, value_name = "N,…", default_value = "512,1024,2048,4096,8192")]
    pub(crate) ages: String,
    /// Chains for each variant (once, restated, derived); each asks for one fact at each age
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) chains: u64,
    /// Language of the chains [default: table for the bundled model, notes for others]
    #[arg(long, value_name = "FORM")]
    pub(crate) form: Option<FactForm>,
    /// Chains to read side by side, each on one thread [default: physical cores]
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<usize>,
    /// One JSON object on stdout in place of the table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}
