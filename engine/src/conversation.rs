//! A conversation: messages, rendered by the model's chat template, over one session.
//!
//! Each turn renders the whole conversation again and compares its tokens with what the session already holds; only what follows
//! the common prefix is processed. Templates of reasoning models drop the thinking of earlier turns, so a turn usually begins by
//! dropping the last chain of thought, which also frees its pages.
//!
//! What people and files say is text: if it happens to contain `<|im_end|>`, that is six or so ordinary tokens, never the control token.
//! A mark character inside every such string survives the template and tells the tokenizer so.

use std::ops::ControlFlow;

use serde_json::Value;

use crate::chat::{
    ChatTemplate, Message as ChatMessage, Reasoning, ReasoningSwitch, RenderInput, ThinkTags,
};
use crate::error::Error;
use crate::generate::{Cut, Event, GenOptions, Outcome, Prompt, Start, generate_from};
use crate::model::Model;
use crate::options::Pin;
use crate::sampling::Sampler;
use crate::session::{Rewind, Session};
use crate::tokenizer::Tokenizer;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// The name that templates use.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// The text, without thinking.
    pub content: String,
    /// The thinking before the text, of an assistant's message.
    pub thinking: Option<String>,
}

/// How a prompt is made of the messages.
#[derive(Clone, Debug, Default)]
pub struct PromptOptions {
    /// Thinking switched on or off, where the model can be told; `None` leaves it to the model.
    pub reasoning: Option<bool>,
    /// Further variables of the template.
    pub extra: serde_json::Map<String, Value>,
}

/// Messages over one session.
pub struct Conversation {
    session: Session,
    messages: Vec<Message>,
    tags: Option<ThinkTags>,
    /// Where the last reply was cut.
    cut: Option<Cut>,
}

/// Separates a string that looks like a control token from being one; no character of any text.
pub const MARK: char = '\u{10fffe}';

impl Conversation {
    /// An empty conversation.
    pub fn new(session: Session) -> Self {
        let tags = think_tags(session.model());
        Self {
            session,
            messages: Vec::new(),
            tags,
            cut: None,
        }
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, to be looked into or given hooks.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The messages so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Tags between which the model thinks.
    pub fn think_tags(&self) -> Option<&ThinkTags> {
        self.tags.as_ref()
    }

    /// Replaces all messages, for a conversation that was saved.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
        self.cut = None;
    }

    /// Sets or removes the system message.
    pub fn set_system(&mut self, text: Option<String>) {
        self.messages.retain(|m| m.role != Role::System);
        if let Some(content) = text {
            self.messages.insert(
                0,
                Message {
                    role: Role::System,
                    content,
                    thinking: None,
                },
            );
        }
    }

    /// The system message.
    pub fn system(&self) -> Option<&str> {
        self.messages
            .first()
            .filter(|m| m.role == Role::System)
            .map(|m| m.content.as_str())
    }

    /// Adds what the person says.
    pub fn push_user(&mut self, text: impl Into<String>) {
        self.messages.push(Message {
            role: Role::User,
            content: text.into(),
            thinking: None,
        });
        self.cut = None;
    }

    /// Removes the last exchange, the person's message included; returns what the person had said.
    pub fn undo(&mut self) -> Option<String> {
        let at = self.messages.iter().rposition(|m| m.role == Role::User)?;
        let said = self.messages[at].content.clone();
        self.messages.truncate(at);
        self.cut = None;
        Some(said)
    }

    /// Removes the last reply, so that [`Conversation::reply`] makes another. `false` if there is none.
    pub fn drop_reply(&mut self) -> bool {
        self.cut = None;
        match self.messages.last() {
            Some(m) if m.role == Role::Assistant => {
                self.messages.pop();
                true
            }
            Some(m) => m.role == Role::User,
            None => false,
        }
    }

    /// Forgets everything but the system message.
    pub fn clear(&mut self) {
        self.messages.retain(|m| m.role == Role::System);
        self.session.clear();
        self.cut = None;
    }

    /// Renders the messages up to the point where the model is to speak.
    ///
    /// # Errors
    /// What the template says, or that there is none.
    pub fn prompt(&self, o: &PromptOptions) -> Result<Prompt, Error> {
        let model = self.session.model();
        let mut prompt = prompt_of(model, self.tags.as_ref(), &self.messages, o)?;
        if self.session.pin() == Pin::System {
            prompt.n_system = self.n_system(&prompt.tokens, o)?;
        }
        Ok(prompt)
    }

    /// Leading tokens of a prompt that come before the first thing the person says: those that two conversations with
    /// different questions have in common.
    fn n_system(&self, tokens: &[u32], o: &PromptOptions) -> Result<usize, Error> {
        let model = self.session.model();
        let system = self.messages.iter().take_while(|m| m.role == Role::System);
        let other = Message {
            role: Role::User,
            content: String::new(),
            thinking: None,
        };
        let messages: Vec<Message> = system.cloned().chain([other]).collect();
        let text = render(model.template()?, model.tokenizer(), &messages, o, false)?;
        let other = Prompt::from_marked(model.tokenizer(), &text).tokens;
        Ok(tokens
            .iter()
            .zip(&other)
            .take_while(|(a, b)| a == b)
            .count())
    }

    /// Makes the model reply to the messages so far and adds its reply to them.
    ///
    /// # Errors
    /// Those of the template, of [`Session::prefill`] and of sampling. The messages are unchanged then.
    pub fn reply(
        &mut self,
        sampler: &mut Sampler,
        p: &PromptOptions,
        g: &GenOptions,
        sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome, Error> {
        let prompt = self.prompt(p)?;
        self.cut = None;
        let kept = reuse(&mut self.session, &prompt.tokens);
        let (outcome, cut) = generate_from(
            Start::Prompt(&prompt, kept),
            &mut self.session,
            sampler,
            self.tags.as_ref(),
            g,
            sink,
        )?;
        self.cut = cut;
        self.messages.push(Message {
            role: Role::Assistant,
            content: outcome.text.clone(),
            thinking: (!outcome.thinking.is_empty()).then(|| outcome.thinking.clone()),
        });
        Ok(outcome)
    }

    /// Goes on with the last reply where it was cut, as if it had not been: under the grammar that it began with. `None` if nothing was
    /// cut.
    ///
    /// The outcome is what was added, but for half a character or tag at the cut, which it has whole.
    ///
    /// # Errors
    /// As [`Conversation::reply`].
    pub fn resume(
        &mut self,
        sampler: &mut Sampler,
        g: &GenOptions,
        sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Option<Outcome>, Error> {
        let Some(last) = self
            .messages
            .last_mut()
            .filter(|m| m.role == Role::Assistant)
        else {
            return Ok(None);
        };
        let Some(cut) = self.cut.take() else {
            return Ok(None);
        };
        if let Err(e) = self.session.decode(cut.token()) {
            // Nothing was said yet: this can be tried again.
            self.cut = Some(cut);
            return Err(e);
        }
        let settled = |text: &str, provisional: &str| {
            let settled = text.strip_suffix(provisional);
            settled.unwrap_or(text).to_owned()
        };
        let [thinking, content] = cut.provisional();
        let content = settled(&last.content, content);
        let thinking = settled(last.thinking.as_deref().unwrap_or_default(), thinking);
        let (outcome, cut) = generate_from(
            Start::Cut(Box::new(cut)),
            &mut self.session,
            sampler,
            self.tags.as_ref(),
            g,
            sink,
        )?;
        self.cut = cut;
        last.content = content + &outcome.text;
        let thinking = thinking + &outcome.thinking;
        last.thinking = (!thinking.is_empty()).then_some(thinking);
        Ok(Some(outcome))
    }
}

/// The prompt that makes a model reply to messages. `tags` are those between which it thinks.
///
/// # Errors
/// What the template says, or that there is none.
pub fn prompt_of(
    model: &Model,
    tags: Option<&ThinkTags>,
    messages: &[Message],
    o: &PromptOptions,
) -> Result<Prompt, Error> {
    let template = model.template()?;
    let mut text = render(template, model.tokenizer(), messages, o, true)?;
    let switch = ReasoningSwitch::detect(template.source());
    text.push_str(&switch.prompt_suffix(mode(o), tags, &text));
    Ok(Prompt::from_marked(model.tokenizer(), &text))
}

/// The tags between which a model thinks.
pub fn think_tags(model: &Model) -> Option<ThinkTags> {
    let template = model.template().ok()?;
    let tokenizer = model.tokenizer();
    ThinkTags::detect(template.source(), |text| tokenizer.find_tag(text))
}

/// Renders messages; strings in them that look like control tokens carry a [`MARK`].
///
/// # Errors
/// What the template says.
pub fn render(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
    o: &PromptOptions,
    add_generation_prompt: bool,
) -> Result<String, Error> {
    let tags = ThinkTags::detect(template.source(), |text| tokenizer.find_tag(text));
    let protect = |text: &str| protect(tokenizer, tags.as_ref(), text);
    let list: Vec<ChatMessage> = messages
        .iter()
        .map(|m| ChatMessage {
            role: m.role.name().to_owned(),
            content: protect(&m.content),
            reasoning_content: m.thinking.as_ref().map(|t| protect(t)),
            ..ChatMessage::default()
        })
        .collect();
    let mut extra = ReasoningSwitch::detect(template.source()).variables(mode(o));
    extra.extend(o.extra.clone());
    let input = RenderInput {
        messages: ChatMessage::list_to_json(&list),
        add_generation_prompt,
        extra,
        ..RenderInput::default()
    };
    Ok(template.render(&input)?)
}

/// Whether the chat template of a model has a place for a system message. One that cannot be rendered says so when it is used.
pub fn takes_system(model: &Model) -> bool {
    let say = |role: Role| Message {
        role,
        content: format!("what the {} says", role.name()),
        thinking: None,
    };
    let shown = |messages: &[Message]| {
        let o = PromptOptions::default();
        render(model.template()?, model.tokenizer(), messages, &o, true)
    };
    let with = shown(&[say(Role::System), say(Role::User)]);
    match (with, shown(&[say(Role::User)])) {
        (Ok(with), Ok(without)) => with != without,
        _ => true,
    }
}

fn mode(o: &PromptOptions) -> Reasoning {
    match o.reasoning {
        None => Reasoning::Auto,
        Some(true) => Reasoning::On,
        Some(false) => Reasoning::Off,
    }
}

/// Puts a [`MARK`] behind the first character of every string that the tokenizer would take for a control token, and of every
/// tag of thinking (which some vocabularies have as ordinary added tokens).
fn protect(tokenizer: &Tokenizer, tags: Option<&ThinkTags>, text: &str) -> String {
    let clean = text.replace(MARK, "\u{fffd}");
    let mut starts = tokenizer.control_starts(&clean);
    for tag in tags.iter().flat_map(|t| [t.open(), t.close()]) {
        starts.extend(clean.match_indices(tag).map(|(at, _)| at));
    }
    starts.sort_unstable();
    starts.dedup();
    let mut out = String::with_capacity(clean.len());
    let mut last = 0;
    for start in starts {
        let Some(first) = clean.get(start..).and_then(|rest| rest.chars().next()) else {
            continue;
        };
        out.push_str(&clean[last..start + first.len_utf8()]);
        out.push(MARK);
        last = start + first.len_utf8();
    }
    out.push_str(&clean[last..]);
    out
}

/// Rewinds a session to the longest common prefix with `tokens`; returns its length.
///
/// At least the last token is left to be processed, since its logits are wanted.
pub fn reuse(session: &mut Session, tokens: &[u32]) -> usize {
    let common = session
        .tokens()
        .iter()
        .zip(tokens)
        .take_while(|(a, b)| a == b)
        .count();
    let keep = common.min(tokens.len().saturating_sub(1));
    match session.rewind(keep as u32) {
        Rewind::Done => keep,
        Rewind::Back(kept) => kept as usize,
        Rewind::Refill => 0,
    }
}
