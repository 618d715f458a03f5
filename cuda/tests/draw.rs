//! The largest logits, and a draw among them.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::*;
use lemma_cuda::Gpu;
use lemma_cuda::ops::{Draw, MAX_TOP, Shortlist};

const NOBODY: u32 = 7_000_000;

fn plain(top_k: usize) -> Draw {
    Draw {
        top_k,
        top_p: 1.0,
        min_p: 0.0,
        temp: 1.0,
        lot: 0.5,
    }
}

/// What is drawn, what stands where the next step looks for its token, and the list.
type Drawn = (Option<u32>, u32, Option<Vec<(u32, f32)>>);

fn draw(gpu: &Gpu, logits: &[f32], d: &Draw) -> Drawn {
    let (x, next) = (upload(gpu, logits), upload_u32(gpu, &[NOBODY]));
    let list = Shortlist::new(gpu).expect("a list");
    list.draw(gpu, next.view(), x.view(), logits.len(), d)
        .expect("draw");
    gpu.synchronize().expect("draw");
    let next = gpu.read(next.view()).expect("next");
    let next = u32::from_le_bytes(next.try_into().expect("four bytes"));
    (list.drawn(), next, list.list().map(Iterator::collect))
}

/// The `k` largest, lower tokens first among equals.
fn largest(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let all = logits.iter().enumerate();
    let mut all: Vec<(u32, f32)> = all
        .filter(|(_, x)| **x > f32::NEG_INFINITY)
        .map(|(i, x)| (i as u32, x.min(f32::MAX) + 0.0))
        .collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.truncate(k);
    all
}

/// How many of a list stay, and the tokens that a draw may end at, rounding allowed for.
fn allowed(list: &[(u32, f32)], d: &Draw, slack: f64) -> Vec<u32> {
    let weights = |temp: f32| -> Vec<f64> {
        let of = |x: f32| (f64::from(x - list[0].1) / f64::from(temp)).exp();
        list.iter().map(|e| of(e.1)).collect()
    };
    let p = weights(1.0);
    let all: f64 = p.iter().sum();
    let (mut kept, mut sum) = (0, 0.0);
    while kept < p.len() && (kept == 0 || d.top_p >= 1.0 || sum / all + 1e-6 < f64::from(d.top_p)) {
        sum += p[kept];
        kept += 1;
    }
    while kept > 1 && p[kept - 1] < f64::from(d.min_p) {
        kept -= 1;
    }
    let w = &weights(d.temp)[..kept];
    let target = f64::from(d.lot) * w.iter().sum::<f64>();
    let (mut below, mut tokens) = (0.0, Vec::new());
    for (w, e) in w.iter().zip(list) {
        let (from, to) = (below - slack, below + w + slack);
        if (from..=to).contains(&target) {
            tokens.push(e.0);
        }
        below += w;
    }
    tokens
}

#[test]
fn the_list_holds_the_largest() {
    for gpu in gpus() {
        let mut rng = Rng::new(5);
        for n in [
            1,
            3,
            40,
            1000,
            4099,
            if is_slow(&gpu) { 20_001 } else { 151_936 },
        ] {
            let mut smooth = rng.normals(n);
            let mut coarse: Vec<f32> = smooth.iter().map(|x| (x * 40.0).round()).collect();
            // Large ones in one run, as the tokens of digits are.
            for x in smooth.iter_mut().skip(n / 2).take(90) {
                *x += 9.0;
            }
            for (i, x) in [f32::NAN, f32::INFINITY, -0.0, f32::NEG_INFINITY, f32::MAX]
                .into_iter()
                .enumerate()
                .take(n.saturating_sub(1))
            {
                coarse[n * i / 6] = x;
            }
            for row in [&smooth, &coarse] {
                for k in [1, 2, 40, MAX_TOP] {
                    let (drawn, next, list) = draw(&gpu, row, &plain(k));
                    let want = largest(row, k);
                    assert_eq!(list.as_deref(), Some(&want[..]), "{k} of {n}");
                    assert_eq!(drawn, Some(next));
                    assert!(want.iter().any(|e| e.0 == next));
                }
            }
        }
    }
}

#[test]
fn draws_fall_where_the_lot_says() {
    for gpu in gpus() {
        let mut rng = Rng::new(6);
        let row: Vec<f32> = rng.normals(3000).iter().map(|x| x * 3.0).collect();
        let mut seen = Vec::new();
        for i in 0..if is_slow(&gpu) { 60 } else { 2000 } {
            let d = Draw {
                top_k: [1, 7, 40, 128][i % 4],
                top_p: [1.0, 0.95, 0.4, 0.0][i / 4 % 4],
                min_p: [0.0, 0.05, 0.5][i % 3],
                temp: [0.8, 1.0, 0.1, 2.0][i / 2 % 4],
                lot: rng.next() as f32 / (1u64 << 32) as f32,
            };
            let (drawn, next, list) = draw(&gpu, &row, &d);
            let allowed = allowed(&list.expect("a list"), &d, 1e-4);
            assert!(
                allowed.contains(&next),
                "{next} is not in {allowed:?}: {d:?}"
            );
            assert_eq!(drawn, Some(next));
            seen.push(next);
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 5, "draws differ: {seen:?}");
    }
}

#[test]
fn where_nothing_can_be_drawn_nothing_is() {
    for gpu in gpus() {
        let (drawn, next, list) = draw(&gpu, &[f32::NAN, f32::NEG_INFINITY], &plain(40));
        assert_eq!((drawn, next, list), (None, NOBODY, Some(Vec::new())));
        // Numbers only where 39 of the 256 groups of threads look, and more than there is room for: the host has to look itself.
        let some = |i: usize| match i / 4 % 1024 / 4 {
            0..39 => 1.5,
            _ => f32::NAN,
        };
        let row: Vec<f32> = (0..20_000).map(some).collect();
        assert!(draw(&gpu, &row, &plain(39)).2.is_some());
        let (drawn, next, list) = draw(&gpu, &row, &plain(40));
        assert_eq!((drawn, next, list), (None, NOBODY, None));
    }
}
