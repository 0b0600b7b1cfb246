//! Some rows of a weight times some rows of activations, in registers.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features here and of sizes in `rows`"
)]

use std::marker::PhantomData;

use super::Input;
use super::activations::Row;
use super::formats::{self, Format};
use super::isa::{Isa, LANES, Portable, STEP};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
use crate::Ggml;
use crate::product::strided::{MatMut, Write};

/// How a weight's bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Blocks(Ggml),
}

/// Instructions that the CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Instructions {
    /// The widest.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if has_avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                return Self::Avx512;
            }
            if has_avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// All, the widest first.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            Self::Portable,
        ];
        let best = Self::best();
        all.into_iter().skip_while(|some| *some != best).collect()
    }
}

/// Consecutive rows of a weight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) row_bytes: usize,
    pub(super) cols: usize,
    pub(super) outs: usize,
}

/// How rows of a weight are multiplied with rows of activations.
trait Source {
    /// A row of activations.
    type Row: Copy;

    /// # Panics
    /// If the activations are of another form or width.
    fn row(job: &Job<'_>, x: &Input<'_>, row: usize) -> Self::Row;

    /// # Safety
    /// The CPU has the instructions of `I`; the rows of the weight and of the activations can be read.
    unsafe fn sums<I: Isa, const R: usize, const N: usize>(
        job: &Job<'_>,
        rows: [*const u8; R],
        x: [Self::Row; N],
    ) -> [[f32; N]; R];
}

/// A weight in a format of blocks, activations in int8.
struct OfBlocks<F>(PhantomData<F>);

/// A block of zeros, which stands in for the second half of a row's last step.
static NOTHING: [u8; 256] = [0; 256];

impl<F: Format> Source for OfBlocks<F> {
    type Row = Row;

    fn row(job: &Job<'_>, x: &Input<'_>, row: usize) -> Row {
        let x = x.int8();
        let width = job.cols.next_multiple_of(STEP);
        assert_eq!(x.width(), width, "the input width of the weight");
        x.row(row)
    }

    #[inline(always)]
    unsafe fn sums<I: Isa, const R: usize, const N: usize>(
        job: &Job<'_>,
        rows: [*const u8; R],
        x: [Row; N],
    ) -> [[f32; N]; R] {
        let blocks = job.row_bytes / F::BYTES;
        let whole = blocks / per_unit::<F>();
        let ahead = job.ahead(R);
        // SAFETY: a unit's blocks lie in the row, or are nothing; activations are filled up to whole steps.
        unsafe {
            let mut sums = [[I::zero(); N]; R];
            for unit in 0..whole {
                let mut heads = [F::head::<I>([NOTHING.as_ptr(); 2]); R];
                for (row, head) in rows.iter().zip(&mut heads) {
                    let block = row.add(unit * per_unit::<F>() * F::BYTES);
                    I::prefetch(block.wrapping_add(ahead), per_unit::<F>() * F::BYTES);
                    *head = F::head::<I>([block, block.wrapping_add(F::BYTES)]);
                }
                add_unit::<I, F, R, N>(&heads, unit, &x, &mut sums);
            }
            if whole * per_unit::<F>() < blocks {
                let mut heads = [F::head::<I>([NOTHING.as_ptr(); 2]); R];
                for (row, head) in rows.iter().zip(&mut heads) {
                    let block = row.add(whole * per_unit::<F>() * F::BYTES);
                    *head = F::head::<I>([block, NOTHING.as_ptr()]);
                }
                add_unit::<I, F, R, N>(&heads, whole, &x, &mut sums);
            }
            totals::<I, R, N>(&sums)
        }
    }
}

/// Blocks of a unit.
const fn per_unit<F: Format>() -> usize {
    if F::STEPS == 1 { 2 } else { 1 }
}

/// Adds a unit of each row. Loops and no closures here: instructions in a closure would be calls.
///
/// # Safety
/// As [`Source::sums`].
#[inline(always)]
unsafe fn add_unit<I: Isa, F: Format, const R: usize, const N: usize>(
    heads: &[F::Head; R],
    unit: usize,
    x: &[Row; N],
    sums: &mut [[I::Sums; N]; R],
) {
    for step in 0..F::STEPS {
        for (head, sums) in heads.iter().zip(&mut *sums) {
            // SAFETY: the caller's promise.
            unsafe { add_step::<I, F, N>(head, step, unit * F::STEPS + step, x, sums) };
        }
    }
}

/// # Safety
/// As [`Source::sums`].
#[inline(always)]
unsafe fn totals<I: Isa, const R: usize, const N: usize>(
    sums: &[[I::Sums; N]; R],
) -> [[f32; N]; R] {
    let mut totals = [[0.0; N]; R];
    for (sums, totals) in sums.iter().zip(&mut totals) {
        for (sum, total) in sums.iter().zip(totals) {
            // SAFETY: the caller's promise.
            *total = unsafe { I::total(*sum) };
        }
    }
    totals
}

/// # Safety
/// As [`Source::sums`].
#[inline(always)]
unsafe fn add_step<I: Isa, F: Format, const N: usize>(
    head: &F::Head,
    step: usize,
    at: usize,
    x: &[Row; N],
    sums: &mut [I::Sums; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (codes, scales) = (F::codes::<I>(head, step), F::scales::<I>(head, step));
        for (x, sum) in x.iter().zip(sums) {
            let (codes_of_x, starts) = (x.codes.add(at * STEP), x.starts.add(at * LANES));
            let products = if F::IS_SIGNED {
                I::dot_signed(codes, codes_of_x, starts)
            } else {
                I::dot(codes, codes_of_x, starts, F::BIAS)
            };
            let scales = I::mul(scales, I::load(x.scales.add(at * LANES)));
            *sum = I::mul_add(products, scales, *sum);
            if F::HAS_OFFSETS {
                let offsets = F::offsets::<I>(head, step);
                *sum = I::mul_add(offsets, I::load(x.sums.add(at * LANES)), *sum);
            }
        }
    }
}

/// Numbers without blocks.
trait Number {
    const BYTES: usize;
    /// # Safety
    /// 16 numbers can be read, and the CPU has the instructions of `I`.
    unsafe fn load<I: Isa>(from: *const u8) -> I::Sums;
}

macro_rules! numbers {
    ($name:ident, $bytes:expr, |$from:ident| $load:expr) => {
        struct $name;

        impl Number for $name {
            const BYTES: usize = $bytes;

            #[inline(always)]
            unsafe fn load<I: Isa>($from: *const u8) -> I::Sums {
                // SAFETY: the caller's promise.
                unsafe { $load }
            }
        }
    };
}

numbers!(F32, 4, |from| I::load(from.cast()));
numbers!(F16, 2, |from| I::load_f16(from));
numbers!(Bf16, 2, |from| I::load_bf16(from));

/// A weight without blocks, activations as they are.
struct OfNumbers<F>(PhantomData<F>);

impl<F: Number> Source for OfNumbers<F> {
    type Row = *const f32;

    fn row(job: &Job<'_>, x: &Input<'_>, row: usize) -> *const f32 {
        let x = x.floats();
        assert_eq!(x.cols(), job.cols, "the input width of the weight");
        x.row(row).as_ptr()
    }

    #[inline(always)]
    unsafe fn sums<I: Isa, const R: usize, const N: usize>(
        job: &Job<'_>,
        rows: [*const u8; R],
        x: [*const f32; N],
    ) -> [[f32; N]; R] {
        let whole = job.cols - job.cols % LANES;
        // SAFETY: whole steps lie in the rows, and what is left is copied to where a whole step can be read.
        unsafe {
            let mut sums = [[I::zero(); N]; R];
            for at in (0..whole).step_by(LANES) {
                for (row, sums) in rows.iter().zip(&mut sums) {
                    let from = row.add(at * F::BYTES);
                    I::prefetch(from.wrapping_add(job.ahead(R)), F::BYTES * LANES);
                    let w = F::load::<I>(from);
                    for (x, sum) in x.iter().zip(sums) {
                        *sum = I::mul_add(w, I::load(x.add(at)), *sum);
                    }
                }
            }
            let left = job.cols - whole;
            if left > 0 {
                for (row, sums) in rows.iter().zip(&mut sums) {
                    let mut bytes = [0u8; LANES * 4];
                    let from = row.add(whole * F::BYTES);
                    std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), left * F::BYTES);
                    let w = F::load::<I>(bytes.as_ptr());
                    for (x, sum) in x.iter().zip(sums) {
                        let mut values = [0f32; LANES];
                        std::ptr::copy_nonoverlapping(x.add(whole), values.as_mut_ptr(), left);
                        *sum = I::mul_add(w, I::load(values.as_ptr()), *sum);
                    }
                }
            }
            totals::<I, R, N>(&sums)
        }
    }
}

/// Bytes that are read while memory brings others: rows that are multiplied together lie too near each other for the CPU
/// to see the order in which they are read.
const AHEAD: usize = 2048;

impl Job<'_> {
    /// How far behind a row lies the one that is asked for: whole tiles of `R` rows.
    #[inline(always)]
    fn ahead(&self, rows: usize) -> usize {
        (rows * self.row_bytes).max(1) * AHEAD.div_ceil((rows * self.row_bytes).max(1))
    }

    /// Multiplies with up to eight rows of activations.
    pub(super) fn run(
        &self,
        (kind, instructions): (Kind, Instructions),
        x: &Input<'_>,
        rows: &[usize],
        y: MatMut<'_>,
        write: Write,
    ) {
        macro_rules! of {
            ($source:ty) => {
                self.dispatch::<$source>(instructions, x, rows, y, write)
            };
        }
        match kind {
            Kind::F32 => of!(OfNumbers<F32>),
            Kind::F16 => of!(OfNumbers<F16>),
            Kind::Bf16 => of!(OfNumbers<Bf16>),
            Kind::Blocks(format) => match format {
                Ggml::F16 | Ggml::Iq4Nl | Ggml::MxFp4 => {
                    unreachable!("`multiplies` says that these have no products in int8")
                }
                Ggml::Q8_0 => of!(OfBlocks<formats::Q8_0>),
                Ggml::Q4_0 => of!(OfBlocks<formats::Q4_0>),
                Ggml::Q4_1 => of!(OfBlocks<formats::Q4_1>),
                Ggml::Q5_0 => of!(OfBlocks<formats::Q5_0>),
                Ggml::Q5_1 => of!(OfBlocks<formats::Q5_1>),
                Ggml::Q2K => of!(OfBlocks<formats::Q2K>),
                Ggml::Q3K => of!(OfBlocks<formats::Q3K>),
                Ggml::Q4K => of!(OfBlocks<formats::Q4K>),
                Ggml::Q5K => of!(OfBlocks<formats::Q5K>),
                Ggml::Q6K => of!(OfBlocks<formats::Q6K>),
            },
        }
    }

    fn dispatch<S: Source>(
        &self,
        instructions: Instructions,
        x: &Input<'_>,
        rows: &[usize],
        y: MatMut<'_>,
        write: Write,
    ) {
        /// Compiles all below for some instructions.
        #[cfg(target_arch = "x86_64")]
        macro_rules! with {
            ($features:literal, $isa:ty) => {{
                #[target_feature(enable = $features)]
                fn run<S: Source>(
                    job: &Job<'_>,
                    x: &Input<'_>,
                    rows: &[usize],
                    y: MatMut<'_>,
                    write: Write,
                ) {
                    job.by_rows::<$isa, S>(x, rows, y, write);
                }
                // SAFETY: `Instructions` of the CPU.
                unsafe { run::<S>(self, x, rows, y, write) }
            }};
        }
        match instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => with!(
                "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c",
                Avx512
            ),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => with!("avx2,fma,f16c", Avx2),
            Instructions::Portable => self.by_rows::<Portable, S>(x, rows, y, write),
        }
    }

    /// Cuts the rows of activations into eights, fours, twos and ones. For few of them several rows of the weight share
    /// what is read of the activations.
    #[inline(always)]
    fn by_rows<I: Isa, S: Source>(
        &self,
        x: &Input<'_>,
        rows: &[usize],
        mut y: MatMut<'_>,
        write: Write,
    ) {
        let (n, mut at) = (rows.len(), 0);
        while at < n {
            let y = y.block(at..n, 0..self.outs);
            let row = |i: usize| S::row(self, x, rows[at + i]);
            at += match n - at {
                8.. => self.tiles::<I, S, 1, 8>(std::array::from_fn(row), y, write),
                4.. => self.tiles::<I, S, 2, 4>(std::array::from_fn(row), y, write),
                2.. => self.tiles::<I, S, 2, 2>(std::array::from_fn(row), y, write),
                _ => self.tiles::<I, S, 4, 1>(std::array::from_fn(row), y, write),
            };
        }
    }

    /// All rows of the weight with `N` rows of activations, `R` at a time. Returns `N`.
    #[inline(always)]
    fn tiles<I: Isa, S: Source, const R: usize, const N: usize>(
        &self,
        x: [S::Row; N],
        mut y: MatMut<'_>,
        write: Write,
    ) -> usize {
        for out in (0..self.outs).step_by(R) {
            // Behind the last row comes the last row again.
            let rows = std::array::from_fn(|r| {
                let row = (out + r).min(self.outs - 1);
                self.bytes[row * self.row_bytes..].as_ptr()
            });
            // SAFETY: `dispatch` found the instructions; rows are whole; `Source::row` checked the widths.
            let sums = unsafe { S::sums::<I, R, N>(self, rows, x) };
            for (r, sums) in sums.iter().enumerate().take(self.outs - out) {
                for (i, sum) in sums.iter().enumerate() {
                    let y = &mut y.row(i)[out + r];
                    *y = if write == Write::Add { *y + sum } else { *sum };
                }
            }
        }
        N
    }
}
