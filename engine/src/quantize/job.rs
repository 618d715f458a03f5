//! Writing the new file.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use lemma_quant::GgmlType;
use rayon::prelude::*;

use super::{Plan, Planned, no_quantizer};
use crate::error::{Error, NAME_MAX, Result, escape, plain};
use crate::gguf::write::{Body, Builder, to_file};
use crate::gguf::{GgufFile, Use};
use crate::memory::{self, show};

/// Values that a thread converts at a time: a multiple of every block.
const PIECE: usize = 1 << 15;
/// Pieces for each thread between two writes.
const PIECES: usize = 4;
/// Bytes that are copied at a time.
const COPY: usize = 4 << 20;
/// The version of the block formats, as llama.cpp counts them.
const QUANTIZATION_VERSION: u32 = 2;
/// The first value that half precision rounds to infinity.
const F16_OVERFLOW: f32 = 65_520.0;

/// Keys that are not copied: the new file is one, with types of its own.
const REPLACED: &[&str] = &["general.file_type", "general.quantization_version"];
const DROPPED: &[&str] = &[
    "general.alignment",
    "split.no",
    "split.count",
    "split.tensors.count",
];

/// The largest alignment of tensors that a new file takes over.
const MAX_ALIGNMENT: u32 = 1 << 16;

/// Keys that say where the importance of columns comes from.
const ORIGINS: &[&str] = &[
    "quantize.imatrix.file",
    "quantize.imatrix.dataset",
    "quantize.imatrix.entries_count",
    "quantize.imatrix.chunks_count",
];
/// Most bytes of such a text, as in llama.cpp.
const MAX_ORIGIN: usize = 127;

/// Called as data is written, with bytes done and bytes in total; false stops.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Writes the file that `plan` makes of `file` to `out`; false if `progress` stopped it. `n_threads`: `None` takes all cores.
///
/// # Errors
/// [`Error::Malformed`] for weights that are not finite, [`Error::Unsupported`] for such that the new type cannot hold,
/// [`Error::Runtime`] if `out` fails.
pub fn write(
    file: &GgufFile,
    plan: &Plan,
    n_threads: Option<usize>,
    out: impl Write,
    progress: Progress<'_>,
) -> Result<bool> {
    let builder = builder(file, plan);
    let total = builder.n_bytes();
    let mut writer = Writer {
        body: builder
            .begin(BufWriter::with_capacity(1 << 20, out))
            .map_err(failed)?,
        pool: rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads.unwrap_or(0))
            .build()
            .map_err(|e| {
                Error::memory(format!(
                    "threads that the system does not start ({e}), expected fewer"
                ))
                .with_hint("-t N starts fewer")
            })?,
        encoded: Vec::new(),
        done: 0,
        total,
        progress,
    };
    let n_values = writer.pool.current_num_threads() * PIECE * (1 + PIECES);
    memory::ask(n_values as u64 * 4, "pieces for each thread")?;
    let n = plan.tensors.len();
    for (i, t) in plan.tensors.iter().enumerate() {
        let data = file.bytes_of(&t.info);
        data.advise(Use::Sequential);
        log::info!(
            "{}/{n} {} {:?}: {}, {}",
            i + 1,
            t.info.name,
            t.info.shape(),
            match t.ty == t.info.ty {
                true => format!("{} stays", t.ty),
                false => format!("{} to {}", t.info.ty, t.ty),
            },
            show(t.n_bytes)
        );
        let goes_on = match t.ty == t.info.ty {
            true => writer.copy(&data)?,
            false => {
                let named = |e: Error| match e {
                    Error::Runtime(_) => e,
                    e => e.in_file(file.name()),
                };
                let importance = plan.importance_of(&t.info);
                writer.convert(t, &data, importance).map_err(named)?
            }
        };
        data.advise(Use::Done);
        if !goes_on {
            return Ok(false);
        }
    }
    writer.body.finish().map_err(failed)?;
    Ok((writer.progress)(total, total))
}

/// [`write`] to the file `path`, which appears only when it is complete.
///
/// # Errors
/// Those of [`write`], and [`Error::Runtime`] if the file cannot be made.
pub fn write_file(
    file: &GgufFile,
    plan: &Plan,
    n_threads: Option<usize>,
    path: &Path,
    progress: Progress<'_>,
) -> Result<bool> {
    to_file(path, |out| write(file, plan, n_threads, out, progress))
}

/// Bytes that the file of `plan` will have.
pub fn n_file_bytes(file: &GgufFile, plan: &Plan) -> u64 {
    builder(file, plan).n_bytes()
}

fn failed(e: io::Error) -> Error {
    Error::runtime(plain(&e))
}

/// The header of the new file.
fn builder(file: &GgufFile, plan: &Plan) -> Builder {
    let mut b = Builder::new();
    let meta = file.meta();
    // The guard lets only numbers through that fit, and powers of two. More than a page of any machine has gives nothing but padding.
    let alignment = meta.opt_u32("general.alignment").ok().flatten();
    if let Some(alignment) = alignment.filter(|&a| a <= MAX_ALIGNMENT) {
        b.alignment(alignment);
    }
    let set = |b: &mut Builder, key: &str| {
        let value = match key == REPLACED[0] {
            true => plan.file_type,
            false => QUANTIZATION_VERSION,
        };
        b.u32(key, value);
    };
    let replaces_origins = |key| plan.importance.is_some() && ORIGINS.contains(&key);
    for (key, pair) in meta.entries() {
        if REPLACED.contains(&key) {
            set(&mut b, key);
        } else if !DROPPED.contains(&key) && !replaces_origins(key) {
            b.entry(pair);
        }
    }
    for key in REPLACED {
        if meta.get(key).is_none() {
            set(&mut b, key);
        }
    }
    if let Some(importance) = &plan.importance {
        let cut = |text: &str| -> String {
            let chars = text.char_indices();
            let fits = chars.take_while(|(at, c)| at + c.len_utf8() <= MAX_ORIGIN);
            fits.map(|(_, c)| c).collect()
        };
        b.str(ORIGINS[0], &cut(&importance.name));
        if let Some(first) = importance.datasets.first() {
            b.str(ORIGINS[1], &cut(first));
        }
        b.u32(ORIGINS[2], importance.len() as u32);
        if importance.n_chunks > 0 {
            b.u32(ORIGINS[3], importance.n_chunks);
        }
    }
    for t in &plan.tensors {
        b.tensor(&t.info.name, t.ty, t.info.shape());
    }
    b
}

/// The new file on its way.
struct Writer<'a, W: Write> {
    body: Body<W>,
    pool: rayon::ThreadPool,
    encoded: Vec<u8>,
    done: u64,
    total: u64,
    progress: Progress<'a>,
}

impl<W: Write> Writer<'_, W> {
    fn copy(&mut self, data: &[u8]) -> Result<bool> {
        for piece in data.chunks(COPY) {
            self.body.write(piece).map_err(failed)?;
            if !self.advance(piece.len()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads pieces of values and writes them as another type, many at once; `importance`: `[n_expert, n_in]`.
    fn convert(&mut self, t: &Planned, data: &[u8], importance: Option<&[f32]>) -> Result<bool> {
        let (from, to) = (t.info.ty.traits(), t.ty.traits());
        let Some(quantize) = to.quantize_row else {
            return Err(no_quantizer(to.name));
        };
        let weighted = importance.zip(to.quantize_row_weighted);
        let (n_in, n_out) = (t.info.dims[0] as usize, t.info.dims[1] as usize);
        // Where columns differ, pieces are whole rows.
        let piece = match weighted {
            Some(_) => n_in * (PIECE / n_in).max(1),
            None => PIECE,
        };
        let source = piece / from.block_size * from.type_size;
        let target = piece / to.block_size * to.type_size;
        let n_pieces = PIECES * self.pool.current_num_threads();
        for (i, batch) in data.chunks(n_pieces * source).enumerate() {
            let n = batch.len() / from.type_size * from.block_size;
            self.encoded.resize(n / to.block_size * to.type_size, 0);
            let pieces = self.encoded.par_chunks_mut(target);
            let pieces = pieces.zip(batch.par_chunks(source)).enumerate();
            self.pool.install(|| {
                pieces.try_for_each_init(
                    || vec![0.0; piece],
                    |values, (j, (y, x))| {
                        let n = x.len() / from.type_size * from.block_size;
                        let values = &mut values[..n];
                        (from.dequantize_row)(x, values);
                        if let Some(at) = values.iter().position(|v| !holds(to.ty, *v)) {
                            return Err(refused(t, (i * n_pieces + j) * piece + at, values[at]));
                        }
                        let Some((importance, quantize)) = weighted else {
                            quantize(values, y);
                            return Ok(());
                        };
                        let first = (i * n_pieces + j) * (piece / n_in);
                        let rows = values.chunks(n_in).zip(y.chunks_mut(y.len() / (n / n_in)));
                        for (row, (x, y)) in (first..).zip(rows) {
                            let expert = row / n_out;
                            quantize(x, &importance[expert * n_in..][..n_in], y);
                        }
                        Ok(())
                    },
                )
            })?;
            self.body.write(&self.encoded).map_err(failed)?;
            let n_bytes = self.encoded.len();
            if !self.advance(n_bytes) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn advance(&mut self, n: usize) -> bool {
        self.done += n as u64;
        (self.progress)(self.done, self.total)
    }
}

/// Whether a type can hold a value. Blocks have scales and hold what is finite.
fn holds(ty: GgmlType, value: f32) -> bool {
    value.is_finite() && (ty != GgmlType::F16 || value.abs() < F16_OVERFLOW)
}

fn refused(t: &Planned, at: usize, value: f32) -> Error {
    let name = escape(&*t.info.name, NAME_MAX);
    let found = format!("value {at} of tensor '{name}' is {value}");
    if value.is_finite() {
        Error::unsupported(format!("{found}, expected at most 65504 (f16)"))
            .with_hint("bf16 and f32 hold larger numbers")
    } else {
        Error::malformed(format!("{found}, expected a finite number"))
    }
}
