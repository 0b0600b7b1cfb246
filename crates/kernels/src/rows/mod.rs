//! Products straight on the stored bytes of a weight: what decoding is made of, and of weights in blocks every product in
//! int8.
//!
//! A weight in blocks is multiplied with activations in int8 ([`Activations`]) in [`strips`], one of f32, f16 or bf16 with
//! the activations as they are, or rounded to bf16, a few rows of them at a time ([`numbers`]). Of few rows the weight's
//! bytes are read once, in the order in which they lie, and nothing is written but the results: so the limit is how fast
//! memory can be read.
//!
//! A result depends on its row of activations and its row of the weight alone, not on the rows beside them, and is the
//! same on every instruction set ([`isa`]).

mod activations;
mod instructions;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod numbers;
mod piece;
mod strips;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use self::activations::Activations;
pub(crate) use self::activations::round_rows;
use self::instructions::Instructions;
use self::numbers::Lines;
pub(crate) use self::numbers::{BLOCK, BLOCK_BYTES, Number};
pub(crate) use self::piece::Piece;
use self::strips::Order;
use crate::matrix::round_to_bf16;
use crate::product::strided::{Mat, MatMut, Write};
use crate::{Compute, Format, Ggml, Matrix};

/// Most rows that are multiplied at once with a weight without blocks.
pub(crate) const MOST_ROWS: usize = 8;

/// Whether a format's blocks are multiplied with activations in int8.
pub(crate) fn multiplies(format: Ggml) -> bool {
    format.block() > 1
}

/// A weight that has products of rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    kind: Kind,
    /// Whether activations are rounded to bf16.
    is_rounded: bool,
}

/// How a weight's bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Numbers(Number),
    Blocks(Ggml, Order),
}

/// The values of f16 numbers.
pub(crate) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    Instructions::best().run(numbers::Decoding { bytes, out });
}

/// Activations, in the forms that some weights are multiplied with.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    floats: Mat<'a>,
    /// Rounded, row after row.
    bf16: Option<Vec<f32>>,
    int8: Option<Activations>,
}

impl<'a> Input<'a> {
    /// Of weights that all read the same rows.
    pub(crate) fn new<'w>(x: Mat<'a>, weights: impl IntoIterator<Item = &'w Packed<'w>>) -> Self {
        let (mut is_int8, mut is_bf16) = (false, false);
        for weight in weights {
            is_int8 |= matches!(weight.kind, Kind::Blocks(..));
            is_bf16 |= weight.is_rounded;
        }
        Self {
            floats: x,
            bf16: is_bf16.then(|| {
                let mut values: Vec<f32> =
                    (0..x.rows()).flat_map(|row| x.row(row)).copied().collect();
                round_to_bf16(&mut values);
                values
            }),
            int8: is_int8.then(|| Activations::new(x)),
        }
    }

    /// As they were before any rounding.
    pub(crate) fn floats(&self) -> Mat<'a> {
        self.floats
    }
}

impl<'a> Packed<'a> {
    /// None where the weight is of another kind, or what it is multiplied with is to be rounded otherwise.
    pub(crate) fn new(w: &'a Matrix, compute: Compute) -> Option<Self> {
        let kind = match (w.format(), compute) {
            (Format::F32, Compute::F32 | Compute::Int8) => Kind::Numbers(Number::F32),
            (Format::F16, Compute::F32 | Compute::Int8) => Kind::Numbers(Number::F16),
            (Format::Bf16, Compute::F32 | Compute::Bf16) => Kind::Numbers(Number::Bf16),
            (Format::Ggml(format), Compute::Int8) if multiplies(*format) => {
                Kind::Blocks(*format, Order::Rows)
            }
            (Format::Interleaved(format), Compute::Int8) => {
                Kind::Blocks(*format, Order::Interleaved)
            }
            _ => return None,
        };
        Some(Self {
            bytes: w.bytes(),
            row_bytes: w.row_bytes(),
            kind,
            is_rounded: compute == Compute::Bf16,
        })
    }

    /// f32 values, row after row.
    pub(crate) fn of_values(values: &'a [f32], cols: usize) -> Self {
        // SAFETY: f32 values are bytes, four each.
        #[expect(unsafe_code, reason = "f32 values read as bytes")]
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        Self {
            bytes,
            row_bytes: 4 * cols,
            kind: Kind::Numbers(Number::F32),
            is_rounded: false,
        }
    }

    /// Where its bytes end.
    pub(crate) fn end(&self) -> *const u8 {
        self.bytes.as_ptr_range().end
    }

    /// Bytes of a row of the weight.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// `y = x · wᵀ` for some rows of `x`, given by their numbers, and some of `w`: y `[rows, outs]`.
    ///
    /// # Panics
    /// If a range leaves its matrix or the sizes do not fit.
    pub(crate) fn multiply(
        &self,
        input: (&Input<'_>, &[usize]),
        outs: Range<usize>,
        y: MatMut<'_>,
        write: Write,
    ) {
        self.multiply_with(Instructions::best(), input, outs, y, write);
    }

    fn multiply_with(
        &self,
        instructions: Instructions,
        (x, rows): (&Input<'_>, &[usize]),
        outs: Range<usize>,
        y: MatMut<'_>,
        write: Write,
    ) {
        assert!(
            outs.end * self.row_bytes <= self.bytes.len()
                && y.rows() == rows.len()
                && y.cols() == outs.len(),
            "rows of a weight and of its product"
        );
        match (self.kind, &x.int8) {
            (Kind::Numbers(number), _) => {
                let floats = x.floats;
                let x = match (self.is_rounded, &x.bf16) {
                    (false, _) => floats,
                    (true, Some(values)) => Mat::dense(values, floats.rows(), floats.cols()),
                    (true, None) => unreachable!("the input is made for its weights"),
                };
                let lines = Lines {
                    number,
                    bytes: &self.bytes[outs.start * self.row_bytes..outs.end * self.row_bytes],
                    stride: self.row_bytes,
                    rows: outs.len(),
                    width: x.cols(),
                };
                assert!(
                    number.row_bytes(x.cols()) == self.row_bytes,
                    "the input width of the weight"
                );
                instructions.run(numbers::Product {
                    lines,
                    x,
                    rows,
                    y,
                    write,
                });
            }
            (Kind::Blocks(format, order), Some(x)) => {
                let product = strips::Product {
                    format,
                    order,
                    bytes: self.bytes,
                    row_bytes: self.row_bytes,
                    x,
                    rows,
                    outs,
                    y,
                    write,
                };
                product.run(instructions);
            }
            (Kind::Blocks(..), None) => unreachable!("the input is made for its weights"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::{every_block_format, every_format, noise};

    /// Formats of 32 with an odd number of blocks in a row.
    fn odd_blocks(rows: usize) -> Vec<Matrix> {
        let formats = Ggml::WRITTEN
            .into_iter()
            .filter(|format| format.block() == 32);
        let matrix = |format: Ggml| {
            let bytes = rows * 3 * format.block_bytes();
            let bytes: Vec<u8> = (0..bytes).map(|i| (i * 61 % 251) as u8 & 0xAF).collect();
            Matrix::dense(rows, 96, Format::Ggml(format), bytes.into()).unwrap()
        };
        formats.map(matrix).collect()
    }

    fn all() -> Vec<Matrix> {
        let mut all = every_block_format(9);
        all.extend(odd_blocks(6));
        all.extend(
            [(7, 77), (3, 16), (5, 7)]
                .into_iter()
                .flat_map(|(rows, cols)| every_format(rows, cols, 2)),
        );
        all.retain(|w| Packed::new(w, Compute::Int8.over(w)).is_some());
        let mut in_strips = all.clone();
        Matrix::repack(&mut in_strips, Compute::Int8, &mut |_| ());
        in_strips.retain(|w| matches!(w.format(), Format::Interleaved(_)));
        assert!(in_strips.len() > 12);
        all.extend(in_strips);
        all
    }

    fn product(w: &Matrix, x: &[f32], rows: &[usize], instructions: Instructions) -> Vec<f32> {
        let packed = Packed::new(w, Compute::Int8.over(w)).unwrap();
        let x = Mat::dense(x, x.len() / w.cols(), w.cols());
        let mut y = vec![f32::NAN; rows.len() * w.rows()];
        // In parts that are no whole strips.
        for outs in [0..w.rows() / 3, w.rows() / 3..w.rows()] {
            let y = MatMut::dense(&mut y, rows.len(), w.rows());
            let input = Input::new(x, [&packed]);
            #[expect(unsafe_code, reason = "one part after the other")]
            // SAFETY: nothing else writes it.
            let y = unsafe { y.part(0..rows.len(), outs.clone()) };
            packed.multiply_with(instructions, (&input, rows), outs, y, Write::Replace);
        }
        y
    }

    #[test]
    fn a_product_is_that_of_the_decoded_weight_and_rounded_activations() {
        for w in all() {
            let (n, cols) = (11, w.cols());
            let (x, dense, name) = (noise(n * cols, 3), w.to_f32(), w.format().name());
            let mut rounded = x.clone();
            Compute::Int8.over(&w).round_rows(&mut rounded, cols);
            let order = [3, 0, 10, 10, 1, 2, 4, 5, 6, 7, 8];
            for n_rows in 1..=order.len() {
                let found = product(&w, &x, &order[..n_rows], Instructions::best());
                for (i, found) in found.iter().enumerate() {
                    let (row, out) = (order[i / w.rows()], i % w.rows());
                    let (x, w) = (&rounded[row * cols..][..cols], &dense[out * cols..][..cols]);
                    let products = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let size: f64 = products().map(f64::abs).sum();
                    // Sums of offsets and of codes may cancel.
                    let size = size + w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
                    let expected: f64 = products().sum();
                    assert!(
                        (f64::from(*found) - expected).abs() <= 2e-6 * size,
                        "{name} at {i} of {n_rows}: {found} {expected}",
                    );
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits_for_any_number_of_rows() {
        for w in all() {
            let x = noise(8 * w.cols(), 5);
            let rows = [0, 1, 2, 3, 4, 5, 6, 7];
            let expected = product(&w, &x, &rows, Instructions::Portable);
            for instructions in Instructions::all() {
                for n in 1..=8 {
                    let found = product(&w, &x, &rows[..n], instructions);
                    let same = found
                        .iter()
                        .zip(&expected)
                        .all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{instructions:?} {} {n}", w.format().name());
                }
            }
        }
    }
}
