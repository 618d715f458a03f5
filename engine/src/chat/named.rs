//! Chat templates by name, for models that bring none and for `--chat-template NAME`.
//!
//! The names are llama.cpp's. Content is printed as it is, except where the model's own template trims it.

use super::ChatError;

/// Turns that are written the same for every role: what stands before the role, between it and the content, and
/// after the content.
macro_rules! uniform {
    ($before:literal, $between:literal, $after:literal) => {
        concat!(
            "{%- for m in messages -%}{{- '",
            $before,
            "' + m['role'] + '",
            $between,
            "' + m['content'] + '",
            $after,
            "' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '",
            $before,
            "assistant",
            $between,
            "' -}}{%- endif -%}"
        )
    };
}

/// Turns whose form depends on the role; the last part opens the assistant's turn.
macro_rules! by_role {
    ($system:literal, $user:literal, $assistant:literal, $prompt:literal) => {
        concat!(
            "{%- for m in messages -%}{%- set text = m['content'] -%}",
            "{%- if m['role'] == 'system' -%}{{- ",
            $system,
            " -}}",
            "{%- elif m['role'] == 'assistant' -%}{{- ",
            $assistant,
            " -}}",
            "{%- else -%}{{- ",
            $user,
            " -}}{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- ",
            $prompt,
            " -}}{%- endif -%}"
        )
    };
}

/// `[INST]` turns in which a system message is the beginning of the user's text.
macro_rules! inst {
    ($open:literal, $system:literal, $close:literal, $assistant:literal) => {
        concat!(
            "{%- set ns = namespace(open=false) -%}{%- for m in messages -%}{%- set text = m['content'] -%}",
            "{%- if m['role'] == 'assistant' -%}{{- ", $assistant, " + '</s>' -}}{%- set ns.open = false -%}",
            "{%- else -%}{%- if not ns.open -%}{{- '", $open, "' -}}{%- set ns.open = true -%}{%- endif -%}",
            "{%- if m['role'] == 'system' -%}{{- ", $system, " -}}{%- else -%}{{- text + '", $close, "' -}}",
            "{%- endif -%}{%- endif -%}{%- endfor -%}"
        )
    };
}

const TEMPLATES: &[(&str, &str)] = &[
    ("chatml", uniform!("<|im_start|>", "\\n", "<|im_end|>\\n")),
    (
        "llama2",
        inst!(
            "[INST] ",
            "'<<SYS>>\\n' + text + '\\n<</SYS>>\\n\\n'",
            " [/INST]",
            "text"
        ),
    ),
    (
        "llama3",
        concat!(
            "{%- for m in messages -%}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' ",
            "+ m['content']|trim + '<|eot_id|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}",
            "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
        ),
    ),
    (
        "mistral-v1",
        inst!(" [INST] ", "text + '\\n\\n'", " [/INST]", "' ' + text"),
    ),
    (
        "mistral-v3",
        inst!("[INST] ", "text + '\\n\\n'", "[/INST]", "' ' + text|trim"),
    ),
    (
        "mistral-v3-tekken",
        inst!("[INST]", "text + '\\n\\n'", "[/INST]", "text"),
    ),
    (
        "mistral-v7",
        by_role!(
            "'[SYSTEM_PROMPT] ' + text + '[/SYSTEM_PROMPT]'",
            "'[INST] ' + text + '[/INST]'",
            "' ' + text + '</s>'",
            "''"
        ),
    ),
    (
        "mistral-v7-tekken",
        by_role!(
            "'[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]'",
            "'[INST]' + text + '[/INST]'",
            "text + '</s>'",
            "''"
        ),
    ),
    (
        "gemma",
        concat!(
            "{%- set ns = namespace(system='') -%}{%- for m in messages -%}{%- if m['role'] == 'system' -%}",
            "{%- set ns.system = ns.system + m['content']|trim + '\\n\\n' -%}{%- else -%}",
            "{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' -}}",
            "{%- if m['role'] != 'assistant' -%}{{- ns.system -}}{%- set ns.system = '' -%}{%- endif -%}",
            "{{- m['content']|trim + '<end_of_turn>\\n' -}}{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
        ),
    ),
    ("phi3", uniform!("<|", "|>\\n", "<|end|>\\n")),
    ("phi4", uniform!("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    ("falcon3", uniform!("<|", "|>\\n", "\\n")),
    ("zephyr", uniform!("<|", "|>\\n", "<|endoftext|>\\n")),
    (
        "vicuna",
        by_role!(
            "text + '\\n\\n'",
            "'USER: ' + text + '\\n'",
            "'ASSISTANT: ' + text + '</s>\\n'",
            "'ASSISTANT:'"
        ),
    ),
    (
        "deepseek",
        by_role!(
            "text",
            "'### Instruction:\\n' + text + '\\n'",
            "'### Response:\\n' + text + '\\n<|EOT|>\\n'",
            "'### Response:\\n'"
        ),
    ),
    (
        "deepseek2",
        by_role!(
            "text + '\\n\\n'",
            "'User: ' + text + '\\n\\n'",
            "'Assistant: ' + text + '<｜end▁of▁sentence｜>'",
            "'Assistant:'"
        ),
    ),
    (
        "deepseek3",
        by_role!(
            "text + '\\n\\n'",
            "'<｜User｜>' + text",
            "'<｜Assistant｜>' + text + '<｜end▁of▁sentence｜>'",
            "'<｜Assistant｜>'"
        ),
    ),
    (
        "command-r",
        by_role!(
            "'<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + text|trim + '<|END_OF_TURN_TOKEN|>'",
            "'<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + text|trim + '<|END_OF_TURN_TOKEN|>'",
            "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + text|trim + '<|END_OF_TURN_TOKEN|>'",
            "'<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'"
        ),
    ),
    (
        "granite",
        uniform!("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>\\n"),
    ),
    (
        "gpt-oss",
        by_role!(
            "'<|start|>system<|message|>' + text + '<|end|>'",
            "'<|start|>user<|message|>' + text + '<|end|>'",
            "'<|start|>assistant<|channel|>final<|message|>' + text + '<|end|>'",
            "'<|start|>assistant'"
        ),
    ),
];

/// Names that [`named_template`] knows. The first is the fallback for models without a template.
pub const TEMPLATE_NAMES: &[&str] = &NAMES;

const NAMES: [&str; TEMPLATES.len()] = {
    let mut names = [""; TEMPLATES.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = TEMPLATES[i].0;
        i += 1;
    }
    names
};

/// The source of a built-in template.
///
/// # Errors
/// [`ChatError::UnknownName`].
pub fn named_template(name: &str) -> Result<&'static str, ChatError> {
    TEMPLATES
        .iter()
        .find(|t| t.0 == name)
        .map(|t| t.1)
        .ok_or_else(|| ChatError::UnknownName {
            found: name.into(),
            expected: NAMES.join(", "),
        })
}
