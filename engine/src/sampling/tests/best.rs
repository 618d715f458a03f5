//! The best token, as devices find it, beside what samplers take.

use super::*;

#[test]
fn the_best_is_what_greedy_samplers_take() {
    let greedy = || SamplerParams {
        temp: 0.0,
        ..plain()
    };
    let mut s = Sampler::new(greedy(), 5, no_text).unwrap();
    assert_eq!(s.choice(), Choice::Best);
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [
        [0.0, 2.0, 2.0, 1.0, nan],
        [nan, -1.0, -inf, -0.5, -0.5],
        [f32::MAX, inf, 0.0, nan, inf],
        [-0.0, 0.0, -1.0, -2.0, -inf],
    ];
    for row in rows {
        assert_eq!(best(&row), Some(s.sample(&row).unwrap().id), "{row:?}");
    }
    assert_eq!(best(&[nan, -inf]), None);
    for other in [
        SamplerParams {
            temp: 0.5,
            ..greedy()
        },
        SamplerParams {
            repeat_penalty: 1.1,
            ..greedy()
        },
        SamplerParams {
            logit_bias: vec![(1, 2.0)],
            ..greedy()
        },
        SamplerParams {
            dry_multiplier: 0.8,
            ..greedy()
        },
    ] {
        let s = Sampler::new(other, 5, no_text).unwrap();
        assert_ne!(s.choice(), Choice::Best);
    }
}
