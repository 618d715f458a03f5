//! The small operations and mixtures of experts, on every instruction set and for several numbers of workers.

mod common;
use common::*;
use lemma_cpu::{
    Act, Activation, Experts, Gating, Isa, Limits, Mat, MoeBias, MoeFfn, MulMat, Pass, RopeMode,
    Shared,
};
use lemma_quant::GgmlType;

/// Runs `step` everywhere; returns what is in `out` afterwards, which must be the same for any number of workers.
fn everywhere(
    start: &[f32],
    limits: Limits,
    step: impl Fn(&Pass<'_>, &Shared<f32>) + Sync,
) -> Vec<(Isa, Vec<f32>)> {
    Isa::available()
        .map(|isa| {
            let results: Vec<Vec<f32>> = [1, 2, 3, 5]
                .into_iter()
                .map(|nth| {
                    let mut out = Shared::from_slice(start);
                    ops(isa, nth, limits).run(|p| step(p, &out));
                    out.as_mut_slice().to_vec()
                })
                .collect();
            assert!(results.iter().all(|r| *r == results[0]), "{isa}");
            (isa, results.into_iter().next().unwrap())
        })
        .collect()
}

fn check(results: Vec<(Isa, Vec<f32>)>, want: &[f64], bound: f64) {
    for (isa, got) in results {
        let error = nmse(&got, want);
        assert!(error < bound, "{isa}: {error:e}");
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

#[test]
fn rms_norm_in_place_and_not() {
    let mut random = Random(21);
    for (n_rows, width) in [(1, 7), (5, 64), (12, 128), (3, 1536)] {
        let (x, w) = (random.vec(n_rows * width), random.vec(width));
        let want: Vec<f64> = x
            .chunks_exact(width)
            .flat_map(|row| {
                let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                let scale = 1.0 / (mean + 1e-6).sqrt();
                row.iter()
                    .zip(&w)
                    .map(move |(x, w)| f64::from(*x) * scale * f64::from(*w))
            })
            .collect();
        let in_place = everywhere(&x, Limits::default(), |p, x| {
            p.rms_norm(x, x, &w, 1e-6, n_rows)
        });
        let source = Shared::from_slice(&x);
        let apart = everywhere(&vec![0.0; x.len()], Limits::default(), |p, out| {
            p.rms_norm(out, &source, &w, 1e-6, n_rows);
        });
        assert_eq!(in_place, apart);
        check(in_place.clone(), &want, 1e-13);
        let rows = x.chunks(width);
        let centered: Vec<f64> = rows
            .flat_map(|row| {
                let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
                row.iter().map(move |x| f64::from(*x) - mean)
            })
            .collect();
        let got = everywhere(&x, Limits::default(), |p, x| p.center(x, width, n_rows));
        check(got, &centered, 1e-13);
        // What lies behind stays.
        let longer = |rows: &[f32]| -> Vec<f32> {
            let rows = rows.chunks(width);
            rows.flat_map(|row| [row, &[7.0, 8.0]].concat()).collect()
        };
        let first = everywhere(&longer(&x), Limits::default(), |p, x| {
            p.rms_norm_first(x, &w, 1e-6, width + 2, n_rows);
        });
        for ((_, first), (_, whole)) in first.iter().zip(&in_place) {
            assert_eq!(*first, longer(whole));
        }
    }
}

#[test]
fn activation_functions() {
    let mut random = Random(22);
    for n in [1, 15, 16, 1000] {
        let (x, y): (Vec<f32>, Vec<f32>) = (0..n)
            .map(|_| (random.unit() * 12.0, random.unit()))
            .unzip();
        let up = Shared::from_slice(&y);
        let pairs = || {
            x.iter()
                .zip(&y)
                .map(|(x, y)| (f64::from(*x), f64::from(*y)))
        };
        let swiglu: Vec<f64> = pairs().map(|(x, y)| silu(x) * y).collect();
        check(
            everywhere(&x, Limits::default(), |p, g| p.swiglu(g, g, &up, n)),
            &swiglu,
            1e-13,
        );
        let geglu: Vec<f64> = pairs().map(|(x, y)| gelu(x) * y).collect();
        check(
            everywhere(&x, Limits::default(), |p, g| p.geglu(g, g, &up, n)),
            &geglu,
            1e-12,
        );
        let plain: Vec<f64> = pairs().map(|(x, _)| gelu(x)).collect();
        check(
            everywhere(&x, Limits::default(), |p, g| p.gelu(g, g, n)),
            &plain,
            1e-12,
        );
        let sum: Vec<f64> = pairs().map(|(x, y)| x + y).collect();
        check(
            everywhere(&x, Limits::default(), |p, x| p.add(x, &up, n)),
            &sum,
            1e-13,
        );
        let scaled: Vec<f64> = pairs().map(|(x, _)| 0.3 * x).collect();
        check(
            everywhere(&x, Limits::default(), |p, x| p.scale(x, 0.3, n)),
            &scaled,
            1e-13,
        );
        let by = Activation::Gelu;
        check(
            everywhere(&x, Limits::default(), |p, x| p.activate(x, by, n)),
            &plain,
            1e-12,
        );
        let squared: Vec<f64> = pairs().map(|(x, _)| x.max(0.0).powi(2)).collect();
        let by = Activation::ReluSqr;
        check(
            everywhere(&x, Limits::default(), |p, x| p.activate(x, by, n)),
            &squared,
            1e-13,
        );
        let bent = |x: f64| match x > 0.0 {
            true => 0.7 * x * x + 0.5 * x,
            false => 1.3 * (x.min(-0.01).exp_m1() - x) + 0.5 * x,
        };
        let bent: Vec<f64> = pairs().map(|(x, _)| bent(x)).collect();
        let by = Activation::Xielu {
            alpha_n: 1.3,
            alpha_p: 0.7,
            beta: 0.5,
            eps: -0.01,
        };
        check(
            everywhere(&x, Limits::default(), |p, x| p.activate(x, by, n)),
            &bent,
            1e-12,
        );
        let capped: Vec<f64> = pairs().map(|(x, _)| 5.0 * (x / 5.0).tanh()).collect();
        check(
            everywhere(&x, Limits::default(), |p, x| p.softcap(x, 5.0, n)),
            &capped,
            1e-12,
        );
    }
}

#[test]
fn extreme_inputs_of_activation_functions() {
    let x = [f32::INFINITY, -100.0, 1e30, -1e30, 200.0, -200.0, 0.0, -0.0];
    let one = Shared::from_slice(&[1.0; 8]);
    for (isa, y) in everywhere(&x, Limits::default(), |p, x| p.swiglu(x, x, &one, 8)) {
        assert_eq!(y[0], f32::INFINITY, "{isa}");
        assert_eq!((y[2], y[4], y[6]), (1e30, 200.0, 0.0), "{isa}");
        assert!(y[3].abs() < 1e-5 && y[5].abs() < 1e-30, "{isa}: {y:?}");
    }
}

#[test]
fn rope_of_both_kinds() {
    let mut random = Random(23);
    let (n_tokens, n_head, head_dim) = (3, 5, 32);
    for n_rot in [32, 20] {
        let x = random.vec(n_tokens * n_head * head_dim);
        let angles = random.vec(n_tokens * n_rot / 2);
        let table: Vec<f32> = angles.iter().flat_map(|a| [a.cos(), a.sin()]).collect();
        for mode in [RopeMode::Norm, RopeMode::NeoX] {
            // From the first value on, or to the last.
            let first = if mode == RopeMode::Norm {
                head_dim - n_rot
            } else {
                0
            };
            let mut want: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            for (i, head) in want.chunks_exact_mut(head_dim).enumerate() {
                let head = &mut head[first..];
                for j in 0..n_rot / 2 {
                    let at = (i / n_head) * n_rot / 2 + j;
                    let (cos, sin) = (f64::from(table[2 * at]), f64::from(table[2 * at + 1]));
                    let (a, b) = match mode {
                        RopeMode::Norm => (2 * j, 2 * j + 1),
                        RopeMode::NeoX => (j, j + n_rot / 2),
                    };
                    (head[a], head[b]) =
                        (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                }
            }
            let got = everywhere(&x, Limits::default(), |p, x| {
                p.rope(x, n_tokens, n_head, head_dim, first, n_rot, &table, mode);
            });
            check(got, &want, 1e-13);
        }
    }
}

#[test]
fn rows_are_taken_and_compared() {
    let mut random = Random(24);
    let data = random.vec(10 * 64);
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0, GgmlType::Q4_0] {
        let bytes = quantize(ty, &data);
        let all = dequantize(ty, &bytes, data.len());
        let tokens = [3, 0, 9, 3];
        for (_, got) in everywhere(&[0.0; 4 * 64], Limits::default(), |p, out| {
            p.embed(out, Mat::new(ty, 64, 10, &bytes), &tokens);
        }) {
            for (got, t) in got.chunks_exact(64).zip(tokens) {
                assert_eq!(got, &all[t as usize * 64..][..64]);
            }
        }
    }
    let x = Shared::from_slice(&data);
    for (_, got) in everywhere(&[0.0; 2 * 64], Limits::default(), |p, out| {
        p.copy_rows(out, &x, &[7, 2], 64);
        p.add_bias(out, &data[..64], 2);
        assert_eq!(
            p.argmax(&x, 640),
            (0..640)
                .max_by(|a, b| data[*a].total_cmp(&data[*b]))
                .unwrap()
        );
    }) {
        assert!((0..64).all(|i| got[i] == data[7 * 64 + i] + data[i]));
    }
}

/// Against the definition, computed from the decoded weights.
#[test]
fn mixtures_of_experts() {
    let mut random = Random(25);
    let (n_embd, n_ff, n_used) = (64, 96, 3);
    for n_tokens in [1, 2, 9] {
        for (gating, norm_topk, with_bias, act, n_expert, groups) in [
            (Gating::Softmax, true, false, Act::Swiglu, 7, (1, 1)),
            (Gating::Softmax, false, false, Act::Swiglu, 7, (1, 1)),
            (Gating::Sigmoid, true, true, Act::Swiglu, 7, (1, 1)),
            (Gating::Softmax, true, true, Act::SwigluOai, 7, (1, 1)),
            (Gating::Sigmoid, true, true, Act::Swiglu, 12, (4, 2)),
            (Gating::Softmax, false, false, Act::Swiglu, 12, (3, 1)),
            (Gating::Sigmoid, true, true, Act::ReluSqr, 7, (1, 1)),
            (Gating::Softmax, true, false, Act::Reglu, 7, (1, 1)),
            (Gating::Sigmoid, false, false, Act::Swiglu, 7, (1, 1)),
            (Gating::Softmax, true, false, Act::Geglu, 7, (1, 1)),
        ] {
            let ty = GgmlType::F16;
            let router = quantize(GgmlType::F32, &random.vec(n_expert * n_embd));
            let [gate, up, down] =
                [0; 3].map(|_| quantize(ty, &random.vec(n_expert * n_ff * n_embd)));
            let choice_bias = random.vec(n_expert);
            let scales = random.vec(n_expert);
            // Gates and what goes up, expert by expert.
            let size = gate.len() / n_expert;
            let halves = gate.chunks(size).zip(up.chunks(size));
            let both: Vec<u8> = halves.flat_map(|(g, u)| [g, u].concat()).collect();
            let both = Experts {
                ty,
                n_in: n_embd,
                n_out: 2 * n_ff,
                n_expert,
                first: 0,
                stride: 2 * n_ff,
                data: &both,
            };
            let in_one = act == Act::Geglu;
            let [r, g, u, d] = [1, n_ff, n_ff, n_embd].map(|n| random.vec(n_expert * n));
            let bias = (act == Act::SwigluOai).then_some(MoeBias {
                router: &r,
                gate: &g,
                up: &u,
                down: &d,
            });
            let x = random.vec(n_tokens * n_embd);
            let start = random.vec(n_tokens * n_embd);
            let experts = |n_in, n_out, data| Experts {
                ty,
                n_in,
                n_out,
                n_expert,
                first: 0,
                stride: n_out,
                data,
            };
            let f = MoeFfn {
                weighs_input: gating == Gating::Sigmoid && !norm_topk,
                router: Mat::new(GgmlType::F32, n_embd, n_expert, &router),
                gate: match in_one {
                    true => Some(both.half(0)),
                    false => (act != Act::ReluSqr).then_some(experts(n_embd, n_ff, &gate)),
                },
                up: match in_one {
                    true => both.half(1),
                    false => experts(n_embd, n_ff, &up),
                },
                down: experts(n_ff, n_embd, &down),
                down_scale: in_one.then_some(&scales),
                clamp: (act == Act::Swiglu && n_expert == 12).then_some(0.3),
                bias,
                act,
                n_expert_used: n_used,
                gating,
                choice_bias: with_bias.then_some(&choice_bias[..]),
                n_group: groups.0,
                n_group_used: groups.1,
                norm_topk,
                weights_scale: 1.5,
            };
            let want = moe(&f, &x, &start);
            let limits = Limits {
                max_tokens: n_tokens,
                max_width: n_ff,
                n_ff_expert: n_ff,
                n_embd_expert: n_embd,
                n_expert,
                n_expert_used: n_used,
                ..Limits::default()
            };
            let input = Shared::from_slice(&x);
            let got = everywhere(&start, limits, |p, out| {
                p.moe_ffn(out, &input, &f, n_tokens)
            });
            check(got.clone(), &want, 1e-12);
            // The same by logits that are there already, and nothing of what was in the output before.
            if bias.is_none() {
                let logits = Shared::zeroed(n_tokens * n_expert);
                let routed = everywhere(&start, limits, |p, out| {
                    let router = MulMat {
                        out: &logits,
                        out_add: false,
                        w: f.router,
                        bias: None,
                    };
                    p.mul_mat(router, &input, n_tokens);
                    p.moe_ffn_routed(out, [&input, &logits], &f, n_tokens);
                });
                let alone: Vec<f64> = (want.iter().zip(&start))
                    .map(|(y, x)| y - f64::from(*x))
                    .collect();
                check(routed, &alone, 1e-11);
            }
            // A token gets what it gets alone.
            for (t, (x, start)) in (x.chunks(n_embd)).zip(start.chunks(n_embd)).enumerate() {
                let input = Shared::from_slice(x);
                let alone = everywhere(start, limits, |p, out| p.moe_ffn(out, &input, &f, 1));
                for ((isa, alone), (_, all)) in alone.iter().zip(&got) {
                    assert_eq!(alone[..], all[t * n_embd..][..n_embd], "{isa} token {t}");
                }
            }
        }
    }
}

fn moe(f: &MoeFfn<'_>, x: &[f32], start: &[f32]) -> Vec<f64> {
    let n_embd = f.up.n_in;
    let times = |w: Mat<'_>, x: &[f64], bias: Option<&[f32]>| -> Vec<f64> {
        let row = |r| dequantize(w.ty, w.row(r), w.n_in);
        let product = |r| -> f64 { row(r).iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum() };
        let bias = |r: usize| bias.map_or(0.0, |b| f64::from(b[r]));
        (0..w.n_out).map(|r| product(r) + bias(r)).collect()
    };
    let mut out: Vec<f64> = start.iter().map(|x| f64::from(*x)).collect();
    for (x, out) in x.chunks_exact(n_embd).zip(out.chunks_exact_mut(n_embd)) {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let logits = times(f.router, &x, f.bias.map(|b| b.router));
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        let p: Vec<f64> = logits
            .iter()
            .map(|l| match f.gating {
                Gating::Softmax => l.exp() / total,
                Gating::Sigmoid => 1.0 / (1.0 + (-l).exp()),
            })
            .collect();
        let rank = |i: usize| p[i] + f.choice_bias.map_or(0.0, |b| f64::from(b[i]));
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|a, b| rank(*b).total_cmp(&rank(*a)));
        let size = p.len() / f.n_group;
        let worth = |group: usize| -> f64 {
            let best = order.iter().filter(|i| *i / size == group).take(2);
            best.map(|i| rank(*i)).sum()
        };
        let mut groups: Vec<usize> = (0..f.n_group).collect();
        groups.sort_by(|a, b| worth(*b).total_cmp(&worth(*a)));
        let open = |i: &usize| groups[..f.n_group_used].contains(&(i / size));
        let order: Vec<usize> = order.iter().copied().filter(open).collect();
        let chosen = &order[..f.n_expert_used];
        let sum: f64 = chosen.iter().map(|e| p[*e]).sum();
        for e in chosen {
            let weight = p[*e] / if f.norm_topk { sum } else { 1.0 } * f64::from(f.weights_scale);
            let weight = weight * f.down_scale.map_or(1.0, |s| f64::from(s[*e]));
            let (x, weight): (Vec<f64>, f64) = match f.weighs_input {
                true => (x.iter().map(|x| weight * x).collect(), 1.0),
                false => (x.clone(), weight),
            };
            let part = |i: usize| {
                let all = f.bias.map(|b| [b.gate, b.up, b.down][i])?;
                let n = all.len() / f.up.n_expert;
                Some(&all[e * n..(e + 1) * n])
            };
            let up = times(f.up.expert(*e), &x, part(1));
            let gate = match f.gate {
                Some(w) => times(w.expert(*e), &x, part(0)),
                None => vec![f64::NAN; up.len()],
            };
            let act = |(g, u): (&f64, &f64)| match f.act {
                Act::Swiglu => {
                    let most = f.clamp.map_or(f64::INFINITY, f64::from);
                    silu(*g).min(most) * u.clamp(-most, most)
                }
                Act::Geglu => {
                    let inner = 0.797_884_560_802_865_4 * g * (1.0 + 0.044_715 * g * g);
                    0.5 * g * (1.0 + inner.tanh()) * u
                }
                Act::ReluSqr => u.max(0.0).powi(2),
                Act::Reglu => g.max(0.0) * u,
                Act::SwigluOai => {
                    let g = g.min(7.0);
                    g / (1.0 + (-1.702 * g).exp()) * (u.clamp(-7.0, 7.0) + 1.0)
                }
            };
            let hidden: Vec<f64> = gate.iter().zip(&up).map(act).collect();
            for (out, y) in out
                .iter_mut()
                .zip(times(f.down.expert(*e), &hidden, part(2)))
            {
                *out += weight * y;
            }
        }
    }
    out
}

#[test]
#[cfg(debug_assertions)]
fn workers_that_disagree_are_found() {
    let x = Shared::from_slice(&[1.0; 64]);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        ops(Isa::Scalar, 2, Limits::default()).run(|p| p.scale(&x, 1.0 + p.ith() as f32, 64));
    }));
    assert!(result.is_err());
}
