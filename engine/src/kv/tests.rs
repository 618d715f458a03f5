//! The books against rules written down once more, the slow way.

use super::policy::{POLICIES, find};
mod tiers;

use super::*;
use crate::options::{KvOptions, Refresh};

fn cache(policy: &str, n_layer: usize, n_slots: usize) -> Cache {
    Cache::new(
        &KvOptions::default(),
        find(policy).unwrap(),
        n_layer,
        n_slots,
    )
}

/// Masses that depend on the page and the step only, so that two implementations see the same.
fn mass(first_pos: u32, step: u32, h: usize) -> f32 {
    let x = first_pos.wrapping_mul(0x9e37_79b9)
        ^ step.wrapping_mul(0x85eb_ca6b)
        ^ (h as u32).wrapping_mul(0xc2b2_ae35);
    ((x ^ (x >> 15)).wrapping_mul(0x2c1b_3c6d) >> 8) as f32 / (1 << 24) as f32
}

fn step(c: &mut Cache, n_head: usize) {
    c.begin(1, false).unwrap();
    let now = c.pos() - 1;
    for t in 0..c.tables().len() {
        let spans: Vec<Span> = c.tables()[t].spans(c.layout()).collect();
        let masses: Vec<f32> = (0..n_head)
            .flat_map(|h| {
                let of = move |s: &Span| mass(s.first_pos + t as u32, now, h);
                spans.iter().map(of).collect::<Vec<_>>()
            })
            .collect();
        c.end_table(t, &masses, n_head);
    }
}

/// What must hold at any time.
fn check(c: &Cache) {
    let layout = c.layout();
    for list in 0..layout.n_lists() {
        let pages =
            (0..layout.n_tables()).flat_map(|t| c.tables[t].pages.iter().map(move |p| (t, p)));
        let held = pages.filter(|(t, p)| layout.list_of(usize::from(p.tier), *t) == list);
        let held = held.map(|(_, p)| p.slot);
        let mut slots: Vec<u32> = held.chain(c.free[list].iter().copied()).collect();
        slots.sort_unstable();
        assert_eq!(
            slots,
            (0..c.open[list] as u32).collect::<Vec<_>>(),
            "every slot is held once or free"
        );
        assert!(c.open[list] <= layout.slots_of_list(list));
    }
    for t in 0..layout.n_tables() {
        let lists = (0..layout.n_tiers()).map(|tier| (tier, layout.list_of(tier, t)));
        let bytes = lists.map(|(tier, list)| c.open[list] as u64 * layout.cost_of_tier(tier));
        let all = layout.slots_of_list(layout.list_of(0, t)) as u64 * layout.cost;
        assert!(
            bytes.sum::<u64>() <= all,
            "tiers share the bytes of the first"
        );
    }
    for table in c.tables() {
        assert!(
            table
                .pages
                .is_sorted_by(|a, b| a.first_pos + a.len <= b.first_pos),
            "pages are in position order"
        );
        let last = table.pages.last().unwrap();
        assert_eq!(last.first_pos + last.len, c.pos());
        assert!(
            table
                .pages
                .iter()
                .rev()
                .skip(1)
                .all(|p| p.len as usize == layout.page || p.pinned),
            "only the last page is partial"
        );
    }
}

#[test]
fn raas_follows_its_rules() {
    let (n_slots, n_head, recent, prompt) = (12, 3, 4, 37);
    let mut o = KvOptions::default();
    o.apply("raas:top_r=0.5").unwrap();
    let mut c = Cache::new(&o, find("raas").unwrap(), 2, n_slots);
    c.begin(prompt, true).unwrap();
    // (first position, stamp, w) of the live pages of layer 0, kept by the rules as they are written down.
    let mut pages: Vec<(u32, u32, f32)> = (0..prompt as u32)
        .step_by(PAGE)
        .map(|p| (p, p, 0.0))
        .collect();
    for _ in 0..600 {
        let t = c.pos();
        if (t as usize).is_multiple_of(PAGE) {
            if pages.len() == n_slots {
                let free: Vec<_> = pages[..n_slots - recent]
                    .iter()
                    .filter(|p| p.0 as usize >= prompt)
                    .collect();
                let victim = free
                    .iter()
                    .min_by(|a, b| (a.1, a.2, a.0).partial_cmp(&(b.1, b.2, b.0)).unwrap())
                    .unwrap()
                    .0;
                pages.retain(|p| p.0 != victim);
            }
            pages.push((t, t, 0.0));
        }
        for p in &mut pages {
            p.2 = (0..n_head).map(|h| mass(p.0, t, h)).fold(0.0, f32::max);
        }
        let mut order: Vec<usize> = (0..pages.len()).collect();
        order.sort_by(|&a, &b| pages[b].2.total_cmp(&pages[a].2).then(a.cmp(&b)));
        for &i in &order[..pages.len().div_ceil(2)] {
            pages[i].1 = t;
        }
        step(&mut c, n_head);
        let got: Vec<(u32, u32, f32)> = c
            .layer(0)
            .pages
            .iter()
            .map(|p| (p.first_pos, p.stamp, p.w))
            .collect();
        assert_eq!(got, pages, "at position {t}");
        check(&c);
    }
    assert!(c.layer(0).recycled > 20);
    assert_eq!(c.first_recycle(), Some((n_slots * PAGE) as u32));
}

#[test]
fn alpha_stamps_by_threshold() {
    let o = KvOptions {
        refresh: Refresh::Alpha(0.9),
        ..KvOptions::default()
    };
    let mut c = Cache::new(&o, find("raas").unwrap(), 1, 8);
    for _ in 0..100 {
        step(&mut c, 1);
        let now = c.pos() - 1;
        for p in &c.layer(0).pages {
            assert_eq!(
                p.stamp == now,
                p.w > 0.9 || p.first_pos == now,
                "page {}",
                p.first_pos
            );
        }
    }
}

#[test]
fn window_keeps_prompt_and_the_last_pages() {
    let mut c = cache("window", 1, 8);
    c.begin(20, true).unwrap();
    for _ in 20..400 {
        step(&mut c, 1);
    }
    let firsts: Vec<u32> = c.layer(0).pages.iter().map(|p| p.first_pos).collect();
    assert_eq!(firsts, [0, 16, 304, 320, 336, 352, 368, 384]);
}

#[test]
fn h2o_forgets_what_received_least() {
    let (n_slots, recent) = (10, 4);
    let mut c = cache("h2o", 1, n_slots);
    c.begin(20, true).unwrap();
    // (first position, summed mass), kept by the rule as it is written down.
    let mut pages: Vec<(u32, f32)> = vec![(0, 0.0), (16, 0.0)];
    for _ in 0..400 {
        let t = c.pos();
        if (t as usize).is_multiple_of(PAGE) {
            if pages.len() == n_slots {
                // Half of the eight slots that are not pinned.
                let free = pages[2..n_slots - recent].iter();
                let victim = free.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
                pages.retain(|p| p.0 != victim);
            }
            pages.push((t, 0.0));
        }
        for p in &mut pages {
            p.1 += mass(p.0, t, 0);
        }
        step(&mut c, 1);
        let held: Vec<u32> = c.layer(0).pages.iter().map(|p| p.first_pos).collect();
        assert_eq!(
            held,
            pages.iter().map(|p| p.0).collect::<Vec<_>>(),
            "at position {t}"
        );
    }
    assert!(c.layer(0).recycled > 10);
}

#[test]
fn random_is_seeded_and_forgets_evenly() {
    let run = |seed: u64| {
        let o = KvOptions {
            seed,
            ..KvOptions::default()
        };
        let mut c = Cache::new(&o, find("random").unwrap(), 1, 32);
        for _ in 0..4000 {
            step(&mut c, 1);
            check(&c);
        }
        c.layer(0)
            .pages
            .iter()
            .map(|p| p.first_pos)
            .collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn every_policy_keeps_pinned_and_recent_pages() {
    for policy in POLICIES.iter().filter(|p| !p.whole_context) {
        let mut c = cache(policy.name, 3, 10);
        c.begin(50, true).unwrap();
        for _ in 0..500 {
            step(&mut c, 2);
            check(&c);
            let pages = &c.layer(2).pages;
            assert!(
                (0..4).all(|i| pages[i].first_pos == i as u32 * 16 && pages[i].pinned),
                "{}",
                policy.name
            );
            let tail: Vec<u32> = pages
                .iter()
                .rev()
                .take(4)
                .map(|p| p.first_pos / 16)
                .collect();
            let now = (c.pos() - 1) / 16;
            assert!(
                tail.iter().zip(0..).all(|(p, i)| *p == now - i),
                "{}: {tail:?} at {now}",
                policy.name
            );
        }
    }
}

#[test]
fn a_pool_of_pinned_pages_is_full() {
    let mut c = cache("raas", 1, 4);
    c.begin(64, true).unwrap();
    assert_eq!(c.room_with_recycling(), 0);
    assert_eq!(
        c.begin(1, false),
        Err(PoolFull {
            n_slots: 4,
            held: 4
        })
    );
}

#[test]
fn a_small_pool_still_turns() {
    // Fewer pages than the recent ones that are usually kept: the current page alone is protected then.
    let mut c = cache("raas", 1, 3);
    c.begin(10, true).unwrap();
    for _ in 0..200 {
        step(&mut c, 1);
        check(&c);
    }
    assert!(c.layer(0).recycled > 5);
}

#[test]
fn rewinding_before_a_recycled_page_is_refused() {
    let mut c = cache("raas", 2, 6);
    c.begin(30, true).unwrap();
    for _ in 0..40 {
        step(&mut c, 1);
    }
    assert!(c.rewind(50));
    assert_eq!(c.pos(), 50);
    check(&c);
    for _ in 0..100 {
        step(&mut c, 1);
    }
    let last = c.pos();
    assert!(!c.rewind(60));
    assert_eq!(c.pos(), last, "a refused rewind changes nothing");
    c.clear();
    assert_eq!((c.pos(), c.room()), (0, 96));
}

#[test]
fn growing_adds_free_slots() {
    let mut c = cache("raas", 1, 2);
    c.begin(32, true).unwrap();
    c.grow(5);
    assert_eq!(c.room(), 48);
    for _ in 0..20 {
        step(&mut c, 1);
        check(&c);
    }
}

/// Layouts by their options: page, dense layers, head tables, one budget.
fn layouts() -> Vec<KvOptions> {
    let specs = [
        "raas:page=8",
        "raas:page=64",
        "raas:scope=head",
        "raas:dense_layers=1",
        "raas:budget_scope=model",
        "lrfu:budget_scope=model,scope=head,dense_layers=1,page=32",
        "lag:budget_scope=model,page=8",
        "random:budget_scope=model,scope=head",
        "h2o:scope=head,page=32",
    ];
    let apply = |spec: &&str| {
        let mut o = KvOptions::default();
        o.apply(spec).unwrap();
        o
    };
    specs.iter().map(apply).collect()
}

#[test]
fn every_layout_keeps_its_books() {
    for o in layouts() {
        let layout = Layout::new(&o, 3, 2, 12, 4096);
        let page = layout.page;
        let mut c = Cache::with_layout(&o, find(&o.policy).unwrap(), layout);
        c.begin(2 * page + 5, true).unwrap();
        for _ in 0..40 * page {
            step(&mut c, 2);
            check(&c);
        }
        for (t, table) in c.tables().iter().enumerate() {
            assert!(table.pages.len() <= c.layout().max_pages(t));
            let dense = t < c.layout().n_dense();
            assert_eq!(table.recycled == 0, dense, "{o:?}: table {t}");
            assert!(table.pages[..3].iter().all(|p| p.pinned));
        }
        let total: usize = c.tables[c.layout.n_dense()..]
            .iter()
            .map(|t| t.pages.len())
            .sum();
        let tables = c.layout.n_tables() - c.layout.n_dense();
        assert_eq!(total, tables * 12, "the budget is used up");

        let pos = c.pos();
        assert!(!c.rewind(pos - 30 * page as u32), "{o:?}");
        let before = c.room_with_recycling();
        c.grow(20);
        check(&c);
        assert!(c.room_with_recycling() >= before + 8 * page, "{o:?}");
        step(&mut c, 2);
        assert!(c.rewind(pos));
        check(&c);
        c.clear();
        assert_eq!((c.pos(), c.room()), (0, 20 * page), "{o:?}");
        c.begin(3, true).unwrap();
        check(&c);
    }
}

#[test]
fn places_lie_in_their_blocks() {
    for o in layouts() {
        let layout = Layout::new(&o, 2, 2, 9, 1024);
        let mut c = Cache::with_layout(&o, find(&o.policy).unwrap(), layout.clone());
        let mut written = std::collections::HashMap::new();
        for _ in 0..30 * layout.page as u32 {
            step(&mut c, 1);
            for (t, table) in c.tables().iter().enumerate() {
                let (place, list) = (table.places[0], layout.list_of(0, t));
                let region = layout.region(0, layout.region_of(t / layout.groups));
                assert!((place.slot as usize) < region.n_blocks && place.row < PAGE as u32);
                written.insert((list, place.slot, place.row), (t, c.pos() - 1));
                // What a table shows is what was written for it last.
                for s in table.spans(&layout) {
                    for i in 0..s.len {
                        let at = (list, s.slot, s.row + i);
                        assert_eq!(written[&at], (t, s.first_pos + i), "{o:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn one_budget_goes_where_it_is_needed() {
    let mut o = KvOptions::default();
    o.apply("raas:alpha=0.5,budget_scope=model").unwrap();
    let mut c = Cache::with_layout(&o, find("raas").unwrap(), Layout::new(&o, 2, 1, 16, 4096));
    for _ in 0..1000 {
        c.begin(1, false).unwrap();
        for t in 0..2 {
            // Everything matters in the first layer, nothing in the second.
            let masses = vec![1.0 - t as f32; c.tables()[t].n_spans()];
            c.end_table(t, &masses, 1);
        }
        check(&c);
    }
    // The sink, the last four, and at times the one that was current before.
    assert!((5..=6).contains(&c.tables()[1].pages.len()));
    assert!(c.tables()[0].pages.len() >= 26);
}

#[test]
fn counts_decay() {
    let mut o = KvOptions::default();
    o.apply("lrfu:alpha=0.5,lambda=0.5,clock=step").unwrap();
    let mut c = Cache::new(&o, find("lrfu").unwrap(), 1, 4);
    for hit in [1.0, 1.0, 0.0, 1.0] {
        c.begin(1, false).unwrap();
        c.end_layer(0, &[hit], 1);
    }
    assert_eq!(
        c.layer(0).pages[0].sum,
        ((1.0 * 0.5 + 1.0) * 0.5) * 0.5 + 1.0
    );
}

#[test]
fn the_most_overdue_page_goes() {
    let mut o = KvOptions::default();
    o.apply("lag:alpha=0.5,recent=1").unwrap();
    let mut c = Cache::new(&o, find("lag").unwrap(), 1, 4);
    for pos in 0..65 {
        c.begin(1, false).unwrap();
        // The page at 16 is hit every twenty steps, that at 32 at every step until 56.
        let mass = |p: &PageMeta| match p.first_pos {
            16 => f32::from(u8::from(pos % 20 == 0)),
            32 => f32::from(u8::from(pos < 56)),
            _ => 0.0,
        };
        let masses: Vec<f32> = c.layer(0).pages.iter().map(mass).collect();
        c.end_layer(0, &masses, 1);
    }
    let held: Vec<u32> = c.layer(0).pages.iter().map(|p| p.first_pos).collect();
    assert_eq!(
        held,
        [0, 16, 48, 64],
        "silent for 8 steps after pauses of 1"
    );
}

#[test]
fn what_a_person_pins_stays_until_it_is_let_go() {
    for policy in ["raas", "window", "random", "h2o", "lrfu", "lag"] {
        let mut c = cache(policy, 2, 8);
        for _ in 0..PAGE * 5 {
            step(&mut c, 2);
        }
        let at = 2 * PAGE as u32;
        // The last token of a page and the first of the next.
        let pinned = c.pin(&(at + 15..at + 17)).unwrap();
        assert_eq!(pinned, [at, at + 16], "{policy}");
        assert!(c.pin(&(at..at + 1)).unwrap().is_empty(), "pinned already");
        for _ in 0..PAGE * 20 {
            step(&mut c, 2);
        }
        let held = |c: &Cache, first| {
            (0..2).all(|t| c.tables()[t].pages.iter().any(|p| p.first_pos == first))
        };
        assert!(held(&c, at) && held(&c, at + 16), "{policy}");
        // Two pages must take turns; nothing is changed by what is refused.
        assert!(c.pin(&(0..u32::MAX)).is_err(), "{policy}");
        c.unpin(&pinned);
        assert!(
            c.tables()
                .iter()
                .all(|t| t.pages.iter().filter(|p| p.pinned).count() == 1)
        );
        for _ in 0..PAGE * 60 {
            step(&mut c, 2);
        }
        assert!(policy != "window" || !held(&c, at), "{policy}");
    }
}

#[test]
fn the_order_of_going_is_the_order_in_which_pages_go() {
    for policy in ["raas", "window", "h2o", "lrfu", "lag"] {
        let mut c = cache(policy, 1, 12);
        for _ in 0..PAGE * 30 {
            step(&mut c, 2);
        }
        for _ in 0..PAGE * 10 {
            let next = c.order(0).unwrap()[0];
            step(&mut c, 2);
            if let Some(r) = c.recycled().first() {
                assert_eq!(r.page.first_pos, next, "{policy}");
            }
        }
    }
    assert!(cache("random", 1, 8).order(0).is_none());
}

/// A row of the pool that depends on the page alone: a direction for keys, a range for values.
fn row_of(pages: &[PageMeta], part: Part, place: Place, row: &mut [f32]) {
    let first_pos = pages
        .iter()
        .find(|p| p.slot == place.slot)
        .unwrap()
        .first_pos;
    row.fill(0.0);
    match part {
        // The pages at 16 and 96 say the same.
        Part::K if first_pos == 96 => row[1] = 1.0,
        Part::K => row[first_pos as usize / 16] = 1.0,
        // The page at 32 has the widest range.
        Part::V => row[0] = if first_pos == 32 { 9.0 } else { 1.0 },
    }
}

#[test]
fn redundant_pages_go_first_and_guarded_ones_last() {
    for (spec, held) in [
        ("window:redundancy=0.9", [0, 32, 48, 64, 80, 96, 112, 128]),
        ("window:guard=0.13", [0, 32, 64, 80, 96, 112, 128, 144]),
        ("window", [0, 48, 64, 80, 96, 112, 128, 144]),
    ] {
        let mut o = KvOptions::default();
        o.apply(spec).unwrap();
        o.set("budget_scope", "layer").unwrap();
        let mut layout = Layout::new(&o, 1, 1, 8, 4096);
        layout.head_dim = 16;
        let mut c = Cache::with_layout(&o, find("window").unwrap(), layout);
        let last = held[7] + 1;
        for _ in 0..last {
            step(&mut c, 1);
            if c.wants_description() {
                let pages = c.layer(0).pages.clone();
                c.describe(1, &mut |part, _, _, place, row| {
                    row_of(&pages, part, place, row)
                });
            }
        }
        let got: Vec<u32> = c.layer(0).pages.iter().map(|p| p.first_pos).collect();
        assert_eq!(got, held, "{spec}");
    }
}
