//! Views of f32 memory as matrices, and their product.
//!
//! Views know their size, so that the product can check that its operands fit: everything above this file works
//! with views and stays safe.

#![expect(
    unsafe_code,
    reason = "strided views over slices, handed to the product by pointer; sizes are checked here"
)]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

pub(crate) use super::blocks::multiplies_pairs;
use super::blocks::{self, Right};
use crate::matrix::round_to_bf16;
use crate::product::gemm::{tiles, with_scratch};

/// A matrix to read: any row and column stride.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a> {
    ptr: *const f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    values: PhantomData<&'a [f32]>,
}

// SAFETY: a view is a shared borrow of f32 values.
unsafe impl Send for Mat<'_> {}
// SAFETY: as above.
unsafe impl Sync for Mat<'_> {}

impl<'a> Mat<'a> {
    /// `rows × cols` values of which consecutive rows lie `stride` apart.
    pub(crate) fn new(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= values.len(),
            "view leaves its slice"
        );
        Self {
            ptr: values.as_ptr(),
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
            values: PhantomData,
        }
    }

    /// Contiguous rows.
    pub(crate) fn dense(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(values, rows, cols, cols)
    }

    /// Contiguous rows of pairs of bf16, a pair as a word; none where they are not aligned as words are.
    pub(crate) fn of_pairs(bytes: &'a [u8], rows: usize, pairs: usize) -> Option<Self> {
        // SAFETY: any four bytes are a value, and only their bits are read.
        let (before, words, _) = unsafe { bytes.align_to::<f32>() };
        (before.is_empty() && words.len() >= rows * pairs).then(|| Self::dense(words, rows, pairs))
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Distances between rows and between columns.
    pub(super) fn strides(&self) -> [usize; 2] {
        [self.row_stride, self.col_stride]
    }

    pub(super) fn as_ptr(&self) -> *const f32 {
        self.ptr
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// A part of the view.
    pub(crate) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "block leaves the view"
        );
        let offset = rows.start * self.row_stride + cols.start * self.col_stride;
        // wrapping_add: an empty view may point one past the end.
        Self {
            ptr: self.ptr.wrapping_add(offset),
            rows: rows.len(),
            cols: cols.len(),
            ..self
        }
    }

    /// One row of a view with contiguous columns.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        assert!(
            row < self.rows && self.col_stride == 1,
            "a contiguous row inside the view"
        );
        // SAFETY: `new` checked that every row lies inside the slice, and the columns are contiguous.
        unsafe { std::slice::from_raw_parts(self.ptr.add(row * self.row_stride), self.cols) }
    }
}

/// A matrix to write, with contiguous columns.
#[derive(Debug)]
pub(crate) struct MatMut<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: a view is a unique borrow of f32 values; sharing parts of it is `part`'s contract.
unsafe impl Send for MatMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// `rows × cols` values of which consecutive rows lie `stride` apart.
    pub(crate) fn new(values: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || (rows - 1) * stride + cols <= values.len(),
            "view leaves its slice"
        );
        Self {
            ptr: values.as_mut_ptr(),
            rows,
            cols,
            row_stride: stride,
            values: PhantomData,
        }
    }

    /// Contiguous rows.
    pub(crate) fn dense(values: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(values, rows, cols, cols)
    }

    /// Contiguous rows of memory that is only to be written.
    pub(crate) fn unwritten(values: &'a mut [MaybeUninit<f32>], rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= values.len(), "view leaves its slice");
        Self {
            ptr: values.as_mut_ptr().cast(),
            rows,
            cols,
            row_stride: cols,
            values: PhantomData,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Distance between rows.
    pub(super) fn stride(&self) -> usize {
        self.row_stride
    }

    pub(super) fn as_ptr(&self) -> *mut f32 {
        self.ptr
    }

    /// A part of the view, while the whole is borrowed.
    pub(crate) fn block(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_> {
        // SAFETY: the borrow of `self` is unique for as long as the part lives.
        unsafe { self.part(rows, cols) }
    }

    /// A part of the view, for parallel tasks that write different parts.
    ///
    /// # Safety
    /// Parts that live at the same time must not overlap.
    pub(crate) unsafe fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "block leaves the view"
        );
        let ptr = self
            .ptr
            .wrapping_add(rows.start * self.row_stride + cols.start);
        Self {
            ptr,
            rows: rows.len(),
            cols: cols.len(),
            row_stride: self.row_stride,
            values: PhantomData,
        }
    }

    /// All values of a view without gaps between its rows.
    pub(crate) fn values(&mut self) -> &mut [f32] {
        assert_eq!(self.row_stride, self.cols, "a view without gaps");
        // SAFETY: `new` checked that all rows lie inside the slice, and they follow one another.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.rows * self.cols) }
    }

    /// One row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "a row inside the view");
        // SAFETY: `new` checked that every row lies inside the slice.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.row_stride), self.cols) }
    }
}

/// Whether a product replaces what is there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    Replace,
    Add,
}

impl Write {
    /// The first of several partial products writes as asked, the others add.
    pub(crate) fn after(self, first: bool) -> Self {
        if first { self } else { Self::Add }
    }
}

/// `dst = scale · a · b`, or `dst += scale · a · b`; serial.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn gemm(dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, write: Write) {
    let (m, n, k) = (dst.rows, dst.cols, a.cols);
    assert!(
        a.rows == m && b.rows == k && b.cols == n,
        "[{m}, {n}] = [{}, {k}] · [{}, {}]",
        a.rows,
        b.rows,
        b.cols
    );
    if m == 0 || n == 0 {
        return;
    }
    if k > 0 && n <= NARROW && a.row_stride == 1 {
        narrow(dst, a, b, scale, write);
    } else if k > 0 {
        blocks::product(&dst, a, b, scale, write);
    } else if write == Write::Replace {
        let mut dst = dst;
        (0..m).for_each(|row| dst.row(row).fill(0.0));
    }
}

/// `dst = a · b`, or `dst += a · b`, of operands that are rounded to bf16, but for `b` where it says that it is bf16 already;
/// serial.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn gemm_bf16(dst: MatMut<'_>, a: Mat<'_>, (b, is_bf16): (Mat<'_>, bool), write: Write) {
    assert_eq!([a.rows, a.cols, b.cols], [dst.rows, b.rows, dst.cols]);
    if a.cols == 0 || dst.rows == 0 || dst.cols == 0 {
        gemm(dst, a, b, 1.0, write);
    } else if multiplies_pairs() {
        blocks::product_bf16(&dst, a, Right::Values(b), write);
    } else {
        gemm_rounded(dst, a, (b, is_bf16), write);
    }
}

/// [`gemm_bf16`] in f32.
fn gemm_rounded(mut dst: MatMut<'_>, a: Mat<'_>, (b, is_bf16): (Mat<'_>, bool), write: Write) {
    for depth in tiles(0..a.cols, ROUNDED_DEPTH) {
        let (rows, cols) = (0..dst.rows, 0..dst.cols);
        let write = write.after(depth.start == 0);
        let b = b.block(depth.clone(), cols.clone());
        with_rounded(a.block(rows.clone(), depth), |a| {
            let dst = dst.block(rows, cols);
            match is_bf16 {
                true => gemm(dst, a, b, 1.0, write),
                false => with_rounded(b, |b| gemm(dst, a, b, 1.0, write)),
            }
        });
    }
}

/// The same with columns of `b` that are pairs of bf16, `[sum / 2, cols]`, where the CPU multiplies such.
///
/// # Panics
/// If the sizes do not fit or it does not.
pub(crate) fn gemm_pairs(dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, write: Write) {
    assert_eq!([a.rows, a.cols, b.cols], [dst.rows, 2 * b.rows, dst.cols]);
    if a.cols == 0 || dst.rows == 0 || dst.cols == 0 {
        let nothing = Mat::dense(&[], 0, b.cols);
        return gemm(dst, a.block(0..a.rows, 0..0), nothing, 1.0, write);
    }
    blocks::product_bf16(&dst, a, Right::Pairs(b), write);
}

/// Values of the sum that are rounded at once, where there are no instructions for bf16.
const ROUNDED_DEPTH: usize = 512;

/// Lends values rounded to bf16, as a view of the same shape.
pub(crate) fn with_rounded<R>(values: Mat<'_>, use_them: impl FnOnce(Mat<'_>) -> R) -> R {
    let is_turned = values.col_stride != 1;
    let lines = if is_turned { values.t() } else { values };
    with_scratch(lines.rows * lines.cols, |copy| {
        for (row, copy) in copy.chunks_exact_mut(lines.cols.max(1)).enumerate() {
            copy.copy_from_slice(lines.row(row));
        }
        round_to_bf16(copy);
        let copy = Mat::dense(copy, lines.rows, lines.cols);
        use_them(if is_turned { copy.t() } else { copy })
    })
}

/// Outputs of up to this width are made turned, where that reads the left operand in the order in which it lies: the
/// gradient of a low-rank factor. Added to what is there, they round once more than wider ones.
const NARROW: usize = 8;

fn narrow(mut dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, scale: f32, write: Write) {
    let (m, n) = (dst.rows, dst.cols);
    with_scratch(m * n, |turned| {
        let view = MatMut::dense(turned, n, m);
        blocks::product(&view, b.t(), a.t(), scale, Write::Replace);
        for row in 0..m {
            for (col, dst) in dst.row(row).iter_mut().enumerate() {
                let value = turned[col * m + row];
                *dst = if write == Write::Add {
                    *dst + value
                } else {
                    value
                };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::noise;

    #[test]
    fn bf16_is_the_same_with_instructions_for_it_and_without() {
        let (m, n, k) = (20, 30, 1100);
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        for (a, b) in [
            (Mat::dense(&a, m, k), Mat::dense(&b, n, k).t()),
            (Mat::dense(&a, k, m).t(), Mat::dense(&b, k, n)),
        ] {
            for write in [Write::Replace, Write::Add] {
                let product = |gemm: &dyn Fn(MatMut<'_>, Mat<'_>, Mat<'_>, Write)| {
                    let mut dst = vec![1.0; m * n];
                    gemm(MatMut::dense(&mut dst, m, n), a, b, write);
                    dst
                };
                let plain = product(&|dst, a, b, write| gemm_rounded(dst, a, (b, false), write));
                let found = product(&|dst, a, b, write| gemm_bf16(dst, a, (b, false), write));
                let same = product(&|dst, a, b, write| {
                    with_rounded(b, |b| gemm_rounded(dst, a, (b, true), write));
                });
                assert_eq!(same, plain);
                for (found, expected) in found.iter().zip(&plain) {
                    assert!((found - expected).abs() < 2e-4, "{found} {expected}");
                }
                let exact = product(&|dst, a, b, write| gemm(dst, a, b, 1.0, write));
                let parts = exact.iter().zip(&plain);
                assert!(parts.filter(|(a, b)| (**a - **b).abs() > 1e-3).count() > m * n / 2);
            }
        }
    }

    #[test]
    fn blocks_and_transposes_multiply_as_written_out() {
        let (a, b) = (noise(7 * 9, 1), noise(9 * 8, 2));
        let (a_part, b_part) = (
            Mat::dense(&a, 7, 9).block(1..6, 2..8),
            Mat::dense(&b, 9, 8).block(0..6, 3..7),
        );
        for write in [Write::Replace, Write::Add] {
            let mut dst = vec![1.0; 5 * 6];
            gemm(MatMut::new(&mut dst, 5, 4, 6), a_part, b_part, 2.0, write);
            let mut turned = vec![1.0; 4 * 5];
            gemm(
                MatMut::dense(&mut turned, 4, 5),
                b_part.t(),
                a_part.t(),
                2.0,
                write,
            );
            for (i, j) in (0..5).flat_map(|i| (0..4).map(move |j| (i, j))) {
                let sum: f32 = (0..6)
                    .map(|l| a[(1 + i) * 9 + 2 + l] * b[l * 8 + 3 + j])
                    .sum();
                let expected = 2.0 * sum + if write == Write::Add { 1.0 } else { 0.0 };
                assert!((dst[i * 6 + j] - expected).abs() < 1e-5);
                assert!((turned[j * 5 + i] - expected).abs() < 1e-5);
            }
            assert_eq!(dst[4], 1.0, "values between the rows of a view stay");
        }
    }
}
