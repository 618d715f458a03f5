//! The dim line after a reply.
//!
//! ```text
//! [ 41.2 t/s · prompt 812 @ 1,930 t/s · think 6,144 + answer 310 tok · kv 256/256 pages (64 pinned) · 212 recycled · stop:eos · seed 42 ]
//! ```
//!
//! It never wraps: on a narrow terminal it says less. Each field has forms from long to short, and a fixed list says which field
//! gives way next; speed and lengths go last.

use lemma_engine::generate::Outcome;
use lemma_engine::session::KvStats;

/// What the line is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) gen_tps: f64,
    pub(crate) n_prompt: usize,
    pub(crate) n_cached: usize,
    pub(crate) prompt_tps: f64,
    pub(crate) n_think: usize,
    pub(crate) n_answer: usize,
    pub(crate) pages: usize,
    pub(crate) n_slots: usize,
    pub(crate) pinned: usize,
    pub(crate) recycled: u64,
    pub(crate) finish: &'static str,
    pub(crate) seed: u64,
}

impl Stats {
    pub(crate) fn new(o: &Outcome, kv: &KvStats, seed: u64) -> Self {
        Self {
            gen_tps: gen_tps(o),
            n_prompt: o.n_prompt,
            n_cached: o.n_cached,
            prompt_tps: prompt_tps(o),
            n_think: o.n_think,
            n_answer: o.n_answer,
            pages: kv.pages,
            n_slots: kv.n_slots,
            pinned: kv.pinned,
            recycled: kv.recycled,
            finish: o.finish.name(),
            seed,
        }
    }

    /// The line in at most `width` columns (but never less than the speed).
    pub(crate) fn line(&self, width: usize) -> String {
        let fresh = self.n_prompt - self.n_cached;
        let cached = if self.n_cached > 0 {
            format!(" ({} cached)", grouped(self.n_cached as u64))
        } else {
            String::new()
        };
        let prompt = grouped(self.n_prompt as u64);
        // A speed over a handful of tokens is noise.
        let speed = if fresh >= 16 {
            format!(" @ {} t/s", grouped(self.prompt_tps.round() as u64))
        } else {
            String::new()
        };
        let total = grouped((self.n_think + self.n_answer) as u64);
        let tokens = match self.n_think {
            0 => format!("answer {} tok", grouped(self.n_answer as u64)),
            n => format!(
                "think {} + answer {} tok",
                grouped(n as u64),
                grouped(self.n_answer as u64)
            ),
        };
        let pool = format!(
            "kv {}/{}",
            grouped(self.pages as u64),
            grouped(self.n_slots as u64)
        );
        let recycled = if self.recycled > 0 {
            format!("{} recycled", grouped(self.recycled))
        } else {
            String::new()
        };
        let tps = if self.gen_tps >= 1000.0 {
            grouped(self.gen_tps.round() as u64)
        } else {
            format!("{:.1}", self.gen_tps)
        };
        // Forms of each field, longest first; an empty form leaves the field out.
        let mut fields = [
            vec![format!("{tps} t/s")],
            vec![
                format!("prompt {prompt}{cached}{speed}"),
                format!("prompt {prompt}{speed}"),
                format!("prompt {prompt}"),
                String::new(),
            ],
            vec![tokens, format!("{total} tok")],
            vec![
                format!("{pool} pages ({} pinned)", grouped(self.pinned as u64)),
                format!("{pool} pages"),
                pool,
                String::new(),
            ],
            vec![recycled, String::new()],
            vec![format!("stop:{}", self.finish), String::new()],
            vec![format!("seed {}", self.seed), String::new()],
        ];
        // Which field takes its next shorter form.
        const YIELD: [usize; 11] = [1, 3, 6, 1, 3, 5, 1, 2, 3, 4, 2];
        let mut steps = YIELD.iter();
        loop {
            let shown: Vec<&str> = fields
                .iter()
                .map(|f| f[0].as_str())
                .filter(|f| !f.is_empty())
                .collect();
            let line = format!("[ {} ]", shown.join(" · "));
            if line.chars().count() <= width {
                return line;
            }
            match steps.next() {
                Some(&i) if fields[i].len() > 1 => {
                    fields[i].remove(0);
                }
                Some(_) => {}
                None => return line,
            }
        }
    }
}

/// Tokens of a reply a second, the first not counted: its time is that of the prompt.
pub(crate) fn gen_tps(o: &Outcome) -> f64 {
    rate((o.n_think + o.n_answer).saturating_sub(1), o.decode_s)
}

/// Tokens of the prompt a second.
pub(crate) fn prompt_tps(o: &Outcome) -> f64 {
    rate(o.n_prompt - o.n_cached, o.prefill_s)
}

fn rate(n: usize, seconds: f64) -> f64 {
    if seconds > 0.0 {
        n as f64 / seconds
    } else {
        0.0
    }
}

/// `1 reply`, `1,930 replies`.
pub(crate) fn counted(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", grouped(n), if n == 1 { one } else { many })
}

/// `1930` → `1,930`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        Stats {
            gen_tps: 41.23,
            n_prompt: 812,
            n_cached: 0,
            prompt_tps: 1930.4,
            n_think: 6144,
            n_answer: 310,
            pages: 256,
            n_slots: 256,
            pinned: 64,
            recycled: 212,
            finish: "eos",
            seed: 42,
        }
    }

    #[test]
    fn the_whole_line() {
        assert_eq!(
            stats().line(200),
            "[ 41.2 t/s · prompt 812 @ 1,930 t/s · think 6,144 + answer 310 tok · kv 256/256 pages (64 pinned) · 212 recycled · stop:eos · seed 42 ]"
        );
    }

    #[test]
    fn fits_every_width() {
        let s = Stats {
            n_cached: 700,
            ..stats()
        };
        let mut last = usize::MAX;
        for width in (0..160).rev() {
            let line = s.line(width);
            let n = line.chars().count();
            assert!(
                n <= width.max("[ 41.2 t/s · 6,454 tok ]".chars().count()),
                "{width}: {line}"
            );
            assert!(n <= last, "a narrower terminal must not get a longer line");
            assert!(!line.contains("·  ·") && !line.contains("[  "), "{line}");
            last = n;
        }
        assert_eq!(s.line(10), "[ 41.2 t/s · 6,454 tok ]");
        assert!(s.line(80).contains("think 6,144 + answer 310 tok"));
    }

    #[test]
    fn one_and_many() {
        let replies = |n| counted(n, "reply", "replies");
        assert_eq!(
            [replies(0), replies(1), replies(1930)],
            ["0 replies", "1 reply", "1,930 replies"]
        );
    }

    #[test]
    fn thousands() {
        assert_eq!(
            (grouped(0), grouped(999), grouped(1000), grouped(1234567)),
            ("0".into(), "999".into(), "1,000".into(), "1,234,567".into())
        );
    }
}
