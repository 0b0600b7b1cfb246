//! The vectors of the microkernel's tiles, and the portable one.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; the callers in this folder check sizes and features"
)]

/// A vector of f32 values in a register, or of words of an operand.
pub(super) trait Lanes: Copy {
    /// Values in it.
    const LEN: usize;
    /// Values in a word of an operand.
    const DEPTH: usize = 1;
    /// The same instructions for operands that are words already.
    type Words: Lanes;
    /// Rows of the largest tile: its sums, a row of b and a value of a fill the registers.
    const ROWS: usize;

    unsafe fn splat(value: f32) -> Self;
    /// # Safety
    /// `LEN` values can be read.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `LEN` values can be written.
    unsafe fn store(self, to: *mut f32);
    /// The first `len ≤ LEN` values, zeros behind them.
    ///
    /// # Safety
    /// `len` values can be read.
    unsafe fn load_first(from: *const f32, len: usize) -> Self;
    /// # Safety
    /// `len` values can be written.
    unsafe fn store_first(self, to: *mut f32, len: usize);
    /// `self · a + b`.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// Adds the products of words of both operands to a sum.
    #[inline(always)]
    unsafe fn add_products(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's promise.
        unsafe { a.mul_add(b, self) }
    }
    /// The words of the first `len ≤ DEPTH · LEN` values along a line, zeros behind them.
    ///
    /// # Safety
    /// `len` values can be read.
    #[inline(always)]
    unsafe fn along(from: *const f32, len: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            match len {
                len if len >= Self::LEN => Self::load(from),
                _ => Self::load_first(from, len),
            }
        }
    }
    /// The words across `depth ≤ DEPTH` lines that lie `stride` apart, of the first `len ≤ LEN` values of each.
    ///
    /// # Safety
    /// The values can be read.
    #[inline(always)]
    unsafe fn across(from: *const f32, stride: usize, depth: usize, len: usize) -> Self {
        let _ = (stride, depth);
        // SAFETY: the caller's promise.
        unsafe { Self::along(from, len) }
    }
    /// Transposes `rows ≤ LEN` rows of `cols ≤ LEN` values into `cols` rows of `LEN`, zeros at their ends.
    ///
    /// # Safety
    /// The rows, `stride` and `to_stride` apart, can be read and written.
    unsafe fn transpose(
        from: *const f32,
        stride: usize,
        size: [usize; 2],
        to: *mut f32,
        to_stride: usize,
    );
}

/// Rows of the largest tile of all vectors, and columns of the widest panel.
pub(super) const MAX_ROWS: usize = 6;
pub(super) const WIDEST: usize = 64;

/// Four values that the compiler turns into whatever the target has: NEON and SSE have four. With NEON the 24 sums of a
/// tile, a row of b and the values stay in its 32 registers, and nothing is left to be written by hand.
#[derive(Clone, Copy)]
pub(super) struct PortableLanes([f32; 4]);

impl Lanes for PortableLanes {
    const LEN: usize = 4;
    const ROWS: usize = 6;
    type Words = Self;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self(from.cast::<[f32; 4]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, len: usize) -> Self {
        let mut values = [0.0; 4];
        for (i, value) in values.iter_mut().enumerate().take(len) {
            // SAFETY: the caller's promise.
            *value = unsafe { *from.add(i) };
        }
        Self(values)
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, len: usize) {
        for (i, value) in self.0.iter().enumerate().take(len) {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = *value };
        }
    }

    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        let mut sums = b.0;
        for (sum, (x, a)) in sums.iter_mut().zip(self.0.iter().zip(a.0)) {
            // Without the instruction, `mul_add` is a slow library call.
            *sum = if cfg!(target_arch = "aarch64") {
                x.mul_add(a, *sum)
            } else {
                x * a + *sum
            };
        }
        Self(sums)
    }

    #[inline(always)]
    unsafe fn transpose(
        from: *const f32,
        stride: usize,
        [rows, cols]: [usize; 2],
        to: *mut f32,
        to_stride: usize,
    ) {
        let mut values = [[0.0; 4]; 4];
        // SAFETY (all below): the caller's promise. Loops of constant length stay in registers.
        if [rows, cols] == [4; 2] {
            for (i, row) in values.iter_mut().enumerate() {
                *row = unsafe { Self::load(from.add(i * stride)).0 };
            }
        } else {
            for (i, row) in values.iter_mut().enumerate().take(rows) {
                *row = unsafe { Self::load_first(from.add(i * stride), cols).0 };
            }
        }
        let columns: [_; 4] = std::array::from_fn(|j| Self(values.map(|row| row[j])));
        for (j, column) in columns.iter().enumerate().take(cols) {
            unsafe { column.store(to.add(j * to_stride)) };
        }
    }
}
