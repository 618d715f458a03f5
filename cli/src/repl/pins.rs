//! `/pin` and `/unpin`: pages that stay whatever the policy says, and where in the sequence a text stands.

use std::ops::Range;

use lemma_engine::conversation::Role;

use super::Repl;
use crate::fail::{Failure, Result};
use crate::out;
use crate::stats::grouped;
use crate::term::escape;

impl Repl {
    pub(super) fn pin(&mut self, rest: &str) -> Result {
        self.forget_dropped_pins();
        if rest.is_empty() {
            return self.list_pins();
        }
        let places = self.places(rest)?;
        let mut new = Vec::new();
        for place in &places {
            let pinned = self
                .conversation
                .session_mut()
                .pin_positions(place)
                .map_err(|e| {
                    Failure::from(e).hint("/unpin lets some go; a larger --kv-budget holds more")
                });
            match pinned {
                Ok(pages) => new.extend(pages),
                Err(f) => {
                    // All or nothing.
                    self.conversation.session_mut().unpin(&new);
                    return Err(f);
                }
            }
        }
        self.pins.extend(&new);
        self.pins.sort_unstable();
        let gone: u32 = places.iter().map(|p| self.recycled_in(p)).sum();
        let note = match gone {
            0 => String::new(),
            n => format!(
                "; {} of the tokens were recycled before",
                grouped(u64::from(n))
            ),
        };
        self.say_dim(&match new.len() {
            0 => format!("nothing new to pin{note}"),
            n => format!("{n} {} pinned{note}", pages(n)),
        });
        Ok(())
    }

    pub(super) fn unpin(&mut self, rest: &str) -> Result {
        self.forget_dropped_pins();
        let free: Vec<u32> = if rest.is_empty() {
            std::mem::take(&mut self.pins)
        } else {
            let places = self.places(rest)?;
            let page = self.page_size();
            let inside = |first: u32| {
                places
                    .iter()
                    .any(|p| first < p.end && first + page > p.start)
            };
            let (free, kept) = self.pins.iter().partition(|&&first| inside(first));
            self.pins = kept;
            free
        };
        self.conversation.session_mut().unpin(&free);
        match free.len() {
            0 => Err(Failure::usage("nothing there that /pin has pinned")
                .hint("/pin lists what is; prompts are pinned by --kv-pin")),
            n => {
                self.say_dim(&format!("{n} {} let go", pages(n)));
                Ok(())
            }
        }
    }

    fn list_pins(&self) -> Result {
        if self.pins.is_empty() {
            self.say_dim("/pin has pinned nothing; /pin TEXT, N-M, last or sys does");
            return Ok(());
        }
        let page = self.page_size();
        let mut text = String::new();
        for &first in &self.pins {
            let range = first..(first + page).min(self.conversation.session().pos());
            text.push_str(&format!(
                "{:>8}–{:<8} {}\n",
                range.start,
                range.end.saturating_sub(1),
                super::kv::cut(&self.text_of(range.clone()), 60)
            ));
        }
        out::err(&text);
        Ok(())
    }

    /// Pages that left with the end of the sequence are pinned no longer.
    fn forget_dropped_pins(&mut self) {
        let session = self.conversation.session();
        let held = |first: u32| {
            let tables = 0..session.n_tables();
            tables.into_iter().any(|il| {
                let mut pages = session.kv_pages(il).iter();
                pages.any(|p| p.first_pos == first && p.pinned)
            })
        };
        self.pins.retain(|&first| held(first));
    }

    /// Positions that an argument names: `N`, `N-M`, `last`, `sys`, or a text that occurs.
    pub(super) fn places(&self, what: &str) -> Result<Vec<Range<u32>>> {
        let end = self.conversation.session().pos();
        if end == 0 {
            return Err(Failure::usage("the pool is empty"));
        }
        if let Some(range) = numbers(what) {
            return if range.start < end && range.start < range.end {
                let end = range.end.min(end);
                Ok(std::iter::once(range.start..end).collect())
            } else {
                Err(Failure::usage(format!(
                    "{}: expected positions below {}",
                    escape(what),
                    grouped(u64::from(end))
                )))
            };
        }
        let text = match what {
            "last" => {
                let said = self.conversation.messages().iter();
                let last = said.rev().find(|m| m.role == Role::Assistant);
                let last = last.map(|m| m.content.trim().to_owned());
                last.filter(|t| !t.is_empty())
                    .ok_or_else(|| Failure::usage("no reply yet"))?
            }
            "sys" => self
                .conversation
                .system()
                .map(|t| t.trim().to_owned())
                .ok_or_else(|| Failure::usage("no system message"))?,
            text => text.trim_matches('"').to_owned(),
        };
        let tokenizer = self.model.tokenizer();
        let ids = self.conversation.session().tokens();
        let pieces = ids.iter().map(|&id| tokenizer.token_bytes(id, true));
        let mut found = find(pieces, text.as_bytes());
        if what == "last" {
            // The latest is meant, wherever else the same was said.
            found.drain(..found.len().saturating_sub(1));
        }
        if found.is_empty() {
            return Err(Failure::usage(format!(
                "{:?} does not occur in the sequence",
                escape(&super::kv::cut(&text, 40))
            ))
            .hint("/kv map shows its text"));
        }
        Ok(found)
    }

    /// Tokens of some positions that no layer holds any more.
    fn recycled_in(&self, place: &Range<u32>) -> u32 {
        let session = self.conversation.session();
        let held = |pos: u32| {
            (0..session.n_tables()).any(|il| {
                let mut pages = session.kv_pages(il).iter();
                pages.any(|p| (p.first_pos..p.first_pos + p.len).contains(&pos))
            })
        };
        place.clone().filter(|&pos| !held(pos)).count() as u32
    }

    pub(super) fn text_of(&self, range: Range<u32>) -> String {
        let tokens = self.conversation.session().tokens();
        let end = (range.end as usize).min(tokens.len());
        let ids = &tokens[(range.start as usize).min(end)..end];
        let bytes = self.model.tokenizer().decode(ids, false, true);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(super) fn page_size(&self) -> u32 {
        self.conversation.session().kv().page as u32
    }
}

fn pages(n: usize) -> &'static str {
    if n == 1 { "page" } else { "pages" }
}

/// `N` or `N-M`, both ends included.
fn numbers(what: &str) -> Option<Range<u32>> {
    let (from, to) = what.split_once(['-', '–']).unwrap_or((what, what));
    let from = from.trim().parse::<u32>().ok()?;
    let to = to.trim().parse::<u32>().ok()?;
    Some(from..to.saturating_add(1))
}

/// Every place at which the text of some tokens contains `needle`, in positions.
fn find<'a>(pieces: impl Iterator<Item = &'a [u8]>, needle: &[u8]) -> Vec<Range<u32>> {
    let mut bytes = Vec::new();
    // Where each token begins.
    let mut starts = Vec::new();
    for piece in pieces {
        starts.push(bytes.len());
        bytes.extend_from_slice(piece);
    }
    if needle.is_empty() || needle.len() > bytes.len() {
        return Vec::new();
    }
    let token_at = |byte: usize| starts.partition_point(|&s| s <= byte) as u32 - 1;
    let mut found = Vec::new();
    let mut at = 0;
    while at + needle.len() <= bytes.len() {
        if bytes[at..].starts_with(needle) {
            found.push(token_at(at)..token_at(at + needle.len() - 1) + 1);
            at += needle.len();
        } else {
            at += 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_across_tokens() {
        let pieces: [&[u8]; 6] = [b"a", b"", b"bc", b"d", b"ab", b"c"];
        let found = |needle: &str| find(pieces.into_iter(), needle.as_bytes());
        assert_eq!(found("abc"), [0..3, 4..6]);
        assert_eq!(found("cd").first(), Some(&(2..4)));
        assert!(found("x").is_empty() && found("").is_empty() && found("abcdabcd").is_empty());
    }

    #[test]
    fn positions() {
        assert_eq!(numbers("16-31"), Some(16..32));
        assert_eq!((numbers("7"), numbers("x-1")), (Some(7..8), None));
    }
}
