//! Products of every type on every instruction set, against the scalar code of the formats.

mod common;
use common::*;
use lemma_cpu::{Experts, Isa, Limits, Mat, MulMat, Shared};
use lemma_quant::GgmlType;

fn weight_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL.iter().copied().filter(|ty| {
        ty.traits().vec_dot.is_some() && !matches!(ty, GgmlType::Q8_1 | GgmlType::Q8_K)
    })
}

/// Random weights: quantized, or blocks of random bytes where there is no quantizer.
fn weights(ty: GgmlType, random: &mut Random, n: usize) -> Vec<u8> {
    if ty.traits().quantize_row.is_some() {
        return quantize(ty, &random.vec(n));
    }
    let mut bytes: Vec<u8> = (0..row_size(ty, n)).map(|_| random.bits() as u8).collect();
    for block in bytes.chunks_exact_mut(ty.type_size()) {
        set_scales(ty, block);
        // Not the same for all.
        let byte = if ty == GgmlType::IQ1_M { 49 } else { 0 };
        block[byte] = random.bits() as u8;
    }
    bytes
}

fn limits(n_tokens: usize, n_in: usize) -> Limits {
    Limits {
        max_tokens: n_tokens,
        max_width: n_in,
        ..Limits::default()
    }
}

fn product(isa: Isa, nth: usize, w: Mat<'_>, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let n_tokens = x.len() / w.n_in;
    let mut ops = ops(isa, nth, limits(n_tokens, w.n_in));
    let x = Shared::from_slice(x);
    let mut out = Shared::zeroed(n_tokens * w.n_out);
    ops.run(|p| {
        p.mul_mat(
            MulMat {
                out: &out,
                out_add: false,
                w,
                bias,
            },
            &x,
            n_tokens,
        );
    });
    out.as_mut_slice().to_vec()
}

/// What the scalar code gives, in double precision over blocks, and the sum of magnitudes to compare errors with.
fn reference(w: Mat<'_>, x: &[f32]) -> Vec<(f64, f64)> {
    let traits = w.ty.traits();
    let n_tokens = x.len() / w.n_in;
    let mut out = Vec::new();
    let rows: Vec<_> = (0..w.n_out)
        .map(|r| dequantize(w.ty, w.row(r), w.n_in))
        .collect();
    let float = matches!(w.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
    for t in 0..n_tokens {
        let x = &x[t * w.n_in..(t + 1) * w.n_in];
        let quantized =
            (!float && traits.vec_dot.is_some()).then(|| quantize(traits.vec_dot_type, x));
        for (r, row) in rows.iter().enumerate() {
            let products = row
                .iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x));
            let magnitude = products.clone().map(f64::abs).sum::<f64>();
            let value = match &quantized {
                None => products.sum(),
                Some(x) => {
                    let (block, size) = (traits.block_size, traits.type_size);
                    let x_size = row_size(traits.vec_dot_type, block);
                    (0..w.n_in / block)
                        .map(|b| {
                            let w = &w.row(r)[b * size..(b + 1) * size];
                            let x = &x[b * x_size..(b + 1) * x_size];
                            f64::from(traits.vec_dot.unwrap()(block, w, x))
                        })
                        .sum()
                }
            };
            out.push((value, magnitude));
        }
    }
    out
}

fn check(w: Mat<'_>, x: &[f32]) {
    let exact = reference(w, x);
    // As ggml does, where there are products of such pairs.
    let rounded = (w.ty == GgmlType::BF16).then(|| {
        let x = dequantize(w.ty, &quantize(w.ty, x), x.len());
        reference(w, &x)
    });
    for isa in Isa::available() {
        let want = match &rounded {
            Some(rounded) if isa >= Isa::Avx512Bf16 => rounded,
            _ => &exact,
        };
        let got = product(isa, 2, w, x, None);
        for (i, (got, (want, magnitude))) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs();
            assert!(
                error <= 1e-6 * magnitude + 1e-30,
                "{} {isa} {}x{}, output {i}: {got} instead of {want} ({error:e} of {magnitude})",
                w.ty,
                w.n_in,
                w.n_out,
            );
        }
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "what was not tested")]
fn every_type_and_shape() {
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        println!("skipped: this machine has no {isa}");
    }
    let mut random = Random(1);
    for ty in weight_types() {
        let block = ty.block_size().max(32);
        for (n_out, n_tokens, blocks) in [
            (1, 1, 1),
            (5, 1, 3),
            (7, 2, 2),
            (37, 3, 3),
            (18, 9, 5),
            (33, 70, 1),
            (64, 16, 9),
            (19, 53, 2),
            (9, 1, 4),
            (21, 6, 10),
        ] {
            let n_in = block * blocks;
            let data = weights(ty, &mut random, n_out * n_in);
            check(
                Mat::new(ty, n_in, n_out, &data),
                &random.vec(n_tokens * n_in),
            );
        }
    }
}

/// Numbers need no blocks: rows that end within a vector, and rows of several blocks of columns.
#[test]
fn numbers_of_any_width() {
    let mut random = Random(4);
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        for n_in in [1, 17, 40, 72, 95, 1025, 3100] {
            for (n_out, n_tokens) in [(3, 1), (9, 2), (12, 4), (21, 7), (17, 25)] {
                let data = quantize(ty, &random.vec(n_out * n_in));
                check(
                    Mat::new(ty, n_in, n_out, &data),
                    &random.vec(n_tokens * n_in),
                );
            }
        }
    }
}

/// What is left of wider activations stays out of narrower ones.
#[test]
fn nothing_is_left_of_wider_activations() {
    let mut random = Random(5);
    for isa in Isa::available() {
        let mut ops = ops(isa, 1, limits(1, 96));
        for (n_in, value) in [(96, f32::INFINITY), (72, 1.0)] {
            let data = quantize(GgmlType::BF16, &random.vec(4 * n_in));
            let w = Mat::new(GgmlType::BF16, n_in, 4, &data);
            let x = Shared::from_slice(&vec![value; n_in]);
            let mut out = Shared::zeroed(4);
            let product = MulMat {
                out: &out,
                out_add: false,
                w,
                bias: None,
            };
            ops.run(|p| p.mul_mat(product, &x, 1));
            let finite = out.as_mut_slice().iter().all(|y| y.is_finite());
            assert_eq!(finite, value.is_finite(), "{isa} {n_in}");
        }
    }
}

/// Quants, scales and activations as large as they get: nothing may saturate on the way.
#[test]
fn extremes() {
    for ty in weight_types().filter(|ty| ty.block_size() > 1 && ty.traits().vec_dot.is_some()) {
        let n_in = 2 * ty.block_size().max(32);
        for byte in [0x00, 0x7f, 0x80, 0xff, 0x88, 0x77, 0xf0, 0x0f] {
            let size = ty.type_size();
            let mut data = vec![byte; row_size(ty, n_in) * 5];
            // Scales are half-precision numbers at one of these places; all of them become 1 or so.
            for block in data.chunks_exact_mut(size) {
                set_scales(ty, block);
            }
            for sign in [1.0, -1.0] {
                for n_tokens in [1, 8, 50] {
                    let x: Vec<f32> = (0..n_tokens * n_in).map(|_| sign * 127.0).collect();
                    check(Mat::new(ty, n_in, 5, &data), &x);
                    let alternating: Vec<f32> = (0..n_tokens * n_in)
                        .map(|i| {
                            if i % 2 == 0 {
                                sign * 127.0
                            } else {
                                sign * -127.0
                            }
                        })
                        .collect();
                    check(Mat::new(ty, n_in, 5, &data), &alternating);
                }
            }
        }
    }
}

/// Every code of a scale, those that stand for no number too.
#[test]
fn scales_of_eight_bits() {
    let mut random = Random(10);
    let mut data = quantize(GgmlType::NVFP4, &random.vec(128 * 128));
    for (i, block) in data.chunks_exact_mut(36).enumerate() {
        for (j, d) in block[..4].iter_mut().enumerate() {
            *d = (4 * i + j) as u8;
        }
    }
    let w = Mat::new(GgmlType::NVFP4, 128, 128, &data);
    for n_tokens in [1, 5] {
        check(w, &random.vec(n_tokens * 128));
    }
}

/// Sets the scales of a block to 1 or so.
fn set_scales(ty: GgmlType, block: &mut [u8]) {
    let at: &[usize] = match ty {
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::MXFP4 => {
            block[0] = 127;
            &[]
        }
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 | GgmlType::IQ4_NL | GgmlType::IQ4_XS => {
            &[0]
        }
        GgmlType::IQ2_XXS
        | GgmlType::IQ2_XS
        | GgmlType::IQ2_S
        | GgmlType::IQ3_XXS
        | GgmlType::IQ3_S
        | GgmlType::IQ1_S => &[0],
        GgmlType::Q1_0 | GgmlType::Q2_0 => &[0],
        GgmlType::NVFP4 => {
            block[..4].fill(0x38);
            &[]
        }
        GgmlType::TQ1_0 => &[52],
        GgmlType::TQ2_0 => &[64],
        GgmlType::IQ1_M => {
            // The upper nibbles of four numbers.
            for (i, nibble) in [0x0, 0x0, 0xc, 0x3].into_iter().enumerate() {
                block[49 + 2 * i] = block[49 + 2 * i] & 0x0f | nibble << 4;
            }
            &[]
        }
        _ => {
            // No kernels of its own; some valid block.
            let mut random = Random(9);
            let x = random.vec(ty.block_size());
            block.copy_from_slice(&quantize(ty, &x));
            &[]
        }
    };
    for at in at {
        block[*at..at + 2].copy_from_slice(&[0x00, 0x3c]);
    }
}

/// A result depends on its row and token alone: not on how many are computed together, by how many workers, nor
/// (for quantized weights) with which vectors.
#[test]
fn results_do_not_depend_on_company() {
    let mut random = Random(2);
    for ty in weight_types() {
        let (n_in, n_out, n_tokens) = (ty.block_size().max(160) * 4, 77, 55);
        let data = weights(ty, &mut random, n_out * n_in);
        let w = Mat::new(ty, n_in, n_out, &data);
        let (x, bias) = (random.vec(n_tokens * n_in), random.vec(n_out));
        let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let mut by_isa = Vec::new();
        for isa in Isa::available() {
            let all = bits(product(isa, 1, w, &x, Some(&bias)));
            for nth in [2, 3, 5] {
                assert_eq!(
                    all,
                    bits(product(isa, nth, w, &x, Some(&bias))),
                    "{ty} {isa} x{nth}"
                );
            }
            for n in [1, 2, 3, 4, 5, 6, 7, 8, 13, 30] {
                for (x, want) in x.chunks_exact(n * n_in).zip(all.chunks_exact(n * n_out)) {
                    assert_eq!(
                        want,
                        bits(product(isa, 1, w, x, Some(&bias))),
                        "{ty} {isa} {n}"
                    );
                }
            }
            by_isa.push((isa, all));
        }
        let vector: Vec<_> = by_isa
            .iter()
            .filter(|(isa, _)| *isa != Isa::Scalar)
            .collect();
        let float = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        let same = vector.windows(2).all(|w| w[0].1 == w[1].1);
        assert!(float || same, "{ty} differs among vectors");
    }
}

#[test]
fn several_products_bias_and_residual() {
    let mut random = Random(3);
    let (n_in, n_tokens) = (512, 6);
    let shapes = [
        (GgmlType::Q4_K, 40),
        (GgmlType::Q6_K, 8),
        (GgmlType::Q8_0, 9),
        (GgmlType::F16, 3),
    ];
    let data: Vec<_> = shapes
        .iter()
        .map(|(ty, n)| quantize(*ty, &random.vec(n * n_in)))
        .collect();
    let bias = random.vec(40);
    let x = random.vec(n_tokens * n_in);
    for isa in Isa::available() {
        let mats: Vec<_> = shapes
            .iter()
            .zip(&data)
            .map(|((ty, n), d)| Mat::new(*ty, n_in, *n, d))
            .collect();
        let start = random.vec(n_tokens * 40);
        let out: Vec<_> = mats
            .iter()
            .map(|m| Shared::from_slice(&start[..n_tokens * m.n_out]))
            .collect();
        let shared_x = Shared::from_slice(&x);
        ops(isa, 3, limits(n_tokens, n_in)).run(|p| {
            let list: [MulMat<'_>; 4] = std::array::from_fn(|i| MulMat {
                out: &out[i],
                out_add: i == 0 || i == 3,
                w: mats[i],
                bias: (i == 0).then_some(&bias[..]),
            });
            p.mul_mats(&list, &shared_x, n_tokens);
        });
        for (i, mut out) in out.into_iter().enumerate() {
            let alone = product(isa, 1, mats[i], &x, (i == 0).then_some(&bias[..]));
            for (j, (got, want)) in out.as_mut_slice().iter().zip(alone).enumerate() {
                let want = if i == 0 || i == 3 {
                    start[j] + want
                } else {
                    want
                };
                assert_eq!(got.to_bits(), want.to_bits(), "{isa} product {i}");
            }
        }
    }
}

/// A matrix for each head gives what it gives alone, and what is left of a head comes behind.
#[test]
fn heads_have_matrices() {
    let mut random = Random(9);
    for ty in weight_types() {
        let block = ty.block_size();
        // Three blocks of 32 leave a group of four unfinished.
        let (n_in, n_out, n_head) = (block.max(96 / block * block), 37, 11);
        let data = weights(ty, &mut random, n_head * n_out * n_in);
        let w = Experts {
            ty,
            n_in,
            n_out,
            n_expert: n_head,
            first: 0,
            stride: n_out,
            data: &data,
        };
        for (n_tokens, rest) in [(1, 8), (1, 0), (2, 5), (7, 0), (19, 3)] {
            let x = random.vec(n_tokens * n_head * (n_in + rest));
            let head = |t: usize, h: usize| &x[(t * n_head + h) * (n_in + rest)..][..n_in + rest];
            for isa in Isa::available() {
                let mut want = vec![0.0; n_tokens * n_head * (n_out + rest)];
                for h in 0..n_head {
                    let x: Vec<f32> = (0..n_tokens)
                        .flat_map(|t| head(t, h)[..n_in].to_vec())
                        .collect();
                    let y = product(isa, 1, w.expert(h), &x, None);
                    for (t, y) in y.chunks(n_out).enumerate() {
                        let to = &mut want[(t * n_head + h) * (n_out + rest)..][..n_out + rest];
                        to[..n_out].copy_from_slice(y);
                        to[n_out..].copy_from_slice(&head(t, h)[n_in..]);
                    }
                }
                for nth in [1, 3] {
                    // Room for less than all heads, and for more.
                    for max_tokens in [n_tokens, 16 * n_tokens] {
                        let limits = Limits {
                            head_product: n_in.max(n_out),
                            ..limits(max_tokens, n_in)
                        };
                        let input = Shared::from_slice(&x);
                        let mut out = Shared::zeroed(want.len());
                        ops(isa, nth, limits)
                            .run(|p| p.mul_mat_heads(&out, &w, &input, rest, n_tokens));
                        assert!(out.as_mut_slice() == want, "{isa} {} {n_tokens}", ty.name());
                    }
                }
            }
        }
    }
}

/// The last rows of a file that ends with them, with nothing mapped behind: there whoever reads on is killed.
#[test]
fn nothing_is_read_behind_the_rows() {
    let mut random = Random(11);
    let path = std::env::temp_dir().join(format!("lemma-rows-{}", std::process::id()));
    for ty in weight_types() {
        for (n_out, blocks) in [(1, 1), (3, 2), (5, 4), (21, 10)] {
            let n_in = ty.block_size().max(32) * blocks;
            let data = weights(ty, &mut random, n_out * n_in);
            let len = data.len().next_multiple_of(1 << 16);
            let mut file = vec![0; len - data.len()];
            file.extend_from_slice(&data);
            std::fs::write(&path, &file).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            // SAFETY: the file is this test's, and nothing is read behind its end.
            let map = unsafe { memmap2::MmapOptions::new().len(len + (1 << 16)).map(&file) };
            let map = map.unwrap();
            for n_tokens in [1, 2, 5, 33] {
                let x = random.vec(n_tokens * n_in);
                for isa in Isa::available() {
                    let at_end = Mat::new(ty, n_in, n_out, &map[len - data.len()..len]);
                    let got = product(isa, 1, at_end, &x, None);
                    let want = product(isa, 1, Mat::new(ty, n_in, n_out, &data), &x, None);
                    assert_eq!(got, want, "{ty} {isa} {n_in}x{n_out}, {n_tokens} tokens");
                }
            }
        }
    }
    std::fs::remove_file(&path).unwrap();
}
