//! Turning thinking on and off.

use serde_json::{Map, Value, json};

use super::ThinkTags;
use super::template::tags;

/// Whether the model is to think (`--reasoning`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reasoning {
    /// As the model does by itself: thinking where the template has a switch named `enable_thinking` or no switch,
    /// not thinking where it has to be asked for (`thinking`).
    #[default]
    Auto,
    /// Think.
    On,
    /// Answer at once.
    Off,
}

impl std::str::FromStr for Reasoning {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(format!("{s:?} is not one of on, off, auto")),
        }
    }
}

/// How a model's template lets thinking be switched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReasoningSwitch {
    /// Boolean variables of the template.
    variables: Vec<&'static str>,
    /// Whether the template has a budget of which 0 means none.
    budget: bool,
}

impl ReasoningSwitch {
    /// Looks at the source of a template.
    pub fn detect(template: &str) -> Self {
        // `enable_thinking`: Qwen3, GLM 4.5 and later, SmolLM3, Hunyuan; `thinking`: Granite 3, DeepSeek V3.1.
        let variables = ["enable_thinking", "thinking"]
            .into_iter()
            .filter(|v| has_variable(template, v))
            .collect();
        Self {
            variables,
            budget: has_variable(template, "thinking_budget"),
        }
    }

    /// Whether the template itself can be told.
    pub fn is_supported(&self) -> bool {
        self.budget || !self.variables.is_empty()
    }

    /// The variables to render with, for [`RenderInput::extra`](super::RenderInput::extra).
    pub fn variables(&self, mode: Reasoning) -> Map<String, Value> {
        let mut vars = Map::new();
        for v in &self.variables {
            match mode {
                Reasoning::On => vars.insert((*v).into(), json!(true)),
                Reasoning::Off => vars.insert((*v).into(), json!(false)),
                // Some templates take a missing variable for a no, against what the model was trained for.
                Reasoning::Auto if *v == "enable_thinking" => vars.insert((*v).into(), json!(true)),
                Reasoning::Auto => None,
            };
        }
        if self.budget && mode == Reasoning::Off {
            vars.insert("thinking_budget".into(), json!(0));
        }
        vars
    }

    /// What to append to the rendered prompt, which ends in the generation prompt, so that the mode holds even if the
    /// template did not see to it: a model that should not think finds its thought closed. To be tokenized with
    /// special tokens on.
    pub fn prompt_suffix(&self, mode: Reasoning, tags: Option<&ThinkTags>, prompt: &str) -> String {
        let (Some(tags), Reasoning::Off) = (tags, mode) else {
            return String::new();
        };
        let end = prompt.trim_end();
        if end.ends_with(tags.open()) {
            return tags.close_sequence().to_owned();
        }
        // A template that was told has either closed the thought itself or knows that the model will not think.
        let closed = !tags.has_channels() && end.ends_with(tags.close());
        if closed || self.is_supported() {
            String::new()
        } else {
            tags.empty_thought()
        }
    }
}

/// Whether `name` occurs in the code of a template as a name of its own: not as part of another one, as an attribute
/// or in a string.
fn has_variable(template: &str, name: &str) -> bool {
    tags(template)
        .filter(|(kind, _)| *kind != b'#')
        .any(|(_, code)| names(code).any(|n| n == name))
}

/// The names in the code of a tag, without attributes and strings.
fn names(code: &str) -> impl Iterator<Item = &str> {
    let bytes = code.as_bytes();
    let mut i = 0;
    std::iter::from_fn(move || {
        while i < bytes.len() {
            let (start, c) = (i, bytes[i]);
            i += 1;
            match c {
                b'\'' | b'"' => {
                    while i < bytes.len() && bytes[i] != c {
                        i += if bytes[i] == b'\\' { 2 } else { 1 };
                    }
                    i += 1;
                }
                b'a'..=b'z' | b'A'..=b'Z' | b'_' | b'0'..=b'9' => {
                    while i < bytes.len() && (bytes[i].is_ascii_alphanumeric() || bytes[i] == b'_')
                    {
                        i += 1;
                    }
                    if start == 0 || bytes[start - 1] != b'.' {
                        return Some(&code[start..i]);
                    }
                }
                _ => {}
            }
        }
        None
    })
}
