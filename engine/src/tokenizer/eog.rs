//! Special tokens that are known by their text: end of generation, fill in the middle, and corrected types.
//!
//! The lists are those of llama.cpp; files rely on them because the metadata rarely names every end token.

use super::source::escape;
use super::vocab::{CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocab};

const EOT: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
const EOM: &[&str] = &["<|eom_id|>"];
const FIM_PRE: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
];
const FIM_SUF: &[&str] = &[
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
];
const FIM_MID: &[&str] = &[
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];
const FIM_PAD: &[&str] = &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"];
const FIM_REP: &[&str] = &[
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
];
const FIM_SEP: &[&str] = &["<|file_sep|>"];
const EOG: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// gpt-oss: structure that must stay visible in the output.
const HARMONY_STRUCTURE: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// Completes the special ids of `vocab` by text, corrects token types and collects the end-of-generation set.
pub(super) fn complete(vocab: &mut Vocab) {
    for (names, slot) in [
        (EOT, 0),
        (EOM, 1),
        (FIM_PRE, 2),
        (FIM_SUF, 3),
        (FIM_MID, 4),
        (FIM_PAD, 5),
        (FIM_REP, 6),
        (FIM_SEP, 7),
    ] {
        let ids = &mut vocab.ids;
        let id = match slot {
            0 => &mut ids.eot,
            1 => &mut ids.eom,
            2 => &mut ids.fim_pre,
            3 => &mut ids.fim_suf,
            4 => &mut ids.fim_mid,
            5 => &mut ids.fim_pad,
            6 => &mut ids.fim_rep,
            _ => &mut ids.fim_sep,
        };
        if id.is_some() {
            continue;
        }
        let Some(found) = names.iter().find_map(|n| vocab.texts.id(n.as_bytes())) else {
            continue;
        };
        *id = Some(found);
        make_control(vocab, found);
    }

    for id in 0..vocab.n_vocab() {
        let attr = vocab.attrs[id as usize];
        if attr & CONTROL != 0 && contains(vocab.texts.arena.get(id), b"unused") {
            vocab.attrs[id as usize] = attr | UNUSED;
        }
    }

    let ids = &vocab.ids;
    let mut eog: Vec<u32> = [ids.fim_pad, ids.fim_rep, ids.fim_sep]
        .into_iter()
        .flatten()
        .collect();
    for name in EOG {
        if let Some(id) = vocab.texts.id(name.as_bytes()) {
            eog.push(id);
            make_control(vocab, id);
        }
    }
    for name in HARMONY_STRUCTURE {
        if let Some(id) = vocab.texts.id(name.as_bytes()) {
            vocab.attrs[id as usize] = USER_DEFINED;
        }
    }
    let ids = &vocab.ids;
    for (key, id) in [("eos", ids.eos), ("eot", ids.eot), ("eom", ids.eom)] {
        if let Some(id) = id
            && !eog.contains(&id)
        {
            log::debug!("the {key} token {id} is not among the known end tokens");
            eog.push(id);
        }
    }
    eog.sort_unstable();
    eog.dedup();
    vocab.eog = eog;

    let has = |v: &Vocab, name: &str| {
        v.texts
            .id(name.as_bytes())
            .is_some_and(|id| v.eog.contains(&id))
    };
    // gpt-oss and solar-open end a message, not the answer, with <|end|>.
    let call = has(vocab, "<|call|>") || has(vocab, "<|calls|>");
    if call && (has(vocab, "<|return|>") || has(vocab, "<|flush|>")) {
        demote(vocab, "<|end|>", USER_DEFINED);
    }
    // gemma 4 and plamo have an ordinary </s>.
    if has(vocab, "<|tool_response>") || has(vocab, "<|plamo:eos|>") {
        demote(vocab, "</s>", NORMAL);
    }
}

/// Takes the token out of the end-of-generation set.
fn demote(vocab: &mut Vocab, name: &str, attr: u8) {
    if let Some(id) = vocab.texts.id(name.as_bytes())
        && let Some(at) = vocab.eog.iter().position(|&e| e == id)
    {
        vocab.eog.remove(at);
        vocab.attrs[id as usize] = attr;
    }
}

fn make_control(vocab: &mut Vocab, id: u32) {
    let attr = &mut vocab.attrs[id as usize];
    if *attr & CONTROL == 0 {
        *attr |= CONTROL;
        let text = escape(vocab.texts.arena.get(id));
        vocab.warnings.push(format!(
            "token {id} \"{text}\" is not marked as a control token; it is treated as one"
        ));
    }
}

fn contains(text: &[u8], what: &[u8]) -> bool {
    text.windows(what.len()).any(|w| w == what)
}
