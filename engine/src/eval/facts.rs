//! Planted facts: something said once, asked for thousands of tokens later.
//!
//! The weak point of a bounded cache is a fact that nothing refers to for a long time (Random Attention, arXiv 2609.03430, measures it
//! with passcodes). A chain is made for the purpose and read token by token under a policy, whatever the model would have said; when
//! a fact is asked for, the answer is right if each of its tokens is the model's first choice. One chain asks for one fact at each age.
//!
//! Two forms: `notes`, plain sentences that any model can read, and `table`, the language of the bundled model, in which a table is
//! worked out and then looked up at the steps of a walk. All numbers of a walk are even, so entries with odd numbers lie idle until
//! they are asked for.

use std::ops::Range;
use std::sync::Arc;

use rand_core::Rng;
use rand_pcg::Pcg32;

use crate::chat::ThinkTags;
use crate::conversation::{Message, PromptOptions, Role, prompt_of};
use crate::error::Error;
use crate::generate::Prompt;
use crate::model::Model;
use crate::options::{KvOptions, LoadOptions};
use crate::sampling::{log_prob, top_log_probs};
use crate::session::Session;

/// How a fact comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Variant {
    /// Said once, and nowhere else.
    Once,
    /// Said again at each quarter of the way.
    Restated,
    /// Said once, as what follows from something in reach: the prompt (`table`), or facts before it (`notes`).
    Derived,
}

impl Variant {
    /// Every variant.
    pub const ALL: [Self; 3] = [Self::Once, Self::Restated, Self::Derived];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Once => "once",
            Self::Restated => "restated",
            Self::Derived => "derived",
        }
    }
}

/// The language of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Sentences.
    Notes,
    /// The bundled model's tables.
    Table,
}

/// The most ages that one chain can ask at: a table has five idle entries.
pub const MAX_AGES: usize = 5;

/// A fact that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Tokens since it was said first, as planned.
    pub age: usize,
    /// Positions of the answer's tokens.
    pub answer: Range<usize>,
}

/// A chain with planted facts.
#[derive(Clone, Debug)]
pub struct Chain {
    /// How its facts come about.
    pub variant: Variant,
    /// Ids, prompt included.
    pub tokens: Vec<u32>,
    /// How many are the prompt.
    pub n_prompt: usize,
    /// In the order of their positions.
    pub asks: Vec<Ask>,
}

/// What a policy said to one question.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Asked {
    /// Tokens since the fact was said.
    pub age: usize,
    /// Whether each token of the answer was the first choice.
    pub right: bool,
    /// Log-probability of the answer, in nats.
    pub logprob: f64,
}

/// Random numbers of a chain.
struct Dice(Pcg32);

impl Dice {
    /// From `from` to `to`, both included.
    fn roll(&mut self, from: u32, to: u32) -> u32 {
        let n = u64::from(to - from + 1);
        from + ((u64::from(self.0.next_u32()) * n) >> 32) as u32
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(0, of.len() as u32 - 1) as usize]
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.roll(0, i as u32) as usize);
        }
    }
}

/// A statement and where it was made.
struct Fact {
    /// What is said again.
    line: String,
    /// End of the statement.
    at: usize,
    age: usize,
    /// Positions after `at` at which it is said again.
    again: Vec<usize>,
    asked: bool,
}

/// A chain in the making.
struct Writer<'a> {
    model: &'a Model,
    tokens: Vec<u32>,
    asks: Vec<Ask>,
}

impl Writer<'_> {
    fn push(&mut self, text: &str) {
        let ids = self.model.tokenizer().encode(text, false, false);
        self.tokens.extend(ids);
    }

    /// Asks: `before` is given, `answer` is what counts, `after` follows.
    fn ask(&mut self, age: usize, before: &str, answer: &str, after: &str) {
        self.push(before);
        let start = self.tokens.len();
        self.push(answer);
        let answer = start..self.tokens.len();
        self.asks.push(Ask { age, answer });
        self.push(after);
    }

    fn end(self, variant: Variant, n_prompt: usize) -> Chain {
        Chain {
            variant,
            tokens: self.tokens,
            n_prompt,
            asks: self.asks,
        }
    }
}

/// Makes the chain of a seed that asks at `ages` (at most [`MAX_AGES`], in tokens).
///
/// # Errors
/// What the chat template says.
pub fn chain(
    model: &Model,
    tags: Option<&ThinkTags>,
    form: Form,
    variant: Variant,
    ages: &[usize],
    seed: u64,
) -> Result<Chain, Error> {
    let mut ages = ages[..ages.len().min(MAX_AGES)].to_vec();
    ages.sort_unstable();
    let dice = Dice(Pcg32::new(seed, 0x5eed_fac7_0001 + variant as u64));
    match form {
        Form::Table => table(model, tags, variant, &ages, dice),
        Form::Notes => notes(model, tags, variant, &ages, dice),
    }
}

fn start<'a>(
    model: &'a Model,
    tags: Option<&ThinkTags>,
    question: String,
) -> Result<Writer<'a>, Error> {
    let prompt = if model.has_template() {
        let message = Message {
            role: Role::User,
            content: question,
            thinking: None,
        };
        prompt_of(model, tags, &[message], &PromptOptions::default())?
    } else {
        Prompt::raw(model.tokenizer(), &format!("{question}\n"), false)
    };
    Ok(Writer {
        model,
        tokens: prompt.tokens,
        asks: Vec::new(),
    })
}

/// What a chain is filled with, and how it asks.
trait Filler {
    /// The line that would come next.
    fn peek(&self) -> String;
    /// It was written.
    fn advance(&mut self);
    /// What asks for fact `i`: what comes before the answer, the answer, the rest of the line.
    fn question(&mut self, i: usize) -> [String; 3];
}

/// Writes fillers, statements made again and questions, each at its place.
fn fill(w: &mut Writer<'_>, facts: &mut [Fact], filler: &mut dyn Filler) {
    while facts.iter().any(|f| !f.asked) {
        let next = filler.peek();
        let len = w.model.tokenizer().encode(&next, false, false).len();
        // What would come too late after another line comes now.
        let due = |at: usize| w.tokens.len() + len > at;
        let repeated = |f: &Fact| f.again.first().is_some_and(|&d| due(f.at + d));
        if let Some(i) = facts.iter().position(|f| !f.asked && due(f.at + f.age)) {
            let [before, answer, after] = filler.question(i);
            facts[i].asked = true;
            w.ask(facts[i].age, &before, &answer, &after);
        } else if let Some(i) = facts.iter().position(repeated) {
            facts[i].again.remove(0);
            let line = facts[i].line.clone();
            w.push(&line);
        } else {
            filler.advance();
            w.push(&next);
        }
    }
}

fn repeats(variant: Variant, age: usize) -> Vec<usize> {
    match variant {
        Variant::Restated => (1..4).map(|q| age * q / 4).collect(),
        _ => Vec::new(),
    }
}

/// An entry with an even value, as the bundled model learned to work them out.
fn entry(dice: &mut Dice) -> (String, u32) {
    loop {
        let (text, value) = match dice.roll(0, 2) {
            0 => {
                let (u, v) = (dice.roll(1, 20), dice.roll(1, 9));
                (format!("{u}+{v}"), u + v)
            }
            1 => {
                let (u, v) = (dice.roll(10, 30), dice.roll(1, 9));
                (format!("{u}-{v}"), u - v)
            }
            _ => {
                let (u, v) = (dice.roll(2, 9), dice.roll(2, 5));
                (format!("{u}*{v}"), u * v)
            }
        };
        if value % 2 == 0 {
            return (text, value);
        }
    }
}

/// The walk of a table: the state that its lines depend on.
#[derive(Clone)]
struct Walk {
    letter: char,
    m: u32,
    values: Vec<u32>,
    /// Entries that are asked for, in the order of the facts.
    asked: Vec<usize>,
    n: u32,
    before: u32,
    x: u32,
}

impl Walk {
    /// The next line, looking up entry `d`: its beginning, the sum, its end.
    fn step(&mut self, d: usize) -> [String; 3] {
        let total = self.x + self.values[d];
        let rest = match total.checked_sub(self.m) {
            Some(left) => format!("-{}={left}\n", self.m),
            None => "\n".to_owned(),
        };
        self.n += 1;
        let head = format!("{}:{}+{}{d}=", self.n, self.x, self.letter);
        (self.before, self.x) = (self.x, total % self.m);
        [head, total.to_string(), rest]
    }
}

impl Filler for Walk {
    fn peek(&self) -> String {
        let d = self.before as usize % 10;
        self.clone().step(d).concat()
    }

    fn advance(&mut self) {
        self.step(self.before as usize % 10);
    }

    fn question(&mut self, i: usize) -> [String; 3] {
        self.step(self.asked[i])
    }
}

fn table(
    model: &Model,
    tags: Option<&ThinkTags>,
    variant: Variant,
    ages: &[usize],
    mut dice: Dice,
) -> Result<Chain, Error> {
    let letter = dice.pick(&['c', 'd', 'e', 'f', 'g', 'h', 'k', 'p', 'q']);
    let entries: Vec<(String, u32)> = (0..10).map(|_| entry(&mut dice)).collect();
    let mut walk = Walk {
        letter,
        m: 2 * dice.roll(25, 49),
        values: entries.iter().map(|e| e.1).collect(),
        asked: Vec::new(),
        n: 1,
        before: 0,
        x: 0,
    };
    walk.before = 2 * dice.roll(0, walk.m / 2 - 1);
    walk.x = 2 * dice.roll(0, walk.m / 2 - 1);
    let mut idle = [1usize, 3, 5, 7, 9];
    dice.shuffle(&mut idle);
    walk.asked = idle[..ages.len()].to_vec();
    let asked = walk.asked.clone();
    // Outside the derived variant the question does not define what is asked for.
    let defined = (0..10).filter(|d| variant == Variant::Derived || !asked.contains(d));
    let defined: Vec<String> = defined
        .map(|d| format!("{letter}{d}={}", entries[d].0))
        .collect();
    let steps = ages.iter().max().copied().unwrap_or(0) / 14 + 8;
    let question = format!(
        "Let {}. Start with x0={} and x1={}. Step n adds to x(n-1) the entry whose number is the last digit of x(n-2), mod {}. Steps 2 to \
         {steps} use {letter}. What is x({steps})?",
        defined.join(", "),
        walk.before,
        walk.x,
        walk.m,
    );
    let mut w = start(model, tags, question)?;
    let n_prompt = w.tokens.len();
    let mut facts: Vec<Option<Fact>> = ages.iter().map(|_| None).collect();
    for (d, (text, value)) in entries.iter().enumerate() {
        let line = format!("{letter}{d}={text}={value}\n");
        w.push(&line);
        if let Some(i) = asked.iter().position(|&a| a == d) {
            facts[i] = Some(Fact {
                line,
                at: w.tokens.len(),
                age: ages[i],
                again: repeats(variant, ages[i]),
                asked: false,
            });
        }
    }
    w.push(&format!("{} {}\n", walk.before, walk.x));
    let mut facts: Vec<Fact> = facts.into_iter().flatten().collect();
    fill(&mut w, &mut facts, &mut walk);
    Ok(w.end(variant, n_prompt))
}

/// Sentences about nothing in particular.
struct Notes {
    dice: Dice,
    next: String,
    /// Names and values of the facts.
    facts: Vec<(String, String)>,
}

const WHO: [&str; 12] = [
    "The gardener",
    "My neighbour",
    "A young clerk",
    "The captain",
    "Her cousin",
    "The baker",
    "An old teacher",
    "The driver",
    "His sister",
    "The porter",
    "A visitor",
    "The carpenter",
];
const DID: [&str; 12] = [
    "carried",
    "painted",
    "forgot",
    "repaired",
    "moved",
    "admired",
    "sold",
    "cleaned",
    "looked for",
    "described",
    "covered",
    "borrowed",
];
const WHAT: [&str; 16] = [
    "the wooden bench",
    "a green bicycle",
    "the heavy curtain",
    "an empty basket",
    "the tall ladder",
    "a broken clock",
    "the red umbrella",
    "a bag of flour",
    "the garden gate",
    "an old map",
    "the silver kettle",
    "a pair of boots",
    "the narrow boat",
    "a box of candles",
    "the kitchen table",
    "a woollen coat",
];
const WHERE: [&str; 12] = [
    "near the river",
    "behind the school",
    "in the early morning",
    "after the rain",
    "on the way home",
    "beside the old mill",
    "before dinner",
    "at the end of the street",
    "without a word",
    "during the long winter",
    "in the small harbour",
    "under the bridge",
];

impl Notes {
    fn turn(&mut self) {
        let d = &mut self.dice;
        let (who, did, what) = (d.pick(&WHO), d.pick(&DID), d.pick(&WHAT));
        self.next = format!("{who} {did} {what} {}.\n", d.pick(&WHERE));
    }
}

impl Filler for Notes {
    fn peek(&self) -> String {
        self.next.clone()
    }

    fn advance(&mut self) {
        self.turn();
    }

    fn question(&mut self, i: usize) -> [String; 3] {
        let (name, value) = &self.facts[i];
        // The space belongs to the answer where a tokenizer glues it to the number; digits on their own need none.
        [
            format!("Recall: {name} ="),
            format!(" {value}"),
            ".\n".to_owned(),
        ]
    }
}

fn notes(
    model: &Model,
    tags: Option<&ThinkTags>,
    variant: Variant,
    ages: &[usize],
    mut dice: Dice,
) -> Result<Chain, Error> {
    let question = "Read these notes. Where a line begins with Recall, write the value that the notes gave to the name.";
    let mut w = start(model, tags, question.to_owned())?;
    let n_prompt = w.tokens.len();
    let mut names: Vec<String> = Vec::new();
    while names.len() < 3 * ages.len() {
        let letter = |d: &mut Dice| d.pick(&['b', 'f', 'g', 'k', 'p', 'q', 'v', 'w', 'x', 'z']);
        let name = format!("{}{}", letter(&mut dice), letter(&mut dice));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut facts = Vec::new();
    let mut values = Vec::new();
    for (&age, of) in ages.iter().zip(names.chunks(3)) {
        let (small, large) = (dice.roll(10, 99), dice.roll(10, 98) * 100);
        let (name, value) = (&of[0], large + small);
        let line = match variant {
            Variant::Derived => format!(
                "Let {} = {large} and {} = {small}, so {name} = {} + {} = {value}.\n",
                of[1], of[2], of[1], of[2]
            ),
            _ => format!("Let {name} = {value}.\n"),
        };
        w.push(&line);
        values.push((name.clone(), value.to_string()));
        facts.push(Fact {
            line,
            at: w.tokens.len(),
            age,
            again: repeats(variant, age),
            asked: false,
        });
    }
    let mut filler = Notes {
        dice,
        next: String::new(),
        facts: values,
    };
    filler.turn();
    fill(&mut w, &mut facts, &mut filler);
    Ok(w.end(variant, n_prompt))
}

/// Reads a chain under a policy. `None` when the prompt does not fit the pool, or `stop` said so on the way.
///
/// # Errors
/// Those of sessions.
pub fn ask(
    model: &Arc<Model>,
    load: &LoadOptions,
    chain: &Chain,
    kv: KvOptions,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Vec<Asked>>, Error> {
    let load = LoadOptions {
        n_threads: Some(1),
        n_ctx: Some(chain.tokens.len() as u32 + 1),
        kv,
        ..load.clone()
    };
    let mut session = Session::new(model.clone(), &load)?;
    let prompt = &chain.tokens[..chain.n_prompt];
    let go = std::ops::ControlFlow::Continue(());
    match session.prefill(prompt, prompt.len(), &mut |_, _| go) {
        Ok(()) => {}
        Err(Error::PromptTooLong(_)) => return Ok(None),
        Err(e) => return Err(e),
    }
    let mut out = Vec::new();
    let mut asks = chain.asks.iter().peekable();
    let mut asked = None;
    for (pos, &id) in chain.tokens.iter().enumerate().skip(chain.n_prompt) {
        if let Some(a) = asks.peek().filter(|a| a.answer.contains(&pos)) {
            let logits = session.logits();
            let now = asked.get_or_insert(Asked {
                age: a.age,
                right: true,
                logprob: 0.0,
            });
            now.right &= top_log_probs(logits, 1).first().is_some_and(|t| t.0 == id);
            now.logprob += f64::from(log_prob(logits, id));
            if pos + 1 == a.answer.end {
                out.extend(asked.take());
                asks.next();
            }
        }
        if asks.peek().is_none() {
            break;
        }
        if stop() {
            return Ok(None);
        }
        match session.decode(id) {
            Ok(()) => {}
            Err(Error::PromptTooLong(_)) => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    Ok(Some(out))
}
