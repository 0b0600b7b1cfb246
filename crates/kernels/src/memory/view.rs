//! Views of f32 memory as matrices.
//!
//! Views know their size, so products can check that their operands fit, and the code above this file stays safe.

#![expect(
    unsafe_code,
    reason = "strided views over slices, handed to the product by pointer; sizes are checked here"
)]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

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
    /// `rows × cols` values with `stride` values from row to row.
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

    /// Contiguous rows of bf16 pairs, one pair per word; `None` if the bytes are not aligned to words.
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
    pub(crate) fn strides(&self) -> [usize; 2] {
        [self.row_stride, self.col_stride]
    }

    pub(crate) fn as_ptr(&self) -> *const f32 {
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
    pub(crate) fn stride(&self) -> usize {
        self.row_stride
    }

    pub(crate) fn as_ptr(&self) -> *mut f32 {
        self.ptr
    }

    /// A block of the view, which stays borrowed.
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
