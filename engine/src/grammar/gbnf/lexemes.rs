//! Which parts of a grammar may be read as one lexeme.
//!
//! The constraint engine reads lexemes greedily: while some lexeme that is possible here can take the next character, it is
//! taken. A part of a grammar without recursion can therefore be one lexeme if greed never costs anything, that is
//!
//! * where the part could go on, what follows it could not begin: `[0-9]+ ","` but not `[0-9]+ [0-9]`;
//! * while another lexeme that begins alike is complete, this one does not go on with what may follow that one.
//!
//! Parts that break a rule are taken apart, down to single characters, for which both hold. All sets are of first bytes
//! of characters, supersets of the truth, so a part may be taken apart for nothing but never kept wrongly.

use super::{Gbnf, Id, Node};

/// Steps of all fixed points together; a grammar that needs more is read character by character.
const MAX_STEPS: usize = 4_000_000;

/// A set of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bytes([u64; 4]);

impl Bytes {
    fn insert_range(&mut self, low: u8, high: u8) {
        for b in low..=high {
            self.0[usize::from(b) / 64] |= 1 << (b % 64);
        }
    }

    fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    fn meets(self, other: Self) -> bool {
        (0..4).any(|i| self.0[i] & other.0[i] != 0)
    }
}

/// What is known of a node. All sets are of first bytes of characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Facts {
    /// The empty text is one of its texts.
    nullable: bool,
    /// Beginnings of its texts.
    first: Bytes,
    /// What may stand in its texts behind their first character.
    rest: Bytes,
    /// What may lengthen one of its texts to another.
    more: Bytes,
    /// No two ways through it share a beginning; otherwise `more` is all of `rest`.
    plain: bool,
}

/// For each node, whether it is to be a lexeme (or part of one).
pub(super) fn find(g: &Gbnf) -> Vec<bool> {
    let recursive = recursive(g);
    let mut lexeme: Vec<bool> = g
        .nodes
        .iter()
        .map(|n| matches!(n, Node::Chars(_)))
        .collect();
    let mut steps = 0;
    let Some(facts) = facts(g, &mut steps) else {
        return lexeme;
    };
    let Some(follow) = follow(g, &facts, &mut steps) else {
        return lexeme;
    };
    let mut apart = recursive;
    // Each round takes at least one node apart.
    loop {
        let parts = parts(g, &apart);
        steps += parts.len() * parts.len();
        if steps > MAX_STEPS {
            return lexeme;
        }
        let mut broken = Vec::new();
        for &s in parts
            .iter()
            .filter(|&&s| !matches!(g.nodes[s], Node::Chars(_)))
        {
            let greedy = facts[s].more.meets(follow[s])
                || parts.iter().any(|&e| {
                    e != s && facts[e].first.meets(facts[s].first) && facts[s].rest.meets(follow[e])
                });
            if greedy {
                broken.push(s);
            }
        }
        if broken.is_empty() {
            for part in parts {
                lexeme[part] = true;
            }
            return lexeme;
        }
        for s in broken {
            apart[s] = true;
        }
    }
}

/// Nodes that contain a rule that contains itself.
fn recursive(g: &Gbnf) -> Vec<bool> {
    // Sound is what has only sound parts; what is left over leads round in a circle, or to a circle.
    let mut missing: Vec<usize> = Vec::with_capacity(g.nodes.len());
    let mut parents: Vec<Vec<Id>> = vec![Vec::new(); g.nodes.len()];
    for id in 0..g.nodes.len() {
        let children = g.children(id);
        missing.push(children.len());
        for child in children {
            parents[child].push(id);
        }
    }
    let mut todo: Vec<Id> = (0..missing.len()).filter(|&i| missing[i] == 0).collect();
    while let Some(id) = todo.pop() {
        for &parent in &parents[id] {
            missing[parent] -= 1;
            if missing[parent] == 0 {
                todo.push(parent);
            }
        }
    }
    missing.iter().map(|&n| n > 0).collect()
}

/// The largest nodes that are not to be taken apart, reached from the root. References stand for the bodies of their rules.
fn parts(g: &Gbnf, apart: &[bool]) -> Vec<Id> {
    let mut seen = vec![false; g.nodes.len()];
    let mut todo = vec![g.body(g.root)];
    let mut parts = Vec::new();
    while let Some(id) = todo.pop() {
        if std::mem::replace(&mut seen[id], true) {
            continue;
        }
        if apart[id] || matches!(g.nodes[id], Node::Ref(_)) {
            todo.extend(g.children(id));
        } else {
            parts.push(id);
        }
    }
    parts
}

/// Facts of all nodes: the least fixed point.
fn facts(g: &Gbnf, steps: &mut usize) -> Option<Vec<Facts>> {
    let mut facts = vec![Facts::default(); g.nodes.len()];
    let mut parents: Vec<Vec<Id>> = vec![Vec::new(); g.nodes.len()];
    for id in 0..g.nodes.len() {
        for child in g.children(id) {
            parents[child].push(id);
        }
    }
    // Nullable, first and rest grow until nothing changes.
    let mut todo: Vec<Id> = (0..g.nodes.len()).collect();
    while let Some(id) = todo.pop() {
        *steps += 1 + g.children(id).len();
        if *steps > MAX_STEPS {
            return None;
        }
        let now = grown(g, &facts, id);
        if now != facts[id] {
            facts[id] = now;
            todo.extend(&parents[id]);
        }
    }
    // The other two only matter without recursion, where a second pass in any order that ends will do.
    let mut missing: Vec<usize> = (0..g.nodes.len()).map(|id| g.children(id).len()).collect();
    let mut todo: Vec<Id> = (0..g.nodes.len()).filter(|&i| missing[i] == 0).collect();
    while let Some(id) = todo.pop() {
        (facts[id].plain, facts[id].more) = lengthened(g, &facts, id);
        for &parent in &parents[id] {
            missing[parent] -= 1;
            if missing[parent] == 0 {
                todo.push(parent);
            }
        }
    }
    Some(facts)
}

/// Nullable, first and rest of a node from those of its children.
fn grown(g: &Gbnf, facts: &[Facts], id: Id) -> Facts {
    let mut f = Facts::default();
    match &g.nodes[id] {
        Node::Chars(ranges) => {
            for r in ranges {
                f.first.insert_range(lead(*r.start()), lead(*r.end()));
            }
        }
        Node::Ref(rule) => f = facts[g.body(*rule)],
        Node::Seq(list) => {
            f.nullable = true;
            for (i, &c) in list.iter().enumerate() {
                let c = facts[c];
                if f.nullable {
                    f.first = f.first.or(c.first);
                }
                f.rest = f.rest.or(c.rest);
                if i > 0 {
                    f.rest = f.rest.or(c.first);
                }
                f.nullable &= c.nullable;
            }
        }
        Node::Alt(list) => {
            for &c in list {
                let c = facts[c];
                f.first = f.first.or(c.first);
                f.rest = f.rest.or(c.rest);
                f.nullable |= c.nullable;
            }
        }
        Node::Repeat(child, min, max) => {
            let c = facts[*child];
            if *max != Some(0) {
                (f.first, f.rest) = (c.first, c.rest);
            }
            if max.is_none_or(|n| n > 1) {
                f.rest = f.rest.or(c.first);
            }
            f.nullable = *min == 0 || c.nullable;
        }
    }
    f
}

/// Whether a node is plain, and what may lengthen its texts, from the facts of its children.
fn lengthened(g: &Gbnf, facts: &[Facts], id: Id) -> (bool, Bytes) {
    let (plain, more) = match &g.nodes[id] {
        Node::Chars(_) => (true, Bytes::default()),
        Node::Ref(rule) => (facts[g.body(*rule)].plain, facts[g.body(*rule)].more),
        Node::Seq(list) => list
            .iter()
            .fold((true, Bytes::default()), |(plain, more), &c| {
                let c = facts[c];
                let clash = more.meets(c.first);
                let more = if c.nullable {
                    more.or(c.first).or(c.more)
                } else {
                    c.more
                };
                (plain && c.plain && !clash, more)
            }),
        Node::Alt(list) => {
            list.iter()
                .fold(
                    ((true, Bytes::default()), Bytes::default()),
                    |((plain, more), first), &c| {
                        let c = facts[c];
                        let clash = first.meets(c.first);
                        (
                            (plain && c.plain && !clash, more.or(c.more)),
                            first.or(c.first),
                        )
                    },
                )
                .0
        }
        Node::Repeat(child, min, max) => {
            let c = facts[*child];
            if max.is_none_or(|n| n > 1) {
                let clash = c.more.meets(c.first);
                // A fixed number of repetitions has no more to come.
                let more = if *max == Some(*min) {
                    c.more
                } else {
                    c.more.or(c.first)
                };
                (c.plain && !clash && !c.nullable, more)
            } else {
                (c.plain, c.more)
            }
        }
    };
    (plain, if plain { more } else { facts[id].rest })
}

/// What may follow each node.
fn follow(g: &Gbnf, facts: &[Facts], steps: &mut usize) -> Option<Vec<Bytes>> {
    let mut follow = vec![Bytes::default(); g.nodes.len()];
    let mut todo: Vec<Id> = (0..g.nodes.len()).collect();
    while let Some(id) = todo.pop() {
        *steps += 1 + g.children(id).len();
        if *steps > MAX_STEPS {
            return None;
        }
        let behind = follow[id];
        let mut grow = |child: Id, by: Bytes| {
            let now = follow[child].or(by);
            if now != follow[child] {
                follow[child] = now;
                todo.push(child);
            }
        };
        match &g.nodes[id] {
            Node::Chars(_) => {}
            Node::Ref(rule) => grow(g.body(*rule), behind),
            Node::Alt(list) => list.iter().for_each(|&c| grow(c, behind)),
            Node::Seq(list) => {
                let mut behind = behind;
                for &c in list.iter().rev() {
                    grow(c, behind);
                    let c = facts[c];
                    behind = if c.nullable {
                        behind.or(c.first)
                    } else {
                        c.first
                    };
                }
            }
            Node::Repeat(child, _, max) => {
                let again = max.is_none_or(|n| n > 1);
                let first = if again {
                    facts[*child].first
                } else {
                    Bytes::default()
                };
                grow(*child, behind.or(first));
            }
        }
    }
    Some(follow)
}

/// First byte of a character in UTF-8.
fn lead(c: char) -> u8 {
    let mut buffer = [0; 4];
    c.encode_utf8(&mut buffer);
    buffer[0]
}
