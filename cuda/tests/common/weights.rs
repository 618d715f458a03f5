//! Matrices of every format, and products with them in double precision.

use lemma_cuda::ops::{self, Quant};
use lemma_cuda::{Buffer, Gpu, Source, Uploader, Weight};
use lemma_quant::GgmlType;

use super::{Rng, read, upload};

/// Random rows of a format and what they mean.
pub fn matrix(rng: &mut Rng, ty: GgmlType, n_in: usize, n_row: usize) -> (Vec<u8>, Vec<f32>) {
    let quantize = ty.traits().quantize_row.expect("a quantizer");
    let row = ty.row_size(n_in).expect("whole blocks");
    let mut bytes = vec![0; row * n_row];
    let mut values = vec![0.0; n_in * n_row];
    for (b, v) in bytes
        .chunks_exact_mut(row)
        .zip(values.chunks_exact_mut(n_in))
    {
        quantize(&rng.normals(n_in), b);
        (ty.traits().dequantize_row)(b, v);
    }
    (bytes, values)
}

/// `x w^T + bias`: `[n, n_out]`.
pub fn reference(x: &[f32], w: &[f32], bias: Option<&[f32]>, n_in: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks_exact(n_in) {
        for (i, w) in w.chunks_exact(n_in).enumerate() {
            let dot: f64 = x
                .iter()
                .zip(w)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum();
            out.push(dot + bias.map_or(0.0, |b| f64::from(b[i])));
        }
    }
    out
}

/// Uploads it.
pub fn put(gpu: &Gpu, ty: GgmlType, data: &[u8], n_in: usize, n_row: usize) -> Weight {
    let source = Source {
        ty,
        n_in,
        n_row,
        data,
    };
    let mut uploader = Uploader::new(gpu).expect("uploader");
    uploader.upload(source).expect("upload")
}

/// Activations in eight bits.
pub struct Q8(Buffer, Buffer);

impl Q8 {
    pub fn of(gpu: &Gpu, x: &Buffer, n: usize) -> Option<Self> {
        if !n.is_multiple_of(32) {
            return None;
        }
        let q = Self(gpu.alloc(n).expect("q"), gpu.alloc(n / 4).expect("ds"));
        ops::quantize(gpu, q.quant(), x.view(), n).expect("quantize");
        Some(q)
    }

    pub fn quant(&self) -> Quant {
        Quant {
            q: self.0.view(),
            ds: self.1.view(),
        }
    }

    /// What the quantized activations stand for: with these as input, only rounding of sums is left as an error.
    pub fn values(&self, gpu: &Gpu) -> Vec<f32> {
        let (q, ds) = (
            gpu.read(self.0.view()).expect("read"),
            read(gpu, self.1.view()),
        );
        q.iter()
            .enumerate()
            .map(|(i, v)| f32::from(*v as i8) * ds[i / 32 * 2])
            .collect()
    }
}

/// A matrix, or those of several experts: values, on the device, and biases.
pub struct Part {
    pub values: Vec<f32>,
    pub w: Weight,
    pub bias: Vec<f32>,
    pub bias_view: Buffer,
}

/// Random rows of a format, on the device.
pub fn part(gpu: &Gpu, rng: &mut Rng, ty: GgmlType, n_in: usize, n_row: usize) -> Part {
    let (data, values) = matrix(rng, ty, n_in, n_row);
    let bias = rng.normals(n_row);
    Part {
        values,
        w: put(gpu, ty, &data, n_in, n_row),
        bias_view: upload(gpu, &bias),
        bias,
    }
}

impl Part {
    /// Products of expert `e` of several with `n` rows each.
    pub fn product(&self, e: usize, n: usize, x: &[f32], biased: bool) -> Vec<f64> {
        let rows = &self.values[e * n * x.len()..][..n * x.len()];
        reference(x, rows, biased.then(|| &self.bias[e * n..][..n]), x.len())
    }
}
