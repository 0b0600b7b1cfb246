//! Products of dense rows with a few rows of activations, with lanes along the row: weights in f32, f16 and bf16, and
//! the rows of a KV cache. Numbers are decoded in registers on their way into the products.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes in `gemv`"
)]

use crate::formats::{DtypeRows, Q8_BLOCK, Q8_BLOCK_BYTES, RowDtype};
use crate::memory::{Mat, MatMut};
use crate::settings::Accumulate;
use crate::simd::{Isa, LANES, SimdWork};

/// The variants of [`RowDtype`] as constants for generics.
pub(super) const F32: u8 = RowDtype::F32 as u8;
pub(super) const F16: u8 = RowDtype::F16 as u8;
pub(super) const BF16: u8 = RowDtype::Bf16 as u8;
pub(super) const Q8_BF16: u8 = RowDtype::Q8Bf16 as u8;

/// Calls a method that is generic over the instruction set and the data type.
macro_rules! with_dtype {
    ($dtype:expr, $self:ident.$method:ident::<$isa:ident>()) => {
        match $dtype {
            RowDtype::F32 => $self.$method::<$isa, { crate::gemv::dense::F32 }>(),
            RowDtype::F16 => $self.$method::<$isa, { crate::gemv::dense::F16 }>(),
            RowDtype::Bf16 => $self.$method::<$isa, { crate::gemv::dense::BF16 }>(),
            RowDtype::Q8Bf16 => $self.$method::<$isa, { crate::gemv::dense::Q8_BF16 }>(),
        }
    };
}
pub(super) use with_dtype;

/// Bytes of 16 numbers.
const fn step_bytes(dtype: u8) -> usize {
    match dtype {
        F32 => 4 * LANES,
        F16 | BF16 => 2 * LANES,
        _ => Q8_BLOCK_BYTES * LANES / Q8_BLOCK,
    }
}

/// 16 numbers of a row from `col` on, a multiple of 16.
///
/// # Safety
/// The numbers can be read, and the CPU has the instructions of `I`.
#[inline(always)]
pub(super) unsafe fn load<I: Isa, const DTYPE: u8>(row: *const u8, col: usize) -> I::Sums {
    // SAFETY: the caller's promise.
    unsafe {
        match DTYPE {
            F32 => I::load(row.add(4 * col).cast()),
            F16 => I::load_f16(row.add(2 * col)),
            BF16 => I::load_bf16(row.add(2 * col)),
            _ => {
                let block = row.add(col / Q8_BLOCK * Q8_BLOCK_BYTES);
                let scale = u32::from(block.cast::<u16>().read_unaligned().to_le()) << 16;
                let codes = I::load_i8(block.add(2 + col % Q8_BLOCK));
                I::mul(codes, I::splat(f32::from_bits(scale)))
            }
        }
    }
}

/// [`load`] of the last `n` numbers of a row, padded with zeros.
///
/// # Safety
/// As [`load`], for `n` numbers.
#[inline(always)]
pub(super) unsafe fn load_some<I: Isa, const DTYPE: u8>(
    row: *const u8,
    col: usize,
    n: usize,
) -> I::Sums {
    let size = match DTYPE {
        F32 => 4,
        F16 | BF16 => 2,
        // SAFETY: the caller's promise; blocks are filled up.
        _ => return unsafe { load::<I, DTYPE>(row, col) },
    };
    let mut dense = [0u8; 4 * LANES];
    // SAFETY: as many bytes as the caller promises, and a whole copy.
    unsafe {
        std::ptr::copy_nonoverlapping(row.add(size * col), dense.as_mut_ptr(), size * n);
        load::<I, DTYPE>(dense.as_ptr(), 0)
    }
}

/// `y = x · wᵀ` for the given rows of `x`: y `[rows, lines]`. A result depends on its row and its line alone.
#[derive(Debug)]
pub(super) struct DenseProduct<'a> {
    pub(super) lines: DtypeRows<'a>,
    pub(super) x: Mat<'a>,
    pub(super) rows: &'a [usize],
    pub(super) y: MatMut<'a>,
    pub(super) accumulate: Accumulate,
}

/// How many bytes ahead of the current lines memory is prefetched.
const AHEAD: usize = 4096;

impl SimdWork for DenseProduct<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe { with_dtype!(self.lines.dtype, self.with::<I>()) }
    }
}

impl DenseProduct<'_> {
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, const DTYPE: u8>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.lines.stride == self.lines.row_bytes() {
                self.in_tiles::<I, DTYPE, true>();
            } else {
                self.in_tiles::<I, DTYPE, false>();
            }
        }
    }

    /// Cuts the rows of activations into eights, fours, twos and ones. If there are few of them, several lines share
    /// the loaded activations. `DENSE` says that there are no gaps between lines.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn in_tiles<I: Isa, const DTYPE: u8, const DENSE: bool>(mut self) {
        let mut at = 0;
        while at < self.rows.len() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.rows.len() - at {
                    8.. if I::TILE >= 8 => self.tiles::<I, DTYPE, DENSE, 1, 8>(at),
                    4.. if I::TILE >= 8 => self.tiles::<I, DTYPE, DENSE, 2, 4>(at),
                    4.. => self.tiles::<I, DTYPE, DENSE, 1, 4>(at),
                    2.. => self.tiles::<I, DTYPE, DENSE, 2, 2>(at),
                    _ => self.tiles::<I, DTYPE, DENSE, 4, 1>(at),
                }
            };
        }
    }

    /// All lines with `N` rows of activations, `R` at a time. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::in_tiles`].
    #[inline(always)]
    unsafe fn tiles<I: Isa, const DTYPE: u8, const DENSE: bool, const R: usize, const N: usize>(
        &mut self,
        at: usize,
    ) -> usize {
        let lines = self.lines;
        let x = std::array::from_fn(|i| self.x.row(self.rows[at + i]).as_ptr());
        let row_bytes = lines.row_bytes();
        let ahead = AHEAD.div_ceil(row_bytes.max(1)) * lines.stride;
        for line in (0..lines.rows).step_by(R) {
            // The pass over the first rows prefetches for the others.
            if !DENSE && at == 0 {
                for line in line..lines.rows.min(line + R) {
                    I::prefetch(lines.row(line).wrapping_add(ahead), row_bytes);
                }
            }
            // The last line is repeated to fill the group.
            let group = std::array::from_fn(|r| lines.row((line + r).min(lines.rows - 1)));
            // SAFETY: lines and rows are whole; the caller's promise.
            let sums = unsafe { sums::<I, DTYPE, DENSE, R, N>(group, x, lines.width) };
            for (r, sums) in sums.iter().enumerate().take(lines.rows - line) {
                for (i, sum) in sums.iter().enumerate() {
                    let y = &mut self.y.row(at + i)[line + r];
                    *y = if self.accumulate == Accumulate::Add {
                        *y + sum
                    } else {
                        *sum
                    };
                }
            }
        }
        N
    }
}

/// Lines without gaps are prefetched in memory order: prefetching them in the order in which they are multiplied is a
/// fifth slower.
///
/// # Safety
/// The CPU has the instructions of `I`; lines and rows of `width` numbers can be read.
#[inline(always)]
unsafe fn sums<I: Isa, const DTYPE: u8, const DENSE: bool, const R: usize, const N: usize>(
    lines: [*const u8; R],
    x: [*const f32; N],
    width: usize,
) -> [[f32; N]; R] {
    let (whole, bytes) = (width - width % LANES, step_bytes(DTYPE));
    let ahead = lines[0].wrapping_add(R * width.div_ceil(LANES) * bytes + AHEAD);
    // SAFETY: whole steps lie in lines and rows, and what is left is copied to where a whole step can be read.
    unsafe {
        let mut sums = [[I::zero(); N]; R];
        for at in (0..whole).step_by(LANES) {
            if DENSE {
                I::prefetch(ahead.wrapping_add(R * at / LANES * bytes), R * bytes);
            }
            for (line, sums) in lines.iter().zip(&mut sums) {
                let dense = load::<I, DTYPE>(*line, at);
                for (x, sum) in x.iter().zip(sums) {
                    *sum = I::mul_add(dense, I::load(x.add(at)), *sum);
                }
            }
        }
        let left = width - whole;
        if left > 0 {
            for (line, sums) in lines.iter().zip(&mut sums) {
                let dense = load_some::<I, DTYPE>(*line, whole, left);
                for (x, sum) in x.iter().zip(sums) {
                    let x = load_some::<I, F32>(x.cast(), whole, left);
                    *sum = I::mul_add(dense, x, *sum);
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
