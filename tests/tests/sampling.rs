//! Sampling as a caller sees it: whole parameter sets over large vocabularies.

use std::io::Write as _;
use std::time::{Duration, Instant};

use lemma_engine::sampling::{
    ParamSource, Sampler, SamplerOverrides, SamplerParams, log_prob, top_log_probs,
};

const N_VOCAB: usize = 151_936;

/// A row with the shape of a language model's: a normal floor and a few tokens above it. The generator is a plain LCG
/// so that the test needs nothing else.
fn row(seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut unit = || {
        x = x
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (x >> 40) as f32 / (1_u32 << 24) as f32
    };
    let mut row: Vec<f32> = (0..N_VOCAB)
        .map(|_| 3.0 * (unit() + unit() + unit() + unit() - 2.0))
        .collect();
    for i in 0..50 {
        let at = (unit() * N_VOCAB as f32) as usize % N_VOCAB;
        row[at] += 14.0 - 0.2 * i as f32;
    }
    row
}

fn median_time(params: SamplerParams) -> Duration {
    let mut sampler = Sampler::new(params, N_VOCAB, |id| id.to_string().into_bytes()).unwrap();
    let rows: Vec<Vec<f32>> = (0..4).map(row).collect();
    let mut times: Vec<Duration> = (0..60)
        .map(|i| {
            let start = Instant::now();
            let drawn = sampler.sample(&rows[i % rows.len()]).unwrap();
            let time = start.elapsed();
            sampler.accept(drawn.id);
            time
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

/// Run with `--release -- --ignored --nocapture` to see numbers.
#[test]
#[ignore = "a measurement"]
fn measure() {
    let base = SamplerParams {
        seed: Some(1),
        ..Default::default()
    };
    let free = SamplerParams {
        top_k: 0,
        ..base.clone()
    };
    let cases = [
        (
            "greedy",
            SamplerParams {
                temp: 0.0,
                ..base.clone()
            },
        ),
        ("defaults", base.clone()),
        (
            "defaults + penalties + DRY",
            SamplerParams {
                repeat_penalty: 1.1,
                dry_multiplier: 0.8,
                ..base.clone()
            },
        ),
        ("top-p 0.95, min-p 0.05", free.clone()),
        (
            "min-p 0.05",
            SamplerParams {
                top_p: 1.0,
                ..free.clone()
            },
        ),
        (
            "top-p 0.95",
            SamplerParams {
                min_p: 0.0,
                ..free.clone()
            },
        ),
        (
            "typical 0.9",
            SamplerParams {
                typical: 0.9,
                ..free.clone()
            },
        ),
        (
            "no truncation",
            SamplerParams {
                top_p: 1.0,
                min_p: 0.0,
                ..free.clone()
            },
        ),
        (
            "mirostat 1",
            SamplerParams {
                mirostat: 1,
                ..base.clone()
            },
        ),
        (
            "mirostat 2",
            SamplerParams {
                mirostat: 2,
                ..base.clone()
            },
        ),
    ];
    let mut out = std::io::stdout();
    for (name, params) in cases {
        writeln!(out, "{name:28} {:?}", median_time(params)).unwrap();
    }
}

#[test]
fn a_large_vocabulary_takes_little_time() {
    // Generous, for builds without optimisation on busy machines; it is there to catch a sort of the whole row.
    let time = median_time(SamplerParams {
        seed: Some(1),
        ..Default::default()
    });
    assert!(time < Duration::from_millis(20), "{time:?}");
}

#[test]
fn only_candidates_are_drawn() {
    let logits = row(7);
    let best = top_log_probs(&logits, 40);
    assert!(best.windows(2).all(|w| w[0].1 >= w[1].1));
    assert!((best[0].1 - log_prob(&logits, best[0].0)).abs() < 1e-5);
    let params = SamplerParams {
        temp: 5.0,
        top_p: 1.0,
        min_p: 0.0,
        seed: Some(3),
        ..Default::default()
    };
    let mut sampler = Sampler::new(params, N_VOCAB, |_| Vec::new()).unwrap();
    for _ in 0..300 {
        let id = sampler.sample(&logits).unwrap().id;
        assert!(best.iter().any(|b| b.0 == id), "{id}");
    }
}

#[test]
fn parameters_know_their_source() {
    let mut flags = SamplerOverrides::default();
    flags.set("temp", "0.2").unwrap();
    let model =
        SamplerOverrides::from_model(|key| (key == "general.sampling.top_k").then_some(20.0));
    let (params, sources) =
        SamplerParams::merge([(ParamSource::Flag, &flags), (ParamSource::Model, &model)]);
    let shown: Vec<String> = params
        .describe(&sources)
        .iter()
        .take(4)
        .map(|(n, v, s)| format!("{n}={v} ({s})"))
        .collect();
    assert_eq!(
        shown,
        [
            "temp=0.2 (flag)",
            "dynatemp_range=0 (builtin)",
            "dynatemp_exponent=1 (builtin)",
            "top_k=20 (model)"
        ]
    );
}
