//! `/kv`: the pool as a picture.
//!
//! One cell is one page of sixteen tokens. Its shape says what the page holds (◆ prompt, ● thinking, ■ answer), how full the shape
//! is says how long ago it last mattered, and on a terminal with colour the class is a hue and the age its depth. Layers
//! recycle on their own, so a page may be alive in some layers only: it is drawn as long as any layer holds it, and underlined
//! when not all do.
//!
//! `/kv map` is the same as text: what is still in memory is bright, what was recycled is dim. Where pages are demoted, it also says in
//! how many layers a page is stored as what.
//!
//! Everything here works on a [`Snapshot`] and returns text, so it is tested without a model.

use std::collections::BTreeMap;
use std::ops::Range;

use lemma_engine::session::{Session, TierStats};

use crate::stats::grouped;
use crate::term::Style;

/// What a position belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Prompt,
    Think,
    Answer,
}

/// The stretches of the sequence: its prompt, then the thinking, then the answer of the last reply.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spans {
    pub(crate) n_prompt: u32,
    pub(crate) n_think: u32,
}

impl Spans {
    fn class(&self, pos: u32) -> Class {
        if pos < self.n_prompt {
            Class::Prompt
        } else if pos < self.n_prompt + self.n_think {
            Class::Think
        } else {
            Class::Answer
        }
    }
}

/// A page of the sequence over all layers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Page {
    pub(crate) positions: Range<u32>,
    /// The latest time stamp in any layer.
    pub(crate) stamp: u32,
    /// Layers that hold it.
    pub(crate) layers: usize,
    pub(crate) pinned: bool,
    pub(crate) class: Class,
    /// Layers that hold it in each tier, if there are several.
    pub(crate) tiers: Vec<usize>,
}

/// The pool at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) pages: Vec<Page>,
    pub(crate) n_layer: usize,
    pub(crate) n_slots: usize,
    /// The most pages that a layer holds.
    pub(crate) held: usize,
    pub(crate) pinned: usize,
    pub(crate) recycled: u64,
    pub(crate) bytes: u64,
    pub(crate) policy: String,
    pub(crate) now: u32,
    /// The tiers of the pool, if there are several.
    pub(crate) tiers: Vec<TierStats>,
}

impl Snapshot {
    pub(crate) fn take(session: &Session, spans: &Spans) -> Self {
        let n_layer = session.n_tables();
        let kv = session.kv();
        let mut pages: BTreeMap<u32, Page> = BTreeMap::new();
        for il in 0..n_layer {
            for p in session.kv_pages(il) {
                let page = pages.entry(p.first_pos).or_insert_with(|| Page {
                    positions: p.first_pos..p.first_pos + p.len,
                    stamp: 0,
                    layers: 0,
                    pinned: false,
                    class: spans.class(p.first_pos),
                    tiers: vec![0; kv.tiers.len()],
                });
                page.positions.end = page.positions.end.max(p.first_pos + p.len);
                page.stamp = page.stamp.max(p.stamp);
                page.layers += 1;
                page.pinned |= p.pinned;
                if let Some(layers) = page.tiers.get_mut(usize::from(p.tier)) {
                    *layers += 1;
                }
            }
        }
        Self {
            pages: pages.into_values().collect(),
            n_layer,
            n_slots: kv.n_slots,
            held: kv.pages,
            pinned: kv.pinned,
            recycled: kv.recycled,
            bytes: kv.bytes,
            policy: kv.policy.to_owned(),
            now: session.pos(),
            tiers: kv.tiers,
        }
    }

    /// In how many layers a page is stored as what, if not as new pages are in all.
    fn stored(&self, page: &Page) -> String {
        if page.tiers.iter().skip(1).all(|&layers| layers == 0) {
            return String::new();
        }
        let names = self.tiers.iter().zip(&page.tiers).filter(|(_, n)| **n > 0);
        let names: Vec<String> = names.map(|(t, n)| format!("{n} {}", t.name)).collect();
        format!(", {}", names.join(" "))
    }

    /// 0 for a page that has just mattered, up to 3.
    fn age(&self, page: &Page) -> usize {
        match self.now.saturating_sub(page.stamp) {
            0..=16 => 0,
            17..=128 => 1,
            129..=1024 => 2,
            _ => 3,
        }
    }
}

/// Shapes by class and age: full, half, hollow.
fn shape(class: Class, age: usize) -> char {
    let shapes = match class {
        Class::Prompt => ['◆', '◆', '◈', '◇'],
        Class::Think => ['●', '◉', '◎', '○'],
        Class::Answer => ['■', '▣', '▤', '□'],
    };
    shapes[age]
}

/// Indices of the 256-colour table, bright to dark.
fn hue(class: Class, age: usize) -> u8 {
    let hues = match class {
        Class::Prompt => [81, 75, 68, 60],
        Class::Think => [220, 178, 136, 94],
        Class::Answer => [120, 77, 71, 65],
    };
    hues[age]
}

/// The picture.
pub(crate) fn draw(s: &Snapshot, width: usize, style: Style) -> String {
    let mut text = format!(
        "{} · {} of {} pages held, {} pinned, {} recycled · {} · position {}\n",
        s.policy,
        grouped(s.held as u64),
        grouped(s.n_slots as u64),
        grouped(s.pinned as u64),
        grouped(s.recycled),
        crate::repl::size(s.bytes),
        grouped(u64::from(s.now)),
    );
    if !s.tiers.is_empty() {
        let tier = |t: &TierStats| format!("{}: {} of {} pages", t.name, t.pages, t.n_slots);
        let tiers: Vec<String> = s.tiers.iter().map(tier).collect();
        text.push_str(&format!("  {}\n", tiers.join(" · ")));
    }
    let label = grouped(u64::from(s.now)).len().max(5);
    let cells = width.saturating_sub(label + 4).clamp(8, 64) / 8 * 8;
    let free = s.n_slots.saturating_sub(s.held);
    // Free cells beyond a few lines say nothing more.
    let shown_free = free.min(cells * 4);
    let mut column = 0;
    let mut line = String::new();
    let flush = |line: &mut String, text: &mut String| {
        text.push_str(line);
        text.push_str(style.reset());
        text.push('\n');
        line.clear();
    };
    for page in &s.pages {
        if column == 0 {
            line = format!(
                "  {}{:>label$}{} ",
                style.dim(),
                grouped(u64::from(page.positions.start)),
                style.reset()
            );
        }
        let age = s.age(page);
        let under = if style.0 && page.layers < s.n_layer {
            "\x1b[4m"
        } else {
            ""
        };
        line.push_str(&format!(
            "{under}{}{}{}",
            style.fg(hue(page.class, age)),
            shape(page.class, age),
            style.reset()
        ));
        column += 1;
        if column == cells {
            flush(&mut line, &mut text);
            column = 0;
        }
    }
    for _ in 0..shown_free {
        if column == 0 {
            line = format!("  {:>label$} ", "");
        }
        line.push_str(&format!("{}·", style.dim()));
        column += 1;
        if column == cells {
            flush(&mut line, &mut text);
            column = 0;
        }
    }
    if column > 0 {
        flush(&mut line, &mut text);
    }
    if free > shown_free {
        text.push_str(&format!(
            "  {:>label$} {}… {} more free{}\n",
            "",
            style.dim(),
            grouped((free - shown_free) as u64),
            style.reset()
        ));
    }
    let partial = s.pages.iter().filter(|p| p.layers < s.n_layer).count();
    let key = |class: Class, name: &str| {
        format!(
            "{}{}{} {name}",
            style.fg(hue(class, 0)),
            shape(class, 0),
            style.reset()
        )
    };
    text.push_str(&format!(
        "  {}  {}  {}  {}·{} free   {}full shape: lately, hollow: long ago{}\n",
        key(Class::Prompt, "prompt"),
        key(Class::Think, "thinking"),
        key(Class::Answer, "answer"),
        style.dim(),
        style.reset(),
        style.dim(),
        style.reset(),
    ));
    if partial > 0 {
        let share: usize = s.pages.iter().map(|p| p.layers).sum();
        text.push_str(&format!(
            "  {}{} of these pages are held by some layers only{}; a page is held by {:.1} of {} layers on average{}\n",
            style.dim(),
            grouped(partial as u64),
            if style.0 { " (underlined)" } else { "" },
            share as f64 / s.pages.len() as f64,
            s.n_layer,
            style.reset(),
        ));
    }
    text
}

/// The text of the sequence: what is held bright, what was recycled dim. `piece(range)` is the text of positions.
pub(crate) fn map(
    s: &Snapshot,
    width: usize,
    style: Style,
    piece: &dyn Fn(Range<u32>) -> String,
) -> String {
    let mut text = String::new();
    let mut next = 0;
    let row = |mark: char, color: &str, range: &Range<u32>, note: String, body: String| {
        let head = format!(
            "{:>6}–{:<6} {note:<22}",
            range.start,
            range.end.saturating_sub(1)
        );
        let room = width.saturating_sub(head.chars().count() + 5).max(16);
        format!(
            "{color}{mark} {head} {}{}\n",
            cut(&body, room),
            style.reset()
        )
    };
    let gone = |range: Range<u32>| {
        let n = range.end - range.start;
        row(
            '✗',
            style.dim(),
            &range,
            format!("recycled, {n} tokens"),
            piece(range.clone()),
        )
    };
    for page in &s.pages {
        if page.positions.start > next {
            text.push_str(&gone(next..page.positions.start));
        }
        next = page.positions.end;
        let age = s.age(page);
        let when = match s.now.saturating_sub(page.stamp) {
            0 => "now".to_owned(),
            n => format!("{} ago", grouped(u64::from(n))),
        };
        let note = match page.pinned {
            true => format!("pinned, {when}"),
            false if page.layers < s.n_layer => {
                format!("{when}, {}/{} layers", page.layers, s.n_layer)
            }
            false => when,
        };
        let note = note + &s.stored(page);
        let color = if style.0 && page.layers * 2 >= s.n_layer {
            style.fg(hue(page.class, 0))
        } else {
            style.fg(hue(page.class, 2))
        };
        text.push_str(&row(
            shape(page.class, age),
            &color,
            &page.positions,
            note,
            piece(page.positions.clone()),
        ));
    }
    if s.now > next {
        text.push_str(&gone(next..s.now));
    }
    if text.is_empty() {
        text.push_str("the pool is empty\n");
    }
    text
}

/// One line of at most `room` columns, newlines shown as ⏎; the middle gives way.
pub(super) fn cut(body: &str, room: usize) -> String {
    let line: Vec<char> = crate::term::escape(&body.replace('\n', "⏎"))
        .chars()
        .collect();
    if line.len() <= room {
        return line.into_iter().collect();
    }
    let head = room / 2;
    let tail = room.saturating_sub(head + 3);
    let mut out: String = line[..head].iter().collect();
    out.push_str(" … ");
    out.extend(&line[line.len() - tail..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(start: u32, stamp: u32, layers: usize, pinned: bool, class: Class) -> Page {
        Page {
            positions: start..start + 16,
            stamp,
            layers,
            pinned,
            class,
            tiers: Vec::new(),
        }
    }

    fn snapshot() -> Snapshot {
        Snapshot {
            pages: vec![
                page(0, 2000, 8, true, Class::Prompt),
                page(16, 10, 8, true, Class::Prompt),
                page(32, 1900, 8, false, Class::Think),
                page(640, 1990, 3, false, Class::Think),
                page(1984, 2000, 8, false, Class::Answer),
            ],
            n_layer: 8,
            n_slots: 12,
            held: 5,
            pinned: 2,
            recycled: 80,
            bytes: 3 << 20,
            policy: "raas".into(),
            now: 2000,
            tiers: Vec::new(),
        }
    }

    #[test]
    fn reads_without_colour() {
        let text = draw(&snapshot(), 80, Style(false));
        assert!(!text.contains('\x1b'));
        assert!(
            text.starts_with(
                "raas · 5 of 12 pages held, 2 pinned, 80 recycled · 3.0 MiB · position 2,000\n"
            ),
            "{text}"
        );
        assert!(text.contains("      0 ◆◇◉●■·······\n"), "{text}");
        assert!(
            text.contains(
                "1 of these pages are held by some layers only; a page is held by 7.0 of 8 layers"
            ),
            "{text}"
        );
    }

    #[test]
    fn fits_the_terminal() {
        let mut s = snapshot();
        s.pages = (0..300)
            .map(|i| page(i * 16, 16 * i, 8, false, Class::Think))
            .collect();
        (s.held, s.n_slots, s.now) = (300, 2000, 4800);
        for width in [40, 80, 115, 300] {
            let text = draw(&s, width, Style(true));
            let rows: Vec<&str> = text
                .lines()
                .filter(|l| l.contains('○') || l.contains('·'))
                .skip(1)
                .collect();
            for row in rows.iter().filter(|r| !r.contains("free")) {
                assert!(crate::term::columns(row) <= width.max(80), "{width}: {row}");
            }
            assert!(text.contains("more free"));
        }
    }

    #[test]
    fn the_map_says_what_is_gone() {
        let text = map(&snapshot(), 80, Style(false), &|r| {
            format!("text of {}\n", r.start)
        });
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 7, "{text}");
        assert!(
            lines[3].starts_with("✗     48–639    recycled, 592 tokens   text of 48⏎"),
            "{}",
            lines[3]
        );
        assert!(lines[4].contains("10 ago, 3/8 layers"), "{}", lines[4]);
        assert!(lines.iter().all(|l| l.chars().count() <= 80));
    }

    #[test]
    fn tiers_are_told() {
        let mut s = snapshot();
        let tier = |name: &str, n_slots, pages| TierStats {
            name: name.into(),
            n_slots,
            pages,
        };
        s.tiers = vec![tier("f16", 6, 3), tier("q8_0", 6, 2)];
        for p in &mut s.pages {
            p.tiers = vec![p.layers, 0];
        }
        s.pages[1].tiers = vec![2, 6];
        let text = draw(&s, 80, Style(false));
        assert!(
            text.contains("\n  f16: 3 of 6 pages · q8_0: 2 of 6 pages\n"),
            "{text}"
        );
        let text = map(&s, 80, Style(false), &|_| String::new());
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].contains("pinned, now ") && !lines[0].contains("f16"),
            "{text}"
        );
        assert!(
            lines[1].contains("pinned, 1,990 ago, 2 f16 6 q8_0"),
            "{text}"
        );
    }
}
