//! `lemma bench`: how fast a model runs here.
//!
//! The tests, their names and the fields of the results are llama-bench's: `pp512` reads a prompt of 512 tokens, `tg128` generates
//! 128, each as a mean and a standard deviation over repetitions after one that warms up, at one or several depths. Prompts are
//! drawn from the vocabulary at random, always the same ones; what is generated are the likeliest tokens, each found before the next is
//! computed.
//!
//! `--decode-to N` is about something llama-bench has no number for: how speed and memory behave over a long reply. It generates up
//! to position N and reports on the way. `--vs COMMAND` alternates with another program, so that a noisy machine is unkind to both.

mod table;
mod vs;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use lemma_engine::backend::Ceiling;
use lemma_engine::backend::cpu::default_threads;
use lemma_engine::model::Model;
use lemma_engine::options::LoadOptions;
use lemma_engine::sampling::Choice;
use lemma_engine::session::{Rewind, Session};
use serde_json::{Map, Value, json};

use self::table::Table;
use super::synth;
use crate::args::Invocation;
use crate::args::config::{self, ModelSource};
use crate::args::tools::BenchArgs;
use crate::args::typed::{ComputeArgs, ModelArgs};
use crate::fail::{Failure, Result};
use crate::term::{Style, Term, escape};
use crate::trace::Trace;
use crate::{bundled, load, out, record};

/// One test: read `n_prompt` tokens or generate `n_gen`, with `n_depth` in the cache before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Test {
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    n_threads: Option<usize>,
}

impl Test {
    fn name(&self) -> String {
        let test = if self.n_prompt > 0 {
            format!("pp{}", self.n_prompt)
        } else {
            format!("tg{}", self.n_gen)
        };
        if self.n_depth > 0 {
            format!("{test} @ d{}", self.n_depth)
        } else {
            test
        }
    }
    fn n(&self) -> usize {
        self.n_prompt.max(self.n_gen)
    }
}

/// A file that is removed in the end.
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub(crate) fn run(args: &BenchArgs, invocation: &Invocation, term: Term) -> Result {
    out::check()?;
    let threads = match &args.threads {
        Some(list) => numbers("--threads", list)?
            .into_iter()
            .map(|n| config::threads(i64::try_from(n).unwrap_or(i64::MAX)))
            .collect::<Result<Vec<_>>>()?,
        None => vec![None],
    };
    // Results say how many there were, asked for or not.
    let threads: Vec<_> = threads
        .into_iter()
        .map(|n| Some(n.unwrap_or_else(default_threads)))
        .collect();
    let (prompts, gens) = (numbers("-p", &args.n_prompt)?, numbers("-n", &args.n_gen)?);
    let depths = numbers("-d", &args.n_depth)?;
    let model_args = ModelArgs {
        model: args.model.clone(),
        ..ModelArgs::default()
    };
    let compute = ComputeArgs {
        device: args.device.clone(),
        offload: args.offload.clone(),
        isa: args.isa.clone(),
        batch_size: args.batch_size,
        ubatch_size: args.ubatch_size,
        ..ComputeArgs::default()
    };
    let options = config::load_options(&model_args, &args.kv, &compute)?;

    let mut temp = None;
    let source = match &args.shape {
        Some(shape) => {
            let path =
                std::env::temp_dir().join(format!("lemma-bench-{}.gguf", std::process::id()));
            let file = temp.insert(Temp(path));
            synth::write(shape, &args.ty, &file.0, 0, term)?;
            ModelSource::Path(file.0.clone())
        }
        None => config::model_source(model_args.model.as_ref(), invocation.model_from_env(), None)?,
    };
    let model = load::model(&source, &options)?.model;
    // The mapping keeps the bytes; nothing stays behind even if the program is killed now.
    drop(temp);

    let mut tests = Vec::new();
    for &n_threads in &threads {
        for &n_depth in &depths {
            tests.extend(prompts.iter().filter(|&&n| n > 0).map(|&n_prompt| Test {
                n_prompt,
                n_gen: 0,
                n_depth,
                n_threads,
            }));
            tests.extend(gens.iter().filter(|&&n| n > 0).map(|&n_gen| Test {
                n_prompt: 0,
                n_gen,
                n_depth,
                n_threads,
            }));
        }
    }
    let mut table = Table::new(args.output, term);
    let name = args.shape.clone().unwrap_or_else(|| match &source {
        ModelSource::Path(p) => p.to_string_lossy().into_owned(),
        ModelSource::Bundled => bundled::NAME.to_owned(),
    });
    let bench = Bench {
        model,
        options,
        name,
        repetitions: args.repetitions as usize,
        term,
        trace: Trace::open(args.kv.kv_trace.as_deref())?,
    };
    let ceilings = match args.ceiling {
        true => bench.ceilings(&threads)?,
        false => Vec::new(),
    };
    table.ceilings = bench.shares(&ceilings);
    match &args.vs {
        Some(command) => vs::alternate(&bench, &tests, command, &mut table)?,
        None => {
            for test in &tests {
                let m = bench.measure(test, bench.repetitions)?;
                table.row(m.row())?;
            }
        }
    }
    if let Some(end) = args.decode_to {
        for &n_threads in &threads {
            bench.decode_to(end, n_threads, &mut table)?;
        }
    }
    for (n_threads, ceiling) in ceilings {
        table.row(ceiling_row(n_threads, &ceiling))?;
    }
    table.finish()
}

/// The largest number of a list: more positions than any model has, and tokens that fit memory.
const MAX_NUMBER: usize = 1 << 24;

/// `1,2,3`, and llama-bench's ranges: `first-last`, `first-last+step`, `first-last*factor`.
fn numbers(flag: &str, list: &str) -> Result<Vec<usize>> {
    let wrong = || {
        Failure::usage(format!(
            "{flag} {:?}: expected numbers, with commas between them",
            escape(list)
        ))
    };
    let mut out = Vec::new();
    for item in list.split(',').map(str::trim).filter(|s| !s.is_empty()) {
        let parse = |s: &str| match s.parse::<usize>() {
            Ok(n) if n > MAX_NUMBER => Err(Failure::usage(format!(
                "{flag} {n}: expected at most {MAX_NUMBER}"
            ))),
            n => n.map_err(|_| wrong()),
        };
        let Some((first, rest)) = item.split_once('-') else {
            out.push(parse(item)?);
            continue;
        };
        let (last, step) = match rest.split_once(['+', '*']) {
            Some((last, step)) => (parse(last)?, parse(step)?),
            None => (parse(rest)?, 1),
        };
        let factor = rest.contains('*');
        if step == 0 || (factor && step == 1) {
            return Err(wrong());
        }
        let mut n = parse(first)?;
        while n <= last && out.len() < 1000 {
            out.push(n);
            n = if factor {
                (n * step).max(n + 1)
            } else {
                n + step
            };
        }
    }
    if out.is_empty() {
        Err(wrong())
    } else {
        Ok(out)
    }
}

struct Bench {
    model: Arc<Model>,
    options: LoadOptions,
    name: String,
    repetitions: usize,
    term: Term,
    trace: Option<Trace>,
}

/// A test and how long it took each time.
struct Measured {
    test: Test,
    fields: Map<String, Value>,
    ns: Vec<f64>,
}

impl Measured {
    /// Tokens a second, each time.
    fn rates(&self) -> Vec<f64> {
        let n = self.test.n() as f64;
        self.ns.iter().map(|ns| n * 1e9 / ns).collect()
    }

    fn row(self) -> Map<String, Value> {
        let rates = self.rates();
        let (avg_ns, stddev_ns) = mean(&self.ns);
        let (avg_ts, stddev_ts) = mean(&rates);
        let numbers = |x: &[f64]| x.iter().map(|&x| record::number(x)).collect::<Value>();
        let mut row = self.fields;
        row.insert("n_prompt".into(), self.test.n_prompt.into());
        row.insert("n_gen".into(), self.test.n_gen.into());
        row.insert("n_depth".into(), self.test.n_depth.into());
        row.insert("avg_ns".into(), (avg_ns.round() as u64).into());
        row.insert("stddev_ns".into(), (stddev_ns.round() as u64).into());
        row.insert("avg_ts".into(), record::number(avg_ts));
        row.insert("stddev_ts".into(), record::number(stddev_ts));
        let samples_ns = self.ns.iter().map(|&ns| ns as u64).collect();
        row.insert("samples_ns".into(), samples_ns);
        row.insert("samples_ts".into(), numbers(&rates));
        row
    }
}

impl Bench {
    fn session(&self, n_ctx: usize, n_threads: Option<usize>) -> Result<Session> {
        let mut o = self.options.clone();
        o.n_threads = n_threads;
        // As llama-bench: room for what is measured and no more. Random tokens care little for the trained context.
        o.n_ctx = Some(
            u32::try_from(n_ctx)
                .unwrap_or(u32::MAX)
                .max(o.n_ctx.unwrap_or(0)),
        );
        o.kv.beyond_train = true;
        Ok(Session::new(self.model.clone(), &o)?)
    }

    /// How fast memory is for each number of threads; nothing where weights lie in two.
    fn ceilings(&self, threads: &[Option<usize>]) -> Result<Vec<(Option<usize>, Ceiling)>> {
        let mut all = Vec::new();
        for &n_threads in threads {
            self.progress("ceiling");
            let mut session = self.session(1, n_threads)?;
            match session.ceiling()? {
                Some(c) => all.push((n_threads, c)),
                None => out::note(
                    "no ceiling: weights in two memories, or a reference that is not fast",
                ),
            }
            self.progress("");
        }
        Ok(all)
    }

    /// Tokens a second that memory would stream.
    fn shares(&self, ceilings: &[(Option<usize>, Ceiling)]) -> Vec<(Option<usize>, f64)> {
        let bytes = self.model.token_bytes().max(1) as f64;
        let all = ceilings.iter();
        all.map(|&(n, c)| (n, c.read / bytes)).collect()
    }

    fn traced(&self, session: &mut Session, test: String) {
        if let Some(trace) = &self.trace {
            trace.install(session, Some(("test", test.into())));
        }
    }

    fn tokens(&self, n: usize) -> Vec<u32> {
        self.ids().take(n).collect()
    }

    fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        // A linear congruential generator; quality is not the point, sameness is.
        let n_vocab = self.model.hparams().n_vocab as u64;
        let mut x = 0x2545_f491_4f6c_dd1d_u64;
        std::iter::repeat_with(move || {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((x >> 33) % n_vocab) as u32
        })
    }

    /// Repeats a test after once to warm up.
    fn measure(&self, t: &Test, repetitions: usize) -> Result<Measured> {
        let mut session = self.session(t.n_depth + t.n() + 1, t.n_threads)?;
        self.traced(&mut session, t.name());
        let tokens = self.tokens(t.n_depth + t.n());
        let (before, now) = tokens.split_at(t.n_depth);
        let mut ns = Vec::new();
        // The first one warms caches and is not counted.
        for i in 0..=repetitions {
            self.progress(&format!("{}: {i} of {repetitions}", t.name()));
            if session.pos() as usize != t.n_depth
                && session.rewind(t.n_depth as u32) != Rewind::Done
            {
                session.clear();
            }
            if session.pos() == 0 && !before.is_empty() {
                session.prefill(before, 0, &mut |_, _| ControlFlow::Continue(()))?;
            }
            let start = Instant::now();
            if t.n_prompt > 0 {
                session.prefill(now, 0, &mut |_, _| ControlFlow::Continue(()))?;
            } else {
                generate(&mut session, now[0], now.len())?;
            }
            let took = start.elapsed().as_nanos() as f64;
            if i > 0 {
                ns.push(took);
            }
        }
        self.progress("");
        Ok(Measured {
            test: *t,
            fields: self.row(&t.name(), &session, t.n_threads),
            ns,
        })
    }

    /// Fields that every row has.
    fn row(&self, test: &str, session: &Session, n_threads: Option<usize>) -> Map<String, Value> {
        let kv = session.kv();
        let file = self.model.gguf();
        let o = &self.options;
        let row = json!({
            "test": test,
            "build_version": env!("CARGO_PKG_VERSION"),
            "backend": session.describe(),
            "model_filename": self.name,
            "model_type": format!("{} {}", self.model.arch(), dominant_type(file)),
            "model_size": file.n_tensor_bytes(),
            "model_n_params": file.tensors().map(|t| t.n_elements()).sum::<u64>(),
            "n_batch": o.n_batch,
            "n_ubatch": o.n_ubatch,
            "n_threads": n_threads,
            "type_k": o.kv.ty_k.name(),
            "type_v": o.kv.ty_v.name(),
            "kv_policy": kv.policy,
            "kv_slots": kv.n_slots,
            "kv_bytes": kv.bytes,
        });
        match row {
            Value::Object(row) => row,
            _ => Map::new(),
        }
    }

    /// Generates up to position `end`; a row at each doubling.
    fn decode_to(&self, end: u32, n_threads: Option<usize>, table: &mut Table) -> Result {
        let end = end as usize;
        if !(1..=MAX_NUMBER).contains(&end) {
            return Err(Failure::usage(format!(
                "--decode-to {end}: expected 1 to {MAX_NUMBER}"
            )));
        }
        let trained = self.model.hparams().n_ctx_train as usize;
        if end > trained && !self.options.kv.beyond_train {
            return Err(Failure::usage(format!(
                "--decode-to {end}, expected at most the {trained} positions that the model was trained on"
            ))
            .hint("--beyond-train goes on all the same"));
        }
        let mut session = self.session(end + 1, n_threads)?;
        self.traced(&mut session, format!("decode@{end}"));
        let start = self.tokens(64.min(end));
        let mut id = start[0];
        session.prefill(&start, start.len(), &mut |_, _| ControlFlow::Continue(()))?;
        let mut at = session.pos() as usize;
        let mut next = 256;
        while at < end {
            let goal = next.min(end);
            // The speed is that of the last stretch: half of the way there at most 512 tokens.
            let stretch = (goal - at).min(512);
            id = generate(&mut session, id, goal - at - stretch)?;
            let clock = Instant::now();
            id = generate(&mut session, id, stretch)?;
            let ns = clock.elapsed().as_nanos() as f64;
            at = goal;
            next = goal * 2;
            let kv = session.kv();
            let mut row = self.row(&format!("decode@{at}"), &session, n_threads);
            row.insert("n_prompt".into(), 0.into());
            row.insert("n_gen".into(), stretch.into());
            row.insert("n_depth".into(), at.into());
            row.insert("avg_ns".into(), (ns as u64).into());
            row.insert("stddev_ns".into(), 0.into());
            row.insert("avg_ts".into(), record::number(stretch as f64 * 1e9 / ns));
            row.insert("stddev_ts".into(), 0.into());
            row.insert("kv_pages".into(), kv.pages.into());
            row.insert("kv_recycled".into(), kv.recycled.into());
            row.insert("resident_bytes".into(), resident().into());
            table.row(row)?;
        }
        Ok(())
    }

    fn progress(&self, text: &str) {
        out::transient(&self.term, text, Style::default());
    }
}

/// Decodes `n` tokens: `id`, then always the likeliest; returns what would come next.
fn generate(session: &mut Session, mut id: u32, n: usize) -> Result<u32> {
    session.follow(Choice::Best);
    for _ in 0..n {
        session.decode(id)?;
        id = session.best().unwrap_or(id);
    }
    session.follow(Choice::Open);
    Ok(id)
}

/// The type that most of the weights have.
fn dominant_type(file: &lemma_engine::gguf::GgufFile) -> &'static str {
    let mut sums: Vec<(&'static str, u64)> = Vec::new();
    for t in file.tensors() {
        match sums.iter_mut().find(|(name, _)| *name == t.ty.name()) {
            Some((_, n)) => *n += t.n_elements(),
            None => sums.push((t.ty.name(), t.n_elements())),
        }
    }
    sums.into_iter()
        .max_by_key(|(_, n)| *n)
        .map_or("?", |(name, _)| name)
}

/// Mean and sample standard deviation.
fn mean(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    if x.len() < 2 {
        return (mean, 0.0);
    }
    let variance = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    (mean, variance.sqrt())
}

/// Memory of the process that is in use now, in bytes; mapped weights that were read count.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

fn ceiling_row(n_threads: Option<usize>, c: &Ceiling) -> Map<String, Value> {
    let mut row = Map::from_iter([
        ("test".to_owned(), "ceiling".into()),
        ("n_threads".to_owned(), n_threads.into()),
        ("read_gb_s".to_owned(), record::number(c.read * 1e-9)),
    ]);
    if let Some(copy) = c.copy {
        row.insert("copy_gb_s".to_owned(), record::number(copy * 1e-9));
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers() {
        assert_eq!(numbers("-p", "256").unwrap(), [256]);
        assert_eq!(
            numbers("-p", "1, 2,4-6,10-20+5,64-512*2").unwrap(),
            [1, 2, 4, 5, 6, 10, 15, 20, 64, 128, 256, 512]
        );
        assert!(
            numbers("-p", "").is_err()
                && numbers("-p", "x").is_err()
                && numbers("-p", "16777217").is_err()
                && numbers("-p", "18446744073709551615").is_err()
                && numbers("-p", "1-9*1").is_err()
        );
    }

    #[test]
    fn names_of_tests() {
        let t = Test {
            n_prompt: 256,
            n_gen: 0,
            n_depth: 0,
            n_threads: None,
        };
        assert_eq!(t.name(), "pp256");
        assert_eq!(
            Test {
                n_prompt: 0,
                n_gen: 48,
                n_depth: 1024,
                ..t
            }
            .name(),
            "tg48 @ d1024"
        );
    }

    #[test]
    fn spread() {
        assert_eq!(mean(&[2.0, 4.0, 4.0, 6.0]), (4.0, (8.0f64 / 3.0).sqrt()));
        assert_eq!(mean(&[3.0]), (3.0, 0.0));
    }
}
