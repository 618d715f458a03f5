//! Draws from a list of the largest logits, beside draws from all of them.

use super::*;

fn drawing() -> SamplerParams {
    SamplerParams {
        temp: 0.8,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.02,
        seed: Some(3),
        ..plain()
    }
}

#[test]
fn a_draw_from_the_largest_is_the_draw_from_all() {
    let n = 500;
    for k in [1, 20, MAX_TOP] {
        let params = SamplerParams {
            top_k: k as i32,
            ..drawing()
        };
        let mut all = Sampler::new(params.clone(), n, no_text).unwrap();
        let mut few = Sampler::new(params, n, no_text).unwrap();
        let mut seen = Vec::new();
        for step in 0..300_u32 {
            let mut row: Vec<f32> = (0..n as u32)
                .map(|i| ((i * 7919 + step * 104_729) % 1009) as f32 / 90.0)
                .collect();
            if step % 3 == 0 {
                // Many equal ones, and some that are no numbers.
                row.iter_mut().for_each(|x| *x = x.floor());
                (row[7], row[300], row[301]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
            }
            let Choice::Draw(d) = few.choice() else {
                panic!("a draw");
            };
            assert_eq!(d.top_k, k);
            let a = all.sample(&row).unwrap();
            let b = few.sample_top(|list| top(&row, d.top_k, list)).unwrap();
            assert_eq!((a.id, a.logprob.to_bits()), (b.id, b.logprob.to_bits()));
            seen.push(a.id);
            for s in [&mut all, &mut few] {
                s.accept(a.id);
            }
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 20);
    }
    let mut s = Sampler::new(drawing(), 3, no_text).unwrap();
    assert!(s.sample_top(|_| {}).is_err());
}

#[test]
fn the_lot_is_that_of_the_next_draw() {
    let mut s = Sampler::new(drawing(), 50, no_text).unwrap();
    let row: Vec<f32> = (0..50).map(|i| i as f32 / 10.0).collect();
    for _ in 0..20 {
        let Choice::Draw(d) = s.choice() else {
            panic!("a draw");
        };
        assert!(s.choice() == Choice::Draw(d), "looking draws nothing");
        let distribution = s.distribution(&row).unwrap();
        let id = s.sample(&row).unwrap().id;
        let mut below = 0.0;
        let at = distribution.iter().find(|(_, p)| {
            below += p;
            below > d.lot
        });
        assert_eq!(at.map(|e| e.0), Some(id));
    }
}

#[test]
fn what_wants_all_logits_says_so() {
    let off = |change: fn(&mut SamplerParams)| {
        let mut p = drawing();
        change(&mut p);
        Sampler::new(p, 500, no_text).unwrap().choice() == Choice::Open
    };
    assert!(!off(|_| {}));
    assert!(off(|p| p.top_k = 0));
    assert!(off(|p| p.top_k = 500));
    assert!(off(|p| p.top_k = MAX_TOP as i32 + 1));
    assert!(off(|p| p.typical = 0.5));
    assert!(off(|p| p.xtc_probability = 0.1));
    assert!(off(|p| p.dynatemp_range = 0.1));
    assert!(off(|p| p.mirostat = 2));
    assert!(off(|p| p.repeat_penalty = 1.1));
    assert!(off(|p| p.dry_multiplier = 0.8));
    assert!(off(|p| p.top_n_sigma = 1.0));
    assert!(off(|p| p.logit_bias = vec![(1, 2.0)]));
}
