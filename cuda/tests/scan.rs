//! State spaces and short convolutions: the convolutions, the scan, norms of groups.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::*;
use lemma_cuda::ops::{self, Quant, ScanHeads, SsmConv, SsmScan};

/// Passes of different lengths, one after the other, from a position on: the last inputs of a pass are seen by the next.
#[test]
fn convolutions_look_back_over_passes() {
    for gpu in gpus() {
        let mut rng = Rng::new(32);
        for (width, d_conv, biased, pos, passes) in [
            (7, 2, false, 0, vec![1, 1, 3]),
            (130, 4, true, 0, vec![2, 1, 1, 1, 20]),
            (256, 4, false, 5, vec![9, 1, 40]),
            (40, 8, true, 0, vec![3, 17, 2]),
            (64, 8, false, 100, vec![1, 8, 9]),
            (300, 3, true, 0, vec![33]),
            (96, 3, false, 0, vec![4, 1, 1, 7]),
        ] {
            for gated in [false, true] {
                let w = rng.normals(d_conv * width);
                let bias = rng.normals(if biased { width } else { 0 });
                let mut past = rng.normals((d_conv - 1) * width);
                let wb = upload(&gpu, &[w.clone(), bias.clone()].concat());
                let state = upload(&gpu, &past);
                if pos == 0 {
                    past.fill(0.0);
                }
                let mut at = pos;
                for n in passes.clone() {
                    let [x, before, behind] = [0; 3].map(|_| rng.normals(n * width));
                    let [xb, before_b, behind_b] = [&x, &before, &behind].map(|x| upload(&gpu, x));
                    let out = poisoned(&gpu, n * width);
                    let pos = upload_u32(&gpu, &[at]);
                    let call = SsmConv {
                        out: out.view(),
                        x: xb.view(),
                        w: wb.view(),
                        past: state.view(),
                        pos: pos.view(),
                    };
                    let quantized = gated && width % 32 == 0;
                    let (q, ds) = (
                        poisoned(&gpu, n * width / 4 + 1),
                        poisoned(&gpu, n * width / 16 + 2),
                    );
                    let quant = quantized.then(|| Quant {
                        q: q.view(),
                        ds: ds.view(),
                    });
                    if gated {
                        let gates = [before_b.view(), behind_b.view()];
                        ops::short_conv(&gpu, &call, gates, quant, n, width, d_conv)
                            .expect("short_conv");
                    } else {
                        ops::ssm_conv(&gpu, &call, n, width, d_conv).expect("ssm_conv");
                    }
                    past.extend(
                        x.iter()
                            .zip(&before)
                            .map(|(x, b)| if gated { b * x } else { *x }),
                    );
                    let want: Vec<f64> = (0..n * width)
                        .map(|i| {
                            let (t, c) = (i / width, i % width);
                            let taps = (0..d_conv).map(|j| {
                                f64::from(past[(t + j) * width + c]) * f64::from(w[j * width + c])
                            });
                            let added = bias.get(c).map_or(0.0, |b| f64::from(*b));
                            let sum = taps.sum::<f64>() + added;
                            match gated {
                                true => f64::from(behind[i]) * sum,
                                false => sum * sigmoid(sum),
                            }
                        })
                        .collect();
                    let what = format!("{gpu:?} {width} x {n} at {at}, gated: {gated}");
                    let e = nmse(&read(&gpu, out.view()), &want);
                    assert!(e < 1e-11, "{what}: {e:e}");
                    if quantized {
                        let (q, ds) = (gpu.read(q.view()).expect("read"), read(&gpu, ds.view()));
                        let back: Vec<f32> = (q[..n * width].iter().enumerate())
                            .map(|(i, q)| f32::from(*q as i8) * ds[i / 32 * 2])
                            .collect();
                        let e = nmse(&back, &want);
                        assert!(e < 2e-4, "{what}, quantized: {e:e}");
                    }
                    past.drain(..n * width);
                    assert_eq!(read(&gpu, state.view()), past, "{what}");
                    at += n as u32;
                }
            }
        }
    }
}

/// The weights of a state space.
struct Weights {
    a: Vec<f32>,
    bias: Vec<f32>,
    d: Vec<f32>,
}

/// The scan in f64: outputs, and the state behind the tokens.
fn scan(h: ScanHeads, w: &Weights, xbc: &[f32], dt: &[f32], s: &mut [f64]) -> Vec<f64> {
    let (inner, bc) = (h.n_head * h.head_dim, h.n_group * h.d_state);
    let mut out = Vec::new();
    for (t, row) in xbc.chunks_exact(inner + 2 * bc).enumerate() {
        let row = f64s(row);
        for head in 0..h.n_head {
            let group = head / (h.n_head / h.n_group);
            let b = &row[inner + group * h.d_state..][..h.d_state];
            let c = &row[inner + bc + group * h.d_state..][..h.d_state];
            let dt = f64::from(dt[t * h.n_head + head]) + f64::from(w.bias[head]);
            let dt = if dt > 40.0 { dt } else { dt.exp().ln_1p() };
            let keeps = (dt * f64::from(w.a[head])).exp();
            for r in head * h.head_dim..(head + 1) * h.head_dim {
                let mut read = row[r] * f64::from(w.d[head]);
                let s = &mut s[r * h.d_state..][..h.d_state];
                for ((s, b), c) in s.iter_mut().zip(b).zip(c) {
                    *s = keeps * *s + dt * row[r] * b;
                    read += *s * c;
                }
                out.push(read);
            }
        }
    }
    out
}

/// In passes of different lengths; one that begins at position 0 knows nothing of the state that lies there, not even whether it is numbers.
#[test]
fn states_are_renewed_token_by_token() {
    for gpu in gpus() {
        let mut rng = Rng::new(41);
        let slow = is_slow(&gpu);
        for (n_head, head_dim, n_group, d_state, pos, passes) in [
            (1, 16, 1, 8, 0, vec![1, 1, 5]),
            (2, 16, 1, 32, 3, vec![1, 9]),
            (4, 32, 2, 40, 0, vec![7, 1, 1]),
            (3, 48, 3, 64, 1, vec![4]),
            (2, 80, 2, 128, 0, vec![70, 1, 33]),
            (4, 16, 4, 120, 2, vec![3, 2]),
            (2, 64, 1, 256, 0, vec![2, 1, 3]),
            (1, 32, 1, 136, 9, vec![1, 4]),
            (2, 16, 2, 264, 0, vec![3, 1]),
            (2, 16, 1, 600, 5, vec![1, 2]),
            (128, 80, 8, 128, 0, vec![if slow { 1 } else { 300 }, 1]),
        ] {
            let h = ScanHeads {
                n_head,
                head_dim,
                n_group,
                d_state,
            };
            let inner = n_head * head_dim;
            let width = inner + 2 * n_group * d_state;
            let w = Weights {
                a: rng
                    .normals(n_head)
                    .iter()
                    .map(|x| -x.abs() - 0.01)
                    .collect(),
                bias: rng.normals(n_head),
                d: rng.normals(n_head),
            };
            let [a, bias, d] = [&w.a, &w.bias, &w.d].map(|x| upload(&gpu, x));
            let (mut want_state, state) = match pos {
                0 => (vec![0.0; inner * d_state], poisoned(&gpu, inner * d_state)),
                _ => {
                    let state = rng.normals(inner * d_state);
                    (f64s(&state), upload(&gpu, &state))
                }
            };
            let mut at = pos;
            for n in passes {
                let xbc = rng.normals(n * width);
                let mut dt = rng.normals(n * n_head);
                // Far out on both sides.
                dt[0] = 30.0;
                if let Some(dt) = dt.get_mut(n_head) {
                    *dt = -60.0;
                }
                let [xb, db] = [&xbc, &dt].map(|x| upload(&gpu, x));
                let (out, pos) = (poisoned(&gpu, n * inner), upload_u32(&gpu, &[at]));
                let call = SsmScan {
                    out: out.view(),
                    xbc: xb.view(),
                    dt: db.view(),
                    state: state.view(),
                    pos: pos.view(),
                    a: a.view(),
                    bias: bias.view(),
                    d: d.view(),
                };
                ops::ssm_scan(&gpu, &call, h, n).expect("ssm_scan");
                let want = scan(h, &w, &xbc, &dt, &mut want_state);
                let e = nmse(&read(&gpu, out.view()), &want);
                assert!(e < 1e-11, "{gpu:?} {h:?} {n} at {at}: {e:e}");
                let e = nmse(&read(&gpu, state.view()), &want_state);
                assert!(e < 1e-11, "{gpu:?} {h:?} {n} at {at}, state: {e:e}");
                at += n as u32;
            }
        }
    }
}

#[test]
fn parts_of_rows_are_normed_behind_their_gates() {
    for gpu in gpus() {
        let mut rng = Rng::new(42);
        for (n, part, n_group) in [
            (1, 16, 1),
            (3, 48, 5),
            (1, 64, 3),
            (2, 1280, 8),
            (5, 4128, 2),
        ] {
            let width = part * n_group;
            let (x, up, w) = (
                rng.normals(n * width),
                rng.normals(n * width),
                rng.normals(width),
            );
            for gated in [false, true] {
                let [xb, ub, wb] = [&x, &up, &w].map(|x| upload(&gpu, x));
                let (q, ds) = (
                    poisoned(&gpu, n * width / 4),
                    poisoned(&gpu, n * width / 16),
                );
                let quantized = part % 32 == 0;
                let quant = quantized.then(|| Quant {
                    q: q.view(),
                    ds: ds.view(),
                });
                let up_view = gated.then(|| ub.view());
                ops::rms_norm_groups(&gpu, xb.view(), up_view, wb.view(), quant, n, n_group, 1e-5)
                    .expect("rms_norm_groups");
                let mut want = f64s(&x);
                for (i, v) in want.iter_mut().enumerate().filter(|_| gated) {
                    *v *= sigmoid(*v) * f64::from(up[i]);
                }
                for (i, part_of) in want.chunks_exact_mut(part).enumerate() {
                    let mean = part_of.iter().map(|x| x * x).sum::<f64>() / part as f64;
                    let scale = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
                    for (v, w) in part_of.iter_mut().zip(&w[i % n_group * part..]) {
                        *v *= scale * f64::from(*w);
                    }
                }
                let e = nmse(&read(&gpu, xb.view()), &want);
                assert!(
                    e < 1e-11,
                    "{gpu:?} {n_group} x {part}, gated: {gated}: {e:e}"
                );
                if quantized {
                    let (q, ds) = (gpu.read(q.view()).expect("read"), read(&gpu, ds.view()));
                    let back: Vec<f32> = (q.iter().enumerate())
                        .map(|(i, q)| f32::from(*q as i8) * ds[i / 32 * 2])
                        .collect();
                    let e = nmse(&back, &want);
                    assert!(e < 2e-4, "{gpu:?} {n_group} x {part}, quantized: {e:e}");
                }
            }
        }
    }
}
