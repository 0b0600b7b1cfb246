//! Attention over a tile of cached rows: the scores of queries, and weighted sums of rows. Numbers are decoded in
//! registers on their way into the products.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes"
)]

use super::dense::{self, load, load_some, with_dtype};
use crate::formats::{CacheType, DtypeRows, RowDtype};
use crate::memory::{Mat, MatMut};
use crate::settings::Accumulate;
use crate::simd::{Instructions, Isa, LANES, SimdWork};

/// Cached rows, in the data type of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvTile<'a>(DtypeRows<'a>);

impl<'a> KvTile<'a> {
    /// Rows that are `stride` bytes apart.
    ///
    /// # Panics
    /// If the rows leave the bytes.
    pub(crate) fn new(
        form: CacheType,
        bytes: &'a [u8],
        stride: usize,
        [rows, width]: [usize; 2],
    ) -> Self {
        let lines = DtypeRows {
            dtype: form.row_dtype(),
            bytes,
            stride,
            rows,
            width,
        };
        lines.check();
        Self(lines)
    }

    /// The products of the given queries with each row: y `[queries, rows]`. A result depends on its query and its row
    /// alone.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub(crate) fn scores(self, queries: Mat<'_>, indices: &[usize], y: MatMut<'_>) {
        self.scores_with(Instructions::best(), queries, indices, y);
    }

    fn scores_with(
        self,
        instructions: Instructions,
        queries: Mat<'_>,
        indices: &[usize],
        y: MatMut<'_>,
    ) {
        assert!(
            queries.cols() == self.0.width && [y.rows(), y.cols()] == [indices.len(), self.0.rows],
            "queries of rows, and their scores"
        );
        instructions.run(dense::DenseProduct {
            lines: self.0,
            x: queries,
            rows: indices,
            y,
            accumulate: Accumulate::Replace,
        });
    }

    /// `y = weights · rows` for the first columns of the rows: weights `[sums, rows]`, y `[sums, columns]`.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub(crate) fn sum(self, weights: Mat<'_>, y: MatMut<'_>) {
        self.sum_with(Instructions::best(), weights, y);
    }

    fn sum_with(self, instructions: Instructions, weights: Mat<'_>, y: MatMut<'_>) {
        assert!(
            weights.cols() == self.0.rows && y.rows() == weights.rows() && y.cols() <= self.0.width,
            "weights of rows, and their sums"
        );
        instructions.run(TileSum {
            lines: self.0,
            weights,
            y,
        });
    }
}

struct TileSum<'a> {
    lines: DtypeRows<'a>,
    weights: Mat<'a>,
    y: MatMut<'a>,
}

impl SimdWork for TileSum<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe { with_dtype!(self.lines.dtype, self.with::<I>()) }
    }
}

impl TileSum<'_> {
    /// Cuts the sums as [`DenseProduct`](dense::DenseProduct) cuts rows. If there are few, several groups of columns
    /// are summed at once.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, const DTYPE: u8>(mut self) {
        let mut at = 0;
        while at < self.weights.rows() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.weights.rows() - at {
                    8.. if I::TILE >= 8 => self.tile::<I, DTYPE, 8, 1>(at),
                    4.. if I::TILE >= 8 => self.tile::<I, DTYPE, 4, 2>(at),
                    4.. => self.tile::<I, DTYPE, 4, 1>(at),
                    2.. => self.tile::<I, DTYPE, 2, 2>(at),
                    _ => self.tile::<I, DTYPE, 1, 4>(at),
                }
            };
        }
    }

    /// `N` sums, `C` times 16 columns at a time. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn tile<I: Isa, const DTYPE: u8, const N: usize, const C: usize>(
        &mut self,
        at: usize,
    ) -> usize {
        let (width, mut col) = (self.y.cols(), 0);
        // SAFETY: the caller's promise.
        unsafe {
            while col + C * LANES <= width {
                self.columns::<I, DTYPE, N, C>(at, col);
                col += C * LANES;
            }
            while col + LANES <= width {
                self.columns::<I, DTYPE, N, 1>(at, col);
                col += LANES;
            }
            if col < width {
                self.last_columns::<I, DTYPE, N>(at, col);
            }
        }
        N
    }

    /// `N` sums of `C` times 16 columns.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn columns<I: Isa, const DTYPE: u8, const N: usize, const C: usize>(
        &mut self,
        at: usize,
        col: usize,
    ) {
        let weights: [*const f32; N] = std::array::from_fn(|i| self.weights.row(at + i).as_ptr());
        let (mut from, stride) = (self.lines.bytes.as_ptr(), self.lines.stride);
        // SAFETY: a weight for each row; as many columns as rows have.
        unsafe {
            let mut sums = [[I::zero(); N]; C];
            for row in 0..self.lines.rows {
                for (c, sums) in sums.iter_mut().enumerate() {
                    let numbers = load::<I, DTYPE>(from, col + c * LANES);
                    for (weights, sum) in weights.iter().zip(sums) {
                        *sum = I::mul_add(numbers, I::splat(*weights.add(row)), *sum);
                    }
                }
                from = from.wrapping_add(stride);
            }
            for (c, sums) in sums.iter().enumerate() {
                let col = col + c * LANES;
                for (i, sum) in sums.iter().enumerate() {
                    let to = &mut self.y.row(at + i)[col..col + LANES];
                    I::store(*sum, to.as_mut_ptr());
                }
            }
        }
    }

    /// `N` sums of fewer than 16 columns.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn last_columns<I: Isa, const DTYPE: u8, const N: usize>(
        &mut self,
        at: usize,
        col: usize,
    ) {
        let n = self.y.cols() - col;
        for i in at..at + N {
            let mut values = [0.0; LANES];
            // SAFETY: as many columns as are left; a copy has 16.
            unsafe {
                let mut sum = I::zero();
                for (row, weight) in self.weights.row(i).iter().enumerate() {
                    let numbers = load_some::<I, DTYPE>(self.lines.row(row), col, n);
                    sum = I::mul_add(numbers, I::splat(*weight), sum);
                }
                I::store(sum, values.as_mut_ptr());
            }
            self.y.row(i)[col..].copy_from_slice(&values[..n]);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::formats::{decode_q8_rows, encode_q8_rows};
    use crate::testing::noise;

    /// Rows in a form, a gap behind each, and the numbers that they stand for.
    fn held(form: CacheType, [rows, width]: [usize; 2], gap: usize) -> (Vec<u8>, Vec<f32>) {
        let mut values = noise(rows * width, 2);
        let packed: Vec<u8> = match form {
            CacheType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            CacheType::F16 => {
                let rounded = values.iter_mut().map(|v| {
                    let rounded = f16::from_f32(*v);
                    *v = rounded.to_f32();
                    rounded.to_le_bytes()
                });
                rounded.flatten().collect()
            }
            CacheType::Bf16 => {
                let rounded = values.iter_mut().map(|v| {
                    let rounded = bf16::from_f32(*v);
                    *v = rounded.to_f32();
                    rounded.to_le_bytes()
                });
                rounded.flatten().collect()
            }
            CacheType::Q8_0 => {
                let mut bytes = vec![0; rows * form.row_bytes(width)];
                encode_q8_rows(&values, width, &mut bytes);
                decode_q8_rows(&bytes, width, &mut values);
                bytes
            }
        };
        let with_gaps = packed.chunks(form.row_bytes(width)).flat_map(|row| {
            let gap = std::iter::repeat_n(0xFF, gap);
            row.iter().copied().chain(gap)
        });
        let mut bytes: Vec<u8> = with_gaps.collect();
        // Nothing behind the last row: what is read there would be seen.
        bytes.truncate(bytes.len() - gap);
        (bytes, values)
    }

    /// `[queries, rows, width, columns]`.
    const SHAPES: [[usize; 4]; 8] = [
        [1, 1, 3, 3],
        [2, 5, 64, 64],
        [4, 9, 40, 40],
        [7, 130, 33, 21],
        [8, 4, 96, 64],
        [11, 3, 70, 50],
        [16, 64, 128, 128],
        [3, 5, 32, 0],
    ];

    #[test]
    fn scores_and_sums_are_those_written_out() {
        for form in CacheType::ALL {
            for [n, rows, width, cols] in SHAPES {
                let (bytes, values) = held(form, [rows, width], 6);
                let stride = form.row_bytes(width) + 6;
                let kv_tile = KvTile::new(form, &bytes, stride, [rows, width]);
                let x = noise(n * width, 1);
                let order: Vec<usize> = (0..n).rev().collect();
                let mut scores = vec![f32::NAN; n * rows];
                let y = MatMut::dense(&mut scores, n, rows);
                kv_tile.scores(Mat::dense(&x, n, width), &order, y);
                for (i, found) in scores.iter().enumerate() {
                    let (query, row) = (order[i / rows], i % rows);
                    let products = (0..width).map(|l| {
                        f64::from(x[query * width + l]) * f64::from(values[row * width + l])
                    });
                    let expected: f64 = products.sum();
                    assert!(
                        (f64::from(*found) - expected).abs() < 1e-5,
                        "{found} {expected}"
                    );
                }
                let (weights, mut sums) = (noise(n * rows, 3), vec![f32::NAN; n * cols]);
                let y = MatMut::dense(&mut sums, n, cols);
                kv_tile.sum(Mat::dense(&weights, n, rows), y);
                for (i, found) in sums.iter().enumerate() {
                    let (sum, col) = (i / cols, i % cols);
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

    #[test]
    fn every_instruction_set_gives_the_same_bits_for_any_number_of_queries() {
        let [rows, width] = [13, 72];
        let (x, weights) = (noise(11 * width, 1), noise(11 * rows, 3));
        for form in CacheType::ALL {
            let (bytes, _) = held(form, [rows, width], 0);
            let kv_tile = KvTile::new(form, &bytes, form.row_bytes(width), [rows, width]);
            let all = |instructions, n: usize| {
                let order: Vec<usize> = (0..n).collect();
                let (mut scores, mut sums) = (vec![0.0; n * rows], vec![0.0; n * width]);
                let y = MatMut::dense(&mut scores, n, rows);
                kv_tile.scores_with(instructions, Mat::dense(&x, n, width), &order, y);
                let y = MatMut::dense(&mut sums, n, width);
                kv_tile.sum_with(instructions, Mat::dense(&weights[..n * rows], n, rows), y);
                [scores, sums]
                    .map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            };
            let [scores, sums] = all(Instructions::Portable, 11);
            for instructions in Instructions::all() {
                for n in 1..=11 {
                    let found = all(instructions, n);
                    let expected = [&scores[..n * rows], &sums[..n * width]];
                    assert!(found == expected, "{instructions:?} {form:?} {n}");
                }
            }
        }
    }
}
