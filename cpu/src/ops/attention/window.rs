//! Which tokens a token sees.

/// Some of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// So many of the newest, the token included.
    Newest(u32),
    /// Those of its part of the text: parts are so many tokens long.
    Chunk(u32),
}

impl Window {
    /// The oldest position that a token at `pos` sees.
    pub fn oldest(self, pos: u32) -> u32 {
        match self {
            Self::Newest(n) => (pos + 1).saturating_sub(n),
            Self::Chunk(n) => pos - pos % n,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Window::{Chunk, Newest};

    #[test]
    fn the_oldest_token_that_is_seen() {
        let oldest = |w: super::Window| [0, 3, 7, 8, 9, 16].map(|pos| w.oldest(pos));
        assert_eq!(oldest(Newest(1)), [0, 3, 7, 8, 9, 16]);
        assert_eq!(oldest(Newest(8)), [0, 0, 0, 1, 2, 9]);
        assert_eq!(oldest(Chunk(8)), [0, 0, 0, 8, 8, 16]);
        assert_eq!(oldest(Chunk(1)), [0, 3, 7, 8, 9, 16]);
    }
}
