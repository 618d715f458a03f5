//! `--kv-trace FILE`: every page that is recycled or moved to a lower tier, one JSON object a line.
//!
//! ```text
//! {"step":4096,"layer":3,"first_pos":512,"len":16,"stamp":2210,"mass":0.00002,"tokens":[…],"text":"…"}
//! {"step":4096,"layer":3,"first_pos":768,"len":16,"stamp":3020,"mass":0.0004,"tier":"q8_0"}
//! ```
//!
//! Where several sequences go through one run, `request` (batch, score) or `test` (bench) says which it was.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lemma_engine::kv::PageMeta;
use lemma_engine::model::Model;
use lemma_engine::session::{OnDemote, OnRecycle, Session};
use serde_json::{Value, json};

use crate::fail::{Failure, Result};
use crate::record;

/// A trace that several sessions may write to.
#[derive(Clone)]
pub(crate) struct Trace {
    file: Arc<Mutex<Target>>,
}

struct Target {
    file: File,
    name: String,
    failed: bool,
}

impl Trace {
    /// Opens the file, or nothing if none is asked for.
    pub(crate) fn open(path: Option<&Path>) -> Result<Option<Self>> {
        let Some(path) = path else { return Ok(None) };
        let file = File::create(path).map_err(|e| Failure::file(path, &e))?;
        let target = Target {
            file,
            name: crate::term::escape_path(path),
            failed: false,
        };
        Ok(Some(Self {
            file: Arc::new(Mutex::new(target)),
        }))
    }

    /// Makes `session` write what it recycles and demotes. `label` is a field of every line.
    pub(crate) fn install(&self, session: &mut Session, label: Option<(&'static str, Value)>) {
        let hook = self.hook(session.model().clone(), label.clone());
        session.on_recycle(Some(hook));
        let hook = self.demotions(session, label);
        session.on_demote(Some(hook));
    }

    /// What writes the lines of pages that move.
    pub(crate) fn demotions(
        &self,
        session: &Session,
        label: Option<(&'static str, Value)>,
    ) -> OnDemote {
        let trace = self.clone();
        let tiers = session.kv().tiers;
        Box::new(move |demoted, _| {
            let mut text = String::new();
            for d in demoted {
                let mut line = start(d.step, d.il, &d.page);
                line["tier"] = tiers[usize::from(d.tier)].name.clone().into();
                add(&mut text, line, &label);
            }
            trace.write(&text);
        })
    }

    /// What writes the lines of pages that go.
    pub(crate) fn hook(
        &self,
        model: Arc<Model>,
        label: Option<(&'static str, Value)>,
    ) -> OnRecycle {
        let trace = self.clone();
        Box::new(move |recycled, tokens| {
            let mut text = String::new();
            for r in recycled {
                let first = (r.page.first_pos as usize).min(tokens.len());
                let end = (first + r.page.len as usize).min(tokens.len());
                let ids = &tokens[first..end];
                let words = model.tokenizer().decode(ids, false, true);
                let mut line = start(r.step, r.il, &r.page);
                line["tokens"] = ids.into();
                line["text"] = String::from_utf8_lossy(&words).into();
                add(&mut text, line, &label);
            }
            trace.write(&text);
        })
    }

    /// A trace that cannot be written is no reason to stop the reply: it is told once.
    fn write(&self, text: &str) {
        let mut t = self.file.lock().unwrap_or_else(|e| e.into_inner());
        if let (Err(e), false) = (t.file.write_all(text.as_bytes()), t.failed) {
            t.failed = true;
            log::warn!("{}: {}", t.name, crate::fail::plain(&e));
        }
    }
}

/// What every line says.
fn start(step: u32, layer: usize, page: &PageMeta) -> Value {
    json!({
        "step": step,
        "layer": layer,
        "first_pos": page.first_pos,
        "len": page.len,
        "stamp": page.stamp,
        "mass": record::number(f64::from(page.w)),
    })
}

fn add(text: &mut String, mut line: Value, label: &Option<(&'static str, Value)>) {
    if let Some((name, value)) = label {
        line[*name] = value.clone();
    }
    text.push_str(&record::text(&line));
    text.push('\n');
}

/// A trace of one session.
pub(crate) fn install(session: &mut Session, path: Option<&Path>) -> Result {
    if let Some(trace) = Trace::open(path)? {
        trace.install(session, None);
    }
    Ok(())
}
