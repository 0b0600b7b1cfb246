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

use super::blocks;
use crate::product::gemm::with_scratch;

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
