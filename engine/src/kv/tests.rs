//! The books against rules written down once more, the slow way.

use super::policy::{POLICIES, find};
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
    for il in 0..c.n_layer() {
        let masses: Vec<f32> = (0..n_head)
            .flat_map(|h| {
                c.layer(il)
                    .pages
                    .iter()
                    .map(move |p| mass(p.first_pos + il as u32, now, h))
            })
            .collect();
        c.end_layer(il, &masses, n_head);
    }
}

/// What must hold at any time.
fn check(c: &Cache) {
    for il in 0..c.n_layer() {
        let l = c.layer(il);
        let mut slots: Vec<u32> = l
            .pages
            .iter()
            .map(|p| p.slot)
            .chain(l.free.iter().copied())
            .collect();
        slots.sort_unstable();
        assert_eq!(
            slots,
            (0..c.n_slots() as u32).collect::<Vec<_>>(),
            "every slot is held once or free"
        );
        assert!(
            l.pages
                .is_sorted_by(|a, b| a.first_pos + a.len <= b.first_pos),
            "pages are in position order"
        );
        let last = l.pages.last().unwrap();
        assert_eq!(last.first_pos + last.len, c.pos());
        assert!(
            l.pages
                .iter()
                .rev()
                .skip(1)
                .all(|p| p.len as usize == PAGE || p.pinned),
            "only the last page is partial"
        );
    }
}

#[test]
fn raas_follows_its_rules() {
    let (n_slots, n_head, recent, prompt) = (12, 3, 4, 37);
    let mut c = cache("raas", 2, n_slots);
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
