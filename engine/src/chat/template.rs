//! The template engine and what it is given.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use serde_json::{Map, json};

use super::{ChatError, CivilTime, json, pycompat};

/// Longest source; the longest published templates have about 30 kB.
const MAX_SOURCE: usize = 1 << 20;
/// Budget of a rendering in instructions, of which each also pays for 64 bytes of data.
const FUEL: u64 = 400_000;
/// Additional budget for each byte of messages and tools; enough to copy each of them 250 times.
const FUEL_PER_BYTE: u64 = 4;
/// Longest prompt, and how much longer it may be for each byte of messages and tools.
const MAX_OUTPUT: usize = 4 << 20;
const MAX_OUTPUT_PER_BYTE: usize = 16;
/// Longest single tag or expression. The parser limits the depth of brackets and blocks, but a chain of operators as
/// long as the source becomes a tree as deep, which is walked by recursion.
const MAX_TAG: usize = 64 << 10;
/// Stack of the thread that compiles and renders; only what is used of it takes memory. Enough for the deepest tree
/// that `MAX_TAG` allows and the deepest value that the budget allows.
const STACK: usize = 512 << 20;
/// Time for compiling or rendering; ordinary templates need milliseconds. The budget stops nearly everything long
/// before, but the engine does not count the work of comparing or printing a list that contains another one many
/// times over.
const DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });
/// Growth of the process, in bytes, at which such a rendering is given up before its deadline.
const MAX_GROWTH: u64 = 1 << 30;
/// Nesting of calls and blocks.
const MAX_DEPTH: usize = 120;
/// Nesting of the messages.
const MAX_JSON_DEPTH: usize = 100;
/// Name under which the template is kept, as it appears in error messages.
const NAME: &str = "chat_template";

/// A call of a tool by the assistant.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// Identifier that the tool's answer refers to.
    pub id: Option<String>,
    /// Name of the function.
    pub name: String,
    /// Its arguments.
    pub arguments: serde_json::Value,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; of an assistant the answer alone, without thinking.
    pub content: String,
    /// What an assistant thought before it answered.
    pub reasoning_content: Option<String>,
    /// Tools an assistant called.
    pub tool_calls: Vec<ToolCall>,
}

impl Message {
    /// A message that is nothing but text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            ..Self::default()
        }
    }

    /// In the form that templates expect; empty fields are left out.
    pub fn to_json(&self) -> serde_json::Value {
        let mut m = Map::new();
        m.insert("role".into(), json!(self.role));
        m.insert("content".into(), json!(self.content));
        if let Some(r) = &self.reasoning_content {
            m.insert("reasoning_content".into(), json!(r));
        }
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.iter().map(|c| {
                let mut call = Map::new();
                if let Some(id) = &c.id {
                    call.insert("id".into(), json!(id));
                }
                call.insert("type".into(), json!("function"));
                call.insert(
                    "function".into(),
                    json!({ "name": c.name, "arguments": c.arguments }),
                );
                serde_json::Value::Object(call)
            });
            m.insert("tool_calls".into(), calls.collect());
        }
        serde_json::Value::Object(m)
    }

    /// A whole conversation as a JSON array.
    pub fn list_to_json(messages: &[Self]) -> serde_json::Value {
        messages.iter().map(Self::to_json).collect()
    }
}

/// What a conversation is rendered from.
#[derive(Debug, Clone, Default)]
pub struct RenderInput<'a> {
    /// An array of messages, each an object with `role` and `content`; see [`Message::list_to_json`].
    pub messages: serde_json::Value,
    /// Tools on offer, an array of JSON schemas as in OpenAI's API.
    pub tools: Option<serde_json::Value>,
    /// Whether to end with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// The variable of that name; not defined if `None`.
    pub enable_thinking: Option<bool>,
    /// Further variables, which win over those above; see [`ReasoningSwitch`](super::ReasoningSwitch).
    pub extra: Map<String, serde_json::Value>,
    /// The time for `strftime_now`; the present, in UTC, if `None`.
    pub now: Option<&'a CivilTime>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    /// Set once a rendering had to be given up.
    dead: AtomicBool,
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` become the variables `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`ChatError::SourceTooLong`] and [`ChatError::Syntax`].
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_SOURCE {
            return Err(ChatError::SourceTooLong {
                found: source.len(),
                limit: MAX_SOURCE,
            });
        }
        let found = tags(source)
            .filter(|t| t.0 != b'#')
            .map(|t| t.1.len())
            .max()
            .unwrap_or(0);
        if found > MAX_TAG {
            return Err(ChatError::Syntax(format!(
                "a tag is {found} bytes long, at most {MAX_TAG} are accepted"
            )));
        }
        let owned = source.to_owned();
        let env = on_deep_stack(move || compile(&owned))?;
        Ok(Self {
            env,
            source: source.into(),
            bos: bos.into(),
            eos: eos.into(),
            dead: AtomicBool::new(false),
        })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation to the text of a prompt.
    ///
    /// # Errors
    /// [`ChatError::Refused`] if the template calls `raise_exception`, [`ChatError::Limit`] if it uses too much time,
    /// memory or depth, [`ChatError::BadMessages`] if `messages` is not an array of objects, else
    /// [`ChatError::Failed`].
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, ChatError> {
        let is_list = input
            .messages
            .as_array()
            .is_some_and(|m| m.iter().all(serde_json::Value::is_object));
        if !is_list {
            return Err(ChatError::BadMessages(
                "expected an array of objects".into(),
            ));
        }
        let mut vars = Map::new();
        vars.insert("messages".into(), input.messages.clone());
        vars.insert("tools".into(), input.tools.clone().unwrap_or_default());
        vars.insert("documents".into(), serde_json::Value::Null);
        vars.insert(
            "add_generation_prompt".into(),
            json!(input.add_generation_prompt),
        );
        if let Some(b) = input.enable_thinking {
            vars.insert("enable_thinking".into(), json!(b));
        }
        vars.extend(input.extra.iter().map(|(k, v)| (k.clone(), v.clone())));
        self.render_vars(&vars, input.now)
    }

    /// Renders with exactly these variables, besides `bos_token`, `eos_token` and the functions.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_vars(
        &self,
        vars: &Map<String, serde_json::Value>,
        now: Option<&CivilTime>,
    ) -> Result<String, ChatError> {
        if !vars.values().all(|v| json::depth(v, MAX_JSON_DEPTH)) {
            return Err(ChatError::BadMessages(format!(
                "nested deeper than {MAX_JSON_DEPTH} levels"
            )));
        }
        if self.dead.load(Ordering::Relaxed) {
            return Err(GIVEN_UP);
        }
        let input: usize = vars.values().map(json::size).sum();
        let now = now.copied().unwrap_or_else(CivilTime::now_utc);
        let tokens = [
            ("bos_token", self.bos.clone()),
            ("eos_token", self.eos.clone()),
        ];
        let (env, vars) = (self.env.clone(), vars.clone());
        let result = on_deep_stack(move || run(env, &tokens, &vars, input, now));
        if result == Err(GIVEN_UP) {
            // One thread left behind is enough.
            self.dead.store(true, Ordering::Relaxed);
        }
        result
    }
}

/// What [`on_deep_stack`] says of a thread that it gave up.
const GIVEN_UP: ChatError =
    ChatError::Limit("it did not come to an end within its time and memory");

/// Renders; `input` is the size of the variables in bytes.
fn run(
    mut env: Environment<'static>,
    tokens: &[(&'static str, String)],
    vars: &Map<String, serde_json::Value>,
    input: usize,
    now: CivilTime,
) -> Result<String, ChatError> {
    let mut context: json::Dict = tokens
        .iter()
        .map(|(k, v)| (*k, Value::from(v.as_str())))
        .collect();
    let strftime = move |state: &State, format: &str| -> Result<String, Error> {
        state.consume_fuel(format.len() as u64)?;
        Ok(now.strftime(format))
    };
    context.insert("strftime_now", Value::from_function(strftime));
    for (name, value) in vars {
        context.insert(name, json::to_value(value));
    }
    env.set_fuel(Some(
        FUEL.saturating_add(FUEL_PER_BYTE.saturating_mul(input as u64)),
    ));
    let template = env
        .get_template(NAME)
        .map_err(|e| ChatError::Failed(describe(&e)))?;
    let limit = MAX_OUTPUT.saturating_add(MAX_OUTPUT_PER_BYTE.saturating_mul(input));
    let mut out = Bounded {
        text: Vec::new(),
        limit,
        full: false,
    };
    match template.render_captured_to(Value::from(context), &mut out) {
        Ok(_) => String::from_utf8(out.text).map_err(|e| ChatError::Failed(e.to_string())),
        Err(_) if out.full => Err(ChatError::Limit("the prompt grew too long")),
        Err(e) => Err(classify(&e)),
    }
}

fn compile(source: &str) -> Result<Environment<'static>, ChatError> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    env.set_syntax(syntax.map_err(|e| ChatError::Failed(describe(&e)))?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_formatter(format_value);
    env.set_unknown_method_callback(pycompat::method);
    env.set_recursion_limit(MAX_DEPTH);
    env.add_filter("tojson", json::tojson);
    env.add_filter("indent", pycompat::indent);
    env.add_test("iterable", pycompat::is_iterable);
    env.add_function("raise_exception", raise_exception);
    env.add_template_owned(NAME, replace_generation_tag(source))
        .map_err(|e| match e.kind() {
            ErrorKind::SyntaxError => ChatError::Syntax(describe(&e)),
            _ => ChatError::Failed(describe(&e)),
        })?;
    Ok(env)
}

/// Runs `f` on a thread of its own, with room for deep recursion, a deadline and an eye on memory. A thread that is
/// given up cannot be stopped and is left behind; the caller does well to end soon.
fn on_deep_stack<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, ChatError> + Send + 'static,
) -> Result<T, ChatError> {
    let (send, receive) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name("chat template".into())
        .stack_size(STACK)
        // A receiver that has given up is no concern of the thread's.
        .spawn(move || drop(send.send(f())))
        .map_err(|e| ChatError::NoThread {
            stack: STACK as u64,
            found: e.to_string(),
        })?;
    let start = Instant::now();
    let mut memory = None;
    loop {
        match receive.recv_timeout(Duration::from_millis(50)) {
            Ok(result) => {
                // Its stack is gone when it is; what comes next may need the room.
                let _ = thread.join();
                return result;
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(ChatError::Failed("the template engine panicked".into()));
            }
            Err(RecvTimeoutError::Timeout) => {
                let now = anonymous_memory();
                let grown = now.saturating_sub(*memory.get_or_insert(now));
                if start.elapsed() > DEADLINE || grown > MAX_GROWTH {
                    return Err(GIVEN_UP);
                }
            }
        }
    }
}

/// Memory of this process that no file stands behind, in bytes; 0 where that cannot be found out.
fn anonymous_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok())
        .unwrap_or(0)
        << 10
}

/// The tags of a template in order: the second byte of the opening delimiter (`{`, `%` or `#`) and what stands up to
/// the closing one, or to the end. Linear in the source.
pub(super) fn tags(source: &str) -> impl Iterator<Item = (u8, &str)> {
    let mut rest = source;
    std::iter::from_fn(move || {
        let open = rest
            .as_bytes()
            .windows(2)
            .position(|w| matches!(w, b"{{" | b"{%" | b"{#"))?;
        let kind = rest.as_bytes()[open + 1];
        let body = &rest[open + 2..];
        let close = match kind {
            b'{' => "}}",
            b'%' => "%}",
            _ => "#}",
        };
        let end = body.find(close).unwrap_or(body.len());
        rest = body[end..].get(2..).unwrap_or_default();
        Some((kind, &body[..end]))
    })
}

/// A writer that refuses to grow beyond its limit.
struct Bounded {
    text: Vec<u8>,
    limit: usize,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.text.len() + buf.len() > self.limit {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Source of the error that `raise_exception` makes, to tell it from others.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: Option<Value>) -> Result<Value, Error> {
    let message = message.map(|m| m.to_string()).unwrap_or_default();
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

fn classify(e: &Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(c) = cause {
        if let Some(Raised(message)) = c.downcast_ref::<Raised>() {
            return ChatError::Refused(clip(message));
        }
        if let Some(e) = c.downcast_ref::<Error>() {
            if e.kind() == ErrorKind::OutOfFuel {
                return ChatError::Limit(
                    "it did not come to an end within its budget of time and memory",
                );
            }
            if e.detail().is_some_and(|d| d.contains("recursion limit")) {
                return ChatError::Limit("calls or blocks are nested too deeply");
            }
        }
        cause = c.source();
    }
    ChatError::Failed(describe(e))
}

/// One line: what went wrong and where.
fn describe(e: &Error) -> String {
    let what = e
        .detail()
        .map_or_else(|| e.kind().to_string(), |d| format!("{}: {d}", e.kind()));
    clip(
        &e.line()
            .map_or_else(|| what.clone(), |line| format!("{what} (line {line})")),
    )
}

/// Error messages quote text from files; a long one helps nobody.
fn clip(message: &str) -> String {
    const MAX: usize = 300;
    match message.char_indices().nth(MAX) {
        Some((at, _)) => format!("{}…", &message[..at]),
        None => message.to_owned(),
    }
}

/// Prints a value as Python would; the engine differs in floats with large or small exponents only.
fn format_value(
    out: &mut minijinja::Output,
    state: &mut State,
    value: &Value,
) -> Result<(), Error> {
    if value.kind() == ValueKind::Number
        && !value.is_integer()
        && let Ok(x) = f64::try_from(value.clone())
        && x.is_finite()
    {
        return out.write_str(&json::python_float(x)).map_err(Error::from);
    }
    minijinja::escape_formatter(out, state, value)
}

/// Turns the tag with which Hugging Face marks what the assistant generates into a condition that always holds.
fn replace_generation_tag(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        // The tag is short; looking no further keeps the whole scan linear.
        let end = tag.as_bytes()[..tag.len().min(64)]
            .windows(2)
            .position(|w| w == b"%}");
        let Some(end) = end.filter(|&e| e >= 2) else {
            out.push_str("{%");
            rest = &tag[2..];
            continue;
        };
        let inner = &tag[2..end];
        let left = inner.starts_with(['-', '+']) as usize;
        let right = inner.len() - (inner.len() > left && inner.ends_with(['-', '+'])) as usize;
        let replacement = match inner[left..right].trim() {
            "generation" => " if true ",
            "endgeneration" => " endif ",
            _ => {
                // Only the opening: an end inside a string literal must not hide a tag after it.
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        };
        out.push_str("{%");
        out.push_str(&inner[..left]);
        out.push_str(replacement);
        out.push_str(&inner[right..]);
        out.push_str("%}");
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}
