//! Small weights that are made of what a file has, and single numbers.

use lemma_quant::GgmlType;

use super::Binder;
use crate::backend::Tensor;
use crate::error::Error;
use crate::gguf::Bytes;

impl<W> Binder<'_, W> {
    /// A vector of `n` ones, which no file has.
    pub(in crate::arch) fn ones(&mut self, n: usize) -> Result<W, Error> {
        self.made(&vec![1.0; n])
    }

    /// `<name>` of `n` elements times `factor`.
    pub(in crate::arch) fn scaled(
        &mut self,
        name: &str,
        n: usize,
        factor: f32,
    ) -> Result<W, Error> {
        let found = self.find(name, &[n], true)?;
        let t = found.ok_or_else(|| self.missing(name, &[n]))?;
        match self.dry {
            true => (self.make)(t),
            false => {
                let scaled: Vec<f32> = t.to_f32().iter().map(|x| x * factor).collect();
                self.made(&scaled)
            }
        }
    }

    /// Weights of convolutions that stand side by side, `<name>.weight` each, of `n` channels over `d_conv` tokens, as [`Binder::conv1d`] binds
    /// them.
    pub(in crate::arch) fn conv1d_parts<const N: usize>(
        &mut self,
        names: [&str; N],
        d_conv: usize,
        n: usize,
    ) -> Result<W, Error> {
        let dims = [d_conv, 1, n];
        let mut all = Vec::with_capacity(N);
        for name in names {
            let name = format!("{name}.weight");
            let found = self.find(&name, &dims, true)?;
            let t = found.ok_or_else(|| self.missing(&name, &dims))?;
            all.push(if self.dry { Vec::new() } else { t.to_f32() });
        }
        let rows = (0..d_conv).flat_map(|tap| {
            let of = move |w: &Vec<f32>| {
                w.iter()
                    .skip(tap)
                    .step_by(d_conv)
                    .copied()
                    .collect::<Vec<_>>()
            };
            all.iter().flat_map(of).collect::<Vec<f32>>()
        });
        let turned: Vec<f32> = rows.collect();
        match self.dry {
            true => self.made(&vec![0.0; N * d_conv * n]),
            false => self.made(&turned),
        }
    }

    /// `<name>` of `n` elements, each `each` times.
    pub(in crate::arch) fn repeated(
        &mut self,
        name: &str,
        n: usize,
        each: usize,
    ) -> Result<W, Error> {
        let found = self.find(name, &[1, n], true)?;
        let t = found.ok_or_else(|| self.missing(name, &[1, n]))?;
        let x = if self.dry { vec![0.0; n] } else { t.to_f32() };
        let all: Vec<f32> = x
            .iter()
            .flat_map(|x| std::iter::repeat_n(*x, each))
            .collect();
        self.made(&all)
    }

    /// `<name>` of `[n_in, n_out]` elements as a vector of `[n_out, n_in]`: what files have side by side is one behind the other. It is copied.
    pub(in crate::arch) fn turned(
        &mut self,
        name: &str,
        [n_in, n_out]: [usize; 2],
    ) -> Result<W, Error> {
        let found = self.find(name, &[n_in, n_out], true)?;
        let mut t = found.ok_or_else(|| self.missing(name, &[n_in, n_out]))?;
        if !self.dry {
            let w = t.to_f32();
            let turned = (0..n_in * n_out).map(|i| w[i % n_out * n_in + i / n_out]);
            let bytes = turned.flat_map(f32::to_le_bytes).collect();
            (t.ty, t.bytes) = (GgmlType::F32, Bytes::owned(bytes));
        }
        (self.make)(t)
    }

    /// The only element of `<name>`, if there is one. It is not read where nothing is.
    pub(in crate::arch) fn number(&self, name: &str) -> Result<Option<f32>, Error> {
        let found = self.find(name, &[1], true)?;
        let read = |t: Tensor| match self.dry {
            true => 1.0,
            false => t.to_f32()[0],
        };
        Ok(found.map(read))
    }

    fn made(&mut self, x: &[f32]) -> Result<W, Error> {
        let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        (self.make)(Tensor {
            ty: GgmlType::F32,
            n_in: x.len(),
            n_out: 1,
            vector: true,
            experts_of: None,
            bytes: Bytes::owned(bytes),
        })
    }
}
