//! Replays the fuzz corpus and a fixed set of mutants of good files; nothing may panic.

use std::fs;
use std::path::Path;

#[path = "../fuzz/probe.rs"]
mod probe;

/// xorshift64*: enough for choosing bytes to break.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

fn folder(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let mut paths: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    paths.into_iter().map(|p| fs::read(p).unwrap()).collect()
}

#[test]
fn corpus_and_malformed_files() {
    let opened = folder("fuzz/corpus/gguf_open")
        .iter()
        .filter(|f| probe::probe(f))
        .count();
    assert!(opened > 0, "the corpus should hold some good files");
    for file in folder("data/malformed") {
        probe::probe(&file);
    }
}

#[test]
fn mutants_of_good_files() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/malformed");
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let mut opened = 0;
    for name in ["ok-control.gguf", "arr-nest-2.gguf"] {
        let good = fs::read(dir.join(name)).unwrap();
        for _ in 0..1000 {
            let mut bad = good.clone();
            for _ in 0..=rng.below(3) {
                let at = rng.below(bad.len());
                let end = |n: usize| (at + 1 + n).min(bad.len());
                match rng.below(6) {
                    0 => bad[at] ^= 1 << rng.below(8),
                    1 => bad[at] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5)],
                    2 => bad[at..].iter_mut().take(8).for_each(|b| *b = 0xff),
                    3 => bad.truncate(at + 1),
                    4 if at > 0 => drop(bad.drain(at..end(rng.below(16)))),
                    _ => {
                        let piece = bad[at..end(rng.below(64))].to_vec();
                        drop(bad.splice(at..at, piece));
                    }
                }
            }
            opened += usize::from(probe::probe(&bad));
        }
    }
    assert!(
        opened > 10,
        "mutants in the data section should still open ({opened})"
    );
}
