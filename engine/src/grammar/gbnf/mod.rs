//! GBNF, the grammar notation of llama.cpp, translated for the constraint engine.
//!
//! ```text
//! text ─ parse ─► Grammar (an arena of nodes) ─ lexemes ─► which parts are lexemes ─ lark ─► text for llguidance
//! ```
//!
//! A GBNF grammar speaks of characters, the constraint engine of lexemes that are read as far as they go. One lexeme for each
//! character is always right and slow; [`lexemes`] finds the largest parts that may be one without changing the language.

mod lark;
mod lexemes;
mod parse;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;

/// Index of a [`Node`].
pub(super) type Id = usize;

/// Part of a grammar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    /// One character out of these ranges, which are sorted and apart.
    Chars(Vec<RangeInclusive<char>>),
    /// What the rule of this index stands for.
    Ref(usize),
    /// One after the other; nothing at all if empty.
    Seq(Vec<Id>),
    /// One of them.
    Alt(Vec<Id>),
    /// At least so many times, and at most (`None`: no limit).
    Repeat(Id, u32, Option<u32>),
}

/// A named rule.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    name: String,
    /// `None` only while the rules are read.
    body: Option<Id>,
    /// Where it was first named.
    at: usize,
}

/// A grammar that was understood: every rule has a body, and every rule can end.
#[derive(Clone, Debug, Default)]
pub(super) struct Gbnf {
    nodes: Vec<Node>,
    rules: Vec<Rule>,
    root: usize,
}

impl Gbnf {
    fn body(&self, rule: usize) -> Id {
        self.rules[rule].body.unwrap_or(0)
    }

    /// Nodes directly inside a node; the body for a reference.
    fn children(&self, id: Id) -> Vec<Id> {
        match &self.nodes[id] {
            Node::Chars(_) => Vec::new(),
            Node::Ref(rule) => vec![self.body(*rule)],
            Node::Seq(list) | Node::Alt(list) => list.clone(),
            Node::Repeat(child, ..) => vec![*child],
        }
    }
}

/// What is wrong with a grammar, in two lines: what was found where and what was expected, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// `line 2, column 7: …`
    pub(super) what: String,
    /// What to do about it.
    pub(super) hint: &'static str,
}

/// Translates a grammar.
///
/// # Errors
/// What is wrong with it.
pub(super) fn to_lark(text: &str) -> Result<String, Problem> {
    let grammar = parse::parse(text)?;
    let lexemes = lexemes::find(&grammar);
    Ok(lark::write(&grammar, &lexemes))
}
