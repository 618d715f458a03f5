//! Turning thinking on and off.

use serde_json::{Map, Value, json};

use super::ThinkTags;

/// Whether the model is to think (`--reasoning`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reasoning {
    /// As the model's template has it.
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
        // `thinking` is also a field of messages in some templates, where a stray variable does no harm.
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
        if mode != Reasoning::Auto {
            for v in &self.variables {
                vars.insert((*v).into(), json!(mode == Reasoning::On));
            }
            if self.budget && mode == Reasoning::Off {
                vars.insert("thinking_budget".into(), json!(0));
            }
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

/// Whether `name` occurs in a template as a name of its own, not as part of another or as an attribute.
fn has_variable(template: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut in_tag = template
        .split("{%")
        .skip(1)
        .map(|s| s.split("%}").next().unwrap_or_default());
    let mut in_print = template
        .split("{{")
        .skip(1)
        .map(|s| s.split("}}").next().unwrap_or_default());
    let found = |code: &str| {
        code.match_indices(name).any(|(at, _)| {
            let before = code[..at].chars().next_back();
            let after = code[at + name.len()..].chars().next();
            !before.is_some_and(|c| word(c) || matches!(c, '.' | '"' | '\'' | '/'))
                && !after.is_some_and(|c| word(c) || matches!(c, '"' | '\''))
        })
    };
    in_tag.any(found) || in_print.any(found)
}
