//! Products of rows of numbers with few rows of activations, lanes along the row: of weights in f32, f16 and bf16, and of
//! what a cache holds. Numbers are decoded in registers, on their way into the products.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes in `rows`"
)]

use super::instructions::Work;
use super::isa::{Isa, LANES};
use crate::product::strided::{Mat, MatMut, Write};

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Number {
    F32,
    F16,
    Bf16,
    /// 32 signed bytes behind their scale, which is a bf16; the last ones of a row are filled up with zeros.
    Scaled,
}

impl Number {
    /// Bytes of a row of so many. Blocks do not cross rows.
    pub(crate) fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => 4 * width,
            Self::F16 | Self::Bf16 => 2 * width,
            Self::Scaled => width.div_ceil(BLOCK) * BLOCK_BYTES,
        }
    }
}

/// The same as constants.
pub(super) const F32: u8 = Number::F32 as u8;
pub(super) const F16: u8 = Number::F16 as u8;
pub(super) const BF16: u8 = Number::Bf16 as u8;
pub(super) const SCALED: u8 = Number::Scaled as u8;

/// Scaled numbers that lie together, and their bytes.
pub(crate) const BLOCK: usize = 32;
pub(crate) const BLOCK_BYTES: usize = 2 + BLOCK;

/// Calls a method with instructions and a number that are known when it is compiled.
macro_rules! with_number {
    ($number:expr, $self:ident.$method:ident::<$isa:ident>()) => {
        match $number {
            Number::F32 => $self.$method::<$isa, { crate::rows::numbers::F32 }>(),
            Number::F16 => $self.$method::<$isa, { crate::rows::numbers::F16 }>(),
            Number::Bf16 => $self.$method::<$isa, { crate::rows::numbers::BF16 }>(),
            Number::Scaled => $self.$method::<$isa, { crate::rows::numbers::SCALED }>(),
        }
    };
}
pub(super) use with_number;

/// Bytes of 16 numbers.
const fn step_bytes(number: u8) -> usize {
    match number {
        F32 => 4 * LANES,
        F16 | BF16 => 2 * LANES,
        _ => BLOCK_BYTES * LANES / BLOCK,
    }
}

/// 16 numbers of a row, from one on whose number is a multiple of 16.
///
/// # Safety
/// They can be read, and the CPU has the instructions of `I`.
#[inline(always)]
pub(super) unsafe fn load<I: Isa, const NUMBER: u8>(row: *const u8, col: usize) -> I::Sums {
    // SAFETY: the caller's promise.
    unsafe {
        match NUMBER {
            F32 => I::load(row.add(4 * col).cast()),
            F16 => I::load_f16(row.add(2 * col)),
            BF16 => I::load_bf16(row.add(2 * col)),
            _ => {
                let block = row.add(col / BLOCK * BLOCK_BYTES);
                let scale = u32::from(block.cast::<u16>().read_unaligned().to_le()) << 16;
                let codes = I::load_i8(block.add(2 + col % BLOCK));
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
pub(super) unsafe fn load_some<I: Isa, const NUMBER: u8>(
    row: *const u8,
    col: usize,
    n: usize,
) -> I::Sums {
    let size = match NUMBER {
        F32 => 4,
        F16 | BF16 => 2,
        // SAFETY: the caller's promise; blocks are filled up.
        _ => return unsafe { load::<I, NUMBER>(row, col) },
    };
    let mut numbers = [0u8; 4 * LANES];
    // SAFETY: as many bytes as the caller promises, and a whole copy.
    unsafe {
        std::ptr::copy_nonoverlapping(row.add(size * col), numbers.as_mut_ptr(), size * n);
        load::<I, NUMBER>(numbers.as_ptr(), 0)
    }
}

/// Rows of numbers that lie `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines<'a> {
    pub(super) number: Number,
    pub(super) bytes: &'a [u8],
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// Numbers of a row.
    pub(super) width: usize,
}

impl Lines<'_> {
    /// # Panics
    /// If they leave their bytes.
    pub(super) fn check(&self) {
        let last = self.rows.saturating_sub(1) * self.stride;
        assert!(
            self.rows == 0 || last + self.row_bytes() <= self.bytes.len(),
            "rows of numbers"
        );
    }

    fn row_bytes(&self) -> usize {
        self.number.row_bytes(self.width)
    }

    pub(super) fn row(&self, row: usize) -> *const u8 {
        self.bytes[row * self.stride..].as_ptr()
    }
}

/// `y = x · wᵀ` for some rows of `x`, given by their numbers: y `[rows, lines]`. A result depends on its row and its line
/// alone.
#[derive(Debug)]
pub(super) struct Product<'a> {
    pub(super) lines: Lines<'a>,
    pub(super) x: Mat<'a>,
    pub(super) rows: &'a [usize],
    pub(super) y: MatMut<'a>,
    pub(super) write: Write,
}

/// Bytes behind the next lines that are multiplied together, at which memory is asked for what comes then.
const AHEAD: usize = 4096;

impl Work for Product<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe { with_number!(self.lines.number, self.with::<I>()) }
    }
}

impl Product<'_> {
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, const NUMBER: u8>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.lines.stride == self.lines.row_bytes() {
                self.in_tiles::<I, NUMBER, true>();
            } else {
                self.in_tiles::<I, NUMBER, false>();
            }
        }
    }

    /// Cuts the rows of activations into eights, fours, twos and ones. For few of them several lines share what is read of
    /// the activations. `DENSE` says that nothing lies between lines.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn in_tiles<I: Isa, const NUMBER: u8, const DENSE: bool>(mut self) {
        let mut at = 0;
        while at < self.rows.len() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.rows.len() - at {
                    8.. if I::TILE >= 8 => self.tiles::<I, NUMBER, DENSE, 1, 8>(at),
                    4.. if I::TILE >= 8 => self.tiles::<I, NUMBER, DENSE, 2, 4>(at),
                    4.. => self.tiles::<I, NUMBER, DENSE, 1, 4>(at),
                    2.. => self.tiles::<I, NUMBER, DENSE, 2, 2>(at),
                    _ => self.tiles::<I, NUMBER, DENSE, 4, 1>(at),
                }
            };
        }
    }

    /// All lines with `N` rows of activations, `R` at a time. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::in_tiles`].
    #[inline(always)]
    unsafe fn tiles<I: Isa, const NUMBER: u8, const DENSE: bool, const R: usize, const N: usize>(
        &mut self,
        at: usize,
    ) -> usize {
        let lines = self.lines;
        let x = std::array::from_fn(|i| self.x.row(self.rows[at + i]).as_ptr());
        let row_bytes = lines.row_bytes();
        let ahead = AHEAD.div_ceil(row_bytes.max(1)) * lines.stride;
        for line in (0..lines.rows).step_by(R) {
            // The first rows bring what the others find in the CPU's cache.
            if !DENSE && at == 0 {
                for line in line..lines.rows.min(line + R) {
                    I::prefetch(lines.row(line).wrapping_add(ahead), row_bytes);
                }
            }
            // Behind the last line comes the last line again.
            let some = std::array::from_fn(|r| lines.row((line + r).min(lines.rows - 1)));
            // SAFETY: lines and rows are whole; the caller's promise.
            let sums = unsafe { sums::<I, NUMBER, DENSE, R, N>(some, x, lines.width) };
            for (r, sums) in sums.iter().enumerate().take(lines.rows - line) {
                for (i, sum) in sums.iter().enumerate() {
                    let y = &mut self.y.row(at + i)[line + r];
                    *y = if self.write == Write::Add {
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

/// Of lines without gaps memory is asked for in the order in which it lies: in the order in which lines beside each other are
/// read it gives a fifth less.
///
/// # Safety
/// The CPU has the instructions of `I`; lines and rows of `width` numbers can be read.
#[inline(always)]
unsafe fn sums<I: Isa, const NUMBER: u8, const DENSE: bool, const R: usize, const N: usize>(
    lines: [*const u8; R],
    x: [*const f32; N],
    width: usize,
) -> [[f32; N]; R] {
    let (whole, bytes) = (width - width % LANES, step_bytes(NUMBER));
    let ahead = lines[0].wrapping_add(R * width.div_ceil(LANES) * bytes + AHEAD);
    // SAFETY: whole steps lie in lines and rows, and what is left is copied to where a whole step can be read.
    unsafe {
        let mut sums = [[I::zero(); N]; R];
        for at in (0..whole).step_by(LANES) {
            if DENSE {
                I::prefetch(ahead.wrapping_add(R * at / LANES * bytes), R * bytes);
            }
            for (line, sums) in lines.iter().zip(&mut sums) {
                let numbers = load::<I, NUMBER>(*line, at);
                for (x, sum) in x.iter().zip(sums) {
                    *sum = I::mul_add(numbers, I::load(x.add(at)), *sum);
                }
            }
        }
        let left = width - whole;
        if left > 0 {
            for (line, sums) in lines.iter().zip(&mut sums) {
                let numbers = load_some::<I, NUMBER>(*line, whole, left);
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

/// f16 numbers that become f32 values.
#[derive(Debug)]
pub(super) struct Decoding<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) out: &'a mut [f32],
}

impl Work for Decoding<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        let bytes = self.bytes.chunks(2 * LANES);
        for (bytes, out) in bytes.zip(self.out.chunks_mut(LANES)) {
            // SAFETY: whole steps lie in both, and what is left is copied to where a whole step can be read and written.
            unsafe {
                if bytes.len() == 2 * LANES && out.len() == LANES {
                    I::store(I::load_f16(bytes.as_ptr()), out.as_mut_ptr());
                } else {
                    let (mut last, mut values) = ([0; 2 * LANES], [0.0; LANES]);
                    last[..bytes.len()].copy_from_slice(bytes);
                    I::store(I::load_f16(last.as_ptr()), values.as_mut_ptr());
                    out.copy_from_slice(&values[..out.len()]);
                }
            }
        }
    }
}
