//! A byte-level BPE vocabulary of any size: 256 byte tokens, merges of letters, and the special tokens of a model.
//!
//! Every text can be encoded and every piece but the longest is part of a longer one, as in a trained vocabulary. The
//! pieces are made, not trained: combinations of letters, frequent letters first.

use super::shape::{Shape, VocabKind};
use crate::gguf::write::Builder;

/// Token types of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// ChatML, the plain form.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// Turns in DeepSeek-R1's tokens; the answer begins inside the thinking tag.
const R1: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\
                  {% elif message['role'] == 'user' %}<｜User｜>{{ message['content'] }}\
                  {% else %}<｜Assistant｜>{{ message['content'] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}\
                  {% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}";
/// Turns with Llama 3's headers.
const LLAMA3: &str = "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n\
                      {{ message['content'] }}<|eot_id|>{% endfor %}\
                      {% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}";

/// Messages of a role, as gpt-oss has them, without channels.
const HARMONY: &str = "{% for message in messages %}<|start|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>{% endfor %}\
                       {% if add_generation_prompt %}<|start|>assistant{% endif %}";

const QWEN_SPECIAL: &[(&str, i32)] = &[
    ("<|endoftext|>", CONTROL),
    ("<|im_start|>", CONTROL),
    ("<|im_end|>", CONTROL),
    ("<|object_ref_start|>", CONTROL),
    ("<|object_ref_end|>", CONTROL),
    ("<|box_start|>", CONTROL),
    ("<|box_end|>", CONTROL),
    ("<|quad_start|>", CONTROL),
    ("<|quad_end|>", CONTROL),
    ("<|vision_start|>", CONTROL),
    ("<|vision_end|>", CONTROL),
    ("<|vision_pad|>", CONTROL),
    ("<|image_pad|>", CONTROL),
    ("<|video_pad|>", CONTROL),
    ("<tool_call>", USER_DEFINED),
    ("</tool_call>", USER_DEFINED),
    ("<|fim_prefix|>", CONTROL),
    ("<|fim_middle|>", CONTROL),
    ("<|fim_suffix|>", CONTROL),
    ("<|fim_pad|>", CONTROL),
    ("<|repo_name|>", CONTROL),
    ("<|file_sep|>", CONTROL),
    ("<tool_response>", USER_DEFINED),
    ("</tool_response>", USER_DEFINED),
    ("<think>", USER_DEFINED),
    ("</think>", USER_DEFINED),
];

const R1_SPECIAL: &[(&str, i32)] = &[
    ("<｜end▁of▁sentence｜>", CONTROL),
    ("<｜User｜>", CONTROL),
    ("<｜Assistant｜>", CONTROL),
    ("<｜begin▁of▁sentence｜>", CONTROL),
    ("<|EOT|>", CONTROL),
    ("<think>", USER_DEFINED),
    ("</think>", USER_DEFINED),
];

const LLAMA3_SPECIAL: &[(&str, i32)] = &[
    ("<|begin_of_text|>", CONTROL),
    ("<|end_of_text|>", CONTROL),
    ("<|reserved_special_token_0|>", CONTROL),
    ("<|reserved_special_token_1|>", CONTROL),
    ("<|finetune_right_pad_id|>", CONTROL),
    ("<|reserved_special_token_2|>", CONTROL),
    ("<|start_header_id|>", CONTROL),
    ("<|end_header_id|>", CONTROL),
    ("<|eom_id|>", CONTROL),
    ("<|eot_id|>", CONTROL),
    ("<|python_tag|>", CONTROL),
];

const HARMONY_SPECIAL: &[(&str, i32)] = &[
    ("<|startoftext|>", CONTROL),
    ("<|endoftext|>", CONTROL),
    ("<|reserved_200000|>", CONTROL),
    ("<|reserved_200001|>", CONTROL),
    ("<|return|>", CONTROL),
    ("<|constrain|>", CONTROL),
    ("<|reserved_200004|>", CONTROL),
    ("<|channel|>", CONTROL),
    ("<|start|>", CONTROL),
    ("<|end|>", CONTROL),
    ("<|message|>", CONTROL),
    ("<|reserved_200009|>", CONTROL),
    ("<|reserved_200010|>", CONTROL),
    ("<|reserved_200011|>", CONTROL),
    ("<|call|>", CONTROL),
];

/// How a vocabulary is put together, in the words of the metadata.
struct Kind {
    pre: &'static str,
    special: &'static [(&'static str, i32)],
    /// Tokens kept for specials and fillers at the end of a vocabulary of published size.
    reserved: u32,
    /// Indices into `special`.
    bos: Option<u32>,
    eos: u32,
    pad: Option<u32>,
    template: &'static str,
}

fn kind(s: &Shape) -> Kind {
    match s.vocab {
        // The ids of the special tokens are those of the published models: 151643 and up.
        VocabKind::Qwen => Kind {
            pre: "qwen2",
            special: QWEN_SPECIAL,
            reserved: s.n_vocab.saturating_sub(151_643).max(64),
            bos: None,
            eos: 2,
            pad: Some(0),
            template: CHATML,
        },
        VocabKind::R1Qwen => Kind {
            pre: "deepseek-r1-qwen",
            special: R1_SPECIAL,
            reserved: s.n_vocab.saturating_sub(151_643).max(64),
            bos: Some(3),
            eos: 0,
            pad: Some(0),
            template: R1,
        },
        VocabKind::Llama3 => Kind {
            pre: "llama-bpe",
            special: LLAMA3_SPECIAL,
            reserved: 256,
            bos: Some(0),
            eos: 9,
            pad: Some(4),
            template: LLAMA3,
        },
        // Likewise: 199998 and up.
        VocabKind::Harmony => Kind {
            pre: "gpt-4o",
            special: HARMONY_SPECIAL,
            reserved: s.n_vocab.saturating_sub(199_998).max(64),
            bos: None,
            eos: 4,
            pad: Some(1),
            template: HARMONY,
        },
    }
}

/// Adds the vocabulary and the chat template to `b`.
pub(super) fn metadata(s: &Shape, b: &mut Builder) {
    let kind = kind(s);
    let first_special = s.n_vocab - kind.reserved;
    let (mut tokens, merges) = pieces(first_special as usize);
    let mut types = vec![NORMAL; tokens.len()];
    for (text, ty) in kind.special {
        tokens.push((*text).to_owned());
        types.push(*ty);
    }
    for i in kind.special.len() as u32..kind.reserved {
        tokens.push(format!("[PAD{}]", first_special + i));
        types.push(UNUSED);
    }
    b.str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", kind.pre)
        .strings("tokenizer.ggml.tokens", tokens.iter())
        .i32s("tokenizer.ggml.token_type", types.into_iter())
        .strings("tokenizer.ggml.merges", merges.iter())
        .u32("tokenizer.ggml.eos_token_id", first_special + kind.eos)
        .bool("tokenizer.ggml.add_bos_token", kind.bos.is_some());
    if let Some(bos) = kind.bos {
        b.u32("tokenizer.ggml.bos_token_id", first_special + bos);
    }
    if let Some(pad) = kind.pad {
        b.u32("tokenizer.ggml.padding_token_id", first_special + pad);
    }
    b.str("tokenizer.chat_template", kind.template);
}

/// `n` ordinary tokens (at least 256) and the merges that build them.
///
/// # Panics
/// If `n` is larger than the combinations of four letters allow, about 490,000.
fn pieces(n: usize) -> (Vec<String>, Vec<String>) {
    let mut tokens: Vec<String> = byte_chars().map(String::from).collect();
    let mut merges = Vec::with_capacity(n.saturating_sub(256));
    let mut add = |left: &str, right: &str| -> bool {
        let room = tokens.len() < n;
        if room {
            tokens.push(format!("{left}{right}"));
            merges.push(format!("{left} {right}"));
        }
        room
    };
    let letters: Vec<String> = "etaoinshrdlcumwfgypbvkjxqz"
        .chars()
        .map(String::from)
        .collect();
    // Ġ stands for the space in the byte alphabet. Each round extends the pieces of the round before by one letter.
    let mut round: Vec<String> = letters.clone();
    round.push("Ġ".to_owned());
    'all: loop {
        let mut next = Vec::with_capacity(round.len() * letters.len());
        for left in &round {
            for right in &letters {
                if !add(left, right) {
                    break 'all;
                }
                next.push(format!("{left}{right}"));
            }
        }
        assert!(next.len() < 10_000_000, "no vocabulary of {n} tokens");
        round = next;
    }
    (tokens, merges)
}

/// The printable stand-ins of the 256 bytes, in the order of GPT-2's vocabulary: bytes that print as themselves first.
fn byte_chars() -> impl Iterator<Item = char> {
    let prints = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let rest = (0..=255_u8)
        .filter(move |b| !prints(b))
        .zip(256_u32..)
        .filter_map(|(_, c)| char::from_u32(c));
    (0..=255_u8).filter(prints).map(char::from).chain(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_build_every_piece_from_earlier_ones() {
        let (tokens, merges) = pieces(151_643);
        assert_eq!(tokens.len(), 151_643);
        assert_eq!(merges.len(), 151_643 - 256);
        let mut known: std::collections::HashSet<&str> =
            tokens[..256].iter().map(String::as_str).collect();
        assert_eq!(known.len(), 256);
        assert!(known.contains("Ġ") && known.contains("Ċ") && known.contains("a"));
        for (token, merge) in tokens[256..].iter().zip(&merges) {
            let (left, right) = merge.split_once(' ').unwrap();
            assert!(known.contains(left) && known.contains(right));
            assert_eq!(format!("{left}{right}"), *token);
            assert!(known.insert(token), "{token} twice");
        }
    }
}
