//! Sums of rows of f32 values, each row times a weight: what attention makes of values that all its heads share.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes"
)]

use std::ops::Range;

use super::instructions::{Instructions, Work};
use super::isa::{Isa, LANES};
use crate::product::strided::{Mat, MatMut};

/// `y = weights · values` for some columns of the values: weights `[sums, rows]`, values `[rows, width]`, y
/// `[sums, columns]`. Nothing is packed, since few sums read each row.
///
/// # Panics
/// If the columns leave the values, or the sizes do not fit.
pub(crate) fn sum(weights: Mat<'_>, values: Mat<'_>, columns: Range<usize>, y: MatMut<'_>) {
    assert!(
        weights.cols() == values.rows()
            && columns.end <= values.cols()
            && (y.rows(), y.cols()) == (weights.rows(), columns.len()),
        "weights of rows, and their sums"
    );
    Instructions::best().run(Sum {
        weights,
        values,
        columns,
        y,
    });
}

struct Sum<'a> {
    weights: Mat<'a>,
    values: Mat<'a>,
    columns: Range<usize>,
    y: MatMut<'a>,
}

impl Work for Sum<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(mut self) {
        let mut at = 0;
        while at < self.weights.rows() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.weights.rows() - at {
                    8.. if I::TILE >= 8 => self.tile::<I, 8>(at),
                    4.. => self.tile::<I, 4>(at),
                    2.. => self.tile::<I, 2>(at),
                    _ => self.tile::<I, 1>(at),
                }
            };
        }
    }
}

impl Sum<'_> {
    /// `N` sums. Returns `N`.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn tile<I: Isa, const N: usize>(&mut self, at: usize) -> usize {
        let weights: [*const f32; N] = std::array::from_fn(|i| self.weights.row(at + i).as_ptr());
        for start in self.columns.clone().step_by(LANES) {
            let cols = start..self.columns.end.min(start + LANES);
            let mut sums = [[0.0; LANES]; N];
            // SAFETY: a weight for each row; as many values as are read, or a copy that is filled up.
            unsafe {
                let mut vectors = [I::zero(); N];
                for row in 0..self.values.rows() {
                    let from = &self.values.row(row)[start..];
                    let values = match from.first_chunk::<LANES>() {
                        Some(from) => I::load(from.as_ptr()),
                        None => {
                            let mut filled = [0.0; LANES];
                            filled[..from.len()].copy_from_slice(from);
                            I::load(filled.as_ptr())
                        }
                    };
                    for (weights, sum) in weights.iter().zip(&mut vectors) {
                        *sum = I::mul_add(values, I::splat(*weights.add(row)), *sum);
                    }
                }
                for (vector, sum) in vectors.iter().zip(&mut sums) {
                    I::store(*vector, sum.as_mut_ptr());
                }
            }
            let to = cols.start - self.columns.start..cols.end - self.columns.start;
            for (i, sums) in sums.iter().enumerate() {
                self.y.row(at + i)[to.clone()].copy_from_slice(&sums[..cols.len()]);
            }
        }
        N
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::noise;

    #[test]
    fn sums_are_those_written_out() {
        for (n, rows, width, columns) in [
            (1, 1, 3, 0..3),
            (4, 9, 40, 0..40),
            (7, 130, 33, 5..33),
            (11, 3, 70, 16..50),
            (3, 5, 64, 64..64),
        ] {
            let (weights, values) = (noise(n * rows, 1), noise(rows * width, 2));
            let cols = columns.len();
            let mut y = vec![f32::NAN; n * cols];
            sum(
                Mat::dense(&weights, n, rows),
                Mat::dense(&values, rows, width),
                columns.clone(),
                MatMut::dense(&mut y, n, cols),
            );
            for (i, found) in y.iter().enumerate() {
                let (sum, col) = (i / cols, columns.start + i % cols);
                let products = (0..rows).map(|row| {
                    f64::from(weights[sum * rows + row]) * f64::from(values[row * width + col])
                });
                let expected: f64 = products.sum();
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-5,
                    "{found} {expected}"
                );
            }
        }
    }
}
