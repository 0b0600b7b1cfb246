//! A weight as a product reads it: tile by tile, in f32, whatever it is stored in and whatever it is rounded to.
//!
//! What a tile goes through, in this order: it is decoded; a low-rank update is added, where the update is part of the
//! weight; it is rounded by the quantizer that the merged weight is meant for; it is rounded to what products compute
//! in, by the product itself where that is bf16. So neither an updated nor a rounded weight ever exists whole.

use std::ops::Range;

use crate::fp8;
use crate::product::gemm::{dot, tiles, with_scratch};
use crate::product::strided::{Mat, MatMut, Write, gemm, gemm_bf16, multiplies_pairs};
use crate::rows::Packed;
use crate::{Compute, Format, Matrix, Quantizer};

/// Side of a tile: 256 × 256 f32 values are 256 KiB, a part of the second-level cache.
pub(crate) const TILE: usize = 256;
/// One as long along its rows as a product sums at once: sums are then added up as over a weight that is read in place.
pub(crate) const LONG_TILE: [usize; 2] = [128, 512];
/// Output widths of tasks are multiples of this, where no quantizer asks for more.
const GRAIN: usize = 16;

/// A weight `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights<'a> {
    stored: Stored<'a>,
    compute: Compute,
    folded: Option<Folded<'a>>,
}

#[derive(Clone, Copy, Debug)]
enum Stored<'a> {
    /// f32 values in place, and their row length.
    Values(&'a [f32], usize),
    /// Other bytes.
    Packed(&'a Matrix),
}

/// What a weight becomes before it is multiplied: the weight that a merge would write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Folded<'a> {
    pub(crate) quantizer: Quantizer,
    /// `scale · b · a` with `a [rank, in]`, `b [out, rank]`.
    pub(crate) update: Option<(Mat<'a>, Mat<'a>, f32)>,
}

impl<'a> Weights<'a> {
    /// A frozen matrix, read in place where it is f32.
    pub(crate) fn frozen(matrix: &'a Matrix, compute: Compute) -> Self {
        match matrix.as_f32() {
            Some(values) => Self::trained(values, matrix.cols(), compute.over(matrix)),
            None => Self {
                stored: Stored::Packed(matrix),
                compute: compute.over(matrix),
                folded: None,
            },
        }
    }

    /// A trained weight: f32 values.
    pub(crate) fn trained(values: &'a [f32], cols: usize, compute: Compute) -> Self {
        Self {
            stored: Stored::Values(values, cols),
            compute,
            folded: None,
        }
    }

    /// The weight that a merge into a quantizer's format would write.
    pub(crate) fn folded(self, folded: Folded<'a>) -> Self {
        let quantizer = folded.quantizer.for_width(self.in_width());
        let is_there_already =
            folded.update.is_none() && self.is_fp8() && matches!(quantizer, Quantizer::Fp8(_));
        Self {
            folded: (!is_there_already).then_some(Folded {
                quantizer,
                ..folded
            }),
            ..self
        }
    }

    pub(crate) fn out_width(&self) -> usize {
        match self.stored {
            Stored::Values(values, cols) => values.len() / cols.max(1),
            Stored::Packed(matrix) => matrix.rows(),
        }
    }

    pub(crate) fn in_width(&self) -> usize {
        match self.stored {
            Stored::Values(_, cols) => cols,
            Stored::Packed(matrix) => matrix.cols(),
        }
    }

    /// Whether a row can be read alone: not one that is rounded in blocks, nor one that is stored as a column.
    pub(crate) fn has_rows(&self) -> bool {
        let is_turned = matches!(self.stored, Stored::Packed(matrix) if matches!(matrix.format(), Format::SplitKvB(_)));
        self.block().is_none() && !is_turned
    }

    /// Rows and columns that [`Self::for_tiles`] must start at a multiple of; a row can be read alone only if there is
    /// no such thing.
    pub(crate) fn block(&self) -> Option<[usize; 2]> {
        let folded = self.folded.map(|folded| folded.quantizer.block());
        let rounded = self.is_rounded_in_blocks().then_some(fp8::BLOCK);
        let larger = |a: [usize; 2], b: [usize; 2]| [a[0].max(b[0]), a[1].max(b[1])];
        match (folded, rounded) {
            (Some(a), Some(b)) => Some(larger(a, b)),
            (a, b) => a.or(b),
        }
    }

    /// What the widths of tasks are multiples of: along the output, and along the input.
    pub(crate) fn grain(&self) -> [usize; 2] {
        let [rows, cols] = self.block().unwrap_or([1, 1]);
        [rows, cols].map(|side| side.next_multiple_of(GRAIN))
    }

    fn is_fp8(&self) -> bool {
        matches!(self.stored, Stored::Packed(matrix) if matches!(matrix.format(), Format::Fp8(_)))
    }

    /// Whether products make FP8 of what is none yet.
    fn is_rounded_in_blocks(&self) -> bool {
        let is_fp8 = match self.folded {
            Some(folded) => matches!(folded.quantizer, Quantizer::Fp8(_)),
            None => self.is_fp8(),
        };
        matches!(self.compute, Compute::Fp8(_)) && !is_fp8
    }

    /// Whether the stored values are those that are multiplied.
    fn is_exact(&self) -> bool {
        let same = match (self.compute, self.stored) {
            (Compute::F32 | Compute::Int8, _) => true,
            (Compute::Bf16, Stored::Packed(matrix)) => matches!(matrix.format(), Format::Bf16),
            (Compute::Bf16 | Compute::F16, _) => false,
            (Compute::Fp8(_), _) => !self.is_rounded_in_blocks(),
        };
        self.folded.is_none() && same
    }

    /// Whether tiles are as they are stored, at most rounded by the product itself.
    fn has_stored_tiles(&self) -> bool {
        self.is_exact() || self.folded.is_none() && self.compute == Compute::Bf16
    }

    /// Calls `each` on tiles of a size, of as many values as a square one at most, that cover the given rows and columns,
    /// rows outermost. They are for [`Self::multiply`], which rounds some.
    pub(crate) fn for_tiles(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        size: [usize; 2],
        mut each: impl FnMut(Range<usize>, Range<usize>, Mat<'_>),
    ) {
        if let (Stored::Values(values, stride), true) = (self.stored, self.has_stored_tiles()) {
            let whole = Mat::dense(values, self.out_width(), stride);
            return each(rows.clone(), cols.clone(), whole.block(rows, cols));
        }
        with_scratch(TILE * TILE, |scratch| {
            for row_tile in tiles(rows, size[0]) {
                for col_tile in tiles(cols.clone(), size[1]) {
                    let tile = &mut scratch[..row_tile.len() * col_tile.len()];
                    self.read_for(
                        self.compute.before_products(),
                        (row_tile.clone(), col_tile.clone()),
                        tile,
                    );
                    let tile = Mat::dense(tile, row_tile.len(), col_tile.len());
                    each(row_tile.clone(), col_tile, tile);
                }
            }
        });
    }

    /// Copies a tile out as the product sees it.
    ///
    /// # Panics
    /// If the weight is rounded in blocks and the tile does not start at the edge of one.
    pub(crate) fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let compute = if self.is_exact() {
            Compute::F32
        } else {
            self.compute
        };
        self.read_for(compute, (rows, cols), out);
    }

    /// [`Self::read`], rounded to what is given.
    fn read_for(
        &self,
        compute: Compute,
        (rows, cols): (Range<usize>, Range<usize>),
        out: &mut [f32],
    ) {
        if let Some(block) = self.block() {
            assert!(
                rows.start.is_multiple_of(block[0]) && cols.start.is_multiple_of(block[1]),
                "a tile starts inside a block"
            );
        }
        match self.stored {
            Stored::Packed(matrix) => matrix.decode(rows.clone(), cols.clone(), out),
            Stored::Values(values, stride) => {
                for (row, line) in rows.clone().zip(out.chunks_exact_mut(cols.len().max(1))) {
                    line.copy_from_slice(&values[row * stride..][cols.clone()]);
                }
            }
        }
        if let Some(Folded { quantizer, update }) = self.folded {
            if let Some((a, b, scale)) = update {
                let tile = MatMut::dense(out, rows.len(), cols.len());
                let (a, b) = (
                    a.block(0..a.rows(), cols.clone()),
                    b.block(rows, 0..b.cols()),
                );
                gemm(tile, b, a, scale, Write::Add);
            }
            quantizer.round(out, cols.len());
        }
        match compute {
            Compute::Fp8(_) if !self.is_rounded_in_blocks() => {}
            compute => compute.round_weight(out, cols.len()),
        }
    }

    /// `dst = a · tile`, or added to `dst`, with a tile of it or a tile's transpose; serial.
    pub(crate) fn multiply(&self, dst: MatMut<'_>, a: Mat<'_>, tile: Mat<'_>, write: Write) {
        match self.compute {
            Compute::Bf16 => gemm_bf16(dst, a, (tile, self.is_exact()), write),
            _ => gemm(dst, a, tile, 1.0, write),
        }
    }

    /// Its rows as pairs of bf16, `[out, in / 2]`, where products in bf16 read such and it is stored so.
    pub(crate) fn pairs(&self) -> Option<Mat<'a>> {
        match self.stored {
            Stored::Packed(matrix)
                if self.compute == Compute::Bf16
                    && self.is_exact()
                    && matrix.cols().is_multiple_of(2)
                    && multiplies_pairs() =>
            {
                Mat::of_pairs(matrix.bytes(), matrix.rows(), matrix.cols() / 2)
            }
            _ => None,
        }
    }

    /// What products with it round to.
    pub(crate) fn compute(&self) -> Compute {
        self.compute
    }

    /// The weight as products in int8 read it, if it has such.
    pub(crate) fn int8(&self) -> Option<Packed<'a>> {
        (self.compute == Compute::Int8)
            .then(|| self.packed())
            .flatten()
    }

    /// Whether activations are int8.
    pub(crate) fn is_int8(&self) -> bool {
        self.int8().is_some()
    }

    /// The weight as products of rows read it, if they can.
    pub(crate) fn packed(&self) -> Option<Packed<'a>> {
        match self.stored {
            _ if !self.is_exact() => None,
            Stored::Values(values, cols) => Some(Packed::of_values(values, cols)),
            Stored::Packed(matrix) => Packed::new(matrix, self.compute),
        }
    }

    /// The product of one row with `x`, for a weight without blocks.
    pub(crate) fn dot(&self, row: usize, x: &[f32]) -> f32 {
        match self.stored {
            Stored::Values(values, cols) if self.is_exact() => {
                dot(&values[row * cols..][..cols], x)
            }
            Stored::Packed(matrix) if self.is_exact() => matrix.dot(row, x),
            _ => with_scratch(x.len(), |line| {
                self.read(row..row + 1, 0..x.len(), line);
                dot(line, x)
            }),
        }
    }
}
