//! What was typed after the name of a command.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::names::{Names, shapes};
use super::typed::{
    CommonArgs, ComputeArgs, FileArgs, GenerateArgs, ISAS, KvArgs, ModelArgs, OffloadArgs,
    SamplingArgs,
};

#[derive(Debug, Args)]
pub(crate) struct BatchArgs {
    /// Requests, one JSON object a line; stdin if absent or "-"
    #[arg(value_name = "REQUESTS", value_hint = ValueHint::FilePath)]
    pub(crate) input: Option<PathBuf>,
    /// Append results here; skip requests that it already answers, try those again that failed, note what fails in the same way once
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// System message for requests that bring a prompt only [short: -sys]
    #[arg(long = "system-prompt", value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Continue prompts as they are, without the chat template [short: -no-cnv]
    #[arg(long)]
    pub(crate) no_conversation: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
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

#[derive(Debug, Args)]
pub(crate) struct ScoreArgs {
    /// Requests: {"text": …} or {"tokens": […]}, one a line [default: stdin]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Also the N most likely tokens at each position
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) top: usize,
    /// Write the logits of every position as raw little-endian f32, n_tokens × n_vocab
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) logits: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// Text to measure on [default: stdin]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Text to measure on
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    pub(crate) prompt: Option<String>,
    /// Chunks at most, -1: all
    #[arg(long, value_name = "N", default_value_t = -1, hide_default_value = true)]
    pub(crate) chunks: i64,
    /// Tokens between the starts of two windows, each scored after a full window of context; 0: disjoint chunks whose second half is scored
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) ppl_stride: usize,
    /// One JSON object
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
pub(crate) enum BenchFormat {
    Md,
    Json,
    Jsonl,
    Csv,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// GGUF file
    #[arg(short, long, value_name = "FILE", env = "LEMMA_MODEL", hide_env_values = true, value_hint = ValueHint::FilePath)]
    pub(crate) model: Option<PathBuf>,
    /// Make a model of random weights in this shape instead (see lemma synth)
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    pub(crate) shape: Option<String>,
    /// Type of the weights with --shape
    #[arg(
        long = "type",
        value_name = "TYPE",
        default_value = "q4_k_m",
        requires = "shape"
    )]
    pub(crate) ty: String,
    /// Tokens of prompt to measure, several with commas, 0: none
    #[arg(short = 'p', long, value_name = "N,…", default_value = "512")]
    pub(crate) n_prompt: String,
    /// Tokens to generate, several with commas, 0: none
    #[arg(short = 'n', long, value_name = "N,…", default_value = "128")]
    pub(crate) n_gen: String,
    /// Tokens that are in the cache before, several with commas
    #[arg(short = 'd', long, value_name = "N,…", default_value = "0")]
    pub(crate) n_depth: String,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repetitions: u32,
    /// Worker threads, several with commas [default: physical cores]
    #[arg(
        short,
        long,
        value_name = "N,…",
        env = "LEMMA_THREADS",
        hide_env_values = true
    )]
    pub(crate) threads: Option<String>,
    /// Form of the results
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    pub(crate) output: BenchFormat,
    /// Also measure how fast the memory of the weights can be read, and show what part of that decoding comes to
    #[arg(long)]
    pub(crate) ceiling: bool,
    /// Alternate with another program, a test of ours and a run of it in turn, and show ratios: a shell command that prints
    /// results as JSON in the way of llama-bench (-o json or jsonl)
    #[arg(long, value_name = "COMMAND", value_hint = ValueHint::CommandString)]
    pub(crate) vs: Option<String>,
    /// Generate up to this position and show speed and resident memory on the way
    #[arg(long, value_name = "POS")]
    pub(crate) decode_to: Option<u32>,
    /// Where to run [short: -dev]
    #[arg(
        long,
        value_name = "NAME",
        env = "LEMMA_DEVICE",
        hide_env_values = true
    )]
    pub(crate) device: Option<String>,
    #[command(flatten)]
    pub(crate) offload: OffloadArgs,
    /// Instruction set of the CPU kernels: scalar, avx2, avx_vnni, avx512, avx512_bf16 or amx
    #[arg(long, value_name = "NAME", env = "LEMMA_ISA", hide_env_values = true, value_parser = ISAS, hide_possible_values = true)]
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
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ubatch_size: u32,
    #[command(flatten)]
    pub(crate) kv: KvArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    /// Text; stdin if absent
    #[arg(value_name = "TEXT", conflicts_with = "jsonl")]
    pub(crate) text: Option<String>,
    /// Text
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = ["text", "jsonl"], hide_short_help = true)]
    pub(crate) prompt: Option<String>,
    /// Text from a file
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["text", "prompt"], value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Only the numbers, as a JSON array
    #[arg(long)]
    pub(crate) ids: bool,
    /// Only how many there are
    #[arg(long, alias = "show-count")]
    pub(crate) count: bool,
    /// Do not add a beginning-of-text token where the model wants one
    #[arg(long)]
    pub(crate) no_bos: bool,
    /// Take the names of special tokens as ordinary text
    #[arg(long)]
    pub(crate) no_parse_special: bool,
    /// Read {"text": …} lines, write {"ids": […]} lines
    #[arg(long)]
    pub(crate) jsonl: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DetokenizeArgs {
    /// Token numbers, separated by spaces or commas, brackets allowed; stdin if absent
    #[arg(value_name = "IDS")]
    pub(crate) ids: Vec<String>,
    /// Show special tokens by their names
    #[arg(long)]
    pub(crate) special: bool,
    /// Read {"ids": […]} lines, write {"text": …} lines
    #[arg(long, conflicts_with = "ids")]
    pub(crate) jsonl: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TemplateArgs {
    /// Render this user message
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Render with this system message [short: -sys]
    #[arg(long = "system-prompt", value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Render a JSON array of messages from a file ("-" is stdin)
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Without the beginning of a reply
    #[arg(long)]
    pub(crate) no_generation_prompt: bool,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// Shape to make; --list names them
    #[arg(value_name = "SHAPE", required_unless_present = "list", value_parser = Names(shapes), hide_possible_values = true)]
    pub(crate) shape: Option<String>,
    /// Type of the weights
    #[arg(long = "type", value_name = "TYPE", default_value = "q4_k_m")]
    pub(crate) ty: String,
    /// File to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "list", value_hint = ValueHint::FilePath)]
    pub(crate) output: Option<PathBuf>,
    /// Seed of the weights
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Replace FILE if it exists, whatever it is; one that synth has made is replaced anyway
    #[arg(long)]
    pub(crate) force: bool,
    /// List the shapes
    #[arg(long)]
    pub(crate) list: bool,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// GGUF file, or the first part of a split one; best with weights in f16, bf16 or f32
    #[arg(value_name = "IN", value_hint = ValueHint::FilePath)]
    pub(crate) input: PathBuf,
    /// File to write
    #[arg(value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Mix of types, by llama.cpp's names: Q4_K_M, Q5_K_S, Q6_K, Q8_0, IQ4_XS, BF16 …
    #[arg(value_name = "TYPE")]
    pub(crate) ty: Option<String>,
    /// Worker threads, as llama-quantize takes them
    #[arg(value_name = "N", hide = true)]
    pub(crate) last_threads: Option<i64>,
    /// Importance matrix of the model (a file of llama-imatrix): bits go where they are multiplied with something
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) imatrix: Option<PathBuf>,
    /// One type for all matrices in place of a mix
    #[arg(long)]
    pub(crate) pure: bool,
    /// Type of the output matrix
    #[arg(long, value_name = "T")]
    pub(crate) output_tensor_type: Option<String>,
    /// Type of the token embeddings
    #[arg(long, value_name = "T")]
    pub(crate) token_embedding_type: Option<String>,
    /// Type of the matrices whose name contains NAME (a regular expression), as in attn_v=q8_0; may be given several times
    #[arg(long, value_name = "NAME=T")]
    pub(crate) tensor_type: Vec<String>,
    /// Leave the output matrix as it is
    #[arg(long, conflicts_with = "output_tensor_type")]
    pub(crate) leave_output_tensor: bool,
    /// Read weights that are quantized already, and lose more
    #[arg(long)]
    pub(crate) allow_requantize: bool,
    /// Worker threads [default: all cores]
    #[arg(
        short,
        long,
        value_name = "N",
        env = "LEMMA_THREADS",
        hide_env_values = true
    )]
    pub(crate) threads: Option<i64>,
    /// List what every tensor would become, and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Replace OUT if it exists
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Shell
    pub(crate) shell: clap_complete::Shell,
}
