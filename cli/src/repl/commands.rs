//! The commands of the prompt: one table, from which help, completion and dispatch are made.

/// What may follow a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Args {
    None,
    Text,
    Path,
    Setting,
    OneOf(&'static [&'static str]),
}

/// One line of `/help`.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: &'static str,
    /// What follows, as help shows it.
    pub(crate) usage: &'static str,
    pub(crate) help: &'static str,
    pub(crate) args: Args,
    pub(crate) action: Action,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Help,
    Exit,
    Clear,
    System,
    Set,
    Show,
    Regen,
    Undo,
    Continue,
    Stats,
    Context,
    Think,
    Kv,
    Pin,
    Unpin,
    Save,
    Load,
    Export,
    Read,
    Edit,
    Copy,
    Tokens,
    Model,
}

/// Settings of `/set` that are not sampling parameters.
pub(crate) const SETTINGS: &[&str] = &["n_predict", "stop", "think_budget"];

const fn entry(
    name: &'static str,
    usage: &'static str,
    help: &'static str,
    args: Args,
    action: Action,
) -> Entry {
    Entry {
        name,
        usage,
        help,
        args,
        action,
    }
}

/// Every command, in the order of the help.
pub(crate) static TABLE: &[Entry] = &[
    entry("/help", "", "this list", Args::None, Action::Help),
    entry("/?", "", "", Args::None, Action::Help),
    entry(
        "/exit",
        "",
        "leave (also /bye, Ctrl-D)",
        Args::None,
        Action::Exit,
    ),
    entry("/bye", "", "", Args::None, Action::Exit),
    entry("/quit", "", "", Args::None, Action::Exit),
    entry(
        "/clear",
        "",
        "forget the conversation, not the system message",
        Args::None,
        Action::Clear,
    ),
    entry(
        "/system",
        "[TEXT | none]",
        "show, set or remove the system message",
        Args::Text,
        Action::System,
    ),
    entry(
        "/regen",
        "",
        "another reply to the same message",
        Args::None,
        Action::Regen,
    ),
    entry(
        "/undo",
        "",
        "take the last exchange back",
        Args::None,
        Action::Undo,
    ),
    entry(
        "/continue",
        "",
        "go on with a reply that was cut",
        Args::None,
        Action::Continue,
    ),
    entry(
        "/edit",
        "",
        "write the next message in $EDITOR",
        Args::None,
        Action::Edit,
    ),
    entry(
        "/read",
        "FILE [TEXT]",
        "send a file, TEXT in front of it",
        Args::Path,
        Action::Read,
    ),
    entry(
        "/copy",
        "",
        "last answer to the clipboard (terminals with OSC 52)",
        Args::None,
        Action::Copy,
    ),
    entry(
        "/save",
        "FILE",
        "write the conversation as JSON",
        Args::Path,
        Action::Save,
    ),
    entry(
        "/load",
        "FILE",
        "go on with a conversation that was saved",
        Args::Path,
        Action::Load,
    ),
    entry(
        "/export",
        "FILE",
        "write the conversation as Markdown",
        Args::Path,
        Action::Export,
    ),
    entry(
        "/set",
        "[NAME VALUE]",
        "change a setting for what follows",
        Args::Setting,
        Action::Set,
    ),
    entry(
        "/show",
        "",
        "settings, and who set them",
        Args::None,
        Action::Show,
    ),
    entry(
        "/think",
        "[HOW]",
        "thinking: show, hide or fold it; on, off or auto",
        Args::OneOf(&["show", "hide", "fold", "on", "off", "auto"]),
        Action::Think,
    ),
    entry(
        "/kv",
        "[map | why [WHAT]]",
        "draw the KV pool; its text; what went, or stays",
        Args::OneOf(&["map", "why"]),
        Action::Kv,
    ),
    entry(
        "/pin",
        "[WHAT]",
        "never recycle a text, positions N-M, last or sys",
        Args::OneOf(&["last", "sys"]),
        Action::Pin,
    ),
    entry(
        "/unpin",
        "[WHAT]",
        "let them go again; without WHAT all of them",
        Args::OneOf(&["last", "sys"]),
        Action::Unpin,
    ),
    entry(
        "/context",
        "",
        "what is used of the context and the pool",
        Args::None,
        Action::Context,
    ),
    entry(
        "/stats",
        "",
        "the last reply in numbers",
        Args::None,
        Action::Stats,
    ),
    entry(
        "/tokens",
        "TEXT",
        "the tokens of a text",
        Args::Text,
        Action::Tokens,
    ),
    entry(
        "/model",
        "[FILE]",
        "what is loaded, or load another",
        Args::Path,
        Action::Model,
    ),
];

/// Looks a command up by its whole name.
pub(crate) fn find(name: &str) -> Option<&'static Entry> {
    TABLE.iter().find(|c| c.name == name)
}

/// What a line at the prompt is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    Empty,
    Message(String),
    Command(Action, &'a str),
    Unknown(&'a str),
    /// A command that takes nothing, with something behind it.
    TooMuch(&'a str),
}

/// Reads a line: `/name …` is a command, `//…` is a message that begins with a slash.
pub(crate) fn parse(line: &str) -> Line<'_> {
    let trimmed = line.trim();
    if trimmed.is_empty() {
        return Line::Empty;
    }
    if let Some(literal) = trimmed.strip_prefix("//") {
        return Line::Message(format!("/{literal}"));
    }
    if !trimmed.starts_with('/') {
        return Line::Message(line.to_owned());
    }
    let (name, rest) = trimmed
        .split_once(char::is_whitespace)
        .unwrap_or((trimmed, ""));
    match find(name) {
        Some(c) if c.args == Args::None && !rest.trim().is_empty() => Line::TooMuch(name),
        Some(c) => Line::Command(c.action, rest.trim()),
        None => Line::Unknown(name),
    }
}

/// The command that an unknown one was probably meant to be.
pub(crate) fn nearest(name: &str) -> Option<&'static str> {
    crate::args::argv::nearest(name, TABLE.iter().map(|c| c.name))
}

/// The text of `/help`.
pub(crate) fn help() -> String {
    let shown = || TABLE.iter().filter(|c| !c.help.is_empty());
    let left = |c: &Entry| {
        if c.usage.is_empty() {
            c.name.to_owned()
        } else {
            format!("{} {}", c.name, c.usage)
        }
    };
    let width = shown().map(|c| left(c).len()).max().unwrap_or(0);
    let mut text = String::new();
    for c in shown() {
        text.push_str(&format!("  {:width$}  {}\n", left(c), c.help));
    }
    text.push_str(
        "\n  Several lines: paste them, press Alt-Enter, or put \"\"\" before and after.\n  \
         Ctrl-C stops a reply and keeps what was said, Ctrl-\\ leaves at once.\n  \
         //text is sent as /text.",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(parse("  "), Line::Empty);
        assert_eq!(
            parse("What is 2+2? "),
            Line::Message("What is 2+2? ".into())
        );
        assert_eq!(parse("/kv map"), Line::Command(Action::Kv, "map"));
        assert_eq!(
            parse("/system  be kind "),
            Line::Command(Action::System, "be kind")
        );
        assert_eq!(parse("//etc/passwd"), Line::Message("/etc/passwd".into()));
        assert_eq!(parse("/clear all"), Line::TooMuch("/clear"));
        assert_eq!(parse("/hlep me"), Line::Unknown("/hlep"));
        assert_eq!(nearest("/hlep"), Some("/help"));
        assert_eq!(nearest("/zzzz"), None);
    }

    #[test]
    fn the_table_is_sound() {
        for (i, c) in TABLE.iter().enumerate() {
            assert!(c.name.starts_with('/'), "{}", c.name);
            assert!(
                TABLE[..i].iter().all(|d| d.name != c.name),
                "{} twice",
                c.name
            );
        }
        // No line of the help wraps on a usual terminal.
        let widest = help().lines().map(|l| l.chars().count()).max();
        assert!(widest <= Some(79), "{widest:?}");
    }
}
