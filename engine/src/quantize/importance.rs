//! Importance matrices: how large the inputs of each matrix are, squared, on average over a text.
//!
//! `llama-imatrix` measures them. A quantizer that knows them spends its bits where they are multiplied with something. They come as
//! GGUF files with two tensors for each matrix, `NAME.in_sum2` (sums of squares, one for each column, in a mixture for each expert) and
//! `NAME.counts` (of how many tokens), or in the format before that, which has no name and begins with a number.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek as _};
use std::path::Path;

use crate::error::{Error, NAME_MAX, Result, escape};
use crate::gguf::{GgmlType, GgufFile, TensorView, Value};
use crate::report::malformed;

/// The magic number of GGUF files.
const GGUF: [u8; 4] = *b"GGUF";
/// Names that are longer are none.
const MAX_NAME: usize = 4096;

/// The importance of the columns of matrices.
#[derive(Debug)]
pub struct Importance {
    /// The file, as it was named.
    pub name: String,
    /// The texts that it was measured on, if the file says.
    pub datasets: Vec<String>,
    /// Pieces of text that it was measured on; 0 if the file does not say.
    pub n_chunks: u32,
    /// By the names of matrices: `[n_expert, n_in]`.
    of: HashMap<String, Vec<f32>>,
}

impl Importance {
    /// Reads a file of `llama-imatrix`.
    ///
    /// # Errors
    /// Those of [`GgufFile::open`]; [`Error::Malformed`] for a file that is no importance matrix, or has numbers in it that are none.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.to_string_lossy().into_owned();
        let failed = |e: std::io::Error| match e.kind() {
            ErrorKind::NotFound => {
                Error::not_found_in(&name, "no such file, expected an importance matrix")
            }
            _ => Error::unreadable_in(
                &name,
                format!("cannot be read ({e}), expected an importance matrix"),
            ),
        };
        let mut magic = [0; 4];
        let meta = std::fs::metadata(path).map_err(failed)?;
        if meta.is_file() {
            let mut file = File::open(path).map_err(failed)?;
            if file.read_exact(&mut magic).is_ok() && magic != GGUF {
                file.rewind().map_err(failed)?;
                return Self::from_legacy(BufReader::new(file), meta.len(), &name);
            }
        }
        Self::from_gguf(&GgufFile::open(path)?)
    }

    fn from_gguf(file: &GgufFile) -> Result<Self> {
        let name = file.name();
        let mut of = HashMap::new();
        for sums in file.tensors() {
            let Some(matrix) = sums.name.strip_suffix(".in_sum2") else {
                continue;
            };
            let shown = escape(matrix, NAME_MAX);
            let counts = file
                .tensor(&format!("{matrix}.counts"))
                .ok_or_else(|| malformed(name, format!("'{shown}' has no counts"), "some"))?;
            let (sums, counts) = (f32s(name, &sums)?, f32s(name, &counts)?);
            if counts.is_empty() || sums.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                let found = format!("'{shown}' has {} sums", sums.len());
                return Err(malformed(
                    name,
                    found,
                    format!("as many for each of {} counts", counts.len()),
                ));
            }
            let n_in = sums.len() / counts.len();
            let mut means = sums;
            for (means, count) in means.chunks_exact_mut(n_in).zip(counts) {
                // Counts are whole numbers. What met no token at all has no preferences.
                match count.round() {
                    n if n > 0.0 => means.iter_mut().for_each(|sum| *sum /= n),
                    _ => means.fill(1.0),
                }
            }
            of.insert(matrix.to_owned(), means);
        }
        let meta = file.meta();
        let datasets = match meta.get("imatrix.datasets") {
            Some(Value::Array(a)) => a.strings().map(|list| {
                let text = |s| String::from_utf8_lossy(s).into_owned();
                list.map(text).collect()
            }),
            _ => None,
        };
        Self {
            name: name.to_owned(),
            datasets: datasets.unwrap_or_default(),
            n_chunks: meta
                .opt_u32("imatrix.chunk_count")
                .ok()
                .flatten()
                .unwrap_or(0),
            of,
        }
        .checked()
    }

    /// Reads the format before GGUF: a number of entries, of which each is a name, a number of calls, and means times that number.
    fn from_legacy(mut file: impl Read, len: u64, name: &str) -> Result<Self> {
        let cut = |_| malformed(name, "no importance matrix, or one that was cut", "one");
        let mut left = len;
        let number = |file: &mut dyn Read| -> Result<usize> {
            let mut bytes = [0; 4];
            file.read_exact(&mut bytes).map_err(cut)?;
            let n = i32::from_le_bytes(bytes);
            usize::try_from(n).map_err(|_| malformed(name, format!("a length of {n}"), "another"))
        };
        // What is claimed to follow is there, or nothing is reserved for it.
        let mut bytes = |file: &mut dyn Read, n: usize| -> Result<Vec<u8>> {
            left = left
                .checked_sub(n as u64)
                .ok_or_else(|| malformed(name, "less than it says", "a whole file"))?;
            let mut bytes = vec![0; n];
            file.read_exact(&mut bytes).map_err(cut)?;
            Ok(bytes)
        };
        let mut of = HashMap::new();
        for _ in 0..number(&mut file)? {
            let n = number(&mut file)?;
            if n > MAX_NAME {
                return Err(malformed(name, format!("a name of {n} bytes"), "a name"));
            }
            let matrix = String::from_utf8_lossy(&bytes(&mut file, n)?).into_owned();
            let n_calls = number(&mut file)?;
            let n = number(&mut file)?;
            let data = bytes(&mut file, n.saturating_mul(4))?;
            let mut means: Vec<f32> = data
                .as_chunks()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect();
            if n_calls > 0 {
                means.iter_mut().for_each(|sum| *sum /= n_calls as f32);
            }
            of.insert(matrix, means);
        }
        // What follows need not be there.
        let n_chunks = number(&mut file).unwrap_or(0) as u32;
        let dataset = number(&mut file).and_then(|n| bytes(&mut file, n));
        let dataset = dataset.ok().filter(|text| !text.is_empty());
        Self {
            name: name.to_owned(),
            datasets: dataset
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .into_iter()
                .collect(),
            n_chunks,
            of,
        }
        .checked()
    }

    fn checked(self) -> Result<Self> {
        if self.of.is_empty() {
            return Err(malformed(
                &self.name,
                "nothing about any matrix",
                "an importance matrix",
            ));
        }
        for (matrix, means) in &self.of {
            if let Some(bad) = means.iter().find(|v| !v.is_finite() || **v < 0.0) {
                let found = format!("{bad} for '{}'", escape(matrix, NAME_MAX));
                return Err(malformed(&self.name, found, "a mean of squares"));
            }
        }
        Ok(self)
    }

    /// How many matrices it knows.
    pub fn len(&self) -> usize {
        self.of.len()
    }

    /// Whether it knows none; there is no such file.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// What it knows of the matrix called `name`: `[n_expert, n_in]`.
    pub fn of(&self, name: &str) -> Option<&[f32]> {
        self.of.get(name).map(Vec::as_slice)
    }
}

fn f32s(file: &str, t: &TensorView<'_>) -> Result<Vec<f32>> {
    if t.ty != GgmlType::F32 {
        let found = format!("'{}' is {}", escape(&*t.name, NAME_MAX), t.ty);
        return Err(malformed(file, found, "f32"));
    }
    let mut values = vec![0.0; t.n_elements() as usize];
    (t.ty.traits().dequantize_row)(t.data, &mut values);
    Ok(values)
}
