//! Attention over pages, against the definition in double precision.

mod common;
use common::*;
use lemma_cpu::{
    Attention, Isa, KvLayer, KvShape, Limits, Move, Ops, PAGE, PageRef, Place, Shared, Window,
};
use lemma_quant::GgmlType;
use lemma_quant::pages::KvType;

/// A layer with tokens in it: positions need not be contiguous from page to page.
struct Case {
    shape: KvShape,
    n_head: usize,
    pages: Vec<PageRef>,
    /// What is stored, as it comes back from the pool: `[page][row][head][dim]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    layer: KvLayer,
    q_pos: Vec<u32>,
    q: Vec<f32>,
    sinks: Option<Vec<f32>>,
    softcap: Option<f32>,
    window: Option<Window>,
}

const SCALE: f32 = 0.11;

impl Case {
    fn new(
        random: &mut Random,
        shape: KvShape,
        group: usize,
        n_pages: usize,
        q_pos: &[u32],
    ) -> Self {
        let n_slots = n_pages + 3;
        let layer = KvLayer::new(shape, n_slots);
        // Slots in no order; a gap in the positions before every third page.
        let mut slots: Vec<u32> = (0..n_slots as u32).collect();
        for i in (1..n_slots).rev() {
            slots.swap(i, random.below(i + 1));
        }
        let mut pages = Vec::new();
        let mut pos = 0;
        for (i, slot) in slots.iter().take(n_pages).enumerate() {
            let len = if i + 1 == n_pages {
                1 + random.below(PAGE) as u32
            } else {
                PAGE as u32
            };
            pages.push(PageRef {
                tier: 0,
                slot: *slot,
                row: 0,
                first_pos: pos,
                len,
            });
            pos += len + if i % 3 == 2 { 32 } else { 0 };
        }
        let places: Vec<Place> = pages
            .iter()
            .flat_map(|p| (0..p.len).map(|row| Place { slot: p.slot, row }))
            .collect();
        let n = places.len();
        let (row_k, row_v) = (
            shape.n_head_kv * shape.head_dim_k,
            shape.n_head_kv * shape.head_dim_v,
        );
        let k = Shared::from_slice(&random.vec(n * row_k));
        let v = Shared::from_slice(&random.vec(n * row_v));
        let limits = Limits {
            max_tokens: n,
            ..Limits::default()
        };
        let mut ops = ops(Isa::detect(), 3, limits);
        let (mut keys, mut values) = (vec![0.0; n * row_k], vec![0.0; n * row_v]);
        if !(shape.ty_k.rows().is_some() && shape.ty_v.rows().is_some()) {
            // Whole pages come from another pool.
            let rows = KvShape {
                ty_k: GgmlType::F32.into(),
                ty_v: GgmlType::F32.into(),
                ..shape
            };
            let mut pool = [KvLayer::new(rows, n_slots), layer];
            let moves: Vec<_> = pages
                .iter()
                .map(|p| Move {
                    from: 0,
                    to: 1,
                    from_token: p.slot * PAGE as u32,
                    to_token: p.slot * PAGE as u32,
                    planes: (0, shape.n_head_kv),
                })
                .collect();
            ops.run(|p| {
                p.kv_store(&pool[0], &k, &v, &places);
                p.kv_move(&pool, &moves, PAGE);
            });
            for (page, first) in pages.iter().zip((0..).step_by(PAGE)) {
                for head in 0..shape.n_head_kv {
                    let read = |ty: KvType, dim, read: &mut dyn FnMut(Place, usize, &mut [f32])| {
                        let mut rows = vec![vec![0.0; dim]; PAGE];
                        for (row, to) in (0..).zip(&mut rows) {
                            let slot = page.slot;
                            read(Place { slot, row }, head, to);
                        }
                        leave(ty, &mut rows);
                        rows
                    };
                    let from = &mut pool[0];
                    let k = read(shape.ty_k, shape.head_dim_k, &mut |p, h, to| {
                        from.read_k(p, h, to)
                    });
                    let v = read(shape.ty_v, shape.head_dim_v, &mut |p, h, to| {
                        from.read_v(p, h, to)
                    });
                    for row in 0..page.len as usize {
                        let at = (first + row) * shape.n_head_kv + head;
                        keys[at * shape.head_dim_k..][..shape.head_dim_k].copy_from_slice(&k[row]);
                        values[at * shape.head_dim_v..][..shape.head_dim_v]
                            .copy_from_slice(&v[row]);
                    }
                }
            }
            let [_, layer] = pool;
            return Self::with(random, layer, group, pages, [keys, values], q_pos);
        }
        let mut layer = layer;
        ops.run(|p| p.kv_store(&layer, &k, &v, &places));
        for (i, (place, head)) in places
            .iter()
            .flat_map(|p| (0..shape.n_head_kv).map(move |h| (*p, h)))
            .enumerate()
        {
            layer.read_k(
                place,
                head,
                &mut keys[i * shape.head_dim_k..][..shape.head_dim_k],
            );
            layer.read_v(
                place,
                head,
                &mut values[i * shape.head_dim_v..][..shape.head_dim_v],
            );
        }
        Self::with(random, layer, group, pages, [keys, values], q_pos)
    }

    fn with(
        random: &mut Random,
        layer: KvLayer,
        group: usize,
        pages: Vec<PageRef>,
        [keys, values]: [Vec<f32>; 2],
        q_pos: &[u32],
    ) -> Self {
        let shape = *layer.shape();
        let n_head = group * shape.n_head_kv;
        let q = random.vec(q_pos.len() * n_head * shape.head_dim_k);
        Self {
            shape,
            n_head,
            pages,
            keys,
            values,
            layer,
            q_pos: q_pos.to_vec(),
            q,
            sinks: None,
            softcap: None,
            window: None,
        }
    }

    /// Output and, for the last token, the weights of pages.
    fn run(&self, isa: Isa, nth: usize, tokens: std::ops::Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let limits = Limits {
            n_head: self.n_head,
            head_dim: self.shape.head_dim_k.max(self.shape.head_dim_v),
            max_pages: self.pages.len() + 1,
            ..Limits::default()
        };
        let row = self.n_head * self.shape.head_dim_k;
        let q = Shared::from_slice(&self.q[tokens.start * row..tokens.end * row]);
        let mut out = Shared::zeroed(tokens.len() * self.n_head * self.shape.head_dim_v);
        let mut mass = Shared::zeroed(self.n_head * self.pages.len());
        let mut ops: Ops = ops(isa, nth, limits);
        ops.run(|p| {
            let a = Attention {
                n_head: self.n_head,
                n_head_kv: self.shape.n_head_kv,
                tables: &[],
                keep: None,
                pages: &self.pages,
                q_pos: &self.q_pos[tokens.clone()],
                scale: SCALE,
                sinks: self.sinks.as_deref(),
                softcap: self.softcap,
                window: self.window,
                mass: Some(&mass),
            };
            p.attention(&out, &q, std::slice::from_ref(&self.layer), &a);
        });
        (out.as_mut_slice().to_vec(), mass.as_mut_slice().to_vec())
    }

    fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let (dim_k, dim_v) = (self.shape.head_dim_k, self.shape.head_dim_v);
        let mut out = Vec::new();
        let mut mass = Vec::new();
        for (t, pos) in self.q_pos.iter().enumerate() {
            for h in 0..self.n_head {
                let q = &self.q[(t * self.n_head + h) * dim_k..][..dim_k];
                let head = h / (self.n_head / self.shape.n_head_kv);
                let mut logits = Vec::new();
                let mut entry = 0;
                for page in &self.pages {
                    for row in 0..page.len {
                        let p = page.first_pos + row;
                        let seen = p <= *pos && self.window.is_none_or(|w| p >= w.oldest(*pos));
                        let k =
                            &self.keys[(entry * self.shape.n_head_kv + head) * dim_k..][..dim_k];
                        let mut logit: f64 = q
                            .iter()
                            .zip(k)
                            .map(|(q, k)| f64::from(*q) * f64::from(*k))
                            .sum();
                        logit *= f64::from(SCALE);
                        if let Some(cap) = self.softcap {
                            logit = f64::from(cap) * (logit / f64::from(cap)).tanh();
                        }
                        logits.push(if seen { logit } else { f64::NEG_INFINITY });
                        entry += 1;
                    }
                }
                let sink = self
                    .sinks
                    .as_ref()
                    .map_or(f64::NEG_INFINITY, |s| f64::from(s[h]));
                let max = logits.iter().copied().fold(sink, f64::max);
                let exp = |x: f64| {
                    if max > f64::NEG_INFINITY {
                        (x - max).exp()
                    } else {
                        0.0
                    }
                };
                let total = logits.iter().map(|x| exp(*x)).sum::<f64>() + exp(sink);
                let weight = |i: usize| {
                    if total > 0.0 {
                        exp(logits[i]) / total
                    } else {
                        0.0
                    }
                };
                for d in 0..dim_v {
                    let value = |i: usize| {
                        f64::from(self.values[(i * self.shape.n_head_kv + head) * dim_v + d])
                    };
                    out.push((0..logits.len()).map(|i| weight(i) * value(i)).sum());
                }
                if t + 1 == self.q_pos.len() {
                    let mut i = 0;
                    for page in &self.pages {
                        mass.push((0..page.len as usize).map(|j| weight(i + j)).sum());
                        i += page.len as usize;
                    }
                }
            }
        }
        (out, mass)
    }

    fn check(&self) {
        let is = |ty: KvType, some: &[GgmlType]| some.iter().any(|t| ty == (*t).into());
        let floats = [GgmlType::F32, GgmlType::F16, GgmlType::BF16];
        let nibbles = [GgmlType::Q4_0, GgmlType::Q4_1];
        let (ty_k, in_keys) = (self.shape.ty_k, self.shape.values_in_keys);
        let ty_v = [self.shape.ty_v, ty_k][usize::from(in_keys)];
        // What small numbers are multiplied with is rounded, to 16 bits, or to 8 if they have 4 and rows of their own.
        let (most, most_mass) = match (is(ty_k, &nibbles), is(ty_v, &nibbles)) {
            (true, _) => (1e-4, 3e-3),
            (false, true) => (3e-5, 1e-4),
            _ if is(ty_k, &floats) && is(ty_v, &floats) => (1e-12, 1e-6),
            _ => (1e-7, 1e-4),
        };
        self.check_within(most, most_mass);
    }

    /// Compares with the reference: normalised squared error, and error of a page's weight.
    fn check_within(&self, most: f64, most_mass: f64) {
        let n = self.q_pos.len();
        let (want, want_mass) = self.reference();
        for isa in Isa::available() {
            let (out, mass) = self.run(isa, 1, 0..n);
            let error = nmse(&out, &want);
            assert!(error < most, "{isa} {:?}: {error:e}", self.shape);
            for (got, want) in mass.iter().zip(&want_mass) {
                assert!(
                    (f64::from(*got) - want).abs() < most_mass,
                    "{isa}: mass {got} {want}"
                );
            }
            if self.sinks.is_none() && want_mass.iter().any(|m| *m > 0.0) {
                for head in mass.chunks_exact(self.pages.len()) {
                    assert!(
                        (head.iter().sum::<f32>() - 1.0).abs() < 1e-5,
                        "{isa}: {head:?}"
                    );
                }
            }
            for nth in [2, 3, 5] {
                assert_eq!(
                    (&out, &mass),
                    (&self.run(isa, nth, 0..n).0, &self.run(isa, nth, 0..n).1)
                );
            }
            // One token alone is the same as in a batch.
            let (alone, alone_mass) = self.run(isa, 2, n - 1..n);
            assert_eq!(alone, out[out.len() - alone.len()..]);
            assert_eq!(alone_mass, mass);
        }
    }
}

fn shape(ty_k: GgmlType, ty_v: GgmlType, n_head_kv: usize, dim_k: usize, dim_v: usize) -> KvShape {
    KvShape {
        ty_k: ty_k.into(),
        ty_v: ty_v.into(),
        values_in_keys: false,
        n_head_kv,
        head_dim_k: dim_k,
        head_dim_v: dim_v,
    }
}

#[test]
fn one_token() {
    let mut random = Random(11);
    for (ty_k, ty_v) in [
        (GgmlType::F32, GgmlType::F32),
        (GgmlType::F16, GgmlType::F16),
        (GgmlType::BF16, GgmlType::F16),
        (GgmlType::Q8_0, GgmlType::Q8_0),
        (GgmlType::Q8_0, GgmlType::Q4_0),
        (GgmlType::Q5_1, GgmlType::IQ4_NL),
    ] {
        for (n_head_kv, group, dim, n_pages) in [
            (1, 1, 64, 1),
            (2, 6, 128, 3),
            (3, 4, 96, 37),
            (1, 20, 32, 17),
            (2, 3, 128, 2),
            (1, 7, 96, 18),
            (1, 8, 64, 3),
        ] {
            let s = shape(ty_k, ty_v, n_head_kv, dim, dim);
            Case::new(&mut random, s, group, n_pages, &[100_000]).check();
        }
    }
}

/// One token, and several with a window and without.
fn check_some(random: &mut Random, s: KvShape, group: usize, n_pages: usize) {
    Case::new(random, s, group, n_pages, &[100_000]).check();
    let mut case = Case::new(random, s, group, n_pages, &[3, 19, 20, 41, 500]);
    case.window = Some(Window::Newest(30));
    case.softcap = Some(3.0);
    case.check();
    // Now the last token sees something too, in one block with others.
    case.window = None;
    case.check();
}

/// Pages that are stored as a whole, beside rows or not.
#[test]
fn whole_pages() {
    let mut random = Random(19);
    let (k4, v2) = (KvType::K4, KvType::V2);
    for (ty_k, ty_v) in [
        (k4, v2),
        (k4, GgmlType::Q4_0.into()),
        (GgmlType::F16.into(), v2),
    ] {
        for (n_head_kv, group, dim_k, dim_v, n_pages) in [
            (1, 1, 64, 64, 1),
            (2, 6, 128, 128, 3),
            (3, 4, 96, 32, 37),
            (1, 20, 32, 96, 17),
            (2, 3, 128, 64, 2),
            (1, 7, 96, 96, 18),
            (1, 8, 288, 160, 3),
            (2, 2, 32, 32, 4),
        ] {
            let s = KvShape {
                ty_k,
                ty_v,
                ..shape(GgmlType::F32, GgmlType::F32, n_head_kv, dim_k, dim_v)
            };
            check_some(&mut random, s, group, n_pages);
        }
    }
}

/// Queries and their channels far from the others, queries that are nothing.
#[test]
fn whole_pages_of_uneven_numbers() {
    let mut random = Random(20);
    let s = KvShape {
        ty_k: KvType::K4,
        ty_v: KvType::V2,
        ..shape(GgmlType::F32, GgmlType::F32, 1, 64, 64)
    };
    let mut case = Case::new(&mut random, s, 6, 40, &[100_000]);
    for (i, q) in case.q.iter_mut().enumerate() {
        *q *= [0.0, 1e-30, 1.0, 30.0, 1e-4, 3.0][i / 64];
        *q *= if i % 64 == 9 { 50.0 } else { 1.0 };
    }
    // Steps of keys move the greatest logits by tens.
    case.check_within(1e-6, 3e-3);
    case.q.fill(0.0);
    case.check();
}

/// Types of rows in blocks, in groups and widths of all kinds, one token and several.
#[test]
fn rows_in_blocks() {
    let mut random = Random(21);
    use GgmlType::{F16, IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
    let keys = [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q8_0, F16];
    let values = [Q8_0, Q4_0, Q5_1, Q4_1, IQ4_NL, Q5_0, F16, Q4_0];
    for (ty_k, ty_v) in keys.into_iter().zip(values) {
        for (n_head_kv, group, dim_k, dim_v, n_pages) in [
            (2, 6, 128, 128, 3),
            (3, 4, 96, 32, 37),
            (1, 20, 32, 96, 17),
            (1, 7, 288, 160, 5),
            (2, 2, 64, 64, 4),
        ] {
            let s = shape(ty_k, ty_v, n_head_kv, dim_k, dim_v);
            check_some(&mut random, s, group, n_pages);
        }
    }
}

/// Queries far from each other, weights of a page that are nearly all on one token, queries that are nothing or not numbers.
#[test]
fn rows_in_blocks_with_uneven_numbers() {
    let mut random = Random(22);
    for ty in [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q5_1] {
        let s = shape(ty, ty, 1, 64, 64);
        let mut case = Case::new(&mut random, s, 6, 40, &[100_000]);
        for (i, q) in case.q.iter_mut().enumerate() {
            *q *= [0.0, 1e-30, 1.0, 30.0, 1e-4, 3.0][i / 64];
            *q *= if i % 64 == 9 { 50.0 } else { 1.0 };
        }
        // Steps of keys move the greatest logits by tens; with 8 bits a channel that is larger than all others leaves these few steps.
        let small = ty == GgmlType::Q4_0;
        let (most, most_mass) = if small { (1e-2, 0.2) } else { (1e-6, 3e-3) };
        case.check_within(most, most_mass);
        case.q[5 * 64 + 3] = f32::NAN;
        for isa in Isa::available() {
            let (out, _) = case.run(isa, 2, 0..1);
            let (numbers, rest) = out.split_at(5 * 64);
            assert!(numbers.iter().all(|x| x.is_finite()), "{ty} on {isa}");
            assert!(
                rest.iter().all(|x| !x.is_finite() || *x == 0.0),
                "{ty} on {isa}"
            );
        }
        case.q.fill(0.0);
        case.check();
    }
}

#[test]
fn odd_dimensions() {
    let mut random = Random(12);
    for (dim_k, dim_v) in [(40, 72), (24, 16), (192, 128), (80, 80)] {
        let s = shape(GgmlType::F16, GgmlType::F16, 2, dim_k, dim_v);
        Case::new(&mut random, s, 3, 5, &[1000]).check();
        Case::new(&mut random, s, 3, 5, &[10, 11, 40, 41]).check();
    }
}

/// Keys of latent attention hold the values; a pool of keys alone.
#[test]
fn values_are_what_keys_begin_with() {
    let mut random = Random(18);
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0, GgmlType::Q4_0] {
        for (dim_k, dim_v, group) in [(96, 64, 16), (576, 512, 5), (64, 64, 1), (32, 24, 40)] {
            let s = KvShape {
                values_in_keys: true,
                ..shape(ty, GgmlType::IQ1_S, 1, dim_k, dim_v)
            };
            assert_eq!(s.slot_size(), PAGE * ty.row_size(dim_k).unwrap());
            for q_pos in [&[1000][..], &[10, 11, 40, 41]] {
                Case::new(&mut random, s, group, 5, q_pos).check();
            }
        }
    }
}

#[test]
fn batches_are_causal() {
    let mut random = Random(13);
    for (group, n_head_kv, n_pages) in [(1, 2, 4), (6, 2, 20), (17, 1, 3)] {
        let s = shape(GgmlType::F16, GgmlType::F32, n_head_kv, 64, 64);
        let last = Case::new(&mut random, s, group, n_pages, &[0]).pages[n_pages - 1].first_pos;
        for n_tokens in [2, 5, 16, 40] {
            let from = last.saturating_sub(n_tokens / 2);
            let q_pos: Vec<u32> = (from..from + n_tokens).collect();
            Case::new(&mut random, s, group, n_pages, &q_pos).check();
        }
    }
}

#[test]
fn window_sinks_and_softcap() {
    let mut random = Random(14);
    let s = shape(GgmlType::F16, GgmlType::F16, 2, 64, 64);
    let newest = [1, 16, 33, 100].map(Window::Newest);
    let chunks = [1, 7, 16, 40].map(Window::Chunk);
    for window in newest.into_iter().chain(chunks).map(Some).chain([None]) {
        for (with_sinks, softcap) in [(false, None), (false, Some(2.0)), (true, Some(2.0))] {
            for q_pos in [&[90][..], &[60, 61, 62, 90], &[400]] {
                let mut case = Case::new(&mut random, s, 4, 6, q_pos);
                case.window = window;
                case.softcap = softcap;
                case.sinks = with_sinks.then(|| random.vec(8));
                case.check();
            }
        }
    }
}

#[test]
fn nothing_seen_gives_zero() {
    let mut random = Random(15);
    let s = shape(GgmlType::F16, GgmlType::F16, 1, 32, 32);
    let mut case = Case::new(&mut random, s, 2, 3, &[5000]);
    case.window = Some(Window::Newest(8));
    let (out, mass) = case.run(Isa::detect(), 2, 0..1);
    assert!(out.iter().chain(&mass).all(|x| *x == 0.0));
}

/// What lies behind the end of a page is not looked at, whatever it is.
#[test]
fn leftovers_in_a_page_do_no_harm() {
    let mut random = Random(16);
    for (ty, bad) in [
        (GgmlType::Q8_0, f32::INFINITY),
        (GgmlType::Q4_0, 1e5),
        (GgmlType::Q5_1, f32::INFINITY),
        (GgmlType::IQ4_NL, 1e4),
        (GgmlType::F32, f32::NAN),
    ] {
        let s = shape(ty, ty, 1, 32, 32);
        let mut case = Case::new(&mut random, s, 2, 2, &[5000]);
        let last = *case.pages.last().unwrap();
        let place = |row| Place {
            slot: last.slot,
            row,
        };
        let at: Vec<_> = (last.len..PAGE as u32).map(place).collect();
        let bad = Shared::from_slice(&vec![bad; at.len() * 32]);
        ops(Isa::detect(), 1, Limits::default()).run(|p| p.kv_store(&case.layer, &bad, &bad, &at));
        case.check();
        case.layer.clear_page(last.slot);
        let mut row = [1.0; 32];
        case.layer.read_v(place(3), 0, &mut row);
        assert_eq!(row, [0.0; 32]);
    }
}

#[test]
fn pages_are_copied_and_pools_grow() {
    let mut random = Random(17);
    let s = shape(GgmlType::F16, GgmlType::Q8_0, 2, 32, 32);
    let mut case = Case::new(&mut random, s, 2, 4, &[5000]);
    let (want, _) = case.run(Isa::detect(), 1, 0..1);
    let n = case.layer.n_slots() as u32;
    case.layer.grow(n as usize + 4);
    let pairs: Vec<_> = case
        .pages
        .iter()
        .enumerate()
        .map(|(i, p)| (p.slot, n + i as u32))
        .collect();
    ops(Isa::detect(), 2, Limits::default()).run(|p| p.kv_copy_pages(&case.layer, &pairs));
    for (page, (from, to)) in case.pages.iter_mut().zip(&pairs) {
        page.slot = *to;
        case.layer.clear_page(*from);
    }
    assert_eq!(want, case.run(Isa::detect(), 1, 0..1).0);
    case.layer.copy_page(n, 0);
    case.pages[0].slot = 0;
    assert_eq!(want, case.run(Isa::detect(), 1, 0..1).0);
}
