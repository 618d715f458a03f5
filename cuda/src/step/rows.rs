//! Which rows of a phase of products each warp of the grid computes, and how their weights come to it.

use lemma_quant::GgmlType;

use crate::args::{Matrix, Phase, Work};
use crate::types::{chunk_blocks, row_bytes};

/// Warps of a block, for whether two rows at a time are worth it.
const WARPS: u32 = super::BLOCK / 32;

/// How long two rows at a time take, in rows one by one.
const PAIR: f64 = 1.7;

/// Groups of rows of a matrix, divided among neighbouring blocks.
struct Share {
    /// The first block, and how many.
    first: u32,
    blocks: u32,
    /// Rows of a group: one or two, or one each of gate and up.
    wide: u32,
    groups: u32,
}

/// A number of things for part `i` of `n`: the first, and how many.
fn part(all: u32, i: u32, n: u32) -> (u32, u32) {
    (
        all / n * i + i.min(all % n),
        all / n + u32::from(i < all % n),
    )
}

/// Rows of a group, for a matrix that `blocks` blocks share, and about how long its rows take a warp. Two rows at a time are less work than one
/// after the other, if there are enough for every warp.
fn turns(m: &Matrix, gated: bool, blocks: u32) -> (u32, f64) {
    let of = |wide: u32| f64::from(m.n_out.div_ceil(wide).div_ceil(blocks).div_ceil(WARPS));
    let (one, two) = (of(1), PAIR * of(2));
    if gated {
        (2, 2.0 * one)
    } else if two <= one {
        (2, two)
    } else {
        (1, one)
    }
}

/// Gives the blocks rows of one matrix each, so that warps stream through one run of them, and so many that those of no matrix take much longer
/// than the others.
fn shares(all: &[Matrix], gated: bool, n_block: u32) -> Vec<Share> {
    let mut blocks = vec![1; all.len()];
    for _ in all.len()..n_block as usize {
        let time = |i: usize| turns(&all[i], gated, blocks[i]).1 * all[i].row_bytes as f64;
        let rows = |i: usize| f64::from(all[i].n_out) / f64::from(blocks[i]);
        let longer = |a: &usize, b: &usize| {
            let by_time = time(*a).total_cmp(&time(*b));
            by_time.then(rows(*a).total_cmp(&rows(*b)))
        };
        let most = (0..all.len()).max_by(longer);
        blocks[most.expect("a matrix")] += 1;
    }
    let mut first = 0;
    let give = |(m, n): (&Matrix, u32)| {
        let (wide, _) = turns(m, gated, n);
        let share = Share {
            first,
            blocks: n,
            wide,
            groups: m.n_out.div_ceil(if gated { 1 } else { wide }),
        };
        first += n;
        share
    };
    all.iter().zip(blocks).map(give).collect()
}

/// Bytes of a stage, at most: half of a ring, so that there is always room for one behind another, wherever it ends.
const STAGE: usize = super::RING / 2;
/// What copies are aligned to in a ring.
const ALIGN: usize = 128;

/// Says how the weights of a matrix with rows of `n_in` elements come to warps that have `most` groups of `wide` rows. Whether rows come whole.
fn asks(m: &mut Matrix, n_in: usize, wide: usize, gated: bool, most: usize) -> bool {
    let ty = GgmlType::ALL.iter().find(|t| t.id() == m.ty);
    let chunk = ty.map_or(1, |t| chunk_blocks(*t) * t.block_size());
    let bytes = ty.and_then(|t| row_bytes(*t, chunk)).unwrap_or(0);
    let row = m.row_bytes as usize;
    let chunks = n_in.div_ceil(chunk);
    let of = |n: usize| n as u32;
    if chunks == 1 {
        // Whole rows, those of a matrix side by side.
        let per = (STAGE / (wide * row)).clamp(1, most.max(1));
        let copy = per * row * if gated { 1 } else { wide };
        m.copies = if gated { 2 } else { 1 };
        m.unit = of(row * if gated { 1 } else { wide });
        m.units = of(per);
        (m.bytes, m.tail, m.jump, m.of_row) = (of(copy), of(copy), of(copy), 1);
        m.apart = of(if gated {
            copy.next_multiple_of(ALIGN)
        } else {
            row
        });
        m.stage = m.copies * of(copy.next_multiple_of(ALIGN));
    } else {
        let fits = |n: &usize| wide * (n * bytes).next_multiple_of(ALIGN) <= STAGE;
        let run = (1..=chunks).rev().find(fits).unwrap_or(1);
        let copy = (run * bytes).min(row);
        m.copies = of(wide);
        (m.unit, m.units) = (of(bytes), of(run));
        m.of_row = of(chunks.div_ceil(run));
        let before = (m.of_row as usize - 1) * run * bytes;
        m.bytes = of(copy);
        m.tail = of(row - before);
        m.jump = of(row * if gated { 1 } else { wide } - before);
        m.apart = of(copy.next_multiple_of(ALIGN));
        m.stage = of(wide) * m.apart;
    }
    assert!(m.stage as usize <= STAGE, "a chunk of either row fits");
    chunks == 1
}

/// What a warp has to do that computes rows of matrix `i`, `wide` of a group, which may come whole.
fn rows_of(phase: &Phase, i: usize, row: u32, n_row: u32, wide: u32, whole: bool) -> Work {
    let (m, gated) = (&phase.m[i], phase.gated != 0);
    let step = if gated { 1 } else { wide };
    let groups = n_row.div_ceil(step);
    let at = |m: &Matrix, row: u32| m.w + u64::from(row) * m.row_bytes;
    let (asks, last, single) = if whole {
        let asks = groups.div_ceil(m.units);
        let rows = n_row.saturating_sub(asks.saturating_sub(1) * m.units * step);
        (asks, rows * m.row_bytes as u32, 0)
    } else {
        let odd = !gated && n_row % wide == 1;
        (groups * m.of_row, m.tail, if odd { m.of_row } else { 0 })
    };
    let other = if gated {
        at(&phase.m[1], row)
    } else {
        at(m, row + 1)
    };
    Work {
        w: [at(m, row), other],
        row,
        n_row,
        asks,
        last,
        single,
        matrix: i as u8,
        ty: m.ty as u8,
        wide: wide as u8,
        ..Work::default()
    }
}

/// Says what each of `n_warp` warps of each of `n_block` blocks has to do in a phase that multiplies by the first `n_mat` of its matrices:
/// `[n_block, n_warp]`; and in the matrices, how their weights come.
pub(super) fn work(phase: &mut Phase, n_mat: usize, n_block: u32, n_warp: u32) -> Vec<Work> {
    let gated = phase.gated != 0;
    let of = if gated { 1 } else { n_mat };
    let mut all = vec![Work::default(); (n_block * n_warp) as usize];
    for (i, share) in shares(&phase.m[..of], gated, n_block).iter().enumerate() {
        let wide = share.wide;
        let most = share.groups.div_ceil(share.blocks).div_ceil(n_warp);
        let whole = asks(
            &mut phase.m[i],
            phase.n_in as usize,
            wide as usize,
            gated,
            most as usize,
        );
        let m = phase.m[i];
        let step = if gated { 1 } else { wide };
        for block in 0..share.blocks {
            let (of_block, n) = part(share.groups, block, share.blocks);
            for warp in 0..n_warp {
                let (of_warp, groups) = part(n, warp, n_warp);
                let row = step * (of_block + of_warp);
                let n_row = (step * groups).min(m.n_out.saturating_sub(row));
                all[((share.first + block) * n_warp + warp) as usize] =
                    rows_of(phase, i, row, n_row, wide, whole);
            }
        }
    }
    all
}

/// The same for the matrices of the experts of a token, each of which some warps have: those of gate and up among all blocks, so that a warp
/// has rows of one expert; those that go down in each block, which has some rows of all of them and adds them up.
pub(super) fn work_of_experts(phase: &mut Phase, n_block: u32, n_warp: u32) -> Vec<Work> {
    let (gated, n_used, n_out) = (phase.gated != 0, phase.n_used, phase.m[0].n_out);
    // Warps of an expert, and the rows that they share: in all, or in a block.
    let all = if gated { n_block * n_warp } else { n_warp };
    let most = |rows: u32| rows.div_ceil(all / n_used);
    let most = if gated {
        most(n_out)
    } else {
        most(n_out.div_ceil(n_block))
    };
    let wide = if gated || PAIR * f64::from(most.div_ceil(2)) <= f64::from(most) {
        2
    } else {
        1
    };
    let step = if gated { 1 } else { wide };
    let groups = most.div_ceil(step) as usize;
    let width = phase.width as usize;
    let whole = asks(&mut phase.m[0], width, wide as usize, gated, groups);
    let one = |block: u32, warp: u32| {
        // Which of the warps that share rows this one is, the first row, and how many.
        let (i, from, rows) = if gated {
            (block * n_warp + warp, 0, n_out)
        } else {
            let (from, n) = part(n_out, block, n_block);
            (warp, from, n)
        };
        let ends = |slot: u32| part(all, slot, n_used);
        let slot = (0..n_used).rfind(|s| ends(*s).0 <= i).unwrap_or(0);
        let (first, n) = ends(slot);
        let (of_warp, groups) = part(rows.div_ceil(step), i - first, n);
        let row = from + (step * of_warp).min(rows);
        let n_row = (step * groups).min(from + rows - row);
        Work {
            slot: slot as u8,
            ..rows_of(phase, 0, row, n_row, wide, whole)
        }
    };
    let blocks = 0..n_block;
    blocks
        .flat_map(|b| (0..n_warp).map(move |w| (b, w)))
        .map(|(b, w)| one(b, w))
        .collect()
}

/// Says which phases of products (their places in the list, and how many matrices they have) ask for weights ahead of their input. Behind
/// attention few blocks work, and what the others ask for holds those up: that is worth it only if the weights of the phase behind do not fit
/// the rings anyway.
pub(super) fn ask_early(phases: &mut [Phase], products: &[(usize, usize)], n_block: usize) {
    let rings = n_block * WARPS as usize * super::RING;
    let many = |&(k, n): &(usize, usize)| {
        let of: &[Matrix] = &phases[k].m[..n];
        let bytes = of.iter().map(|m| m.row_bytes * u64::from(m.n_out));
        bytes.sum::<u64>() > rings as u64
    };
    let many: Vec<bool> = products.iter().map(many).collect();
    for (i, &(k, _)) in products.iter().enumerate() {
        let attended = k > 0 && phases[k - 1].kind == 2;
        let early = !attended || many.get(i + 1).is_some_and(|m| *m);
        phases[k].early = u32::from(early);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ahead of everything but the output of attention, and ahead of that if much is to come.
    #[test]
    fn much_is_asked_for_early() {
        for (n_out, output) in [(1 << 10, 0), (1 << 20, 1)] {
            let phase = |kind, n_out| {
                let mut p = Phase {
                    kind,
                    ..Phase::default()
                };
                p.m.iter_mut()
                    .for_each(|m| (m.n_out, m.row_bytes) = (n_out, 1 << 10));
                p
            };
            let small = 1 << 10;
            let mut phases = [
                phase(0, 0),
                phase(1, small),
                phase(2, 0),
                phase(1, small),
                phase(1, n_out),
                phase(1, small),
            ];
            ask_early(&mut phases, &[(1, 3), (3, 1), (4, 2), (5, 1)], 132);
            let early = phases.map(|p| p.early);
            assert_eq!(early, [0, 1, 0, output, 1, 1]);
        }
    }

    /// Every row of every matrix is computed once, whatever the numbers.
    #[test]
    fn rows_are_given_once() {
        for (rows, gated) in [
            (vec![4096, 1024, 1024], false),
            (vec![14336, 14336], true),
            (vec![1536], false),
            (vec![7, 1, 3], false),
            (vec![128_257], false),
            (vec![5, 5], true),
        ] {
            for (n_block, n_warp) in [(132, 16), (4, 4), (3, 16)] {
                let mut phase = Phase {
                    gated: u32::from(gated),
                    n_in: 4,
                    ..Phase::default()
                };
                for (m, n) in phase.m.iter_mut().zip(&rows) {
                    (m.n_out, m.row_bytes) = (*n, 16);
                }
                let mut seen: Vec<Vec<u32>> = rows.iter().map(|n| vec![0; *n as usize]).collect();
                for w in work(&mut phase, rows.len(), n_block, n_warp) {
                    for row in w.row..w.row + w.n_row {
                        seen[w.matrix as usize][row as usize] += 1;
                    }
                    if w.n_row > 0 {
                        assert_eq!(w.w[0], u64::from(w.row) * 16);
                        assert!(w.wide == 2 || !gated);
                    }
                }
                let of = if gated { 1 } else { rows.len() };
                assert!(seen[..of].iter().flatten().all(|&n| n == 1), "{rows:?}");
            }
        }
    }

    /// What a warp asks for is the bytes of its rows, each once, in as many stages as it reads.
    #[test]
    fn stages_bring_all_rows() {
        use GgmlType::{F16, F32, Q4_0, Q4_K, Q6_K, Q8_0};
        for ty in [F32, F16, Q8_0, Q4_0, Q4_K, Q6_K] {
            for (n_in, n_out) in [
                (256, 3),
                (1536, 8960),
                (2048, 1024),
                (4096, 1024),
                (4096, 14336),
                (8960, 1537),
                (14336, 4097),
            ] {
                for gated in [false, true] {
                    let row_bytes = row_bytes(ty, n_in).expect("kernels") as u64;
                    let mut phase = Phase {
                        gated: u32::from(gated),
                        n_in: n_in as u32,
                        ..Phase::default()
                    };
                    for (i, m) in phase.m.iter_mut().enumerate() {
                        (m.ty, m.n_out, m.row_bytes) = (ty.id(), n_out, row_bytes);
                        m.w = (i as u64) << 40;
                    }
                    for w in work(&mut phase, 1, 132, 16) {
                        let m = phase.m[0];
                        let (groups, wide) = if gated {
                            (w.n_row, 2)
                        } else {
                            (w.n_row.div_ceil(w.wide.into()), w.wide.into())
                        };
                        let (mut at, mut of_row, mut parts) = (w.w, m.of_row, Vec::new());
                        for left in (1..=w.asks).rev() {
                            let last = of_row == 1;
                            let n = if left == 1 {
                                w.last
                            } else if last {
                                m.tail
                            } else {
                                m.bytes
                            };
                            parts.push((at[0], n));
                            if m.copies == 2 && left > w.single {
                                parts.push((at[1], n));
                            }
                            let on = if last { m.jump } else { m.bytes };
                            at = at.map(|a| a + u64::from(on));
                            of_row = if last { m.of_row } else { of_row - 1 };
                        }
                        parts.sort_unstable();
                        let rows = u64::from(w.n_row) * row_bytes;
                        let matrices = if gated { 2 } else { 1 };
                        let mut parts = parts.into_iter();
                        for i in 0..matrices {
                            let mut to = ((i as u64) << 40) + u64::from(w.row) * row_bytes;
                            let end = to + rows;
                            while to < end {
                                let (from, n) = parts.next().expect("a copy");
                                assert_eq!(from, to, "{ty:?} {n_in} x {n_out}");
                                to += u64::from(n);
                            }
                            assert_eq!(to, end);
                        }
                        assert!(parts.next().is_none());
                        // Chunks of a row, as a warp goes through them.
                        let chunk = chunk_blocks(ty) * ty.block_size();
                        let chunks = n_in.div_ceil(chunk) as u32;
                        let (mut seen, mut stages) = (0, 0);
                        for g in 0..groups {
                            for c in 0..chunks {
                                seen += 1;
                                if seen == m.units
                                    || (c + 1 == chunks && (chunks > 1 || g + 1 == groups))
                                {
                                    (seen, stages) = (0, stages + 1);
                                }
                            }
                        }
                        assert_eq!(stages, w.asks, "{ty:?} {n_in} x {n_out} {wide}");
                    }
                }
            }
        }
    }
}
