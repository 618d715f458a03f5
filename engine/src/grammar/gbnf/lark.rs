//! Writing the notation that llguidance reads.
//!
//! Every node becomes a definition of its own, named after its number: `r7` is a rule, `T7` a terminal. That keeps the text flat,
//! however deep the grammar, and a part that occurs twice is written once.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use super::{Gbnf, Id, Node};

/// The grammar as text; `lexeme` says which nodes are lexemes.
pub(super) fn write(g: &Gbnf, lexeme: &[bool]) -> String {
    let mut w = Writer {
        g,
        lexeme,
        seen: vec![[false; 2]; g.nodes.len()],
        todo: Vec::new(),
        out: String::new(),
    };
    let root = w.name(g.body(g.root), false);
    let _ = writeln!(w.out, "start: {root}");
    while let Some((id, terminal)) = w.todo.pop() {
        w.define(id, terminal);
    }
    w.out
}

struct Writer<'g> {
    g: &'g Gbnf,
    lexeme: &'g [bool],
    /// Named already, as a rule and as a terminal.
    seen: Vec<[bool; 2]>,
    todo: Vec<(Id, bool)>,
    out: String,
}

impl Writer<'_> {
    /// How to refer to a node, inside a terminal or not.
    fn name(&mut self, id: Id, inside: bool) -> String {
        let mut id = id;
        // A chain of references may lead round in a circle only in rules that never end, which do not get here.
        while let Node::Ref(rule) = self.g.nodes[id] {
            id = self.g.body(rule);
        }
        let terminal = inside || self.lexeme[id];
        if !std::mem::replace(&mut self.seen[id][usize::from(terminal)], true) {
            self.todo.push((id, terminal));
        }
        format!("{}{id}", if terminal { 'T' } else { 'r' })
    }

    fn define(&mut self, id: Id, terminal: bool) {
        let body = match &self.g.nodes[id] {
            Node::Chars(ranges) => class(ranges),
            Node::Ref(rule) => self.name(self.g.body(*rule), terminal),
            Node::Seq(list) => self.sequence(list, terminal),
            Node::Alt(list) => {
                let list: Vec<String> = list.iter().map(|&c| self.name(c, terminal)).collect();
                list.join(" | ")
            }
            Node::Repeat(child, min, max) => {
                let name = self.name(*child, terminal);
                match (min, max) {
                    (_, Some(0)) => "\"\"".to_owned(),
                    (0, None) => format!("{name}*"),
                    (1, None) => format!("{name}+"),
                    (0, Some(1)) => format!("{name}?"),
                    (min, None) => format!("{name}{{{min},}}"),
                    (min, Some(max)) => format!("{name}{{{min},{max}}}"),
                }
            }
        };
        let kind = if terminal { 'T' } else { 'r' };
        let _ = writeln!(self.out, "{kind}{id}: {body}");
    }

    /// One after the other; characters of a terminal that follow each other become one expression.
    fn sequence(&mut self, list: &[Id], terminal: bool) -> String {
        let mut parts: Vec<String> = Vec::new();
        let mut run = String::new();
        for &id in list {
            if let (true, Node::Chars(ranges)) = (terminal, &self.g.nodes[id]) {
                run.push_str(class(ranges).trim_matches('/'));
                continue;
            }
            if !run.is_empty() {
                parts.push(format!("/{}/", std::mem::take(&mut run)));
            }
            parts.push(self.name(id, terminal));
        }
        if !run.is_empty() {
            parts.push(format!("/{run}/"));
        }
        if parts.is_empty() {
            parts.push("\"\"".to_owned());
        }
        parts.join(" ")
    }
}

/// A regular expression for one character.
fn class(ranges: &[RangeInclusive<char>]) -> String {
    let mut out = String::from("/[");
    for r in ranges {
        let _ = write!(
            out,
            "\\x{{{:X}}}-\\x{{{:X}}}",
            u32::from(*r.start()),
            u32::from(*r.end())
        );
    }
    out.push_str("]/");
    out
}
