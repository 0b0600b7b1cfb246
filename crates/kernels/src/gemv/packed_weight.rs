//! A weight whose stored bytes are multiplied, and the activations it is multiplied with.

use std::ops::Range;

use super::activations::Activations;
use super::dense::DenseProduct;
use super::quantized::{BlockOrder, QuantizedProduct};
use crate::formats::{DtypeRows, Format, Ggml, Matrix, RowDtype};
use crate::memory::{Mat, MatMut};
use crate::settings::{Accumulate, Compute};
use crate::simd::{Instructions, round_to_bf16};

/// The most rows of activations that are multiplied with a weight's stored bytes, one row at a time: each row has the
/// bits it has alone. The most queries of decoding, too.
pub const MAX_GEMV_ROWS: usize = 8;

/// A weight whose stored bytes are multiplied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedWeight<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
    kind: PackedKind,
    /// Whether activations are rounded to bf16.
    is_rounded: bool,
}

/// The encoding of a weight's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PackedKind {
    Dense(RowDtype),
    Quantized(Ggml, BlockOrder),
}

/// Activations, in all forms that the weights of a product need.
#[derive(Debug)]
pub(crate) struct GemvInput<'a> {
    floats: Mat<'a>,
    /// Rounded to bf16, row after row.
    bf16: Option<Vec<f32>>,
    int8: Option<Activations>,
}

impl<'a> GemvInput<'a> {
    /// The input of weights that share the same rows.
    pub(crate) fn new<'w>(
        x: Mat<'a>,
        weights: impl IntoIterator<Item = &'w PackedWeight<'w>>,
    ) -> Self {
        let (mut is_int8, mut is_bf16) = (false, false);
        for weight in weights {
            is_int8 |= matches!(weight.kind, PackedKind::Quantized(..));
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

    /// The activations before any rounding.
    pub(crate) fn floats(&self) -> Mat<'a> {
        self.floats
    }
}

impl<'a> PackedWeight<'a> {
    /// `None` if products with this format and setting do not read the stored bytes.
    pub(crate) fn new(w: &'a Matrix, compute: Compute) -> Option<Self> {
        let kind = match (w.format(), compute) {
            (Format::F32, Compute::F32 | Compute::MatchWeight) => PackedKind::Dense(RowDtype::F32),
            (Format::F16, Compute::F32 | Compute::MatchWeight) => PackedKind::Dense(RowDtype::F16),
            (Format::Bf16, Compute::F32 | Compute::Bf16) => PackedKind::Dense(RowDtype::Bf16),
            (Format::Ggml(format), Compute::MatchWeight) if format.has_blocks() => {
                PackedKind::Quantized(*format, BlockOrder::Rows)
            }
            (Format::Interleaved(format), Compute::MatchWeight) => {
                PackedKind::Quantized(*format, BlockOrder::Interleaved)
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
            kind: PackedKind::Dense(RowDtype::F32),
            is_rounded: false,
        }
    }

    /// The end of its bytes.
    pub(crate) fn end(&self) -> *const u8 {
        self.bytes.as_ptr_range().end
    }

    /// Bytes of a row of the weight.
    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// `y = x · wᵀ` for the given rows of `x` and a range of rows of `w`: y `[rows, outs]`.
    ///
    /// # Panics
    /// If a range leaves its matrix or the sizes do not fit.
    pub(crate) fn multiply(
        &self,
        x: &GemvInput<'_>,
        rows: &[usize],
        outs: Range<usize>,
        y: MatMut<'_>,
        accumulate: Accumulate,
    ) {
        self.multiply_with(Instructions::best(), (x, rows), outs, y, accumulate);
    }

    fn multiply_with(
        &self,
        instructions: Instructions,
        (x, rows): (&GemvInput<'_>, &[usize]),
        outs: Range<usize>,
        y: MatMut<'_>,
        accumulate: Accumulate,
    ) {
        assert!(
            outs.end * self.row_bytes <= self.bytes.len()
                && y.rows() == rows.len()
                && y.cols() == outs.len(),
            "rows of a weight and of its product"
        );
        match (self.kind, &x.int8) {
            (PackedKind::Dense(dtype), _) => {
                let floats = x.floats;
                let x = match (self.is_rounded, &x.bf16) {
                    (false, _) => floats,
                    (true, Some(values)) => Mat::dense(values, floats.rows(), floats.cols()),
                    (true, None) => unreachable!("the input is made for its weights"),
                };
                let lines = DtypeRows {
                    dtype,
                    bytes: &self.bytes[outs.start * self.row_bytes..outs.end * self.row_bytes],
                    stride: self.row_bytes,
                    rows: outs.len(),
                    width: x.cols(),
                };
                assert!(
                    dtype.row_bytes(x.cols()) == self.row_bytes,
                    "the input width of the weight"
                );
                instructions.run(DenseProduct {
                    lines,
                    x,
                    rows,
                    y,
                    accumulate,
                });
            }
            (PackedKind::Quantized(format, order), Some(x)) => {
                let product = QuantizedProduct {
                    format,
                    order,
                    bytes: self.bytes,
                    row_bytes: self.row_bytes,
                    x,
                    rows,
                    outs,
                    y,
                    accumulate,
                };
                product.run(instructions);
            }
            (PackedKind::Quantized(..), None) => unreachable!("the input is made for its weights"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemv::round_rows_to_int8;
    use crate::testing::{every_block_format, every_format, noise};

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
        all.retain(|w| PackedWeight::new(w, Compute::MatchWeight.for_weight(w)).is_some());
        let mut in_strips = all.clone();
        Matrix::repack(&mut in_strips, Compute::MatchWeight, &mut |_| ());
        in_strips.retain(|w| matches!(w.format(), Format::Interleaved(_)));
        assert!(in_strips.len() > 12);
        all.extend(in_strips);
        all
    }

    fn product(w: &Matrix, x: &[f32], rows: &[usize], instructions: Instructions) -> Vec<f32> {
        let packed = PackedWeight::new(w, Compute::MatchWeight.for_weight(w)).unwrap();
        let x = Mat::dense(x, x.len() / w.cols(), w.cols());
        let mut y = vec![f32::NAN; rows.len() * w.rows()];
        // In parts that are not whole strips.
        for outs in [0..w.rows() / 3, w.rows() / 3..w.rows()] {
            let y = MatMut::dense(&mut y, rows.len(), w.rows());
            let input = GemvInput::new(x, [&packed]);
            #[expect(unsafe_code, reason = "one part after the other")]
            // SAFETY: nothing else writes it.
            let y = unsafe { y.part(0..rows.len(), outs.clone()) };
            packed.multiply_with(instructions, (&input, rows), outs, y, Accumulate::Replace);
        }
        y
    }

    #[test]
    fn a_product_is_that_of_the_decoded_weight_and_rounded_activations() {
        for w in all() {
            let (n, cols) = (11, w.cols());
            let (x, dense, name) = (noise(n * cols, 3), w.to_f32(), w.format().name());
            let mut rounded = x.clone();
            match Compute::MatchWeight.for_weight(&w) {
                Compute::MatchWeight => round_rows_to_int8(&mut rounded, cols),
                compute => compute.rounding().round_rows(&mut rounded, cols),
            }
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
