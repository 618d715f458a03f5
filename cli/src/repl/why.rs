//! `/kv why`: why pages went, and why one is still there.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use lemma_engine::kv::Recycled;
use lemma_engine::session::Session;

use super::Repl;
use super::kv::cut;
use crate::fail::Result;
use crate::out;
use crate::stats::{counted, grouped};
use crate::trace::Trace;

/// Recycled pages that are remembered: some steps of a model of many layers.
const REMEMBERED: usize = 8192;

/// Pages that are shown.
const SHOWN: usize = 8;

/// What was recycled last, the latest at the end.
#[derive(Clone, Default)]
pub(super) struct Recent(Arc<Mutex<VecDeque<Recycled>>>);

impl Recent {
    /// Follows a session; `trace` is served too.
    pub(super) fn watch(&self, session: &mut Session, trace: Option<&Trace>) {
        let list = self.0.clone();
        let mut write = trace.map(|t| t.hook(session.model().clone(), None));
        session.on_recycle(Some(Box::new(move |recycled, tokens| {
            let mut list = list.lock().unwrap_or_else(|e| e.into_inner());
            for r in recycled {
                if list.len() == REMEMBERED {
                    list.pop_front();
                }
                list.push_back(*r);
            }
            drop(list);
            if let Some(write) = &mut write {
                write(recycled, tokens);
            }
        })));
        session.on_demote(trace.map(|t| t.demotions(session, None)));
    }

    /// What is remembered of pages that may be in the sequence, which ends at `pos`.
    fn list(&self, pos: u32) -> Vec<Recycled> {
        let mut list = self.0.lock().unwrap_or_else(|e| e.into_inner());
        // What a sequence that is gone had recycled says nothing.
        if list.back().is_some_and(|r| r.step >= pos) {
            list.retain(|r| r.step < pos);
        }
        list.iter().copied().collect()
    }
}

/// A page that went, in how many layers, when, and what it was worth.
#[derive(Clone, Debug, PartialEq)]
struct Gone {
    positions: Range<u32>,
    steps: Range<u32>,
    layers: usize,
    stamp: u32,
    mass: f32,
}

/// Recycled pages by their positions over all layers, the latest last.
fn gone(list: &[Recycled]) -> Vec<Gone> {
    let mut by_page: BTreeMap<u32, Gone> = BTreeMap::new();
    for r in list {
        let g = by_page.entry(r.page.first_pos).or_insert_with(|| Gone {
            positions: r.page.first_pos..r.page.first_pos + r.page.len,
            steps: r.step..r.step,
            layers: 0,
            stamp: 0,
            mass: 0.0,
        });
        g.steps.start = g.steps.start.min(r.step);
        g.steps.end = g.steps.end.max(r.step);
        g.layers += 1;
        g.stamp = g.stamp.max(r.page.stamp);
        g.mass = g.mass.max(r.page.w);
    }
    let mut out: Vec<Gone> = by_page.into_values().collect();
    out.sort_by_key(|g| (g.steps.end, g.positions.start));
    out
}

impl Repl {
    pub(super) fn why(&mut self, what: &str) -> Result {
        let text = if what.is_empty() {
            self.why_gone()
        } else {
            let mut text = String::new();
            for place in self.places(what)?.into_iter().take(SHOWN) {
                text.push_str(&self.why_place(&place));
            }
            text
        };
        out::err(&text);
        Ok(())
    }

    /// The last pages that went.
    fn why_gone(&self) -> String {
        let pos = self.conversation.session().pos();
        let list = gone(&self.recent.list(pos));
        if list.is_empty() {
            return "nothing was recycled; /kv why N, or /kv why TEXT, asks about a page\n"
                .to_owned();
        }
        let mut text = format!(
            "the last of {} pages that went:\n",
            grouped(list.len() as u64)
        );
        for g in list.iter().rev().take(SHOWN) {
            text.push_str(&self.line_of_gone(g));
        }
        text
    }

    fn line_of_gone(&self, g: &Gone) -> String {
        let n_layer = self.conversation.session().n_tables();
        let when = if g.steps.start == g.steps.end {
            format!("at {}", grouped(u64::from(g.steps.end)))
        } else {
            let ends = [g.steps.start, g.steps.end].map(|s| grouped(u64::from(s)));
            format!("at {} to {}", ends[0], ends[1])
        };
        let last = match self.conversation.session().kv().policy {
            // These do not go by what mattered.
            "window" => "the oldest that is not pinned".to_owned(),
            "random" => "drawn".to_owned(),
            _ => format!(
                "last mattered at {}, mass {:.1e} when it went",
                grouped(u64::from(g.stamp)),
                g.mass
            ),
        };
        format!(
            "  {}–{} recycled {when} in {} of {n_layer} layers; {last}\n      {}\n",
            g.positions.start,
            g.positions.end.saturating_sub(1),
            g.layers,
            cut(&self.text_of(g.positions.clone()), 72),
        )
    }

    /// Why the pages of some positions stay, or when they went.
    fn why_place(&mut self, place: &Range<u32>) -> String {
        let page = self.page_size();
        let mut text = String::new();
        let mut first = place.start / page * page;
        while first < place.end {
            text.push_str(&self.why_page(first));
            first += page;
        }
        text
    }

    fn why_page(&mut self, first: u32) -> String {
        let session = self.conversation.session();
        let (n_layer, now) = (session.n_tables(), session.pos());
        let mut held = Vec::new();
        let mut recent = false;
        for il in 0..n_layer {
            let pages = session.kv_pages(il);
            if let Some(i) = pages.iter().position(|p| p.first_pos == first) {
                held.push((il, pages[i]));
                recent |= i + 1 == pages.len();
            }
        }
        let range = first..(first + self.page_size()).min(now);
        let mut text = format!(
            "  {}–{}  {}\n",
            range.start,
            range.end.saturating_sub(1),
            cut(&self.text_of(range.clone()), 60)
        );
        let mut say = |line: String| text.push_str(&format!("      {line}\n"));
        let Some((_, any)) = held.first() else {
            let list = self.recent.list(now);
            let went = gone(&list).into_iter().find(|g| g.positions.start == first);
            say(match went {
                Some(g) => self
                    .line_of_gone(&g)
                    .lines()
                    .next()
                    .unwrap_or("")
                    .trim()
                    .to_owned(),
                None => "recycled".to_owned(),
            });
            return text;
        };
        if any.pinned {
            let by = if self.pins.contains(&first) {
                "by /pin"
            } else if first == 0 {
                "as the attention sink"
            } else {
                "as part of a prompt"
            };
            say(format!("pinned {by}: it stays"));
        } else if recent {
            say("the current page: it stays".to_owned());
        } else {
            self.rank(
                first,
                &held.iter().map(|h| h.0).collect::<Vec<_>>(),
                &mut say,
            );
        }
        let ages = held.iter().map(|(_, p)| now.saturating_sub(p.stamp));
        let (young, old) = (ages.clone().min().unwrap_or(0), ages.max().unwrap_or(0));
        let mass = held.iter().map(|(_, p)| p.w).fold(0.0, f32::max);
        let ago = match young == old {
            true => String::new(),
            false => format!("{} to ", grouped(u64::from(young))),
        };
        say(format!(
            "held by {} of {n_layer} layers; last mattered {ago}{} ago; mass up to {mass:.1e}",
            held.len(),
            counted(u64::from(old), "token", "tokens"),
        ));
        text
    }

    /// How near to going a page is.
    fn rank(&mut self, first: u32, layers: &[usize], say: &mut dyn FnMut(String)) {
        let mut ranks = Vec::new();
        let mut n = 0;
        for &il in layers {
            let Some(order) = self.conversation.session_mut().recycling_order(il) else {
                return say("the policy draws: any page may be next".to_owned());
            };
            n = n.max(order.len());
            ranks.extend(order.iter().position(|&p| p == first).map(|i| i + 1));
        }
        match (ranks.iter().min(), ranks.iter().max()) {
            (Some(a), Some(b)) => say(format!(
                "place {a} to {b} of {n} in the order of going, by layer"
            )),
            _ => say("among the recent pages: it stays for now".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use lemma_engine::kv::PageMeta;

    use super::*;

    #[test]
    fn layers_come_together() {
        let page = |first_pos, stamp| PageMeta {
            tier: 0,
            slot: 0,
            first_pos,
            len: 16,
            stamp,
            w: 0.5,
            sum: 0.0,
            gap: 0,
            pinned: false,
            range: 0.0,
            double: u32::MAX,
        };
        let recycled = |il, step, first_pos, stamp| Recycled {
            il,
            step,
            group: 0,
            page: page(first_pos, stamp),
        };
        let list = [
            recycled(0, 100, 32, 40),
            recycled(1, 100, 48, 50),
            recycled(1, 116, 32, 60),
        ];
        let out = gone(&list);
        assert_eq!(out.len(), 2);
        assert_eq!((out[0].positions.start, out[0].layers), (48, 1));
        assert_eq!(
            (out[1].steps.clone(), out[1].stamp, out[1].layers),
            (100..116, 60, 2)
        );
    }
}
