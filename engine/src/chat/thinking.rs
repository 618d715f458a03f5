//! How a model marks its thinking.

/// The known pairs of tags, more specific ones first.
const PAIRS: &[(&str, &str)] = &[
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<think>", "</think>"),
];

/// Tags that some models put around the answer.
const AROUND_ANSWER: &[&str] = &[
    "<response>",
    "</response>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|begin_of_solution|>",
    "<|end_of_solution|>",
];

/// What a tag does to the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// What follows is thinking.
    Open,
    /// What follows is the answer.
    Close,
    /// Nothing but not being shown.
    Silent,
    /// What follows up to the end of the line names a channel (Gemma 4): not shown. What comes then is thinking if it is `thought`.
    Channel,
    /// What follows is the header of a message, or its channel (gpt-oss): not shown.
    Header,
    /// The header ends; the channel named in it decides what follows.
    Message,
}

/// A tag, its token if it is a single one, and its effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) text: String,
    pub(super) id: Option<u32>,
    pub(super) effect: Effect,
}

/// The tags of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkTags {
    pub(super) tags: Vec<Tag>,
    open: String,
    close: String,
    close_sequence: String,
    channels: bool,
}

impl ThinkTags {
    /// Looks for the tags of a model: those that its chat template mentions, else a pair of which both are single
    /// tokens. `token` finds the id of a token by its text. `None` if the model does not think, as far as can be
    /// seen.
    pub fn detect(template: &str, token: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        if template.contains("<|channel|>") && template.contains("<|message|>") {
            return Some(Self::harmony(&token));
        }
        if template.contains("<|channel>") && template.contains("<channel|>") {
            return Some(Self::gemma(&token));
        }
        let in_template = PAIRS
            .iter()
            .find(|(open, close)| template.contains(open) || template.contains(close));
        let in_vocabulary = || {
            PAIRS
                .iter()
                .find(|(open, close)| token(open).is_some() && token(close).is_some())
        };
        let (open, close) = in_template.or_else(in_vocabulary)?;
        let mut tags = vec![(*open, Effect::Open), (*close, Effect::Close)];
        tags.extend(
            AROUND_ANSWER
                .iter()
                .filter(|t| template.contains(**t))
                .map(|t| (*t, Effect::Silent)),
        );
        Some(Self {
            tags: with_ids(&tags, &token),
            open: (*open).into(),
            close: (*close).into(),
            close_sequence: format!("\n{close}\n\n"),
            channels: false,
        })
    }

    /// Gemma 4: `<|channel>thought\n…<channel|>…`.
    fn gemma(token: &impl Fn(&str) -> Option<u32>) -> Self {
        let tags = [
            ("<|channel>", Effect::Channel),
            ("<channel|>", Effect::Close),
        ];
        Self {
            tags: with_ids(&tags, token),
            open: "<|channel>thought".into(),
            close: "<channel|>".into(),
            close_sequence: "\n<channel|>".into(),
            channels: false,
        }
    }

    /// gpt-oss: `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`.
    fn harmony(token: &impl Fn(&str) -> Option<u32>) -> Self {
        let tags = [
            ("<|start|>", Effect::Header),
            ("<|channel|>", Effect::Header),
            ("<|constrain|>", Effect::Silent),
            ("<|message|>", Effect::Message),
            ("<|end|>", Effect::Header),
            ("<|call|>", Effect::Header),
            ("<|return|>", Effect::Silent),
        ];
        Self {
            tags: with_ids(&tags, token),
            open: "<|channel|>analysis<|message|>".into(),
            close: "<|end|><|start|>assistant<|channel|>final<|message|>".into(),
            close_sequence: "<|end|><|start|>assistant<|channel|>final<|message|>".into(),
            channels: true,
        }
    }

    /// The tokens that are tags.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        self.tags.iter().filter_map(|t| t.id)
    }

    /// The token that opens thinking, if it is a single one that stands for itself.
    pub fn open_id(&self) -> Option<u32> {
        let mut tags = self.tags.iter();
        tags.find(|t| t.effect == Effect::Open).and_then(|t| t.id)
    }

    /// The text that opens thinking.
    pub fn open(&self) -> &str {
        &self.open
    }

    /// The text that closes thinking.
    pub fn close(&self) -> &str {
        &self.close
    }

    /// What to append to the text of a model that is thinking so that it goes on to answer: the closing tag with the
    /// white space that models put around it. To be tokenized with special tokens on.
    pub fn close_sequence(&self) -> &str {
        &self.close_sequence
    }

    /// What to append to a prompt that does not open thinking, so that the model answers at once: an empty thought.
    pub(super) fn empty_thought(&self) -> String {
        if self.channels {
            "<|channel|>final<|message|>".into()
        } else {
            format!("{}\n\n{}\n\n", self.open, self.close)
        }
    }

    /// Whether thinking is marked by channels of messages (gpt-oss) instead of a pair of tags.
    pub fn has_channels(&self) -> bool {
        self.channels
    }
}

fn with_ids(tags: &[(&str, Effect)], token: &impl Fn(&str) -> Option<u32>) -> Vec<Tag> {
    tags.iter()
        .map(|&(text, effect)| Tag {
            text: text.into(),
            id: token(text),
            effect,
        })
        .collect()
}
