//! Attention and experts of a decode step that is one launch. Whole models go through such steps in the tests of other crates.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::pages::F16;
use common::pool::{POOLS, Pool, Rules, fits};
use common::weights::{Part, part};
use common::*;
use half::f16;
use lemma_cuda::ops::{Activation, Attention, Choice, Glu, Heads, Mode, Pairs, RopeStore, Store};
use lemma_cuda::step::{Attend, Builder, First, Inputs, Mixture, Norms, Products, Program, Shape};
use lemma_cuda::{Gpu, PAGE, Source, Uploader, Weight};
use lemma_quant::GgmlType;

const N_EMBD: usize = 64;

/// A step, or nothing on a device that is too old for one.
fn finished(gpu: &Gpu, b: Builder) -> Option<Program> {
    match b.finish().expect("driver") {
        Ok(program) => Some(program),
        Err(_) if gpu.info().sm < (9, 0) && !is_slow(gpu) => None,
        Err(why) => panic!("{why}"),
    }
}

/// Of a step that attends to nothing.
fn without_attention() -> Shape {
    Shape {
        heads: Heads {
            n_head: 1,
            n_head_kv: 1,
            head_dim: 8,
        },
        n_layer: 1,
        max_pages: 1,
        pairs: Pairs::Neighbours,
        n_rope: 1,
        mean: false,
        scale: 1.0,
    }
}

/// A matrix of f32, and what it is.
fn matrix(gpu: &Gpu, rng: &mut Rng, n_row: usize) -> (Weight, Vec<f32>) {
    let x: Vec<f32> = rng
        .normals(N_EMBD * n_row)
        .iter()
        .map(|x| x * 0.25)
        .collect();
    let data = bytes_of(&x);
    let source = Source {
        ty: GgmlType::F32,
        n_in: N_EMBD,
        n_row,
        data: &data,
    };
    let mut up = Uploader::new(gpu).expect("uploader");
    let w = up.upload(source).expect("upload");
    gpu.synchronize().expect("upload");
    (w, x)
}

fn product(w: &[f32], x: &[f32]) -> Vec<f32> {
    let dot = |row: &[f32]| -> f64 {
        let terms = row
            .iter()
            .zip(x)
            .map(|(a, b)| f64::from(*a) * f64::from(*b));
        terms.sum()
    };
    w.chunks_exact(x.len()).map(|row| dot(row) as f32).collect()
}

/// What happens to a head's queries and keys before attention.
#[derive(Clone, Copy, Debug)]
struct Before {
    norms: Option<Norms>,
    pairs: Option<Pairs>,
}

const EPS: f32 = 1e-6;

impl Before {
    /// Cosines and sines, those of pairs that do not rotate included.
    fn angles(self, d: usize) -> Vec<f32> {
        let rotating = match self.pairs {
            None => 0,
            Some(Pairs::Neighbours) => d / 2,
            Some(Pairs::Halves(n)) => n,
        };
        let angle = |i: usize| if i < rotating { 0.3 + i as f32 } else { 0.0 };
        // As YaRN has them, rotations change lengths.
        (0..d / 2)
            .flat_map(|i| {
                let grow = if i < rotating { 1.3 } else { 1.0 };
                [angle(i).cos(), angle(i).sin()].map(|x| grow * x)
            })
            .collect()
    }

    /// Of heads of `d`; the weights are as many as there are queries or keys.
    fn apply(self, x: &[f32], w: &[f32], d: usize) -> Vec<f32> {
        let mut all = x.to_vec();
        let scale = |x: &[f32]| {
            let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
            1.0 / (mean + EPS).sqrt()
        };
        let whole = scale(x);
        for (x, w) in all.chunks_exact_mut(d).zip(w.chunks_exact(d)) {
            let weigh = |x: &mut [f32], f: f32| {
                x.iter_mut().zip(w).for_each(|(x, w)| *x *= f * w);
            };
            match self.norms {
                Some(Norms::Heads) => weigh(x, scale(x)),
                Some(Norms::AllHeads) => weigh(x, whole),
                _ => {}
            }
            let angles = self.angles(d);
            for (i, cs) in angles.chunks_exact(2).enumerate() {
                let (a, b) = match self.pairs {
                    Some(Pairs::Neighbours) => (2 * i, 2 * i + 1),
                    Some(Pairs::Halves(n)) if i < n => (i, i + n),
                    _ => continue,
                };
                let (xa, xb) = (x[a], x[b]);
                (x[a], x[b]) = (xa * cs[0] - xb * cs[1], xa * cs[1] + xb * cs[0]);
            }
            if self.norms == Some(Norms::RotatedHeads) {
                weigh(x, scale(x));
            }
        }
        all
    }
}

#[test]
fn a_step_attends_to_pages_of_any_tier() {
    for gpu in gpus() {
        let mut rng = Rng::new(51);
        let shapes = [
            (4, 4, 64),
            (12, 2, 128),
            (9, 1, 32),
            (6, 2, 96),
            (5, 1, 64),
            (3, 3, 80),
        ];
        for (n_head, n_head_kv, head_dim) in shapes {
            let h = Heads {
                n_head,
                n_head_kv,
                head_dim,
            };
            let (d, slow) = (head_dim, is_slow(&gpu));
            let (embd, rows) = matrix(&gpu, &mut rng, 8);
            let (wq, q) = matrix(&gpu, &mut rng, n_head * d);
            let (wk, k) = matrix(&gpu, &mut rng, n_head_kv * d);
            let (wv, v) = matrix(&gpu, &mut rng, n_head_kv * d);
            // Steps attend in one launch where new pages are f16.
            let pools = POOLS.iter().filter(|p| fits(p, h) && p[0] == [F16; 2]);
            let sizes = [1, 2, 19, if slow { 40 } else { 600 }];
            let norms = [n_head, n_head_kv].map(|n| rng.normals(n * d));
            let norm_views = [0, 1].map(|i| gpu.buffer_of(&bytes_of(&norms[i])).expect("norm"));
            let (heads, rotated, all) = (Norms::Heads, Norms::RotatedHeads, Norms::AllHeads);
            let kinds = [
                (None, None),
                (Some(heads), Some(Pairs::Halves(d / 2))),
                (None, Some(Pairs::Neighbours)),
                (Some(all), Some(Pairs::Halves(d / 4))),
                (Some(rotated), Some(Pairs::Neighbours)),
                (Some(heads), Some(Pairs::Neighbours)),
                (Some(all), None),
                (Some(rotated), Some(Pairs::Halves(d / 2))),
                (Some(heads), Some(Pairs::Halves(d / 4))),
                (Some(all), Some(Pairs::Neighbours)),
                (Some(rotated), Some(Pairs::Halves(d / 4))),
            ];
            let mut kinds = kinds.into_iter().cycle();
            // Windows, and whether there are sinks.
            let bounds = [
                (None, false),
                (Some(40), true),
                (Some(1), false),
                (None, true),
                (Some(700), true),
                (None, false),
                (Some(17), false),
            ];
            let mut bounds = bounds.into_iter().cycle();
            let sinks = rng.normals(n_head);
            let sink_view = upload(&gpu, &sinks);
            for (types, n_pages) in pools.flat_map(|p| sizes.map(|n| (p, n))) {
                let (norms_of, pairs) = kinds.next().expect("a cycle");
                // Of norms that each head has for itself, all have the weights of the first.
                let weights = [0, 1].map(|i| match norms_of {
                    Some(Norms::AllHeads) => norms[i].clone(),
                    _ => norms[i][..d].repeat(norms[i].len() / d),
                });
                let (window, sunk) = bounds.next().expect("a cycle");
                let before = Before {
                    norms: norms_of,
                    pairs,
                };
                let token = rng.below(8);
                let rows_used = 1 + rng.below(PAGE);
                let mut pool = Pool::new(&gpu, &mut rng, h, types, n_pages, rows_used);
                if window.is_some() {
                    pool.close_up(7);
                }
                let (_, slot, first) = pool.pages[n_pages - 1];
                let pos = first + rows_used as u32 - 1;
                let place = slot * PAGE as u32 + rows_used as u32 - 1;
                let x = &rows[token * N_EMBD..][..N_EMBD];
                let [qx, kx, vx] = [&q, &k, &v].map(|w| product(w, x));
                let qx = before.apply(&qx, &weights[0], d);
                let kx = before.apply(&kx, &weights[1], d);
                // The row of the token is not there yet: the step computes and stores it.
                for (part, new) in pool.parts[0].iter_mut().zip([&kx, &vx]) {
                    let at = place as usize * n_head_kv * d;
                    for (to, x) in part.values[at..].iter_mut().zip(new) {
                        *to = f16::from_f32(*x).to_f32();
                    }
                }
                let zeros = |n: usize| poisoned(&gpu, n);
                let (xb, qb) = (zeros(N_EMBD), zeros(n_head * d));
                let (kb, vb, out) = (
                    zeros(n_head_kv * d),
                    zeros(n_head_kv * d),
                    zeros(n_head * d),
                );
                let table = upload_u32(&gpu, &pool.table());
                let state = upload_u32(&gpu, &[n_pages as u32, pos, place]);
                let scale = 1.0 / (d as f32).sqrt();
                let mass = zeros(n_pages);
                // The last of several rotations.
                let n_rope = 1 + token % 3;
                let mut b = Builder::new(
                    &gpu,
                    Shape {
                        heads: h,
                        n_layer: 1,
                        max_pages: n_pages,
                        pairs: pairs.unwrap_or(Pairs::Neighbours),
                        n_rope,
                        mean: false,
                        scale,
                    },
                );
                b.embed(xb.view(), &embd, 1.0);
                let parts = [
                    (&wq, None, qb.view()),
                    (&wk, None, kb.view()),
                    (&wv, None, vb.view()),
                ];
                b.products(&Products {
                    parts: &parts,
                    src: xb.view(),
                    first: First::Nothing,
                    norm: None,
                    mode: Mode::Store,
                });
                let first = pool.tiers[0].expect("a first tier");
                let angles = before.angles(d);
                let angle_view = gpu.buffer_of(&bytes_of(&angles)).expect("angles");
                let store = Store {
                    k: first.k,
                    v: first.v,
                    places: state.view().slice(8, 4),
                };
                let call = RopeStore {
                    q: qb.view(),
                    k: kb.view(),
                    v: vb.view(),
                    q_norm: norms_of.map(|_| (norm_views[0].view(), EPS)),
                    k_norm: norms_of.map(|_| (norm_views[1].view(), EPS)),
                    rope: pairs.map(|_| [angle_view.view(); 2]),
                    pairs: pairs.unwrap_or(Pairs::Neighbours),
                    store: Some(store),
                };
                let attention = Attention {
                    q: qb.view(),
                    tiers: pool.tiers,
                    pages: table.view(),
                    n_pages: state.view().slice(0, 4),
                    pos: state.view().slice(4, 4),
                    scale,
                    window,
                    cap: None,
                    sinks: sunk.then(|| sink_view.view()),
                };
                let at = Attend {
                    il: 0,
                    rope: n_rope - 1,
                    norms: norms_of.unwrap_or_default(),
                    weighed: true,
                };
                b.attend(at, out.view(), &call, &attention);
                b.weigh(mass.view());
                let Some(mut program) = finished(&gpu, b) else {
                    return;
                };
                program
                    .run(&Inputs {
                        pos,
                        token: Some(token as u32),
                        n_pages: &[n_pages as u32],
                        places: &[place],
                        rope: &[rng.normals((n_rope - 1) * d), angles.clone()].concat(),
                    })
                    .expect("step");
                gpu.synchronize().expect("step");
                let rules = Rules {
                    window,
                    sinks: if sunk { sinks.clone() } else { Vec::new() },
                    ..Rules::scaled(scale)
                };
                let what =
                    format!("{gpu:?} {h:?} {types:?} {n_pages} pages, {before:?}, {rules:?}");
                let (want, masses) = pool.reference(h, &qx, pos, &rules);
                let e = nmse(&read(&gpu, out.view()), &want);
                // Tensor cores round the weights of the values to f16.
                assert!(e < 1e-7, "{what}: {e:e}");
                let want: Vec<f64> = (0..n_pages)
                    .map(|p| masses.iter().map(|m| m[p]).fold(0.0, f64::max))
                    .collect();
                let e = nmse(&read(&gpu, mass.view()), &want);
                assert!(e < 1e-7, "{what}, masses: {e:e}");
                let row = 2 * n_head_kv * d;
                let stored = gpu
                    .read(first.k.slice(place as usize * row, row))
                    .expect("read");
                let stored = stored
                    .chunks_exact(2)
                    .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
                let kx: Vec<f64> = kx.iter().map(|x| f64::from(*x)).collect();
                let e = nmse(&stored.collect::<Vec<_>>(), &kx);
                assert!(e < 1e-6, "{what}, the key: {e:e}");
            }
        }
    }
}

#[test]
fn a_step_asks_the_experts_that_it_chooses() {
    use GgmlType::{F16, F32, IQ4_XS, MXFP4, Q4_K, Q6_K, Q8_0};
    for gpu in gpus() {
        let mut rng = Rng::new(77);
        let shapes = [
            // Types of gate and up, and of down; elements, elements of an expert, experts, those of a token.
            ([F32, F32], 64, 40, 5, 2),
            ([MXFP4, MXFP4], 96, 160, 32, 4),
            ([Q4_K, Q6_K], 256, 512, 9, 3),
            ([Q8_0, F16], 64, 32, 70, 8),
            ([F32, Q8_0], 72, 96, 16, 16),
            ([IQ4_XS, MXFP4], 256, 64, 2, 1),
            ([MXFP4, MXFP4], 2880, 2880, 5, 4),
            ([Q4_K, Q6_K], 2048, 768, 12, 8),
        ];
        for (i, (types, n_in, n_ff, n_expert, n_used)) in shapes.into_iter().enumerate() {
            if is_slow(&gpu) && n_in > 1000 {
                continue;
            }
            let [ty, ty_down] = types;
            let (biased, even, leans) = (i % 2 == 1, i % 3 > 0, i % 4 > 1);
            let lean = rng.normals(n_expert);
            let lean_view = upload(&gpu, &lean);
            let choice = Choice {
                sigmoid: [2, 4, 5].contains(&i),
                bias: leans.then(|| lean_view.view()),
                norm: even,
                scale: if biased { 1.0 } else { 2.5 },
                ..Choice::SOFTMAX
            };
            let glu = if biased { Glu::SwigluOai } else { Glu::Swiglu };
            let embd = part(&gpu, &mut rng, F32, n_in, 3);
            let router = part(&gpu, &mut rng, F32, n_in, n_expert);
            let gate = part(&gpu, &mut rng, ty, n_in, n_ff * n_expert);
            let up = part(&gpu, &mut rng, ty, n_in, n_ff * n_expert);
            let down = part(&gpu, &mut rng, ty_down, n_ff, n_in * n_expert);
            let norm = rng.normals(n_in);
            let norm_view = upload(&gpu, &norm);
            let x = poisoned(&gpu, n_in);
            let (logits, hidden) = (poisoned(&gpu, n_expert), poisoned(&gpu, n_used * n_ff));
            let mut b = Builder::new(&gpu, without_attention());
            let of = |p: &Part| biased.then(|| p.bias_view.view());
            b.embed(x.view(), &embd.w, 1.0);
            b.experts(&Mixture {
                src: x.view(),
                first: First::Nothing,
                norm: Some((norm_view.view(), EPS)),
                router: (&router.w, of(&router)),
                gate: (&gate.w, of(&gate)),
                up: (&up.w, of(&up)),
                down: (&down.w, of(&down)),
                glu,
                n_used,
                choice,
                logits: logits.view(),
                hidden: hidden.view(),
                acc: x.view(),
            });
            let Some(mut program) = finished(&gpu, b) else {
                return;
            };
            // More than the two sets of places, so that every one is made ready again.
            let tokens: &[u32] = if n_in > 1000 { &[1] } else { &[1, 0, 2, 1, 2] };
            for &token in tokens {
                program
                    .run(&Inputs {
                        pos: 0,
                        token: Some(token),
                        n_pages: &[1],
                        places: &[0],
                        rope: &[0.0; 8],
                    })
                    .expect("step");
                gpu.synchronize().expect("step");
                let row = &embd.values[token as usize * n_in..][..n_in];
                let mean = row.iter().map(|x| x * x).sum::<f32>() / n_in as f32;
                let f = 1.0 / (mean + EPS).sqrt();
                let xn: Vec<f32> = row.iter().zip(&norm).map(|(x, w)| x * f * w).collect();
                let logits = router.product(0, n_expert, &xn, biased);
                let exp: f64 = logits.iter().map(|a| a.exp()).sum();
                let weight = |x: f64| match choice.sigmoid {
                    true => 1.0 / (1.0 + (-x).exp()),
                    false => x.exp() / exp,
                };
                let weights: Vec<f64> = logits.into_iter().map(weight).collect();
                let by = |e: usize| weights[e] + if leans { f64::from(lean[e]) } else { 0.0 };
                let mut all: Vec<usize> = (0..n_expert).collect();
                all.sort_by(|a, b| by(*b).total_cmp(&by(*a)));
                let chosen = &all[..n_used];
                let sum: f64 = chosen.iter().map(|e| weights[*e]).sum();
                let mut want: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                for &e in chosen {
                    let weight =
                        weights[e] * f64::from(choice.scale) / if even { sum } else { 1.0 };
                    let [g, u] = [&gate, &up].map(|p| p.product(e, n_ff, &xn, biased));
                    let h = g.iter().zip(&u).map(|(g, u)| gated(glu, *g, *u) as f32);
                    let h: Vec<f32> = h.collect();
                    for (to, y) in want.iter_mut().zip(down.product(e, n_in, &h, biased)) {
                        *to += weight * y;
                    }
                }
                // Activations are rounded to eight bits for quantized weights.
                let rounds = types.iter().any(|t| !matches!(t, F32 | F16));
                let limit = if rounds { 1e-3 } else { 1e-9 };
                let e = nmse(&read(&gpu, x.view()), &want);
                assert!(e < limit, "{gpu:?} {types:?} {n_used} of {n_expert}: {e:e}");
            }
        }
    }
}

/// `x`, normed.
fn normed(x: &[f64], w: &[f32]) -> Vec<f32> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let f = 1.0 / (mean + f64::from(EPS)).sqrt();
    let each = x.iter().zip(w).map(|(x, w)| (x * f * f64::from(*w)) as f32);
    each.collect()
}

#[test]
fn a_step_norms_what_blocks_give() {
    use GgmlType::{F16, F32, Q4_K, Q8_0};
    for gpu in gpus() {
        let mut rng = Rng::new(78);
        let shapes = [
            (F32, 64, 40),
            (Q8_0, 96, 32),
            (F16, 1032, 8),
            (Q4_K, 512, 256),
            (F32, 4096, 16),
            (F32, 4104, 8),
            (F16, 8192, 8),
        ];
        for (ty, n_in, n_ff) in shapes {
            // One that takes two units a thread.
            if is_slow(&gpu) && n_in > 2000 && n_in != 4104 {
                continue;
            }
            let embd = part(&gpu, &mut rng, F32, n_in, 3);
            let [first, second] = [0; 2].map(|_| part(&gpu, &mut rng, ty, n_in, n_in));
            let [gate, up] = [0; 2].map(|_| part(&gpu, &mut rng, ty, n_in, n_ff));
            let last = part(&gpu, &mut rng, F32, n_in, 5);
            let norms = [0; 2].map(|_| rng.normals(n_in));
            let views = norms.each_ref().map(|n| upload(&gpu, n));
            let room = |n| poisoned(&gpu, n);
            let (x, y, hidden, logits) = (room(n_in), room(n_in), room(n_ff), room(5));
            let mut b = Builder::new(&gpu, without_attention());
            let of = |p: &Part| Some(p.bias_view.view());
            let products =
                |b: &mut Builder, parts: &[_], src: &lemma_cuda::Buffer, first, norm, mode| {
                    b.products(&Products {
                        parts,
                        src: src.view(),
                        first,
                        norm,
                        mode,
                    });
                };
            let store = Mode::Store;
            b.embed(x.view(), &embd.w, 0.75);
            // x += 1.5 (first x + bias)
            let parts = [(&first.w, of(&first), y.view())];
            products(&mut b, &parts, &x, First::Nothing, None, store);
            b.scale_last(y.view(), 1.5);
            b.add_last(x.view(), y.view());
            // x += norm(second x + bias), by who reads the sum
            let parts = [(&second.w, of(&second), y.view())];
            products(&mut b, &parts, &x, First::Nothing, None, store);
            let parts = [
                (&gate.w, of(&gate), hidden.view()),
                (&up.w, of(&up), hidden.view()),
            ];
            let norm = |i: usize| (views[i].view(), EPS);
            let add = First::Add {
                x: y.view(),
                norm: norm(0).0,
                eps: EPS,
            };
            let geglu = Mode::Gated(Glu::Geglu);
            products(&mut b, &parts, &x, add, Some(norm(1)), geglu);
            // and by those who come after it.
            let parts = [(&last.w, None, logits.view())];
            let center = First::Center;
            products(&mut b, &parts, &x, center, Some(norm(0)), store);
            let by = Activation::Xielu {
                alpha_n: 0.3,
                alpha_p: 0.7,
                beta: 0.5,
                eps: -1e-6,
            };
            b.activate_last(logits.view(), by);
            b.scale_last(logits.view(), 0.25);
            let Some(mut program) = finished(&gpu, b) else {
                return;
            };
            for token in [1, 0, 2, 1] {
                program
                    .run(&Inputs {
                        pos: 0,
                        token: Some(token as u32),
                        n_pages: &[1],
                        places: &[0],
                        rope: &[0.0; 8],
                    })
                    .expect("step");
                gpu.synchronize().expect("step");
                let row = &embd.values[token * n_in..][..n_in];
                let mut at: Vec<f32> = row.iter().map(|x| x * 0.75).collect();
                let plus = |at: &mut Vec<f32>, y: &[f64]| {
                    at.iter_mut().zip(y).for_each(|(x, y)| *x += *y as f32);
                };
                let ya: Vec<f64> = first.product(0, n_in, &at, true);
                plus(&mut at, &ya.iter().map(|y| 1.5 * y).collect::<Vec<_>>());
                let yb = normed(&second.product(0, n_in, &at, true), &norms[0]);
                plus(
                    &mut at,
                    &yb.iter().map(|y| f64::from(*y)).collect::<Vec<_>>(),
                );
                let xn: Vec<f64> = at.iter().map(|x| f64::from(*x)).collect();
                let xn = normed(&xn, &norms[1]);
                let [g, u] = [&gate, &up].map(|p| p.product(0, n_ff, &xn, true));
                let want: Vec<f64> = g
                    .iter()
                    .zip(&u)
                    .map(|(g, u)| gated(Glu::Geglu, *g, *u))
                    .collect();
                // Activations are rounded to eight bits for quantized weights.
                let limit = if matches!(ty, F32 | F16) { 1e-9 } else { 1e-3 };
                let e = nmse(&read(&gpu, hidden.view()), &want);
                assert!(e < limit, "{gpu:?} {ty:?} {n_in}: {e:e}");
                let mean = at.iter().sum::<f32>() / n_in as f32;
                let xc: Vec<f64> = at.iter().map(|x| f64::from(x - mean)).collect();
                let xielu = |x: f64| match x > 0.0 {
                    true => 0.7 * x * x + 0.5 * x,
                    false => 0.3 * (x.min(-1e-6).exp() - 1.0 - x) + 0.5 * x,
                };
                let want = last.product(0, 5, &normed(&xc, &norms[0]), false);
                let want: Vec<f64> = want.iter().map(|y| 0.25 * xielu(*y)).collect();
                let e = nmse(&read(&gpu, logits.view()), &want);
                assert!(e < limit, "{gpu:?} {ty:?} {n_in}, the sum: {e:e}");
            }
        }
    }
}
