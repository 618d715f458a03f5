//! What is written to the pool, byte by byte as the reference stores it.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod common;

use common::pages::{F16, Q4_0, Q8_0, Stored, stored};
use common::*;
use half::f16;
use lemma_cuda::ops::{self, Heads, Tier, TierTable, Tiers};
use lemma_cuda::{Buffer, Gpu, PAGE, Stretch};
use lemma_quant::pages::KvType::{self, K4, V2};

const SHAPES: [(usize, usize); 5] = [(1, 32), (2, 64), (3, 96), (2, 128), (1, 256)];

fn heads((n_head_kv, head_dim): (usize, usize)) -> Heads {
    Heads {
        n_head: 2 * n_head_kv,
        n_head_kv,
        head_dim,
    }
}

/// Numbers of many sizes: channels far larger and far smaller than others, channels and tokens that are all the same or zero, ties,
/// what is not a number.
fn awkward(rng: &mut Rng, h: Heads, slots: usize) -> Vec<f32> {
    let (n_kv, d) = (h.n_head_kv, h.head_dim);
    let mut x = rng.normals(slots * PAGE * n_kv * d);
    for (i, v) in x.iter_mut().enumerate() {
        let (channel, token) = (i % d, i / (n_kv * d));
        match channel % 16 {
            1 => *v *= 40.0,
            2 => *v *= 1e-3,
            3 => *v = 0.75,
            4 => *v = 0.0,
            5 => *v *= 1e-6,
            6 => *v = (*v * 2.0).round() / 2.0,
            _ => {}
        }
        match token % 16 {
            3 => *v = 0.0,
            5 => *v = -1.5,
            7 => *v *= 100.0,
            9 => *v = -0.0,
            _ => {}
        }
    }
    for (at, v) in [
        (40, f32::NAN),
        (170, f32::INFINITY),
        (200, -f32::INFINITY),
        (300, 65504.0),
        (333, -65504.0),
    ] {
        x[at] = v;
    }
    x
}

struct Pool {
    parts: [Stored; 2],
    buffers: [Buffer; 2],
    types: [KvType; 2],
}

impl Pool {
    fn new(gpu: &Gpu, h: Heads, types: [KvType; 2], values: [Vec<f32>; 2]) -> Self {
        let [k, v] = values;
        let parts = [stored(types[0], h, k), stored(types[1], h, v)];
        let buffers = [&parts[0], &parts[1]].map(|p| gpu.buffer_of(&p.bytes).expect("upload"));
        Self {
            parts,
            buffers,
            types,
        }
    }

    fn tier(&self) -> Tier {
        Tier {
            k: self.buffers[0].view(),
            v: self.buffers[1].view(),
            ty_k: self.types[0],
            ty_v: self.types[1],
        }
    }

    fn check(&self, gpu: &Gpu, want: &[Stored; 2], what: &str) {
        for (part, want) in want.iter().enumerate() {
            let got = gpu.read(self.buffers[part].view()).expect("read");
            let half = self.types[part] == F16;
            let pairs = got.chunks(2).zip(want.bytes.chunks(2));
            // What is not a number has many names in half precision.
            let wrong = pairs.enumerate().find(|(_, (a, b))| {
                let nan = |x: &[u8]| f16::from_le_bytes([x[0], x[1]]).is_nan();
                a != b && !(half && nan(a) && nan(b))
            });
            assert_eq!(wrong, None, "{what}: part {part}, {:?}", self.types);
        }
    }
}

#[test]
fn tokens_are_stored_as_the_reference_does() {
    for gpu in gpus() {
        let mut rng = Rng::new(31);
        for shape in SHAPES {
            let h = heads(shape);
            let width = h.n_head_kv * h.head_dim;
            // The last without values, as latent keys are.
            for (types, n_part) in [
                ([Q8_0, Q8_0], 2),
                ([Q4_0, Q4_0], 2),
                ([F16, Q8_0], 2),
                ([Q4_0, F16], 2),
                ([Q8_0, F16], 1),
            ] {
                let slots = 3;
                let all = [(); 2].map(|()| awkward(&mut rng, h, slots));
                let nothing = [(); 2].map(|()| vec![0.0; all[0].len()]);
                let pool = Pool::new(&gpu, h, types, nothing.clone());
                // Tokens in any order, some places left as they are.
                let places: Vec<u32> = (0..(slots * PAGE) as u32)
                    .filter(|p| p % 7 != 2)
                    .rev()
                    .collect();
                let mut want = nothing;
                let mut rows = [Vec::new(), Vec::new()];
                for &p in &places {
                    for ((want, all), rows) in want.iter_mut().zip(&all).zip(&mut rows).take(n_part)
                    {
                        let at = p as usize * width..(p as usize + 1) * width;
                        want[at.clone()].copy_from_slice(&all[at.clone()]);
                        rows.extend_from_slice(&all[at]);
                    }
                }
                let (k, v) = (upload(&gpu, &rows[0]), upload(&gpu, &rows[1]));
                let at = upload_u32(&gpu, &places);
                let kv = [k.view(), v.view()];
                ops::store_rows(
                    &gpu,
                    h,
                    &pool.tier(),
                    kv[0],
                    (n_part == 2).then_some(kv[1]),
                    at.view(),
                    places.len(),
                )
                .expect("store");
                let [wk, wv] = want;
                let want = [stored(types[0], h, wk), stored(types[1], h, wv)];
                pool.check(&gpu, &want, &format!("{gpu:?} {h:?}"));
            }
        }
    }
}

#[test]
fn pages_move_as_the_reference_stores_them() {
    let lists: [&[[KvType; 2]]; 6] = [
        &[[F16; 2], [Q8_0; 2], [K4, V2]],
        &[[F16; 2], [K4, V2]],
        &[[F16; 2], [Q8_0; 2], [Q8_0, Q4_0], [Q4_0; 2]],
        &[[Q8_0; 2], [Q4_0; 2], [K4, V2]],
        &[[F16, Q8_0], [K4, Q8_0], [K4, V2]],
        &[[Q4_0; 2], [K4, V2]],
    ];
    for gpu in gpus() {
        let mut rng = Rng::new(32);
        for shape in SHAPES {
            let h = heads(shape);
            let page = PAGE * h.n_head_kv * h.head_dim;
            // Latent keys have no values beside them: those stay where they are.
            for (list, n_part) in lists.into_iter().flat_map(|list| [(list, 2), (list, 1)]) {
                let slots = 4;
                // Two regions, of which the second is meant.
                let mut pools: Vec<Vec<Pool>> = Vec::new();
                for _ in 0..2 {
                    let tier = |types: &[KvType; 2]| {
                        let values = [(); 2].map(|()| awkward(&mut rng, h, slots));
                        Pool::new(&gpu, h, *types, values)
                    };
                    pools.push(list.iter().map(tier).collect());
                }
                let regions: Vec<Tiers> = pools
                    .iter()
                    .map(|region| {
                        let mut tiers = [None; ops::MAX_TIERS];
                        for (to, pool) in tiers.iter_mut().zip(region) {
                            *to = Some(pool.tier());
                        }
                        tiers
                    })
                    .collect();
                let table = TierTable::new(&gpu, h, &regions).expect("table");
                // A page of each tier moves to the next, one within the first; then one of them moves on, in a launch of its own.
                let mut moves: Vec<[(u8, u32); 2]> = (1..list.len() as u8)
                    .map(|tier| [(tier - 1, 2), (tier, 1)])
                    .collect();
                moves.push([(0, 3), (0, 0)]);
                let mut launches = vec![moves];
                if list.len() > 2 {
                    launches.push(vec![[(1, 1), (2, 3)]]);
                }
                for moves in launches {
                    let words: Vec<u32> = moves
                        .iter()
                        .flat_map(|m| {
                            [
                                1,
                                ops::slot_of(m[0].0, m[0].1),
                                ops::slot_of(m[1].0, m[1].1),
                                0,
                            ]
                        })
                        .collect();
                    let words = upload_u32(&gpu, &words);
                    ops::move_pages(&gpu, h, &table, words.view(), moves.len(), n_part)
                        .expect("moves");
                    for [from, to] in moves {
                        for part in 0..n_part {
                            let tiers = &mut pools[1];
                            let [old, new] =
                                [from, to].map(|(tier, _)| tiers[usize::from(tier)].types[part]);
                            let source = &tiers[usize::from(from.0)].parts[part];
                            let mut page = Stored {
                                values: source.values[from.1 as usize * page..][..page].to_vec(),
                                bytes: Vec::new(),
                            };
                            let size = source.bytes.len() / slots;
                            page.bytes = source.bytes[from.1 as usize * size..][..size].to_vec();
                            if old != new {
                                page = stored(new, h, page.values);
                            }
                            let target = &mut tiers[usize::from(to.0)].parts[part];
                            let size = target.bytes.len() / slots;
                            target.bytes[to.1 as usize * size..][..size]
                                .copy_from_slice(&page.bytes);
                            let at = to.1 as usize * page.values.len();
                            target.values[at..][..page.values.len()].copy_from_slice(&page.values);
                        }
                    }
                    for pool in pools.iter().flatten() {
                        pool.check(&gpu, &pool.parts, &format!("{gpu:?} {h:?} {list:?}"));
                    }
                }
            }
        }
    }
}

#[test]
fn memory_comes_and_goes_at_the_same_address() {
    for gpu in gpus() {
        let bytes = (9 << 20) + 48;
        let mut all = Stretch::new(&gpu, bytes).expect("addresses");
        assert_eq!(all.view().bytes(), bytes);
        let at = all.view();
        let what: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8 + 1).collect();
        let from = gpu.buffer_of(&what).expect("upload");
        for (n, kept) in [
            (100, 0),
            (bytes, 100),
            (3 << 20, 100),
            (bytes, 3 << 20),
            (0, 0),
            (bytes, 0usize),
        ] {
            all.back(n).expect("memory");
            assert!(all.backed().bytes() >= n && all.view() == at);
            if gpu.can_stretch() {
                assert!(all.backed().bytes() < n + (4 << 20));
            }
            if n == 0 {
                continue;
            }
            let got = gpu.read(at.slice(0, n)).expect("read");
            assert!(got[..kept] == what[..kept], "{gpu:?}: what was there stays");
            // Pieces are larger than what was asked for, so that more may stay.
            let fresh = |i: usize| got[i] == 0 || got[i] == what[i];
            assert!((kept..n).all(fresh), "{gpu:?}: what is new is zero");
            gpu.copy(at.slice(0, n), from.view().slice(0, n))
                .expect("copy");
        }
    }
}
