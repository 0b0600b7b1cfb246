//! A weight as products read it: tile by tile in f32, whatever its stored form and rounding.
//!
//! A tile is decoded; a low-rank update is added, if it is part of the weight; the sum is rounded to the format of the
//! merged weight; and it is rounded to the precision of products, by the product itself for bf16. So neither an updated
//! nor a rounded weight ever exists whole.

use std::ops::Range;

use super::gemm::{gemm, gemm_bf16};
use crate::formats::{Format, Matrix, Quantizer, fp8};
use crate::gemv::PackedWeight;
use crate::memory::{Mat, MatMut, with_scratch};
use crate::settings::{Accumulate, Compute, OperandRounding};
use crate::simd::dot;
use crate::threads::tiles;

/// Side of a tile: 256 × 256 f32 values are 256 KiB, a part of the second-level cache.
pub(crate) const TILE: usize = 256;
/// A tile as long as the depth that a product sums at once, so sums are added up as for a weight that is read in place.
pub(crate) const LONG_TILE: [usize; 2] = [128, 512];
/// Output widths of tasks are multiples of this, or of a larger block.
const GRAIN: usize = 16;

/// One of a layer's two products with its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LayerPass {
    /// `y = x · wᵀ`.
    Forward,
    /// `dx = dy · w`.
    Backward,
}

/// A weight `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightOperand<'a> {
    stored: OperandSource<'a>,
    compute: Compute,
    fake_quant: Option<WeightFakeQuant<'a>>,
}

#[derive(Clone, Copy, Debug)]
enum OperandSource<'a> {
    /// f32 values in place, and their row length.
    Values(&'a [f32], usize),
    /// Stored bytes of any format.
    Matrix(&'a Matrix),
}

/// Fake quantization of a weight: it is multiplied as a merge would write it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightFakeQuant<'a> {
    pub(crate) quantizer: Quantizer,
    /// `scale · b · a` with `a [rank, in]`, `b [out, rank]`.
    pub(crate) update: Option<(Mat<'a>, Mat<'a>, f32)>,
}

impl<'a> WeightOperand<'a> {
    /// A frozen matrix, read in place where it is f32.
    pub(crate) fn frozen(matrix: &'a Matrix, compute: Compute) -> Self {
        match matrix.as_f32() {
            Some(values) => Self::trained(values, matrix.cols(), compute.for_weight(matrix)),
            None => Self {
                stored: OperandSource::Matrix(matrix),
                compute: compute.for_weight(matrix),
                fake_quant: None,
            },
        }
    }

    /// A trained weight: f32 values.
    pub(crate) fn trained(values: &'a [f32], cols: usize, compute: Compute) -> Self {
        Self {
            stored: OperandSource::Values(values, cols),
            compute,
            fake_quant: None,
        }
    }

    /// The weight as a merge into the quantizer's format would write it.
    pub(crate) fn fake_quantized(self, fake_quant: WeightFakeQuant<'a>) -> Self {
        let quantizer = fake_quant.quantizer.for_width(self.in_width());
        let is_there_already =
            fake_quant.update.is_none() && self.is_fp8() && matches!(quantizer, Quantizer::Fp8(_));
        Self {
            fake_quant: (!is_there_already).then_some(WeightFakeQuant {
                quantizer,
                ..fake_quant
            }),
            ..self
        }
    }

    pub(crate) fn out_width(&self) -> usize {
        match self.stored {
            OperandSource::Values(values, cols) => values.len() / cols.max(1),
            OperandSource::Matrix(matrix) => matrix.rows(),
        }
    }

    pub(crate) fn in_width(&self) -> usize {
        match self.stored {
            OperandSource::Values(_, cols) => cols,
            OperandSource::Matrix(matrix) => matrix.cols(),
        }
    }

    /// Whether a row can be decoded alone: not if the weight is rounded in blocks or its rows are stored as columns.
    pub(super) fn has_rows(&self) -> bool {
        let is_transposed = matches!(self.stored, OperandSource::Matrix(matrix) if matches!(matrix.format(), Format::SplitKvB(_)));
        self.block().is_none() && !is_transposed
    }

    /// The rows and columns at whose multiples tiles must start; `None` if rows are decoded alone.
    pub(crate) fn block(&self) -> Option<[usize; 2]> {
        let fake_quant = self
            .fake_quant
            .map(|fake_quant| fake_quant.quantizer.block());
        let rounded = self.is_rounded_in_blocks().then_some(fp8::BLOCK);
        let larger = |a: [usize; 2], b: [usize; 2]| [a[0].max(b[0]), a[1].max(b[1])];
        match (fake_quant, rounded) {
            (Some(a), Some(b)) => Some(larger(a, b)),
            (a, b) => a.or(b),
        }
    }

    /// The multiple of the widths of tasks: along the output forward, along the input backward.
    pub(super) fn grain(&self, pass: LayerPass) -> usize {
        let [rows, cols] = self.block().unwrap_or([1, 1]);
        let side = match pass {
            LayerPass::Forward => rows,
            LayerPass::Backward => cols,
        };
        side.next_multiple_of(GRAIN)
    }

    fn is_fp8(&self) -> bool {
        matches!(self.stored, OperandSource::Matrix(matrix) if matches!(matrix.format(), Format::Fp8(_)))
    }

    /// Whether products round the weight to FP8, which it is not yet.
    fn is_rounded_in_blocks(&self) -> bool {
        let is_fp8 = match self.fake_quant {
            Some(fake_quant) => matches!(fake_quant.quantizer, Quantizer::Fp8(_)),
            None => self.is_fp8(),
        };
        matches!(self.compute, Compute::Fp8(_)) && !is_fp8
    }

    /// Whether the stored values are multiplied as they are.
    fn is_exact(&self) -> bool {
        let same = match (self.compute, self.stored) {
            (Compute::F32 | Compute::MatchWeight, _) => true,
            (Compute::Bf16, OperandSource::Matrix(matrix)) => {
                matches!(matrix.format(), Format::Bf16)
            }
            (Compute::Bf16 | Compute::F16, _) => false,
            (Compute::Fp8(_), _) => !self.is_rounded_in_blocks(),
        };
        self.fake_quant.is_none() && same
    }

    /// Whether tiles hold the stored values, which at most the product itself rounds.
    fn has_stored_tiles(&self) -> bool {
        self.is_exact() || self.fake_quant.is_none() && self.compute == Compute::Bf16
    }

    /// Calls `each` on tiles that cover the given rows and columns, rows outermost. A tile has at most `TILE · TILE`
    /// values. [`Self::multiply`] rounds those that products round themselves.
    pub(crate) fn for_tiles(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        size: [usize; 2],
        mut each: impl FnMut(Range<usize>, Range<usize>, Mat<'_>),
    ) {
        if let (OperandSource::Values(values, stride), true) =
            (self.stored, self.has_stored_tiles())
        {
            let whole = Mat::dense(values, self.out_width(), stride);
            return each(rows.clone(), cols.clone(), whole.block(rows, cols));
        }
        with_scratch(TILE * TILE, |scratch| {
            for row_tile in tiles(rows, size[0]) {
                for col_tile in tiles(cols.clone(), size[1]) {
                    let tile = &mut scratch[..row_tile.len() * col_tile.len()];
                    self.read_for(
                        self.compute.rounding_before_product(),
                        row_tile.clone(),
                        col_tile.clone(),
                        tile,
                    );
                    let tile = Mat::dense(tile, row_tile.len(), col_tile.len());
                    each(row_tile.clone(), col_tile, tile);
                }
            }
        });
    }

    /// Reads a tile as it is multiplied.
    ///
    /// # Panics
    /// If the weight is rounded in blocks and the tile does not start at the edge of one.
    pub(crate) fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let rounding = if self.is_exact() {
            OperandRounding::F32
        } else {
            self.compute.rounding()
        };
        self.read_for(rounding, rows, cols, out);
    }

    /// [`Self::read`] with a rounding of its own.
    fn read_for(
        &self,
        rounding: OperandRounding,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
    ) {
        if let Some(block) = self.block() {
            assert!(
                rows.start.is_multiple_of(block[0]) && cols.start.is_multiple_of(block[1]),
                "a tile starts inside a block"
            );
        }
        match self.stored {
            OperandSource::Matrix(matrix) => matrix.decode(rows.clone(), cols.clone(), out),
            OperandSource::Values(values, stride) => {
                for (row, line) in rows.clone().zip(out.chunks_exact_mut(cols.len().max(1))) {
                    line.copy_from_slice(&values[row * stride..][cols.clone()]);
                }
            }
        }
        if let Some(WeightFakeQuant { quantizer, update }) = self.fake_quant {
            if let Some((a, b, scale)) = update {
                let tile = MatMut::dense(out, rows.len(), cols.len());
                let (a, b) = (
                    a.block(0..a.rows(), cols.clone()),
                    b.block(rows, 0..b.cols()),
                );
                gemm(tile, b, a, scale, Accumulate::Add);
            }
            quantizer.round(out, cols.len());
        }
        match rounding {
            OperandRounding::Fp8(_) if !self.is_rounded_in_blocks() => {}
            rounding => rounding.round_weight(out, cols.len()),
        }
    }

    /// `dst = a · tile`, or added to `dst`, with a tile of the weight or its transpose; serial.
    pub(crate) fn multiply(
        &self,
        dst: MatMut<'_>,
        a: Mat<'_>,
        tile: Mat<'_>,
        accumulate: Accumulate,
    ) {
        match self.compute {
            Compute::Bf16 => gemm_bf16(dst, a, tile, self.is_exact(), accumulate),
            _ => gemm(dst, a, tile, 1.0, accumulate),
        }
    }

    /// Its rows as pairs of bf16, `[out, in / 2]`, if it is stored so and multiplied as it is.
    pub(super) fn bf16_pairs(&self) -> Option<Mat<'a>> {
        match self.stored {
            OperandSource::Matrix(matrix) if self.is_exact() && matrix.cols().is_multiple_of(2) => {
                Mat::of_pairs(matrix.bytes(), matrix.rows(), matrix.cols() / 2)
            }
            _ => None,
        }
    }

    /// The rounding of products with this weight.
    pub(crate) fn compute(&self) -> Compute {
        self.compute
    }

    /// The weight for products that read its stored bytes, if there are any.
    pub(super) fn packed(&self) -> Option<PackedWeight<'a>> {
        match self.stored {
            _ if !self.is_exact() => None,
            OperandSource::Values(values, cols) => Some(PackedWeight::of_values(values, cols)),
            OperandSource::Matrix(matrix) => PackedWeight::new(matrix, self.compute),
        }
    }

    /// The product of one row with `x`, for a weight whose rows are decoded alone.
    pub(crate) fn dot(&self, row: usize, x: &[f32]) -> f32 {
        match self.stored {
            OperandSource::Values(values, cols) if self.is_exact() => {
                dot(&values[row * cols..][..cols], x)
            }
            OperandSource::Matrix(matrix) if self.is_exact() => matrix.dot(row, x),
            _ => with_scratch(x.len(), |line| {
                self.read(row..row + 1, 0..x.len(), line);
                dot(line, x)
            }),
        }
    }
}
