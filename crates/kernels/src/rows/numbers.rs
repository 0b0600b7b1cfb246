//! Products of weights in f32, f16 and bf16 with few rows of activations, lanes along the row.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes in `rows`"
)]

use super::instructions::Work;
use super::isa::{Isa, LANES};
use crate::product::strided::{Mat, MatMut, Write};

/// A number format without blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    F32,
    F16,
    Bf16,
}

/// `y = x · wᵀ` for some rows of `x`, given by their numbers, and consecutive ones of `w`.
#[derive(Debug)]
pub(super) struct Product<'a> {
    pub(super) number: Number,
    /// Of the rows that are multiplied.
    pub(super) bytes: &'a [u8],
    pub(super) x: Mat<'a>,
    pub(super) rows: &'a [usize],
    pub(super) y: MatMut<'a>,
    pub(super) write: Write,
}

impl Number {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// # Safety
    /// 16 numbers can be read, and the CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn load<I: Isa>(self, from: *const u8) -> I::Sums {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32 => I::load(from.cast()),
                Self::F16 => I::load_f16(from),
                Self::Bf16 => I::load_bf16(from),
            }
        }
    }
}

/// The formats as constants.
const F32: u8 = Number::F32 as u8;
const F16: u8 = Number::F16 as u8;
const BF16: u8 = Number::Bf16 as u8;

const fn number(number: u8) -> Number {
    match number {
        F32 => Number::F32,
        F16 => Number::F16,
        _ => Number::Bf16,
    }
}

/// Bytes behind the next rows that are multiplied together, at which memory is asked for what comes then, in the order in
/// which it lies: in the order in which rows beside each other are read, memory gives a fifth less.
const AHEAD: usize = 4096;

impl Work for Product<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.number {
                Number::F32 => self.with::<I, F32>(),
                Number::F16 => self.with::<I, F16>(),
                Number::Bf16 => self.with::<I, BF16>(),
            }
        }
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

impl Product<'_> {
    /// Cuts the rows of activations into eights, fours, twos and ones. For few of them several rows of the weight share
    /// what is read of the activations.
    ///
    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, const NUMBER: u8>(mut self) {
        let mut at = 0;
        while at < self.rows.len() {
            // SAFETY: the caller's promise.
            at += unsafe {
                match self.rows.len() - at {
                    8.. if I::TILE >= 8 => self.tiles::<I, NUMBER, 1, 8>(at),
                    4.. if I::TILE >= 8 => self.tiles::<I, NUMBER, 2, 4>(at),
                    4.. => self.tiles::<I, NUMBER, 1, 4>(at),
                    2.. => self.tiles::<I, NUMBER, 2, 2>(at),
                    _ => self.tiles::<I, NUMBER, 4, 1>(at),
                }
            };
        }
    }

    /// All rows of the weight with `N` rows of activations, `R` at a time. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn tiles<I: Isa, const NUMBER: u8, const R: usize, const N: usize>(
        &mut self,
        at: usize,
    ) -> usize {
        let row_bytes = self.x.cols() * number(NUMBER).bytes();
        let x = std::array::from_fn(|i| self.x.row(self.rows[at + i]).as_ptr());
        let n_outs = self.y.cols();
        for out in (0..n_outs).step_by(R) {
            // Behind the last row comes the last row again.
            let rows = std::array::from_fn(|r| {
                let row = (out + r).min(n_outs - 1);
                self.bytes[row * row_bytes..][..row_bytes].as_ptr()
            });
            // SAFETY: rows are whole; the caller's promise.
            let sums = unsafe { sums::<I, NUMBER, R, N>(rows, x, self.x.cols()) };
            for (r, sums) in sums.iter().enumerate().take(n_outs - out) {
                for (i, sum) in sums.iter().enumerate() {
                    let y = &mut self.y.row(at + i)[out + r];
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

/// # Safety
/// The CPU has the instructions of `I`; rows of `cols` numbers can be read.
#[inline(always)]
unsafe fn sums<I: Isa, const NUMBER: u8, const R: usize, const N: usize>(
    rows: [*const u8; R],
    x: [*const f32; N],
    cols: usize,
) -> [[f32; N]; R] {
    let (number, whole) = (number(NUMBER), cols - cols % LANES);
    let bytes = number.bytes();
    let ahead = rows[0].wrapping_add(R * cols * bytes + AHEAD);
    // SAFETY: whole steps lie in the rows, and what is left is copied to where a whole step can be read.
    unsafe {
        let mut sums = [[I::zero(); N]; R];
        for at in (0..whole).step_by(LANES) {
            I::prefetch(ahead.wrapping_add(R * at * bytes), R * LANES * bytes);
            for (row, sums) in rows.iter().zip(&mut sums) {
                let w = number.load::<I>(row.add(at * bytes));
                for (x, sum) in x.iter().zip(sums) {
                    *sum = I::mul_add(w, I::load(x.add(at)), *sum);
                }
            }
        }
        let left = cols - whole;
        if left > 0 {
            for (row, sums) in rows.iter().zip(&mut sums) {
                let mut last = [0u8; LANES * 4];
                let from = row.add(whole * bytes);
                std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), left * bytes);
                let w = number.load::<I>(last.as_ptr());
                for (x, sum) in x.iter().zip(sums) {
                    let mut values = [0f32; LANES];
                    std::ptr::copy_nonoverlapping(x.add(whole), values.as_mut_ptr(), left);
                    *sum = I::mul_add(w, I::load(values.as_ptr()), *sum);
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
