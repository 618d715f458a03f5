//! Longer pieces of help.

/// The end of `--help`.
pub(crate) const AFTER_LONG: &str = "\
Environment (a flag says more):
  LEMMA_MODEL       model file, as -m
  LEMMA_THREADS     worker threads, as -t
  LEMMA_ISA         instruction set of the CPU kernels, as --isa
  LEMMA_DEVICE      where to run, as --device
  LEMMA_CTX_SIZE    positions, as -c
  LEMMA_KV_BUDGET   size of the KV pool, as --kv-budget
  LEMMA_KV_POLICY   as --kv-policy
  LEMMA_N_PREDICT   as -n
  LEMMA_THINK       as --think
  LEMMA_SEED LEMMA_TEMP LEMMA_TOP_K LEMMA_TOP_P LEMMA_MIN_P LEMMA_REPEAT_PENALTY
                    sampling, as the flags of these names
  LEMMA_LOG         error, warn, info, debug or trace: the log on stderr
  NO_COLOR          no colour unless --color always
  XDG_STATE_HOME    the history of the prompt is kept in lemma/history under it
                    [default: ~/.local/state]

Exit codes:
  0  answered          5  not enough memory             9  batch finished with failures
  1  runtime error     6  the prompt does not fit      70  a bug in lemma
  2  usage             7  no answer: cut while still  130  SIGINT
  3  model not found      thinking, or empty          143  SIGTERM
  4  model malformed   8  grammar or schema invalid   141  SIGPIPE

Grammars and schemas (--grammar, --json-schema and their files) rule the answer, not the thinking before it. An object \
whose schema lists properties has no others unless additionalProperties says so. 'lemma batch' takes grammar and \
json_schema in requests.

Flags that llama.cpp has and that change nothing here (-fa, --mlock, --no-mmap, --jinja, -nkvo …) are accepted and ignored.";

/// The end of `lemma batch --help`.
pub(crate) const REQUESTS: &str = "\
A request has a prompt (a text) or messages (as in {\"role\":\"user\",\"content\":\"...\"}), and may have an id, system, n, stop, think, \
think_budget, kv_budget, json_schema, grammar, logprobs (true: the natural logarithm of the probability that the model gives to each token, \
whatever the sampler makes of it), and sampling parameters by their names (temp, top_k, seed ...).";

/// The help of `--kv-policy`, from the engine's table.
pub(crate) fn policies() -> String {
    let mut text =
        "Which page gives its place away when the pool is full; options may follow, as in raas:alpha=1e-4,page=32 [default: raas]:".to_owned();
    for p in lemma_engine::kv::policy::POLICIES {
        text.push_str(&format!("\n{}: {}", p.name, p.summary));
    }
    text
}
