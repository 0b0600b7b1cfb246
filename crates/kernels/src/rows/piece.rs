//! What attention does with a piece of the rows that a cache holds: scores of queries, and sums of rows, each times a
//! weight. Numbers are decoded in registers, on their way into the products.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes"
)]

use super::instructions::{Instructions, Work};
use super::isa::{Isa, LANES};
use crate::CacheType;
use crate::product::strided::{Mat, MatMut};

/// Rows of numbers that lie `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    form: CacheType,
    bytes: &'a [u8],
    stride: usize,
    rows: usize,
    width: usize,
}

impl<'a> Piece<'a> {
    /// # Panics
    /// If the rows leave the bytes.
    pub(crate) fn new(
        form: CacheType,
        bytes: &'a [u8],
        stride: usize,
        [rows, width]: [usize; 2],
    ) -> Self {
        let row_bytes = form.row_bytes(width);
        assert!(
            rows == 0 || (rows - 1) * stride + row_bytes <= bytes.len(),
            "rows of a piece"
        );
        Self {
            form,
            bytes,
            stride,
            rows,
            width,
        }
    }

    /// The products of some queries, given by their numbers, with each row: `y` is `[queries, rows]`. A result depends on its
    /// query and its row alone.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub(crate) fn scores(self, queries: (Mat<'_>, &[usize]), y: MatMut<'_>) {
        self.scores_with(Instructions::best(), queries, y);
    }

    fn scores_with(
        self,
        instructions: Instructions,
        (queries, numbers): (Mat<'_>, &[usize]),
        y: MatMut<'_>,
    ) {
        assert!(
            queries.cols() == self.width && [y.rows(), y.cols()] == [numbers.len(), self.rows],
            "queries of rows, and their scores"
        );
        instructions.run(Scores {
            piece: self,
            queries,
            numbers,
            y,
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
            weights.cols() == self.rows && y.rows() == weights.rows() && y.cols() <= self.width,
            "weights of rows, and their sums"
        );
        instructions.run(Sum {
            piece: self,
            weights,
            y,
        });
    }

    fn row(&self, row: usize) -> *const u8 {
        self.bytes[row * self.stride..].as_ptr()
    }
}

/// The forms as constants.
const F32: u8 = CacheType::F32 as u8;
const F16: u8 = CacheType::F16 as u8;
const BF16: u8 = CacheType::Bf16 as u8;
const Q8_0: u8 = CacheType::Q8_0 as u8;

/// 16 numbers of a row, from one on whose number is a multiple of 16.
///
/// # Safety
/// They can be read, and the CPU has the instructions of `I`.
#[inline(always)]
unsafe fn load<I: Isa, const FORM: u8>(row: *const u8, col: usize) -> I::Sums {
    // SAFETY: the caller's promise.
    unsafe {
        match FORM {
            F32 => I::load(row.add(4 * col).cast()),
            F16 => I::load_f16(row.add(2 * col)),
            BF16 => I::load_bf16(row.add(2 * col)),
            _ => {
                let block = row.add(col / 32 * 34);
                let scale = u32::from(block.cast::<u16>().read_unaligned().to_le()) << 16;
                let codes = I::load_i8(block.add(2 + col % 32));
                I::mul(codes, I::splat(f32::from_bits(scale)))
            }
        }
    }
}

/// [`load`] of what is left of a row, zeros behind it.
///
/// # Safety
/// As [`load`], of so many numbers.
#[inline(always)]
unsafe fn load_some<I: Isa, const FORM: u8>(row: *const u8, col: usize, n: usize) -> I::Sums {
    let size = match FORM {
        F32 => 4,
        F16 | BF16 => 2,
        // Blocks are filled up with zeros.
        // SAFETY: the caller's promise.
        _ => return unsafe { load::<I, FORM>(row, col) },
    };
    let mut numbers = [0u8; 4 * LANES];
    // SAFETY: as many bytes as the caller promises, and a whole copy.
    unsafe {
        std::ptr::copy_nonoverlapping(row.add(size * col), numbers.as_mut_ptr(), size * n);
        load::<I, FORM>(numbers.as_ptr(), 0)
    }
}

/// Bytes that are read while memory brings others.
const AHEAD: usize = 4096;

struct Scores<'a> {
    piece: Piece<'a>,
    queries: Mat<'a>,
    numbers: &'a [usize],
    y: MatMut<'a>,
}

impl Work for Scores<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.piece.form {
                CacheType::F32 => self.with::<I, F32>(),
                CacheType::F16 => self.with::<I, F16>(),
                CacheType::Bf16 => self.with::<I, BF16>(),
                CacheType::Q8_0 => self.with::<I, Q8_0>(),
            }
        }
    }
}

impl Scores<'_> {
    /// Cuts the queries into eights, fours, twos and ones. Of few, several rows share what is read of them.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, const FORM: u8>(mut self) {
        let mut at = 0;
        while at < self.numbers.len() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.numbers.len() - at {
                    8.. if I::TILE >= 8 => self.tiles::<I, FORM, 1, 8>(at),
                    4.. if I::TILE >= 8 => self.tiles::<I, FORM, 2, 4>(at),
                    4.. => self.tiles::<I, FORM, 1, 4>(at),
                    2.. => self.tiles::<I, FORM, 2, 2>(at),
                    _ => self.tiles::<I, FORM, 4, 1>(at),
                }
            };
        }
    }

    /// All rows with `N` queries, `R` at a time. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn tiles<I: Isa, const FORM: u8, const R: usize, const N: usize>(
        &mut self,
        at: usize,
    ) -> usize {
        let x = std::array::from_fn(|i| self.queries.row(self.numbers[at + i]).as_ptr());
        let (n_rows, row_bytes) = (self.piece.rows, self.piece.form.row_bytes(self.piece.width));
        let ahead = AHEAD.div_ceil(row_bytes.max(1)) * self.piece.stride;
        for row in (0..n_rows).step_by(R) {
            // The first queries bring what the others find in the CPU's cache.
            if at == 0 {
                for row in row..n_rows.min(row + R) {
                    I::prefetch(self.piece.row(row).wrapping_add(ahead), row_bytes);
                }
            }
            // Behind the last row comes the last row again.
            let rows = std::array::from_fn(|r| self.piece.row((row + r).min(n_rows - 1)));
            // SAFETY: rows and queries are whole; the caller's promise.
            let sums = unsafe { products::<I, FORM, R, N>(rows, x, self.piece.width) };
            for (r, sums) in sums.iter().enumerate().take(n_rows - row) {
                for (i, sum) in sums.iter().enumerate() {
                    self.y.row(at + i)[row + r] = *sum;
                }
            }
        }
        N
    }
}

/// # Safety
/// The CPU has the instructions of `I`; rows and queries of `width` numbers can be read.
#[inline(always)]
unsafe fn products<I: Isa, const FORM: u8, const R: usize, const N: usize>(
    rows: [*const u8; R],
    x: [*const f32; N],
    width: usize,
) -> [[f32; N]; R] {
    let whole = width - width % LANES;
    // SAFETY: whole steps lie in rows and queries, and what is left is copied to where a whole step can be read.
    unsafe {
        let mut sums = [[I::zero(); N]; R];
        for at in (0..whole).step_by(LANES) {
            for (row, sums) in rows.iter().zip(&mut sums) {
                let numbers = load::<I, FORM>(*row, at);
                for (x, sum) in x.iter().zip(sums) {
                    *sum = I::mul_add(numbers, I::load(x.add(at)), *sum);
                }
            }
        }
        let left = width - whole;
        if left > 0 {
            for (row, sums) in rows.iter().zip(&mut sums) {
                let numbers = load_some::<I, FORM>(*row, whole, left);
                for (x, sum) in x.iter().zip(sums) {
                    let x = load_some::<I, F32>(x.cast(), whole, left);
                    *sum = I::mul_add(numbers, x, *sum);
                }
            }
        }
        let mut totals = [[0.0; N]; R];
        for (sums, totals) in sums.iter().zip(&mut totals) {
            for (sum, total) in sums.iter().zip(totals) {
                *total = I::total(*sum);
            }
        }
        totals
    }
}

struct Sum<'a> {
    piece: Piece<'a>,
    weights: Mat<'a>,
    y: MatMut<'a>,
}

impl Work for Sum<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.piece.form {
                CacheType::F32 => self.with::<I, F32>(),
                CacheType::F16 => self.with::<I, F16>(),
                CacheType::Bf16 => self.with::<I, BF16>(),
                CacheType::Q8_0 => self.with::<I, Q8_0>(),
            }
        }
    }
}

impl Sum<'_> {
    /// Cuts the sums as [`Scores`] does queries. Of few, several columns are summed side by side.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, const FORM: u8>(mut self) {
        let mut at = 0;
        while at < self.weights.rows() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.weights.rows() - at {
                    8.. if I::TILE >= 8 => self.tile::<I, FORM, 8, 1>(at),
                    4.. if I::TILE >= 8 => self.tile::<I, FORM, 4, 2>(at),
                    4.. => self.tile::<I, FORM, 4, 1>(at),
                    2.. => self.tile::<I, FORM, 2, 2>(at),
                    _ => self.tile::<I, FORM, 1, 4>(at),
                }
            };
        }
    }

    /// `N` sums, `C` times 16 columns at a time. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn tile<I: Isa, const FORM: u8, const N: usize, const C: usize>(
        &mut self,
        at: usize,
    ) -> usize {
        let (width, mut col) = (self.y.cols(), 0);
        // SAFETY: the caller's promise.
        unsafe {
            while col + C * LANES <= width {
                self.columns::<I, FORM, N, C>(at, col);
                col += C * LANES;
            }
            while col + LANES <= width {
                self.columns::<I, FORM, N, 1>(at, col);
                col += LANES;
            }
            if col < width {
                self.last_columns::<I, FORM, N>(at, col);
            }
        }
        N
    }

    /// `N` sums of `C` times 16 columns.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn columns<I: Isa, const FORM: u8, const N: usize, const C: usize>(
        &mut self,
        at: usize,
        col: usize,
    ) {
        let weights: [*const f32; N] = std::array::from_fn(|i| self.weights.row(at + i).as_ptr());
        let (mut from, stride) = (self.piece.bytes.as_ptr(), self.piece.stride);
        // SAFETY: a weight for each row; as many columns as rows have.
        unsafe {
            let mut sums = [[I::zero(); N]; C];
            for row in 0..self.piece.rows {
                for (c, sums) in sums.iter_mut().enumerate() {
                    let numbers = load::<I, FORM>(from, col + c * LANES);
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
    unsafe fn last_columns<I: Isa, const FORM: u8, const N: usize>(
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
                    let numbers = load_some::<I, FORM>(self.piece.row(row), col, n);
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
    use crate::attention::cached::{decode_blocks, encode_blocks};
    use crate::matrix::tests::noise;

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
                encode_blocks(&values, width, &mut bytes);
                decode_blocks(&bytes, width, &mut values);
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
                let piece = Piece::new(form, &bytes, stride, [rows, width]);
                let x = noise(n * width, 1);
                let order: Vec<usize> = (0..n).rev().collect();
                let mut scores = vec![f32::NAN; n * rows];
                let y = MatMut::dense(&mut scores, n, rows);
                piece.scores((Mat::dense(&x, n, width), &order), y);
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
                piece.sum(Mat::dense(&weights, n, rows), y);
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
            let piece = Piece::new(form, &bytes, form.row_bytes(width), [rows, width]);
            let all = |instructions, n: usize| {
                let order: Vec<usize> = (0..n).collect();
                let (mut scores, mut sums) = (vec![0.0; n * rows], vec![0.0; n * width]);
                let y = MatMut::dense(&mut scores, n, rows);
                piece.scores_with(instructions, (Mat::dense(&x, n, width), &order), y);
                let y = MatMut::dense(&mut sums, n, width);
                piece.sum_with(instructions, Mat::dense(&weights[..n * rows], n, rows), y);
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
