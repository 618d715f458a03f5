//! What people type who come from other programs, for things that are not here or have another name.

use std::ffi::OsString;
use std::path::Path;

use crate::fail::{Failure, Result};

/// Flags of llama.cpp for what this program does not do, and what to say of it.
const ABSENT: &[(&[&str], &str)] = &[
    (
        &["--samplers", "--sampler-seq", "--sampling-seq"],
        "the order of samplers is fixed: penalties, dry, top-n-sigma, top-k, typical, top-p, min-p, xtc, temperature",
    ),
    (
        &["--lora", "--lora-scaled"],
        "adapters are not supported; merge them into the model",
    ),
    (
        &["-mm", "--mmproj", "--image", "--audio"],
        "models of text only",
    ),
    (&["-md", "--model-draft"], "no speculative decoding"),
    (
        &[
            "-hf",
            "-hfr",
            "--hf-repo",
            "-hff",
            "--hf-file",
            "-hft",
            "--hf-token",
            "-mu",
            "--model-url",
            "-dr",
            "--docker-repo",
        ],
        "nothing is downloaded here: get the GGUF file, then name it with -m FILE",
    ),
    (
        &["--host", "--port", "-np", "--parallel"],
        "there is no server; 'lemma batch' answers many requests, one a line",
    ),
    (
        &[
            "--rope-scaling",
            "--rope-scale",
            "--rope-freq-base",
            "--rope-freq-scale",
            "--yarn-orig-ctx",
        ],
        "rotations are as the model file says; --beyond-train allows more positions",
    ),
    (
        &["--include-weights", "--exclude-weights"],
        "all that an importance matrix knows counts",
    ),
    (
        &["--keep-split"],
        "the parts of a split model become one file",
    ),
    (
        &["-ot", "--override-tensor"],
        "-ngl and -ncmoe say what is on a GPU and what is not",
    ),
    (
        &["-sp", "--special"],
        "control tokens are no part of an answer; 'lemma detokenize --special' shows them",
    ),
    (&["-bf", "--binary-file"], "did you mean -f?"),
    (
        &["--prompt-cache", "--prompt-cache-all", "--prompt-cache-ro"],
        "nothing is kept from run to run; in a conversation /save and /load do",
    ),
    (
        &["--override-kv"],
        "a model is run as its file says; --pre and --chat-template replace what is often wrong",
    ),
    (
        &["--in-prefix", "--in-suffix", "--in-prefix-bos"],
        "the chat template says what stands around a message; --chat-template takes another",
    ),
    (&["--list-devices"], "'lemma devices' lists them"),
    // Words of other programs for what is here, too far off for an edit.
    (
        &["--chat-template-kwargs", "--thinking", "--no-think"],
        "did you mean --reasoning (on, off or auto)?",
    ),
    (&["--max-tokens", "--num-predict"], "did you mean -n?"),
    (&["--context", "--ctx", "--num-ctx"], "did you mean -c?"),
    (&["--system"], "did you mean -sys?"),
    (&["--format"], "did you mean -j '{}' (an answer in JSON)?"),
];

/// Commands of other programs, and what to do here.
const FOREIGN: &[(&[&str], &str)] = &[
    (
        &["run", "chat", "cli"],
        "'lemma -m FILE' talks to a model, 'lemma -m FILE -p TEXT' answers once",
    ),
    (
        &["pull", "push", "list", "ls", "rm", "ps"],
        "models are GGUF files, named with -m FILE; nothing is downloaded or kept here",
    ),
    (
        &["serve", "server"],
        "there is no server; 'lemma batch' answers many requests, one a line",
    ),
    (&["show"], "'lemma inspect FILE' lists what a file holds"),
];

/// `lemma run llama3`: the fingers of somebody who comes from elsewhere. A file of that name is a model.
pub(super) fn foreign(words: &[OsString]) -> Result {
    let Some(word) = words.first().and_then(|w| w.to_str()) else {
        return Ok(());
    };
    match FOREIGN.iter().find(|(names, _)| names.contains(&word)) {
        Some((_, hint)) if !Path::new(word).exists() => {
            Err(Failure::usage(format!("no command '{word}'")).hint(*hint))
        }
        _ => Ok(()),
    }
}

/// What to say of a flag that other programs have.
pub(super) fn absent(name: &str) -> Option<&'static str> {
    let entry = ABSENT.iter().find(|(flags, _)| flags.contains(&name));
    entry.map(|(_, why)| *why)
}
