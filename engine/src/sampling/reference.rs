//! The same chain written the plain way, in f64, sorting and allocating at will: the oracle of the tests.

use super::SamplerParams;

type Dist = Vec<(u32, f64)>; // (id, logit), then (id, probability)

fn sorted(mut d: Dist) -> Dist {
    d.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    d
}

fn softmax(d: &Dist) -> Vec<f64> {
    let max = d.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
    let w: Vec<f64> = d.iter().map(|x| (x.1 - max).exp()).collect();
    let sum: f64 = w.iter().sum();
    w.iter().map(|x| x / sum).collect()
}

fn penalties(d: &mut Dist, p: &SamplerParams, history: &[u32]) {
    let n = if p.repeat_last_n < 0 {
        history.len()
    } else {
        history.len().min(p.repeat_last_n as usize)
    };
    let recent = &history[history.len() - n..];
    for (id, x) in d {
        let count = recent.iter().filter(|t| *t == id).count();
        if count > 0 {
            *x = if *x <= 0.0 {
                *x * f64::from(p.repeat_penalty)
            } else {
                *x / f64::from(p.repeat_penalty)
            };
            *x -= count as f64 * f64::from(p.frequency_penalty) + f64::from(p.presence_penalty);
        }
    }
}

/// Straight from the definition: for every candidate, the longest suffix of the text that occurs earlier and was
/// followed by it there. `texts` are the strings of the tokens.
fn dry(d: &mut Dist, p: &SamplerParams, history: &[u32], texts: &[&str]) {
    let n = if p.dry_penalty_last_n < 0 {
        history.len()
    } else {
        history.len().min(p.dry_penalty_last_n as usize)
    };
    if p.dry_multiplier == 0.0 || n <= p.dry_allowed_length as usize {
        return;
    }
    let h = &history[history.len() - n..];
    // The text after the last breaker, in tokens: a token in which a breaker ends is not part of it.
    let mut ends = Vec::new();
    let mut all = String::new();
    for &t in history {
        all.push_str(texts[t as usize]);
        ends.push(all.len());
    }
    let after = match p
        .dry_sequence_breakers
        .iter()
        .filter_map(|b| all.rfind(b.as_str()).map(|a| a + b.len()))
        .max()
    {
        Some(byte) => {
            let breaking = ends.iter().position(|&e| e >= byte).unwrap();
            history.len() - 1 - breaking
        }
        None => history.len(),
    };
    for (id, x) in d {
        if p.dry_sequence_breakers
            .iter()
            .any(|b| texts[*id as usize].contains(b.as_str()))
        {
            continue;
        }
        let mut longest = None;
        for at in 1..n {
            if h[at] != *id {
                continue;
            }
            // Longest common suffix of h[..at] and h.
            let len = (0..at)
                .take_while(|i| h[at - 1 - i] == h[n - 1 - i])
                .count()
                .min(after);
            if len >= p.dry_allowed_length as usize {
                longest = longest.max(Some(len));
            }
        }
        if let Some(len) = longest {
            *x -= f64::from(p.dry_multiplier)
                * f64::from(p.dry_base).powi(len as i32 - p.dry_allowed_length as i32);
        }
    }
}

fn top_n_sigma(d: Dist, n: f64) -> Dist {
    if n <= 0.0 {
        return d;
    }
    let mean = d.iter().map(|x| x.1).sum::<f64>() / d.len() as f64;
    let std = (d.iter().map(|x| (x.1 - mean).powi(2)).sum::<f64>() / d.len() as f64).sqrt();
    let max = d.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
    d.into_iter().filter(|x| x.1 >= max - n * std).collect()
}

fn typical(d: Dist, p: f64, min_keep: usize) -> Dist {
    if p >= 1.0 {
        return d;
    }
    let probs = softmax(&d);
    let entropy: f64 = probs
        .iter()
        .filter(|q| **q > 0.0)
        .map(|q| -q * q.ln())
        .sum();
    let mut order: Vec<usize> = (0..d.len()).collect();
    let shift = |i: &usize| (-probs[*i].ln() - entropy).abs();
    order.sort_by(|a, b| shift(a).total_cmp(&shift(b)).then(d[*a].0.cmp(&d[*b].0)));
    let mut mass = 0.0;
    let mut out = Vec::new();
    for i in order {
        out.push(d[i]);
        mass += probs[i];
        if mass > p && out.len() >= min_keep {
            break;
        }
    }
    sorted(out)
}

fn top_p(d: Dist, p: f64, min_keep: usize) -> Dist {
    if p >= 1.0 {
        return d;
    }
    let probs = softmax(&d);
    let mut mass = 0.0;
    let mut out = Vec::new();
    for (x, q) in d.into_iter().zip(probs) {
        out.push(x);
        mass += q;
        if mass + 1e-6 >= p && out.len() >= min_keep {
            break;
        }
    }
    out
}

fn min_p(d: Dist, p: f64, min_keep: usize) -> Dist {
    if p <= 0.0 {
        return d;
    }
    let floor = d[0].1 + p.min(1.0).ln();
    d.into_iter()
        .enumerate()
        .filter(|(i, x)| x.1 >= floor - 1e-9 || *i < min_keep)
        .map(|x| x.1)
        .collect()
}

fn xtc(d: Dist, threshold: f64, min_keep: usize) -> Dist {
    let probs = softmax(&d);
    let above = probs.iter().filter(|q| **q >= threshold).count();
    if threshold > 0.5 || above < 2 || d.len() - (above - 1) < min_keep {
        return d;
    }
    d[above - 1..].to_vec()
}

/// Final distribution, most probable first. XTC strikes if its probability is 1.
pub(super) fn distribution(
    logits: &[f32],
    p: &SamplerParams,
    history: &[u32],
    texts: &[&str],
) -> Dist {
    let mut d: Dist = logits
        .iter()
        .enumerate()
        .map(|(i, &x)| (i as u32, f64::from(x)))
        .collect();
    d.retain(|x| !x.1.is_nan() && x.1 != f64::NEG_INFINITY);
    for (id, bias) in &p.logit_bias {
        d.iter_mut()
            .filter(|x| x.0 == *id)
            .for_each(|x| x.1 += f64::from(*bias));
    }
    d.retain(|x| x.1 != f64::NEG_INFINITY);
    penalties(&mut d, p, history);
    dry(&mut d, p, history, texts);
    let mut d = sorted(top_n_sigma(d, f64::from(p.top_n_sigma)));
    if p.temp <= 0.0 {
        return vec![(d[0].0, 1.0)];
    }
    if p.top_k > 0 {
        d.truncate((p.top_k as usize).max(p.min_keep));
    }
    d = typical(d, f64::from(p.typical), p.min_keep);
    d = top_p(d, f64::from(p.top_p), p.min_keep);
    d = min_p(d, f64::from(p.min_p), p.min_keep);
    if p.xtc_probability >= 1.0 {
        d = xtc(d, f64::from(p.xtc_threshold), p.min_keep);
    }
    let mut temp = f64::from(p.temp);
    if p.dynatemp_range > 0.0 && d.len() > 1 {
        let entropy: f64 = softmax(&d)
            .iter()
            .filter(|q| **q > 0.0)
            .map(|q| -q * q.ln())
            .sum();
        let (low, high) = (
            (temp - f64::from(p.dynatemp_range)).max(0.0),
            temp + f64::from(p.dynatemp_range),
        );
        temp = low
            + (high - low) * (entropy / (d.len() as f64).ln()).powf(f64::from(p.dynatemp_exponent));
    }
    d.iter_mut().for_each(|x| x.1 /= temp);
    let probs = softmax(&d);
    d.iter().zip(probs).map(|(x, q)| (x.0, q)).collect()
}
