//! Pages that are stored anew as other types.

mod common;
use common::*;
use lemma_cpu::{Attention, Isa, KvLayer, KvShape, Limits, Move, PAGE, PageRef, Place, Shared};
use lemma_quant::GgmlType;
use lemma_quant::pages::KvType;

const HEADS: usize = 3;
const SLOTS: usize = 8;

fn layer(ty_k: KvType, ty_v: KvType, dim: usize) -> KvLayer {
    let shape = KvShape {
        ty_k,
        ty_v,
        values_in_keys: false,
        n_head_kv: HEADS,
        head_dim_k: dim,
        head_dim_v: dim,
    };
    KvLayer::new(shape, SLOTS)
}

#[test]
fn attention_reads_pages_that_have_moved() {
    let mut random = Random(21);
    let rows = |ty: GgmlType| KvType::from(ty);
    let f32s = [rows(GgmlType::F32); 2];
    for (dim, second, third) in [
        (64, [rows(GgmlType::Q8_0); 2], [KvType::K4, KvType::V2]),
        (
            128,
            [rows(GgmlType::Q5_0), rows(GgmlType::Q4_0)],
            [KvType::K4, KvType::V2],
        ),
        (
            32,
            [KvType::K4, rows(GgmlType::Q8_0)],
            [rows(GgmlType::Q4_0), KvType::V2],
        ),
        (96, [rows(GgmlType::Q8_0); 2], [rows(GgmlType::Q4_0); 2]),
    ] {
        for isa in Isa::available() {
            for nth in [1, 2, 4] {
                let types = [f32s, second, third];
                let pool = types.map(|[k, v]| layer(k, v, dim));
                let n = 4 * PAGE;
                let (k, v) = (random.vec(n * HEADS * dim), random.vec(n * HEADS * dim));
                let places: Vec<_> = (0..n as u32)
                    .map(|t| Place {
                        slot: 2 * (t / PAGE as u32),
                        row: t % PAGE as u32,
                    })
                    .collect();
                let limits = Limits {
                    n_head: 2 * HEADS,
                    head_dim: dim,
                    max_pages: 4,
                    ..Limits::default()
                };
                let mut ops = ops(isa, nth, limits);
                let shared = (Shared::from_slice(&k), Shared::from_slice(&v));
                ops.run(|p| p.kv_store(&pool[0], &shared.0, &shared.1, &places));
                // Pages 0 and 2 go to the second tier, then 0 to the third, and 1 takes its place; all in one go.
                let to = |from, slot: u32, to, new: u32| Move {
                    from,
                    to,
                    from_token: slot * PAGE as u32,
                    to_token: new * PAGE as u32,
                    planes: (0, HEADS),
                };
                let moves = [
                    to(0, 0, 1, 3),
                    to(0, 4, 1, 5),
                    to(1, 3, 2, 1),
                    to(0, 2, 1, 3),
                ];
                ops.run(|p| p.kv_move(&pool, &moves, PAGE));
                let at = [(2, 1), (1, 3), (1, 5), (0, 6)];
                let through: [&[[KvType; 2]]; 4] = [&[second, third], &[second], &[second], &[]];
                // The same values in a pool of f32.
                let mut want = [k, v];
                for (part, values) in want.iter_mut().enumerate() {
                    for (page, types) in through.iter().enumerate() {
                        for head in 0..HEADS {
                            let at = |t: usize| ((page * PAGE + t) * HEADS + head) * dim;
                            let mut rows: Vec<_> =
                                (0..PAGE).map(|t| values[at(t)..][..dim].to_vec()).collect();
                            types.iter().for_each(|ty| leave(ty[part], &mut rows));
                            for (t, row) in rows.iter().enumerate() {
                                values[at(t)..][..dim].copy_from_slice(row);
                            }
                        }
                    }
                }
                let plain = layer(f32s[0], f32s[1], dim);
                let want = want.map(|x| Shared::from_slice(&x));
                ops.run(|p| p.kv_store(&plain, &want[0], &want[1], &places));
                let page = |i: usize, (tier, slot)| PageRef {
                    tier,
                    slot,
                    row: 0,
                    first_pos: (i * PAGE) as u32,
                    len: PAGE as u32,
                };
                let moved: Vec<_> = (0..4).map(|i| page(i, at[i])).collect();
                let stayed: Vec<_> = (0..4).map(|i| page(i, (0, 2 * i as u32))).collect();
                for q_pos in [&[100][..], &[40, 41, 100]] {
                    let q = Shared::from_slice(&random.vec(q_pos.len() * 2 * HEADS * dim));
                    let mut attend = |pool: &[KvLayer], pages: &[PageRef]| {
                        let mut out = Shared::zeroed(q.len());
                        let a = Attention {
                            n_head: 2 * HEADS,
                            n_head_kv: HEADS,
                            pages,
                            tables: &[],
                            keep: None,
                            q_pos,
                            scale: 0.1,
                            sinks: None,
                            softcap: None,
                            window: None,
                            mass: None,
                        };
                        ops.run(|p| p.attention(&out, &q, pool, &a));
                        out.as_mut_slice().to_vec()
                    };
                    let got = attend(&pool, &moved);
                    let want = attend(std::slice::from_ref(&plain), &stayed);
                    // Attention multiplies small numbers with rounded ones, those of `q4_0` with such of 8 bits.
                    let q4_0 = KvType::from(GgmlType::Q4_0);
                    let limit = match types.as_flattened().contains(&q4_0) {
                        true => 1e-5,
                        false => 1e-7,
                    };
                    let want: Vec<_> = want.iter().map(|x| f64::from(*x)).collect();
                    let error = nmse(&got, &want);
                    assert!(error < limit, "{dim} {types:?} on {isa}: {error:e}");
                }
            }
        }
    }
}

/// A pool whose values are in its keys, beside one that stores both and has the same numbers in them.
#[test]
fn keys_that_hold_values_move() {
    let mut random = Random(23);
    let (dim_k, dim_v, n) = (96, 64, 2 * PAGE);
    let (f16, q8_0) = (GgmlType::F16.into(), GgmlType::Q8_0.into());
    for types in [[f16, q8_0], [f16, KvType::K4], [q8_0, KvType::K4]] {
        let k = random.vec(n * dim_k);
        let v: Vec<f32> = k.chunks(dim_k).flat_map(|k| k[..dim_v].to_vec()).collect();
        let q = Shared::from_slice(&random.vec(3 * dim_k));
        let outs = [true, false].map(|values_in_keys| {
            let pool = types.map(|ty| {
                let shape = KvShape {
                    ty_k: ty,
                    ty_v: ty,
                    values_in_keys,
                    n_head_kv: 1,
                    head_dim_k: dim_k,
                    head_dim_v: dim_v,
                };
                KvLayer::new(shape, 2)
            });
            let place = |t: usize| Place {
                slot: (t / PAGE) as u32,
                row: (t % PAGE) as u32,
            };
            let places: Vec<_> = (0..n).map(place).collect();
            let page = |tier, slot, first_pos| PageRef {
                tier,
                slot,
                row: 0,
                first_pos,
                len: PAGE as u32,
            };
            let pages = [page(1, 1, 0), page(0, 1, PAGE as u32)];
            let down = Move {
                from: 0,
                to: 1,
                from_token: 0,
                to_token: PAGE as u32,
                planes: (0, 1),
            };
            let limits = Limits {
                n_head: 3,
                head_dim: dim_k,
                max_pages: 2,
                ..Limits::default()
            };
            let (k, v) = (Shared::from_slice(&k), Shared::from_slice(&v));
            let mut out = Shared::zeroed(3 * dim_v);
            ops(Isa::detect(), 2, limits).run(|p| {
                p.kv_store(&pool[0], &k, &v, &places);
                p.kv_move(&pool, &[down], PAGE);
                let a = Attention {
                    n_head: 3,
                    n_head_kv: 1,
                    pages: &pages,
                    tables: &[],
                    keep: None,
                    q_pos: &[n as u32],
                    scale: 0.2,
                    sinks: None,
                    softcap: None,
                    window: None,
                    mass: None,
                };
                p.attention(&out, &q, &pool, &a);
            });
            out.as_mut_slice().to_vec()
        });
        assert!(
            outs[0] == outs[1] && outs[0].iter().any(|x| *x != 0.0),
            "{types:?}"
        );
    }
}
