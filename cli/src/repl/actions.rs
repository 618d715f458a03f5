//! What the commands do.

use lemma_engine::conversation::{Conversation, Role};
use lemma_engine::session::Session;

use super::commands::{self, Action, SETTINGS};
use super::files::path_of;
use super::kv::{self, Snapshot, Spans};
use super::{Next, Repl, size, transcript};
use crate::args::config::{self, ModelSource};
use crate::args::typed::{OnOffAuto, ThinkShow};
use crate::fail::{Failure, Result};
use crate::stats::{counted, grouped};
use crate::term::{Term, escape};
use crate::{load, out, sampling};

impl Repl {
    pub(super) fn act(&mut self, action: Action, rest: &str) -> Result<Next> {
        match action {
            Action::Help => out::note(&commands::help()),
            Action::Exit => return Ok(Next::Leave),
            Action::Clear => {
                self.conversation.clear();
                (self.last, self.spans, self.told_recycling) = (None, Spans::default(), false);
                self.say_dim("the conversation is empty");
            }
            Action::System => self.system(rest),
            Action::Set => self.set(rest)?,
            Action::Show => self.show(),
            Action::Regen => {
                if !self.conversation.drop_reply() {
                    return Err(Failure::usage("nothing to regenerate: no message yet"));
                }
                return self.reply(false);
            }
            Action::Undo => match self.conversation.undo() {
                Some(said) => {
                    self.last = None;
                    self.say_dim(&format!("taken back: {}", first_line(&said)));
                }
                None => return Err(Failure::usage("nothing to undo")),
            },
            Action::Continue => return self.reply(true),
            Action::Stats => self.stats()?,
            Action::Context => self.context(),
            Action::Think => self.think(rest)?,
            Action::Kv => self.kv(rest)?,
            Action::Pin => self.pin(rest)?,
            Action::Unpin => self.unpin(rest)?,
            Action::Save => self.save(rest)?,
            Action::Load => self.load(rest)?,
            Action::Export => self.export(rest)?,
            Action::Read => return self.read(rest),
            Action::Edit => return self.edit(),
            Action::Copy => self.copy()?,
            Action::Tokens => self.tokens(rest)?,
            Action::Model => self.model(rest)?,
        }
        Ok(Next::Go)
    }

    pub(super) fn say_dim(&self, text: &str) {
        let style = self.config.term.err_style;
        out::note(&format!("{}{text}{}", style.dim(), style.reset()));
    }

    fn system(&mut self, rest: &str) {
        match rest {
            "" => match self.conversation.system() {
                Some(text) => out::note(&crate::term::filter::Filter::default().clean(text)),
                None => self.say_dim("no system message"),
            },
            "none" => {
                self.conversation.set_system(None);
                self.say_dim("no system message from here on");
            }
            text => {
                self.conversation.set_system(Some(text.to_owned()));
                self.say_dim("system message set");
                self.look_at_system();
            }
        }
    }

    fn set(&mut self, rest: &str) -> Result {
        // As ollama has it: /set parameter NAME VALUE, /set system TEXT, /set think.
        let rest = rest
            .strip_prefix("parameter ")
            .map_or(rest, str::trim_start);
        match rest.split_once(' ').unwrap_or((rest, "")) {
            ("", _) => {
                self.show();
                return Ok(());
            }
            ("system", text) if !text.is_empty() => {
                self.system(text.trim());
                return Ok(());
            }
            ("think", "") => return self.think("on"),
            ("nothink", "") => return self.think("off"),
            _ => {}
        }
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            return Err(
                Failure::usage(format!("/set {}: a value is missing", escape(rest)))
                    .hint("/set NAME VALUE; /show lists the settings"),
            );
        };
        let value = value.trim();
        let g = &mut self.config.generate;
        let number = |what: &str| {
            value.parse::<i64>().map_err(|_| {
                Failure::usage(format!(
                    "{what}: {:?}, expected a whole number",
                    escape(value)
                ))
            })
        };
        match name.trim_start_matches('-').replace('-', "_").as_str() {
            "n_predict" | "num_predict" | "predict" | "n" => {
                g.n_predict = config::n_predict("n_predict", number("n_predict")?)?
            }
            "think_budget" | "reasoning_budget" => {
                g.think_budget = config::tokens("think_budget", number("think_budget")?)?
            }
            "stop" | "reverse_prompt" => {
                g.stop = if value == "none" {
                    Vec::new()
                } else {
                    vec![value.to_owned()]
                }
            }
            other => config::set(&mut g.sampling.set, other, value).map_err(|f| {
                if f.hint.is_some() {
                    return f;
                }
                f.hint("/show lists the settings; others are flags of the command line")
            })?,
        }
        if name.trim_start_matches('-') == "seed" {
            // A seed that is set anew counts from its first reply.
            (self.n_replies, self.base_seed) = (0, None);
        }
        self.say_dim(&format!("{} = {}", escape(name), escape(value)));
        Ok(())
    }

    fn show(&self) {
        let g = &self.config.generate;
        let resolved = sampling::resolve(&g.sampling, None, &self.model);
        let mut text = String::new();
        for (name, value, source) in resolved.params.describe(&resolved.sources) {
            text.push_str(&format!("  {name:<22} {:<14} {source}\n", escape(&value)));
        }
        let limit = |n: i64| {
            if n < 0 {
                "no limit".to_owned()
            } else {
                n.to_string()
            }
        };
        let own = [
            (SETTINGS[0], limit(g.n_predict)),
            (
                SETTINGS[1],
                if g.stop.is_empty() {
                    "none".to_owned()
                } else {
                    format!("{:?}", g.stop)
                },
            ),
            (SETTINGS[2], limit(g.think_budget.map_or(-1, i64::from))),
        ];
        for (name, value) in own {
            text.push_str(&format!("  {name:<22} {}\n", escape(&value)));
        }
        text.push_str(&format!(
            "  {:<22} {}\n",
            "system",
            self.conversation
                .system()
                .map_or("none".to_owned(), first_line)
        ));
        text.push_str(&format!(
            "  {:<22} {}",
            "device",
            escape(&self.conversation.session().describe())
        ));
        out::note(&text);
    }

    fn stats(&self) -> Result {
        let last = self
            .last
            .as_ref()
            .ok_or_else(|| Failure::usage("no reply yet"))?;
        let (o, s) = (&last.outcome, &last.stats);
        out::note(&format!(
            "  prompt      {} tokens, {} of them still in the session; {:.3} s, {} t/s\n  \
               thinking    {} tokens\n  \
               answer      {} tokens\n  \
               speed       {:.1} t/s over {:.2} s; first token after {:.0} ms\n  \
               kv          {} of {} pages, {} pinned, {} recycled\n  \
               ended by    {}, seed {}\n  \
               loaded in   {:.0} ms",
            grouped(o.n_prompt as u64),
            grouped(o.n_cached as u64),
            o.prefill_s,
            grouped(s.prompt_tps.round() as u64),
            grouped(o.n_think as u64),
            grouped(o.n_answer as u64),
            s.gen_tps,
            o.decode_s,
            o.ttft_s * 1e3,
            grouped(s.pages as u64),
            grouped(s.n_slots as u64),
            grouped(s.pinned as u64),
            grouped(s.recycled),
            s.finish,
            s.seed,
            self.load_ms,
        ));
        Ok(())
    }

    fn context(&self) {
        let session = self.conversation.session();
        let kv = session.kv();
        let messages = self.conversation.messages();
        let count = |role: Role| messages.iter().filter(|m| m.role == role).count();
        let used = f64::from(session.pos()) / f64::from(session.n_ctx().max(1));
        let bar_width = 40;
        let full = ((used * f64::from(bar_width)).ceil() as usize).min(bar_width as usize);
        out::note(&format!(
            "  positions   {} of {}  {}{}\n  messages    {} from you, {}{}\n  kv pool     {} of {} pages ({} tokens), {} pinned, {}{}",
            grouped(u64::from(session.pos())),
            grouped(u64::from(session.n_ctx())),
            "█".repeat(full),
            "░".repeat(bar_width as usize - full),
            count(Role::User),
            counted(count(Role::Assistant) as u64, "reply", "replies"),
            if self.conversation.system().is_some() {
                ", a system message"
            } else {
                ""
            },
            grouped(kv.pages as u64),
            grouped(kv.n_slots as u64),
            grouped((kv.n_slots * kv.page) as u64),
            grouped(kv.pinned as u64),
            size(kv.bytes),
            kv.first_recycle.map_or(String::new(), |p| format!(
                "; recycling since token {}",
                grouped(u64::from(p))
            )),
        ));
    }

    fn think(&mut self, rest: &str) -> Result {
        let g = &mut self.config.generate;
        match rest {
            "show" => g.think = Some(ThinkShow::Show),
            "hide" => g.think = Some(ThinkShow::Hide),
            "fold" => g.think = Some(ThinkShow::Fold),
            "stderr" => g.think = Some(ThinkShow::Stderr),
            "on" => g.reasoning = OnOffAuto::On,
            "off" => g.reasoning = OnOffAuto::Off,
            "auto" => g.reasoning = OnOffAuto::Auto,
            "" => {}
            other => {
                return Err(Failure::usage(format!(
                    "/think {}: expected show, hide, fold, stderr, on, off or auto",
                    escape(other)
                )));
            }
        }
        let shown = match self.config.generate.think {
            None | Some(ThinkShow::Show) => "shown",
            Some(ThinkShow::Hide) => "hidden",
            Some(ThinkShow::Fold) => "folded",
            Some(ThinkShow::Stderr) => "on stderr",
        };
        let mode = match self.config.generate.reasoning {
            OnOffAuto::On => "on",
            OnOffAuto::Off => "off",
            OnOffAuto::Auto => "as the model likes",
        };
        let tags = if self.conversation.think_tags().is_some() {
            ""
        } else {
            "; this model has no thinking tags"
        };
        self.say_dim(&format!("thinking is {mode}, and {shown}{tags}"));
        Ok(())
    }

    fn kv(&mut self, rest: &str) -> Result {
        if let Some(what) = rest
            .strip_prefix("why")
            .filter(|w| w.is_empty() || w.starts_with(' '))
        {
            return self.why(what.trim());
        }
        let session = self.conversation.session();
        let snapshot = Snapshot::take(session, &self.spans);
        let (width, style) = (Term::width(), self.config.term.err_style);
        match rest {
            "" => out::err(&kv::draw(&snapshot, width, style)),
            "map" => {
                let tokenizer = self.model.tokenizer();
                let tokens = session.tokens();
                let piece = |r: std::ops::Range<u32>| {
                    let end = (r.end as usize).min(tokens.len());
                    let ids = &tokens[(r.start as usize).min(end)..end];
                    String::from_utf8_lossy(&tokenizer.decode(ids, false, true)).into_owned()
                };
                out::err(&kv::map(&snapshot, width, style, &piece));
            }
            other => {
                return Err(Failure::usage(format!(
                    "/kv {}: expected nothing, map, or why",
                    escape(other)
                )));
            }
        }
        Ok(())
    }

    fn copy(&self) -> Result {
        let last = self
            .conversation
            .messages()
            .iter()
            .rfind(|m| m.role == Role::Assistant);
        let last = last.ok_or_else(|| Failure::usage("no reply yet"))?;
        if !self.config.term.err_tty {
            return Err(Failure::usage("/copy needs a terminal"));
        }
        let text = last.content.trim();
        out::err(&format!(
            "\x1b]52;c;{}\x07",
            transcript::base64(text.as_bytes())
        ));
        self.say_dim(&format!(
            "{} bytes on the clipboard, if the terminal allows it",
            grouped(text.len() as u64)
        ));
        Ok(())
    }

    fn tokens(&self, rest: &str) -> Result {
        if rest.is_empty() {
            return Err(Failure::usage("/tokens needs a text"));
        }
        let tokenizer = self.model.tokenizer();
        let ids = tokenizer.encode(rest, false, true);
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&format!(
                "{id:>8}  \"{}\"\n",
                escape(&String::from_utf8_lossy(tokenizer.token_bytes(id, true)))
            ));
        }
        text.push_str(&format!("{:>8}  tokens", ids.len()));
        out::note(&text);
        Ok(())
    }

    fn model(&mut self, rest: &str) -> Result {
        if rest.is_empty() {
            let session = self.conversation.session();
            let hp = self.model.hparams();
            out::note(&format!(
                "  {}\n  {}, {} layers, {} wide, {} heads over {} for keys and values, vocabulary of {}\n  {}\n  {}",
                self.model.name(),
                self.model.arch(),
                hp.n_layer,
                hp.n_embd,
                hp.n_head,
                hp.n_head_kv,
                grouped(hp.n_vocab as u64),
                session.plan(),
                escape(&session.describe()),
            ));
            return Ok(());
        }
        let source = ModelSource::Path(path_of("/model", rest)?);
        let loaded = load::model(&source, &self.config.load)?;
        loaded.model.template()?;
        let constraint = self.config.generate.constraint.as_ref();
        let grammar = crate::run::compile(&loaded.model, constraint)?;
        let mut session = Session::new(loaded.model.clone(), &self.config.load)?;
        self.recent.watch(&mut session, self.trace.as_ref());
        let messages = self.conversation.messages().to_vec();
        self.conversation = Conversation::new(session);
        self.conversation.set_messages(messages);
        (self.model, self.load_ms, self.config.source) = (loaded.model, loaded.load_ms, source);
        self.grammar = grammar;
        (self.last, self.spans, self.told_recycling) = (None, Spans::default(), false);
        self.say_dim(&format!(
            "{}, loaded in {:.0} ms; the conversation stays",
            self.model.name(),
            self.load_ms
        ));
        self.told_system = false;
        self.look_at_system();
        Ok(())
    }
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or("");
    let mut short: String = line.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    escape(&short)
}
