//! Whether a merged folder has base plus adapter: read again, and computed another way.
//!
//! Tensors that the adapter leaves alone have the base's bytes. Of a matrix that was written anew, the products of both with a
//! vector of random signs are compared, instead of the sum of matrices that was written.

use checkpoint::Folder;
use kernels::{Format, Matrix};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::merge::{Merger, matrix_shape};
use super::weight_format::encode;
use crate::Error;
use crate::adapt::WeightUpdate;

impl Merger<'_> {
    /// Compares every tensor of the output with base plus adapter.
    pub(super) fn check(&mut self, merged: &Folder, step: &mut dyn FnMut()) -> Result<(), Error> {
        for (name, source) in self.outputs_of(self.base.names()) {
            step();
            let name = &*name;
            let (before, after) = (self.tensor(&source)?, merged.tensor(name)?);
            after.expect_shape(&before.shape)?;
            if after.dtype == before.dtype && !self.changes(name) {
                if after.bytes != before.bytes {
                    return Err(Error::Unfaithful {
                        tensor: name.into(),
                        expected: "the base's bytes".into(),
                        found: "others".into(),
                    });
                }
            } else if before.shape.len() != 2 {
                if after.bytes != encode(after.dtype, &self.values_before(name, &before)?) {
                    let expected = format!("the base's or the adapter's values in {}", after.dtype);
                    return Err(Error::Unfaithful {
                        tensor: name.into(),
                        expected,
                        found: "others".into(),
                    });
                }
            } else {
                self.check_matrix(name, &before, merged)?;
            }
        }
        Ok(())
    }

    fn check_matrix(
        &mut self,
        name: &str,
        before: &checkpoint::Tensor,
        merged: &Folder,
    ) -> Result<(), Error> {
        let shape = matrix_shape(name, &before.shape)?;
        let base = self.matrix_before(name, before)?;
        let merged = self.matrix(merged, name, shape)?;
        let signs = random_signs(base.cols());
        let update = self.update(name);
        let low: Vec<f32> = update.as_ref().map_or(vec![], |u| {
            u.a.chunks(base.cols())
                .map(|a| u.scale * dot(a, &signs))
                .collect()
        });
        let line = |row: usize| {
            let mut line = vec![0.0; base.cols()];
            merged.decode(row..row + 1, 0..base.cols(), &mut line);
            line
        };
        let dora_scale = |row: usize| match &update {
            Some(update) if update.magnitude.is_some() => {
                let mut plain = vec![0.0; base.cols()];
                base.decode(row..row + 1, 0..base.cols(), &mut plain);
                update.dora_scale(row, &plain)
            }
            _ => 1.0,
        };
        // The error of each row, relative to the row's magnitude, and the part of it that rounding does not explain.
        let errors = (0..base.rows()).into_par_iter().map(|row| {
            let added = update
                .as_ref()
                .map_or(0.0, |u| dot(&u.b[row * u.rank..(row + 1) * u.rank], &low));
            let magnitude: f32 = line(row).iter().map(|value| value.abs()).sum();
            let expected = dora_scale(row) * (base.dot(row, &signs) + added);
            let difference = (expected - merged.dot(row, &signs)).abs();
            let allowed = allowed_error(&merged, row, magnitude);
            let magnitude = magnitude + f32::MIN_POSITIVE;
            [difference / magnitude, difference - allowed]
        });
        // NaN counts as the largest: a merge that makes NaN is not faithful.
        let larger = |a: f32, b: f32| if a > b || a.is_nan() { a } else { b };
        let [largest, excess] = errors.reduce(
            || [0.0, f32::NEG_INFINITY],
            |a, b| [larger(a[0], b[0]), larger(a[1], b[1])],
        );
        if largest.is_nan() || excess.is_nan() || excess > 0.0 {
            return Err(Error::Unfaithful {
                tensor: name.into(),
                expected: format!("base plus adapter, rounded to {}", merged.format().name()),
                found: format!("a row that differs by {largest:.1e} of its magnitude"),
            });
        }
        self.report.largest_error = self.report.largest_error.map(|known| known.max(largest));
        let error = relative_error(&base, update.as_ref(), &merged);
        self.report.errors.push((name.into(), error));
        Ok(())
    }
}

/// Root mean square of `merged − (base + update)`, relative to that of the sum.
pub(crate) fn relative_error(base: &Matrix, update: Option<&WeightUpdate>, merged: &Matrix) -> f64 {
    let width = base.cols();
    let squares = (0..base.rows()).into_par_iter().map(|row| {
        let [mut expected, mut found] = [vec![0.0; width], vec![0.0; width]];
        base.decode(row..row + 1, 0..width, &mut expected);
        merged.decode(row..row + 1, 0..width, &mut found);
        if let Some(update) = update {
            update.apply(row, &mut expected);
        }
        let square = |value: f32| f64::from(value) * f64::from(value);
        let pairs = expected.iter().zip(&found);
        let difference: f64 = pairs
            .map(|(expected, found)| square(expected - found))
            .sum();
        [
            difference,
            expected.iter().map(|value| square(*value)).sum(),
        ]
    });
    // Rows are collected first, so that the sum has one order.
    let squares: Vec<[f64; 2]> = squares.collect();
    let [difference, whole] = [0, 1].map(|i| squares.iter().map(|pair| pair[i]).sum::<f64>());
    if whole > 0.0 {
        (difference / whole).sqrt()
    } else {
        0.0
    }
}

/// The largest error of a row's sum that rounding explains: a share of each value, f32 sums, and the smallest step of a
/// block.
fn allowed_error(merged: &Matrix, row: usize, magnitude: f32) -> f32 {
    let relative = match merged.format() {
        Format::F32 => 1e-6,
        Format::Bf16 => 1.0 / 256.0,
        Format::F16 => 1.0 / 2048.0,
        Format::Fp8(_) => 1.0 / 16.0,
        // None is written.
        Format::Ggml(_) | Format::SplitKvB(_) | Format::Interleaved(_) => 0.0,
    };
    let sums = 1e-6 * (merged.cols() as f32).sqrt();
    (relative + sums) * magnitude + merged.smallest_half_steps(row)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn random_signs(n: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(n as u64);
    (0..n)
        .map(|_| {
            if random.next_u32() & 1 == 0 {
                1.0
            } else {
                -1.0
            }
        })
        .collect()
}
