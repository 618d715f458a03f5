//! Pages that move to lower tiers before they go.

use std::collections::HashMap;

use super::*;

fn options(spec: &str) -> KvOptions {
    let mut o = KvOptions::default();
    o.apply(spec).unwrap();
    o
}

/// A cache of `n_layer` layers of two heads with a budget of `n_slots` pages a table.
fn tiered(spec: &str, n_layer: usize, n_slots: usize) -> Cache {
    let o = options(spec).decided(true, Some(u32::MAX));
    let layout = Layout::new(&o, n_layer, 2, n_slots, 1 << 16);
    Cache::with_layout(&o, find(&o.policy).unwrap(), layout)
}

/// One table whose first tier has given away what it can, with so many slots in each tier.
fn with_slots(spec: &str, slots: [usize; 3]) -> Cache {
    let mut o = options(spec);
    o.set("demote", "q8_0+q4_0").unwrap();
    o.set("budget_scope", "layer").unwrap();
    let mut layout = Layout::new(&o, 1, 1, 64, 1 << 16);
    let given = (34 * slots[1] + 18 * slots[2]).div_ceil(64);
    (layout.n_slots, layout.kept) = (slots[0] + given, slots[0]);
    (layout.tiers[0].n_slots, layout.tiers[1].n_slots) = (slots[1], slots[2]);
    let mut c = Cache::with_layout(&o, find(&o.policy).unwrap(), layout);
    for (tier, n) in slots.into_iter().enumerate() {
        let list = c.layout.list_of(tier, 0);
        (c.open[list], c.free[list]) = (n, (0..n as u32).rev().collect());
    }
    c
}

fn prompt(c: &mut Cache, n: usize, pin: bool) {
    let mut left = n;
    while left > 0 {
        let n = left.min(c.batch());
        c.begin(n, pin).unwrap();
        left -= n;
    }
}

/// The pages of each tier of the first table, by their number in the sequence.
fn held(c: &Cache) -> Vec<Vec<u32>> {
    let of = |tier: usize| {
        let pages = c.layer(0).pages.iter();
        let here = pages.filter(|p| usize::from(p.tier) == tier);
        here.map(|p| p.first_pos / PAGE as u32).collect()
    };
    (0..c.layout().n_tiers()).map(of).collect()
}

#[test]
fn tiers_take_the_bytes_of_the_budget() {
    let lists = [
        "q8_0",
        "q4_0",
        "q8_0+q4_0",
        "q8_0+k4/v2",
        "k4/v2",
        "q8_0:0.3+q5_0:0.3+q4_0:0.3",
        "q4_0:0.97",
    ];
    for list in lists {
        let o = options(&format!("raas:demote={list}")).decided(true, Some(u32::MAX));
        for n in 2..200 {
            let layout = Layout::new(&o, 3, 2, n, 1 << 16);
            let lower = layout.tiers.iter().map(|t| t.n_slots as u64 * t.cost);
            let got = layout.kept as u64 * layout.cost + lower.sum::<u64>();
            let most = n as u64 * layout.cost;
            assert!(
                got <= most && got + layout.cost > most,
                "{list}, {n}: {got} of {most}"
            );
            assert!(layout.kept >= 2 && layout.all_slots() >= n, "{list}, {n}");
            assert!(n < 20 || layout.all_slots() > n, "{list}, {n}");
            // No more than is asked for, unless the budget is more.
            let o = options(&format!("raas:demote={list}@1600"));
            let capped = Layout::new(&o, 3, 2, n, 1 << 16);
            assert!(capped.all_slots() <= n.max(100), "{list}, {n}");
            assert!(
                capped.all_slots() >= layout.all_slots().min(95),
                "{list}, {n}"
            );
            // What is larger than the context would be of no use.
            let short = Layout::new(&o, 3, 2, n, n * PAGE + 5 * PAGE);
            assert!((n..=n + 5).contains(&short.all_slots()), "{list}, {n}");
            let grown = short.grown(n + 3);
            let grows = |tier| grown.slots_of_tier(tier) >= short.slots_of_tier(tier);
            assert!((0..short.n_tiers()).all(grows), "{list}, {n}");
        }
    }
    let o = options("raas:demote=q8_0:0.5").decided(true, Some(u32::MAX));
    let layout = Layout::new(&o, 1, 1, 34, 1 << 16);
    let slots = (layout.kept, layout.tiers[0].n_slots);
    assert_eq!(slots, (17, 32), "17 pages of 64 bytes, as 32 of 34");
}

#[test]
fn pages_go_down_in_the_order_of_their_worth() {
    let mut c = with_slots("window", [5, 3, 2]);
    prompt(&mut c, 20, true);
    for _ in 20..9 * PAGE {
        step(&mut c, 1);
    }
    // Nine pages: the oldest have moved, nothing has gone.
    assert_eq!(held(&c), [vec![4, 5, 6, 7, 8], vec![1, 2, 3], vec![0]]);
    assert_eq!(c.layer(0).recycled, 0);
    step(&mut c, 1);
    let moved: Vec<_> = (c.demoted().iter())
        .map(|d| (d.page.first_pos / 16, d.page.tier, d.tier))
        .collect();
    assert_eq!(moved, [(1, 1, 2), (4, 0, 1)], "room is made from below");
    assert_eq!(c.demoted()[1].slot, c.demoted()[0].page.slot);
    // The last tier is full of pinned pages now: the tier above deletes what it can.
    for now in 10..40 {
        for _ in 0..PAGE {
            step(&mut c, 1);
            check(&c);
        }
        let recent: Vec<u32> = (now - 4..=now).collect();
        let middle: Vec<u32> = (now - 7..now - 4).collect();
        assert_eq!(held(&c), [recent, middle, vec![0, 1]], "at page {now}");
    }
    assert_eq!(c.layer(0).recycled, 30);
    let pinned = |p: &PageMeta| p.pinned == (p.first_pos < 32);
    assert!(c.layer(0).pages.iter().all(pinned));
}

#[test]
fn the_first_tier_has_all_of_the_budget_until_it_is_full() {
    for (spec, n_layer) in [
        ("raas:demote=q8_0", 3),
        ("raas:demote=q8_0+k4/v2", 2),
        ("raas:demote=q8_0:0.9", 1),
        ("window:demote=q8_0+q4_0,budget_scope=layer", 2),
        ("raas:demote=q4_0:0.9,scope=head", 2),
    ] {
        let mut c = tiered(spec, n_layer, 40);
        let all = c.layout().all_slots();
        assert_eq!(c.room(), all * PAGE, "{spec}");
        let mut last = 0;
        for pos in 0..all * PAGE {
            step(&mut c, 2);
            check(&c);
            assert_eq!(c.first_recycle(), None, "{spec}: room for all");
            let below = c.tables().iter().flat_map(|t| &t.pages);
            let below = below.filter(|p| p.tier > 0).count();
            assert_eq!(below > 0, pos >= 40 * PAGE, "{spec} at {pos}");
            assert!(below >= last, "{spec}: nothing comes back");
            let l = c.layout();
            for t in 0..l.n_tables() {
                let lists = (1..l.n_tiers()).map(|tier| l.list_of(tier, t));
                let idle: usize = lists.map(|list| c.free[list].len()).sum();
                let given = l.cost / l.tiers.last().unwrap().cost;
                assert!(idle <= given as usize + 1, "{spec}: one slot at a time");
            }
            last = below;
        }
        assert_eq!(c.room(), 0, "{spec}");
        for _ in 0..5 * PAGE {
            step(&mut c, 2);
            check(&c);
        }
        assert_eq!(c.first_recycle(), Some((all * PAGE) as u32), "{spec}");
        let open = c.layout().list_of(0, 0);
        assert_eq!(c.open[open], c.layout().kept_of_list(open), "{spec}");
    }
}

#[test]
fn what_was_given_away_comes_back_when_it_is_not_needed() {
    let mut c = tiered("raas:demote=q8_0,budget_scope=layer", 1, 12);
    prompt(&mut c, 12 * PAGE, true);
    let taken = c.begin(PAGE, true);
    assert!(taken.is_ok() && !c.demoted().is_empty());
    assert!(!c.rewind(12 * PAGE as u32 - 3), "pages have lost something");
    c.clear();
    assert_eq!(c.open[c.layout().list_of(0, 0)], 12);
    check_free(&c);
}

/// Every open slot is free.
fn check_free(c: &Cache) {
    for (free, open) in c.free.iter().zip(&c.open) {
        assert_eq!(free.len(), *open);
    }
}

#[test]
fn raas_follows_its_rules_in_tiers() {
    type Page = (u32, usize, u32, f32);
    let slots = [6, 4, 5];
    let (recent, n_prompt) = (4, 40);
    let mut c = with_slots("raas:alpha=0.9", slots);
    prompt(&mut c, n_prompt, true);
    // (first position, tier, stamp, w) of the live pages, kept by the rules as they are written down.
    let mut pages: Vec<Page> = (0..n_prompt as u32)
        .step_by(PAGE)
        .map(|p| (p, 0, p, 0.0))
        .collect();
    let least = |pages: &[Page], tier: usize, pinned: bool| {
        let asked = (0..pages.len() - recent)
            .filter(|&i| pages[i].1 == tier && (pinned || pages[i].0 as usize >= n_prompt));
        let key = |&i: &usize| (pages[i].2, pages[i].3, pages[i].0);
        asked.min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap())
    };
    let full = |pages: &[Page], tier| pages.iter().filter(|p| p.1 == tier).count() == slots[tier];
    for _ in 0..1000 {
        let t = c.pos();
        if (t as usize).is_multiple_of(PAGE) {
            let down: Vec<usize> = (0..3).take_while(|&tier| full(&pages, tier)).collect();
            let gone = (down.len() == 3).then(|| pages[least(&pages, 2, false).unwrap()].0);
            for &tier in down.iter().take(2) {
                let i = least(&pages, tier, true).unwrap();
                // Marked, so that it does not move twice.
                pages[i].1 = 10 + tier;
            }
            pages.retain(|p| Some(p.0) != gone);
            for p in pages.iter_mut().filter(|p| p.1 >= 10) {
                p.1 -= 9;
            }
            pages.push((t, 0, t, 0.0));
        }
        for p in &mut pages {
            p.3 = mass(p.0, t, 0);
            if p.3 > 0.9 {
                p.2 = t;
            }
        }
        step(&mut c, 1);
        let got: Vec<Page> = (c.layer(0).pages.iter())
            .map(|p| (p.first_pos, usize::from(p.tier), p.stamp, p.w))
            .collect();
        assert_eq!(got, pages, "at position {t}");
        check(&c);
    }
    assert!(c.layer(0).recycled > 40);
    let next = c.order(0).unwrap();
    step(&mut c, 1);
    while c.recycled().is_empty() {
        step(&mut c, 1);
    }
    assert!(next.contains(&c.recycled()[0].page.first_pos));
}

#[test]
fn a_prompt_may_be_longer_than_the_first_tier() {
    let specs = [
        "raas:demote=q8_0+q4_0",
        "window:demote=q4_0,budget_scope=layer",
    ];
    for spec in specs {
        let mut c = tiered(spec, 3, 16);
        let all = c.layout().all_slots();
        assert!(c.layout().kept < 9 && all > 24, "{spec}");
        assert_eq!(c.room_with_recycling(), all * PAGE);
        prompt(&mut c, (all - 2) * PAGE, true);
        assert_eq!(c.room_with_recycling(), 2 * PAGE, "{spec}");
        for _ in 0..20 * PAGE {
            step(&mut c, 2);
            check(&c);
            for t in c.tables() {
                let pinned = t.pages.iter().take_while(|p| p.pinned).count();
                assert_eq!(pinned, all - 2, "{spec}: pinned pages stay");
                let last = t.pages.last().unwrap();
                assert_eq!(last.tier, 0, "{spec}: new pages are in the first tier");
            }
        }
        c.clear();
        prompt(&mut c, all * PAGE, true);
        assert_eq!((c.room(), c.room_with_recycling()), (0, 0));
        assert!(c.begin(1, false).is_err());
    }
}

#[test]
fn rewinding_before_a_move_is_refused() {
    let mut c = with_slots("raas", [4, 4, 4]);
    for _ in 0..5 * PAGE {
        step(&mut c, 1);
    }
    assert_eq!(held(&c)[1].len(), 1);
    let moved = 4 * PAGE as u32;
    assert!(c.rewind(moved + 1));
    check(&c);
    assert!(!c.rewind(moved), "the step there has moved a page");
    assert_eq!(c.pos(), moved + 1);
    for _ in 0..40 * PAGE {
        step(&mut c, 1);
        check(&c);
    }
    assert_eq!(c.first_recycle(), Some(12 * PAGE as u32));
    c.clear();
    assert_eq!((c.pos(), c.room()), (0, 12 * PAGE));
}

#[test]
fn descriptions_move_with_their_pages() {
    let o = options("window:redundancy=0.9,demote=q8_0:0.5,budget_scope=layer");
    let mut layout = Layout::new(&o, 1, 1, 8, 4096);
    layout.head_dim = 16;
    let slots = (layout.kept, layout.tiers[0].n_slots);
    assert_eq!(slots, (4, 7));
    let mut c = Cache::with_layout(&o, find("window").unwrap(), layout);
    for _ in 0..12 * PAGE {
        step(&mut c, 1);
        let pages = c.layer(0).pages.clone();
        c.describe(1, &mut |part, _, _, place, row| {
            let here = |p: &&PageMeta| p.tier == 0 && p.slot == place.slot;
            let first_pos = pages.iter().find(here).unwrap().first_pos;
            row.fill(0.0);
            if part == Part::K {
                // Page 10 says what page 3 says, which has moved by then.
                let page = first_pos as usize / 16;
                row[if page == 10 { 3 } else { page }] = 1.0;
            }
        });
        check(&c);
    }
    // Page 3 went for page 11, where page 1 would have.
    let held = held(&c).concat();
    assert!(held.contains(&1) && !held.contains(&3), "{held:?}");
}

/// Where a row of the pool is: list of its tier and table, block, row.
type Key = (usize, u32, u32);

/// Whatever is appended, moved and rewound, a table shows what was written for it, and no slot is held twice.
#[test]
fn tables_show_what_was_written() {
    let specs = [
        "raas:demote=q8_0",
        "raas:demote=q8_0:0.3+q4_0:0.3,scope=head",
        "lrfu:demote=q4_0,page=8,dense_layers=1",
        "h2o:demote=q8_0+q5_0+q4_0,page=32,budget_scope=layer",
        "random:demote=q8_0+q4_0,budget_scope=layer,scope=head",
        "lag:demote=q4_0:0.9,page=64",
        "window:demote=q8_0+q4_0,recent=9",
    ];
    for spec in specs {
        let mut c = tiered(spec, 3, 14);
        let layout = c.layout().clone();
        let page = layout.page;
        let mut memory: HashMap<Key, (usize, u32)> = HashMap::new();
        let (mut moves, mut heirs, mut rewound) = (0, 0, 0);
        for round in 0..1500 {
            let draw = |h| (mass(round, 7, h) * 1000.0) as usize;
            let before = c.pos();
            match draw(0) {
                0..50 => {
                    let to = before - (draw(1) as u32 % 20).min(before);
                    rewound += u32::from(to > 0 && to < before && c.rewind(to));
                    check_rows(&c, &memory, spec);
                    continue;
                }
                50..53 => {
                    c.clear();
                    continue;
                }
                60..160 => {
                    let room = c.room_with_recycling().saturating_sub(2 * page);
                    let n = (draw(1) % (6 * page)).min(c.batch()).min(room);
                    if n == 0 {
                        continue;
                    }
                    c.begin(n, draw(2) < 100).unwrap();
                }
                _ => step(&mut c, 2),
            }
            // What a backend does: moves in order, then stores.
            for d in c.demoted() {
                moves += 1;
                let t = d.il * layout.groups + d.group;
                for row in 0..d.page.len {
                    let key = |tier: u8, slot| {
                        let place = layout.place(slot, row);
                        let list = layout.list_of(usize::from(tier), t);
                        (list, place.slot, place.row)
                    };
                    let what = memory[&key(d.page.tier, d.page.slot)];
                    assert_eq!(what, (t, d.page.first_pos + row), "{spec}");
                    memory.insert(key(d.tier, d.slot), what);
                }
                let Some(h) = d.heir else { continue };
                heirs += 1;
                let list = layout.list_of(0, h.il * layout.groups + h.group);
                for row in 0..page as u32 {
                    let at = |slot| {
                        let place = layout.place(slot, row);
                        (list, place.slot, place.row)
                    };
                    // Rows that the step is about to write are not there yet.
                    if let Some(&what) = memory.get(&at(h.slot)) {
                        memory.insert(at(d.page.slot), what);
                    }
                }
            }
            for (t, table) in c.tables().iter().enumerate() {
                for (p, pos) in table.places.iter().zip(before..) {
                    memory.insert((layout.list_of(0, t), p.slot, p.row), (t, pos));
                }
            }
            check(&c);
            check_rows(&c, &memory, spec);
        }
        assert!(
            moves > 100 && heirs > 10 && rewound > 5,
            "{spec}: {moves} moves, {heirs} heirs, {rewound} rewound"
        );
    }
}

fn check_rows(c: &Cache, memory: &HashMap<Key, (usize, u32)>, spec: &str) {
    let layout = c.layout();
    for (t, table) in c.tables().iter().enumerate() {
        assert!(table.pages.len() <= layout.max_pages(t));
        for s in table.spans(layout) {
            let list = layout.list_of(usize::from(s.tier), t);
            for i in 0..s.len {
                let what = memory[&(list, s.slot, s.row + i)];
                assert_eq!(what, (t, s.first_pos + i), "{spec}");
            }
        }
    }
}
