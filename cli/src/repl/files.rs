//! Commands that read and write files.

use std::path::{Path, PathBuf};

use super::kv::Spans;
use super::{Next, Repl, transcript};
use crate::fail::{Failure, Result};
use crate::out;
use crate::signals::{Deaf, Unfinished};
use crate::stats::counted;
use crate::term::{escape, escape_path};
use crate::text::{self, MAX_PROMPT};

impl Repl {
    pub(super) fn save(&self, rest: &str) -> Result {
        let path = path_of("/save", rest)?;
        let json = transcript::to_json(self.conversation.messages(), &self.model.name());
        write_new(&path, &format!("{json}\n"), 0o666)?;
        self.say_dim(&format!(
            "{} in {}",
            counted(
                self.conversation.messages().len() as u64,
                "message",
                "messages"
            ),
            escape_path(&path)
        ));
        Ok(())
    }

    pub(super) fn load(&mut self, rest: &str) -> Result {
        let path = path_of("/load", rest)?;
        let text = text::of_file(&path, MAX_PROMPT)?;
        let messages = transcript::from_json(&text).map_err(|f| Failure {
            message: format!("{}: {}", escape_path(&path), f.message),
            ..f
        })?;
        self.conversation.clear();
        self.conversation.set_messages(messages);
        (self.last, self.spans, self.told_recycling) = (None, Spans::default(), false);
        let n = self.conversation.messages().len();
        self.say_dim(&format!(
            "{} from {}; the next reply reads them",
            counted(n as u64, "message", "messages"),
            escape_path(&path)
        ));
        self.look_at_system();
        Ok(())
    }

    pub(super) fn export(&self, rest: &str) -> Result {
        let path = path_of("/export", rest)?;
        write_new(
            &path,
            &transcript::to_markdown(self.conversation.messages(), &self.model.name()),
            0o666,
        )?;
        self.say_dim(&format!("written to {}", escape_path(&path)));
        Ok(())
    }

    pub(super) fn read(&mut self, rest: &str) -> Result<Next> {
        let (name, words) = split_path(rest);
        let path = expanded("/read", name)?;
        let text = text::chomp(text::of_file(&path, MAX_PROMPT)?);
        if text.trim().is_empty() {
            return Err(Failure::usage(format!(
                "{}: nothing in it, expected a text",
                escape_path(&path)
            )));
        }
        self.say(if words.is_empty() {
            text
        } else {
            format!("{words}\n\n{text}")
        })
    }

    /// A message from the user's own editor.
    pub(super) fn edit(&mut self) -> Result<Next> {
        let editor = ["VISUAL", "EDITOR"]
            .iter()
            .find_map(|v| std::env::var(v).ok().filter(|e| !e.trim().is_empty()))
            .unwrap_or_else(|| "vi".to_owned());
        let text = written(&editor)?;
        if text.trim().is_empty() {
            self.say_dim("nothing was written");
            return Ok(Next::Go);
        }
        out::note(&format!(
            "> {}",
            crate::term::filter::Filter::default().clean(&text)
        ));
        self.say(text)
    }
}

/// What somebody writes in `editor`. The draft goes away, however that ends; Ctrl-C belongs to the editor.
fn written(editor: &str) -> Result<String> {
    let path = std::env::temp_dir().join(format!("lemma-{}.md", std::process::id()));
    let _unfinished = Unfinished::begin(Some(&path));
    // Others on the machine have no business in it.
    write_new(&path, "", 0o600)?;
    let text = run_editor(editor, &path);
    let _ = std::fs::remove_file(&path);
    text
}

fn run_editor(editor: &str, path: &Path) -> Result<String> {
    let deaf = Deaf::begin();
    // Editors come with arguments ("code --wait").
    let status = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{editor} \"$1\""))
        .arg("sh")
        .arg(path)
        .status();
    drop(deaf);
    let status = status
        .map_err(|e| Failure::runtime(format!("{}: {}", escape(editor), crate::fail::plain(&e))))?;
    if !status.success() {
        return Err(Failure::runtime(format!(
            "{} ended with {status}",
            escape(editor)
        )));
    }
    Ok(text::chomp(text::of_file(path, MAX_PROMPT)?))
}

/// A path as typed: quotes and backslashes as completion writes them, `~` for the home.
pub(super) fn path_of(command: &str, typed: &str) -> Result<PathBuf> {
    let (name, rest) = split_path(typed);
    if !rest.is_empty() {
        return Err(Failure::usage(format!("{command}: one file at a time"))
            .hint("put a name with blanks in quotes"));
    }
    expanded(command, name)
}

/// The path of a name that is unquoted already.
fn expanded(command: &str, name: String) -> Result<PathBuf> {
    if name.is_empty() {
        return Err(Failure::usage(format!("{command} needs a file")));
    }
    Ok(match (name.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(name),
    })
}

/// The first word, unquoted, and the rest.
fn split_path(typed: &str) -> (String, String) {
    let mut name = String::new();
    let mut quote = None;
    let mut chars = typed.char_indices();
    while let Some((at, c)) = chars.next() {
        match (c, quote) {
            ('\\', None | Some('"')) => name.extend(chars.next().map(|(_, c)| c)),
            ('"' | '\'', None) => quote = Some(c),
            (c, Some(q)) if c == q => quote = None,
            (c, None) if c.is_whitespace() => return (name, typed[at..].trim().to_owned()),
            (c, _) => name.push(c),
        }
    }
    (name, String::new())
}

/// Writes a file that was not there; one that is there is somebody's work.
fn write_new(path: &Path, text: &str, mode: u32) -> Result {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Failure::runtime(format!("{}: exists already", escape_path(path)))
                    .hint("take another name, or remove it first")
            }
            _ => Failure::file(path, &e),
        })?;
    file.write_all(text.as_bytes())
        .map_err(|e| Failure::file(path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_as_typed() {
        assert_eq!(
            split_path("a.txt what is this?"),
            ("a.txt".into(), "what is this?".into())
        );
        assert_eq!(
            split_path(r"my\ file.txt go"),
            ("my file.txt".into(), "go".into())
        );
        assert_eq!(
            split_path("\"my file.txt\""),
            ("my file.txt".into(), String::new())
        );
        for typed in [r"sp\ ace/q.txt", "\"sp ace/q.txt\"", "'sp ace/q.txt'"] {
            assert_eq!(
                path_of("/save", typed).unwrap(),
                Path::new("sp ace/q.txt"),
                "{typed}"
            );
        }
        assert!(path_of("/save", "a b").is_err() && path_of("/save", "").is_err());
    }
}
