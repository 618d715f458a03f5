//! What was typed: the command line as clap sees it, after [`argv`](super::argv) has spelled llama.cpp's short names out.
//!
//! Nothing here decides anything. Fields say what was given, in the words of the command line; what that means is the business of
//! [`config`](super::config). The doc comments are the help text.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use super::kv::KvCommandArgs;
use super::names::{Names, policies};
use super::tools::{
    BatchArgs, BenchArgs, CheckArgs, CompletionsArgs, DetokenizeArgs, DevicesArgs, InspectArgs,
    PerplexityArgs, QuantizeArgs, ScoreArgs, SynthArgs, TemplateArgs, TokenizeArgs,
};

/// Instruction sets that `--isa` takes.
pub(crate) const ISAS: [&str; 6] = ["scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx"];

const MODEL: &str = "Model";
const PROMPT: &str = "Prompt";
const OUTPUT: &str = "Output";
const THINK: &str = "Thinking";
const SAMPLING: &str = "Sampling";
const KV: &str = "KV cache";
const COMPUTE: &str = "Compute";

/// Run GGUF language models from one binary, with a KV cache of fixed size.
#[derive(Debug, Parser)]
#[command(
    name = "lemma",
    version,
    max_term_width = 110,
    disable_help_subcommand = true,
    args_override_self = true,
    override_usage = "lemma [MODEL] [OPTIONS]                 talk to a model (the bundled one if none is named)\n       lemma [MODEL] -p PROMPT | -f FILE       one answer to stdout\n       ... | lemma [MODEL]                     the whole of stdin is one prompt\n       lemma COMMAND [OPTIONS]",
    after_help = "'lemma --help' explains more, 'lemma COMMAND --help' a command.",
    after_long_help = super::help::AFTER_LONG
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Subcommand)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one, and it lives as long as the program"
)]
pub(crate) enum Command {
    /// Answer the requests of a JSONL file, one result a line; resumable
    #[command(after_help = super::help::REQUESTS)]
    Batch(BatchArgs),
    /// Log-probabilities of given texts, JSONL in and out
    Score(ScoreArgs),
    /// Perplexity of a model over a text
    Perplexity(PerplexityArgs),
    /// Measure the speed of a model on this machine
    Bench(BenchArgs),
    /// Measure what KV policies cost in right answers
    Kv(KvCommandArgs),
    /// Text to tokens
    Tokenize(TokenizeArgs),
    /// Tokens to text
    Detokenize(DetokenizeArgs),
    /// Show the chat template of a model, or what it makes of a conversation
    Template(TemplateArgs),
    /// List the metadata and tensors of a file
    Inspect(InspectArgs),
    /// Read a model file from end to end and report what is wrong with it
    Check(CheckArgs),
    /// Write a model with other types of weights: fewer bits, or more
    #[command(
        override_usage = "lemma quantize [OPTIONS] IN OUT TYPE\n       lemma quantize [OPTIONS] IN TYPE --dry-run"
    )]
    Quantize(QuantizeArgs),
    /// Write a model of random weights in the shape of a published one
    Synth(SynthArgs),
    /// List the devices that can run a model
    Devices(DevicesArgs),
    /// Write a completion script for a shell
    Completions(CompletionsArgs),
}

/// No subcommand: talk, or answer once.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// GGUF file, or the first part of a split one
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub(crate) positional: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// A file that is looked at and not run.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct FileArgs {
    /// GGUF file, or the first part of a split one
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub(crate) positional: Option<PathBuf>,
    /// The same
    #[arg(short, long, value_name = "FILE", env = "LEMMA_MODEL", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub(crate) model: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = MODEL)]
pub(crate) struct ModelArgs {
    /// GGUF file, or the first part of a split one
    #[arg(short, long, value_name = "FILE", env = "LEMMA_MODEL", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub(crate) model: Option<PathBuf>,
    /// Pre-tokenizer to use in place of the one that the file names
    #[arg(long, value_name = "NAME", hide_short_help = true)]
    pub(crate) pre: Option<String>,
    /// Chat template to use in place of the model's: a name (chatml, llama3 …) or Jinja source
    #[arg(
        long,
        value_name = "TEMPLATE",
        hide_short_help = true,
        conflicts_with = "chat_template_file"
    )]
    pub(crate) chat_template: Option<String>,
    /// The same, from a file
    #[arg(long, value_name = "FILE", hide_short_help = true, value_hint = ValueHint::FilePath)]
    pub(crate) chat_template_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = PROMPT)]
pub(crate) struct PromptArgs {
    /// What to ask; joined with stdin by a blank line if that is piped
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Read the prompt from a file ("-" is stdin)
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// System message [short: -sys]
    #[arg(
        long = "system-prompt",
        value_name = "TEXT",
        conflicts_with = "system_file"
    )]
    pub(crate) system: Option<String>,
    /// System message from a file [short: -sysf]
    #[arg(long = "system-prompt-file", value_name = "FILE", hide_short_help = true, value_hint = ValueHint::FilePath)]
    pub(crate) system_file: Option<PathBuf>,
    /// Leave after one reply [short: -st]
    #[arg(long, hide_short_help = true)]
    pub(crate) single_turn: bool,
    /// Talk on after -p has been answered [short: -cnv]
    #[arg(long, hide_short_help = true, conflicts_with = "no_conversation")]
    pub(crate) conversation: bool,
    /// Continue the text as it is, without the chat template [short: -no-cnv]
    #[arg(long)]
    pub(crate) no_conversation: bool,
    /// Take backslashes in -p and -sys literally
    #[arg(long, hide_short_help = true)]
    pub(crate) no_escape: bool,
    /// Undo --no-escape (the default: \n, \t, \", \\ … in -p and -sys are processed)
    #[arg(short, long, hide = true, overrides_with = "no_escape")]
    pub(crate) escape: bool,
    /// Show the prompt and its tokens on stderr
    #[arg(long, hide_short_help = true)]
    pub(crate) verbose_prompt: bool,
}

/// What becomes of the thinking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ThinkShow {
    /// Dim, live, before the answer
    Show,
    /// Not at all
    Hide,
    /// Live on one line that the answer replaces (terminal), one line saying how long it was (pipe: hidden)
    Fold,
    /// To stderr
    Stderr,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnOffAuto {
    On,
    Off,
    #[default]
    Auto,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = OUTPUT)]
pub(crate) struct OutputArgs {
    /// One JSON object in place of the answer
    #[arg(long, conflicts_with = "stream_json")]
    pub(crate) json: bool,
    /// JSON events as they happen: start, think, text, kv, end
    #[arg(long)]
    pub(crate) stream_json: bool,
}

/// Flags that every command takes.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = OUTPUT)]
pub(crate) struct CommonArgs {
    /// auto, always or never; NO_COLOR counts under auto
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = ["auto", "always", "never", "on", "off"], hide_possible_values = true)]
    pub(crate) color: String,
    /// Say more on stderr (statistics also when it is not a terminal)
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = SAMPLING)]
pub(crate) struct GenerateArgs {
    /// Tokens to generate at most, -1: until the answer ends
    #[arg(short = 'n', long = "predict", alias = "n-predict", value_name = "N", env = "LEMMA_N_PREDICT", hide_env = true, default_value_t = -1, hide_default_value = true)]
    pub(crate) n_predict: i64,
    /// Stop before this text; may be given several times
    #[arg(
        short = 'r',
        long = "reverse-prompt",
        alias = "stop",
        value_name = "TEXT"
    )]
    pub(crate) stop: Vec<String>,
    /// Go on after the end-of-generation token
    #[arg(long, hide_short_help = true)]
    pub(crate) ignore_eos: bool,
    /// Keep the answer to a grammar in GBNF, as llama.cpp has it; thinking stays free
    #[arg(long, value_name = "GBNF", group = "constraint")]
    pub(crate) grammar: Option<String>,
    /// The same, from a file
    #[arg(long, value_name = "FILE", hide_short_help = true, group = "constraint", value_hint = ValueHint::FilePath)]
    pub(crate) grammar_file: Option<PathBuf>,
    /// Keep the answer to JSON that this schema describes ({}: any JSON)
    #[arg(short, long, value_name = "SCHEMA", group = "constraint")]
    pub(crate) json_schema: Option<String>,
    /// The same, from a file [short: -jf]
    #[arg(long, value_name = "FILE", hide_short_help = true, group = "constraint", value_hint = ValueHint::FilePath)]
    pub(crate) json_schema_file: Option<PathBuf>,
    /// Whether a model that can think does: on, off or auto (what its template does)
    #[arg(long, value_name = "MODE", help_heading = THINK, alias = "rea", default_value = "auto", hide_default_value = true, hide_possible_values = true)]
    pub(crate) reasoning: OnOffAuto,
    /// Tokens of thinking after which it is brought to an end; -1: no limit
    #[arg(long, value_name = "N", help_heading = THINK, allow_negative_numbers = true)]
    pub(crate) reasoning_budget: Option<i64>,
    /// show, hide, fold or stderr [terminal: show, pipe: hide]
    #[arg(long, value_name = "WHERE", env = "LEMMA_THINK", hide_env = true, help_heading = THINK, hide_possible_values = true)]
    pub(crate) think: Option<ThinkShow>,
}

/// Sampling parameters, in llama.cpp's words. Without a flag the environment decides, then the model file, then the defaults below.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = SAMPLING)]
pub(crate) struct SamplingArgs {
    /// Seed of the random numbers; -1: a new one each time
    #[arg(short, long, value_name = "N", env = "LEMMA_SEED", hide_env = true)]
    pub(crate) seed: Option<String>,
    /// Temperature; 0: always the most likely token [default: 0.8]
    #[arg(
        long,
        alias = "temperature",
        value_name = "F",
        env = "LEMMA_TEMP",
        hide_env = true
    )]
    pub(crate) temp: Option<String>,
    /// Only the K most likely tokens, 0: all [default: 40]
    #[arg(long, value_name = "K", env = "LEMMA_TOP_K", hide_env = true)]
    pub(crate) top_k: Option<String>,
    /// Only the most likely tokens that make up this probability [default: 0.95]
    #[arg(long, value_name = "F", env = "LEMMA_TOP_P", hide_env = true)]
    pub(crate) top_p: Option<String>,
    /// Only tokens at least this likely compared with the best [default: 0.05]
    #[arg(long, value_name = "F", env = "LEMMA_MIN_P", hide_env = true)]
    pub(crate) min_p: Option<String>,
    /// Only tokens within this many standard deviations of the best logit
    #[arg(
        long = "top-nsigma",
        alias = "top-n-sigma",
        value_name = "F",
        hide_short_help = true
    )]
    pub(crate) top_n_sigma: Option<String>,
    /// Locally typical sampling [default: 1.0, off]
    #[arg(long, alias = "typical-p", value_name = "F", hide_short_help = true)]
    pub(crate) typical: Option<String>,
    /// Penalty of tokens that occurred lately [default: 1.0, off]
    #[arg(
        long,
        value_name = "F",
        env = "LEMMA_REPEAT_PENALTY",
        hide_env = true,
        hide_short_help = true
    )]
    pub(crate) repeat_penalty: Option<String>,
    /// How many tokens back a penalty looks, -1: all [default: 64]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) repeat_last_n: Option<String>,
    /// Flat penalty of tokens that occurred [default: 0]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) presence_penalty: Option<String>,
    /// Penalty by how often a token occurred [default: 0]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) frequency_penalty: Option<String>,
    /// DRY (penalty of repeated sequences) [default: 0, off]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) dry_multiplier: Option<String>,
    /// Growth of the DRY penalty [default: 1.75]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) dry_base: Option<String>,
    /// Length of a repetition that DRY lets pass [default: 2]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) dry_allowed_length: Option<String>,
    /// How many tokens back DRY looks, -1: all [default: 64]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) dry_penalty_last_n: Option<String>,
    /// Text at which DRY stops looking back; may be given several times, "none" for none
    #[arg(
        long = "dry-sequence-breaker",
        value_name = "TEXT",
        hide_short_help = true
    )]
    pub(crate) dry_sequence_breakers: Vec<String>,
    /// XTC (exclude top choices): probability [default: 0, off]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) xtc_probability: Option<String>,
    /// XTC: threshold [default: 0.1]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) xtc_threshold: Option<String>,
    /// Dynamic temperature: range around --temp [default: 0, off]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) dynatemp_range: Option<String>,
    /// Dynamic temperature: exponent [default: 1.0]
    #[arg(long = "dynatemp-exp", value_name = "F", hide_short_help = true)]
    pub(crate) dynatemp_exponent: Option<String>,
    /// Mirostat: 0 off, 1, or 2
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) mirostat: Option<String>,
    /// Mirostat: learning rate [default: 0.1]
    #[arg(long = "mirostat-lr", value_name = "F", hide_short_help = true)]
    pub(crate) mirostat_eta: Option<String>,
    /// Mirostat: target entropy [default: 5.0]
    #[arg(long = "mirostat-ent", value_name = "F", hide_short_help = true)]
    pub(crate) mirostat_tau: Option<String>,
    /// Add to the logit of a token: TOKEN+BIAS or TOKEN-BIAS, several with commas
    #[arg(short = 'l', long, value_name = "T+B,…", hide_short_help = true)]
    pub(crate) logit_bias: Option<String>,
    /// Truncation leaves at least this many tokens [default: 0]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) min_keep: Option<String>,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = KV)]
pub(crate) struct KvArgs {
    /// Positions at most; costs no memory, 0: as trained
    #[arg(short, long, value_name = "N", env = "LEMMA_CTX_SIZE", hide_env = true)]
    pub(crate) ctx_size: Option<u32>,
    /// Size of the pool in tokens, the prompt included [default: prompt + 4096]
    #[arg(
        long,
        value_name = "TOKENS",
        env = "LEMMA_KV_BUDGET",
        hide_env = true,
        conflicts_with = "kv_mem"
    )]
    pub(crate) kv_budget: Option<u32>,
    /// Size of the pool in MiB
    #[arg(long, value_name = "MIB", hide_short_help = true)]
    pub(crate) kv_mem: Option<u32>,
    /// Which page gives its place away when the pool is full [default: raas]
    #[arg(long, value_name = "NAME[:KEY=VALUE,…]", env = "LEMMA_KV_POLICY", hide_env = true, help = super::help::policies(), value_parser = Names(policies), hide_possible_values = true)]
    pub(crate) kv_policy: Option<String>,
    /// What counts as a hit (raas, lrfu, lag): a page with more attention mass than this [default: 0.5]
    #[arg(
        long,
        value_name = "F",
        hide_short_help = true,
        conflicts_with = "kv_top_r"
    )]
    pub(crate) kv_alpha: Option<String>,
    /// The same: this share of the pages, the best
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) kv_top_r: Option<String>,
    /// Decay of a page's hits per tick of --kv-clock (lrfu) [default: 0.9]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) kv_lambda: Option<String>,
    /// What decaying counts count: step or page [default: page]
    #[arg(long, value_name = "UNIT", hide_short_help = true, value_parser = ["step", "page"], hide_possible_values = true)]
    pub(crate) kv_clock: Option<String>,
    /// What is never recycled: prompt, system or none [default: prompt]
    #[arg(long, value_name = "WHAT", hide_short_help = true, value_parser = ["prompt", "system", "none"], hide_possible_values = true)]
    pub(crate) kv_pin: Option<String>,
    /// The last pages that are never recycled [default: 4]
    #[arg(long, value_name = "PAGES", hide_short_help = true)]
    pub(crate) kv_recent: Option<String>,
    /// How the heads that share a page agree on its mass: max or mean [default: max]
    #[arg(long, value_name = "HOW", hide_short_help = true, value_parser = ["max", "mean"], hide_possible_values = true)]
    pub(crate) kv_aggregate: Option<String>,
    /// What the mass of a page is: exact, or bound (an estimate from its least and greatest keys) [default: exact]
    #[arg(long, value_name = "HOW", hide_short_help = true, value_parser = ["exact", "bound"], hide_possible_values = true)]
    pub(crate) kv_score: Option<String>,
    /// The heads that share a page table: layer (all) or head (those of one key and value head) [default: layer]
    #[arg(long, value_name = "WHICH", hide_short_help = true, value_parser = ["layer", "head"], hide_possible_values = true)]
    pub(crate) kv_scope: Option<String>,
    /// The tables that share a budget: layer (none) or model (all) [default: model]
    #[arg(long, value_name = "WHICH", hide_short_help = true, value_parser = ["auto", "layer", "model"], hide_possible_values = true)]
    pub(crate) kv_budget_scope: Option<String>,
    /// Tokens in a page: 8, 16, 32 or 64 [default: 16]
    #[arg(long, value_name = "N", hide_short_help = true, value_parser = ["8", "16", "32", "64"], hide_possible_values = true)]
    pub(crate) kv_page: Option<String>,
    /// Layers, counted from the first, that keep everything [default: 0]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) kv_dense_layers: Option<String>,
    /// Recycle a page first when a later one has nearly the same mean key: their cosine exceeds this [default: 1, off]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) kv_redundancy: Option<String>,
    /// Recycle this share of the pages last, those with the widest range of values [default: 0, off]
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) kv_guard: Option<String>,
    /// Store pages as cheaper types before they are forgotten, in the same bytes: none, q8_0, q4_0, q8_0+k4/v2, or with shares of the
    /// bytes and the most tokens to hold, q8_0:0.25+q4_0:0.5@8192 [default: auto, k4/v2:0.95 with raas, on a GPU @4096]
    #[arg(long, value_name = "LIST", hide_short_help = true)]
    pub(crate) kv_demote: Option<String>,
    /// Seed of policies that draw
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) kv_seed: Option<String>,
    /// Write every page that is recycled or demoted to this file, as JSON lines
    #[arg(long, value_name = "FILE", hide_short_help = true, value_hint = ValueHint::FilePath)]
    pub(crate) kv_trace: Option<PathBuf>,
    /// Allow positions beyond the trained context
    #[arg(long, hide_short_help = true)]
    pub(crate) beyond_train: bool,
    /// Type of the stored keys: f32, f16, q8_0 … [default: f16] [short: -ctk]
    #[arg(long, value_name = "TYPE", hide_short_help = true)]
    pub(crate) cache_type_k: Option<String>,
    /// Type of the stored values [default: f16] [short: -ctv]
    #[arg(long, value_name = "TYPE", hide_short_help = true)]
    pub(crate) cache_type_v: Option<String>,
}

impl KvArgs {
    /// Flags, the engine's names for what they set, and the values that were given.
    pub(crate) fn options(&self) -> [(&'static str, &'static str, Option<&str>); 18] {
        [
            ("--kv-alpha", "alpha", self.kv_alpha.as_deref()),
            ("--kv-top-r", "top_r", self.kv_top_r.as_deref()),
            ("--kv-lambda", "lambda", self.kv_lambda.as_deref()),
            ("--kv-clock", "clock", self.kv_clock.as_deref()),
            ("--kv-pin", "pin", self.kv_pin.as_deref()),
            ("--kv-recent", "recent", self.kv_recent.as_deref()),
            ("--kv-aggregate", "aggregate", self.kv_aggregate.as_deref()),
            ("--kv-score", "score", self.kv_score.as_deref()),
            ("--kv-scope", "scope", self.kv_scope.as_deref()),
            (
                "--kv-budget-scope",
                "budget_scope",
                self.kv_budget_scope.as_deref(),
            ),
            ("--kv-page", "page", self.kv_page.as_deref()),
            (
                "--kv-dense-layers",
                "dense_layers",
                self.kv_dense_layers.as_deref(),
            ),
            (
                "--kv-redundancy",
                "redundancy",
                self.kv_redundancy.as_deref(),
            ),
            ("--kv-guard", "guard", self.kv_guard.as_deref()),
            ("--kv-demote", "demote", self.kv_demote.as_deref()),
            ("--kv-seed", "seed", self.kv_seed.as_deref()),
            ("-ctk", "ctk", self.cache_type_k.as_deref()),
            ("-ctv", "ctv", self.cache_type_v.as_deref()),
        ]
    }
}

/// What of a model is on a GPU.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct OffloadArgs {
    /// Layers on a GPU, counted from the last; those before them run on the CPU: a number, auto (as many as fit) or all [short: -ngl]
    #[arg(long, alias = "n-gpu-layers", value_name = "N", hide_short_help = true)]
    pub(crate) gpu_layers: Option<String>,
    /// Layers, counted from the first, whose routed experts the CPU runs though they are on a GPU [default: as many as must; short: -ncmoe]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) n_cpu_moe: Option<u32>,
    /// All routed experts on the CPU [short: -cmoe]
    #[arg(long, hide_short_help = true, conflicts_with = "n_cpu_moe")]
    pub(crate) cpu_moe: bool,
}

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = COMPUTE)]
pub(crate) struct ComputeArgs {
    /// Worker threads [default: physical cores]
    #[arg(
        short,
        long,
        value_name = "N",
        env = "LEMMA_THREADS",
        hide_env_values = true
    )]
    pub(crate) threads: Option<i64>,
    /// Where to run: auto, cpu, cuda, cuda0, cuda1 …, or trace (slow reference) [short: -dev]
    #[arg(
        long,
        value_name = "NAME",
        env = "LEMMA_DEVICE",
        hide_env_values = true
    )]
    pub(crate) device: Option<String>,
    #[command(flatten)]
    pub(crate) offload: OffloadArgs,
    /// Instruction set of the CPU kernels: scalar, avx2, avx_vnni, avx512, avx512_bf16 or amx [default: the best present]
    #[arg(long, value_name = "NAME", env = "LEMMA_ISA", hide_env_values = true, hide_short_help = true, value_parser = ISAS, hide_possible_values = true)]
    pub(crate) isa: Option<String>,
    /// Upper limit of --ubatch-size, for llama.cpp's sake
    #[arg(
        short,
        long,
        value_name = "N",
        hide_short_help = true,
        default_value_t = 2048,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) batch_size: u32,
    /// Tokens of a prompt in one forward pass [short: -ub]
    #[arg(long, value_name = "N", hide_short_help = true, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ubatch_size: u32,
}
