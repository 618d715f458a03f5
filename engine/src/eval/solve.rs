//! One problem under one policy.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde_json::{Value, json};

use super::grid::{Budget, Contender};
use super::problem::Problem;
use super::replay::Trace;
use crate::chat::ThinkTags;
use crate::error::Error;
use crate::generate::{Finish, GenOptions, Outcome, Prompt, generate};
use crate::kv::PAGE;
use crate::model::Model;
use crate::options::LoadOptions;
use crate::sampling::{Sampler, SamplerParams};
use crate::session::Session;

/// Tokens that a reply may have beyond one and a half times the reference.
const SLACK: usize = 64;

/// Tokens that a reply may have where nothing says how long it should be.
const UNKNOWN: usize = 8192;

/// What every problem of a run has in common.
pub struct Setting {
    /// The model.
    pub model: Arc<Model>,
    /// Tags between which it thinks.
    pub tags: Option<ThinkTags>,
    /// Options of sessions; pool and threads are set here.
    pub load: LoadOptions,
    /// How tokens are chosen.
    pub sampling: SamplerParams,
    /// Tokens that a reply may have; `None`: one and a half times the reference.
    pub n_predict: Option<usize>,
}

/// A problem as the model sees it.
pub struct Task {
    /// The problem.
    pub problem: Problem,
    /// What the model is given.
    pub prompt: Prompt,
}

/// What came of a problem in a cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// Whether the answer is right.
    pub right: bool,
    /// Whether the prompt fits the pool; if not, there is no reply.
    pub fits: bool,
    /// Why the reply ended.
    pub finish: String,
    /// The same tokens as under `full`, since nothing had to be recycled; not run again.
    pub reused: bool,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Tokens of the reply.
    pub n_reply: usize,
    /// Tokens that the pool may hold; all that there were if it is not limited.
    pub budget_tokens: u64,
    /// Bytes of the pool that were in use at the end, when they are most.
    pub kv_bytes: u64,
    /// Pages that were recycled, the most of any layer.
    pub recycled: u64,
    /// Seconds for the prompt.
    pub prefill_s: f64,
    /// Seconds for the tokens after the first.
    pub decode_s: f64,
    /// The end of the reply, for who wants to look.
    pub tail: String,
}

impl Setting {
    /// Renders a problem.
    ///
    /// # Errors
    /// What the template says.
    pub fn task(&self, problem: Problem) -> Result<Task, Error> {
        let prompt = problem.prompt(&self.model, self.tags.as_ref())?;
        Ok(Task { problem, prompt })
    }

    /// Most tokens of a reply whose reference has `reference`.
    pub fn cap(&self, task: &Task, reference: Option<usize>) -> usize {
        let room = self.n_ctx().saturating_sub(task.prompt.tokens.len() + 1);
        let cap = match (self.n_predict, reference) {
            (Some(n), _) => n,
            (None, Some(n)) => n + n / 2 + SLACK,
            (None, None) => UNKNOWN,
        };
        cap.min(room)
    }

    fn n_ctx(&self) -> usize {
        let trained = self.model.hparams().n_ctx_train;
        self.load.n_ctx.filter(|&n| n > 0).unwrap_or(trained) as usize
    }

    /// Runs a problem. `n_chain` is the length that shares are taken of, `reference` the length of the reply that is expected.
    /// `None` when `stop` said so on the way.
    ///
    /// # Errors
    /// Those of sessions, except that a prompt which does not fit is a result.
    pub fn solve(
        &self,
        task: &Task,
        contender: &Contender,
        budget: Option<Budget>,
        seed: u64,
        lengths: Lengths,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Solved>, Error> {
        let n_prompt = task.prompt.tokens.len();
        let cap = self.cap(task, lengths.reference);
        let tokens = budget.map(|b| contender.tokens(b, lengths.chain));
        let mut load = self.load.clone();
        load.n_threads = Some(1);
        load.n_ctx = Some((n_prompt + cap + 1).min(self.n_ctx()) as u32);
        load.kv = contender.options(tokens, seed);
        let mut session = Session::new(self.model.clone(), &load)?;
        let sampler_seed = self.sampling.seed.unwrap_or(0).wrapping_add(seed);
        let mut sampler = self.sampler(sampler_seed)?;
        let options = GenOptions {
            n_predict: Some(cap),
            ..GenOptions::default()
        };
        let made = generate(
            &mut session,
            &task.prompt,
            0,
            &mut sampler,
            self.tags.as_ref(),
            &options,
            &mut |_| {
                if stop() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        let kv = session.kv();
        let mut solved = Solved {
            right: false,
            fits: true,
            finish: "no room".to_owned(),
            reused: false,
            n_prompt,
            n_reply: 0,
            budget_tokens: tokens.map_or(u64::from(session.pos()), u64::from),
            kv_bytes: kv.used,
            recycled: kv.recycled,
            prefill_s: 0.0,
            decode_s: 0.0,
            tail: String::new(),
        };
        match made {
            Ok(o) if o.finish == Finish::Interrupt => return Ok(None),
            Ok(o) => solved.take(&task.problem, &o),
            Err(Error::PromptTooLong(_)) => solved.fits = false,
            Err(e) => return Err(e),
        }
        Ok(Some(solved))
    }

    /// The chain of a problem: prompt and reference reply where the file has one, else what `full` says. `None` when `stop` said so, or
    /// the reply is empty.
    ///
    /// # Errors
    /// Those of sessions and sampling.
    pub fn trace(&self, task: &Task, stop: &dyn Fn() -> bool) -> Result<Option<Trace>, Error> {
        let n_prompt = task.prompt.tokens.len();
        let tokenizer = self.model.tokenizer();
        let mut tokens = task.prompt.tokens.clone();
        if let Some(reply) = &task.problem.reply {
            tokens.extend(tokenizer.encode(reply, false, true));
        } else {
            let mut load = self.load.clone();
            let cap = self.cap(task, task.problem.reply_tokens(n_prompt));
            load.n_threads = Some(1);
            load.n_ctx = Some((n_prompt + cap + 1).min(self.n_ctx()) as u32);
            load.kv.policy = "full".to_owned();
            let mut session = Session::new(self.model.clone(), &load)?;
            let go = ControlFlow::Continue(());
            session.prefill(&tokens, n_prompt, &mut |_, _| go)?;
            let mut sampler = self.sampler(self.sampling.seed.unwrap_or(0))?;
            for i in 0..cap {
                if stop() {
                    return Ok(None);
                }
                let id = sampler.sample(session.logits())?.id;
                sampler.accept(id);
                tokens.push(id);
                // The end is part of the chain: it is predicted too.
                if tokenizer.is_eog(id) || i + 1 == cap {
                    break;
                }
                session.decode(id)?;
            }
        }
        Ok((tokens.len() > n_prompt).then(|| Trace {
            set: task.problem.set.clone(),
            id: task.problem.id.clone(),
            tokens,
            n_prompt,
        }))
    }

    fn sampler(&self, seed: u64) -> Result<Sampler, Error> {
        let tokenizer = self.model.tokenizer();
        let params = SamplerParams {
            seed: Some(seed),
            ..self.sampling.clone()
        };
        let made = Sampler::new(params, self.model.hparams().n_vocab, |id| {
            tokenizer.token_bytes(id, true).to_vec()
        });
        Ok(made?)
    }
}

/// Lengths in tokens that a cell goes by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lengths {
    /// Prompt and reply: what shares are taken of.
    pub chain: usize,
    /// The reply that is expected, if anything is.
    pub reference: Option<usize>,
}

impl Solved {
    fn take(&mut self, problem: &Problem, o: &Outcome) {
        self.right = problem.is_right(o);
        self.finish = o.finish.name().to_owned();
        self.n_reply = o.n_think + o.n_answer;
        self.prefill_s = o.prefill_s;
        self.decode_s = o.decode_s;
        let said = if o.text.trim().is_empty() {
            &o.thinking
        } else {
            &o.text
        };
        let from = said.char_indices().rev().nth(79).map_or(0, |(i, _)| i);
        self.tail = said[from..].trim().to_owned();
    }

    /// Whether the reply came to its end before the cap.
    pub fn finished(&self) -> bool {
        matches!(self.finish.as_str(), "eos" | "stop")
    }

    /// The result under a pool of `tokens`, if this one, made under `full`, fits it so that nothing would be recycled.
    pub fn reuse(&self, tokens: u32) -> Option<Self> {
        // The last token (the end of generation) is sampled and not stored, but it does no harm to count it.
        let used = self.n_prompt + self.n_reply + 1;
        (used.div_ceil(PAGE) <= tokens as usize / PAGE && self.fits).then(|| Self {
            reused: true,
            budget_tokens: u64::from(tokens),
            ..self.clone()
        })
    }

    /// As fields of a log record.
    pub fn to_json(&self) -> Value {
        let ms = |s: f64| ((s * 1e5).round() / 100.0).max(0.0);
        json!({
            "right": self.right,
            "fits": self.fits,
            "finish": self.finish,
            "reused": self.reused,
            "n_prompt": self.n_prompt,
            "n_reply": self.n_reply,
            "budget_tokens": self.budget_tokens,
            "kv_bytes": self.kv_bytes,
            "recycled": self.recycled,
            "prefill_ms": ms(self.prefill_s),
            "decode_ms": ms(self.decode_s),
            "tail": self.tail,
        })
    }

    /// From the fields of a log record.
    pub fn from_json(v: &Value) -> Option<Self> {
        let n = |key: &str| v[key].as_u64();
        // Numbers keep their decimal text in this build, so they are read as such.
        let seconds = |key: &str| v[key].as_f64().map(|ms| ms / 1e3);
        Some(Self {
            right: v["right"].as_bool()?,
            fits: v["fits"].as_bool()?,
            finish: v["finish"].as_str()?.to_owned(),
            reused: v["reused"].as_bool()?,
            n_prompt: n("n_prompt")? as usize,
            n_reply: n("n_reply")? as usize,
            budget_tokens: n("budget_tokens")?,
            kv_bytes: n("kv_bytes")?,
            recycled: n("recycled")?,
            prefill_s: seconds("prefill_ms")?,
            decode_s: seconds("decode_ms")?,
            tail: v["tail"].as_str()?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solved() -> Solved {
        Solved {
            right: true,
            fits: true,
            finish: "eos".into(),
            reused: false,
            n_prompt: 40,
            n_reply: 100,
            budget_tokens: 140,
            kv_bytes: 9 << 10,
            recycled: 0,
            prefill_s: 0.25,
            decode_s: 1.5,
            tail: "The answer is 4.".into(),
        }
    }

    #[test]
    fn what_fits_is_not_run_again() {
        let s = solved();
        assert!(s.reuse(128).is_none() && s.reuse(140).is_none());
        let r = s.reuse(144).unwrap();
        assert_eq!((r.reused, r.kv_bytes, r.right), (true, 9 << 10, true));
    }

    #[test]
    fn records_come_back() {
        let s = solved();
        assert_eq!(Solved::from_json(&s.to_json()), Some(s));
        assert_eq!(Solved::from_json(&json!({})), None);
    }
}
