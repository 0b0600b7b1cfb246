//! Products of weights in ggml's blocks with activations in int8, sixteen rows of the weight at a time, one in each
//! lane.
//!
//! Nothing moves between lanes: four codes of each row are multiplied with the same four activations, summed in
//! integers over a group, and added to an f32 sum with the group's scales. A weight that is stored row by row is
//! interleaved as it is read.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers, behind the checks of features and of sizes in `gemv`"
)]

mod layouts;

use std::marker::PhantomData;
use std::ops::Range;

use self::layouts::UnitLayout;
use crate::formats::{Ggml, ROWS, fill};
use crate::gemv::activations::{Activations, INT8_BLOCK, Int8Block};
use crate::memory::{MatMut, with_byte_scratch};
use crate::settings::Accumulate;
use crate::simd::{FOUR, Instructions, Isa, SimdWork};

/// Rows of activations that are multiplied with a strip before the next strip is read: they stay in the cache.
const TOGETHER: usize = 64;

/// How many bytes ahead are prefetched: a strip is too short for the CPU's own prefetcher.
const AHEAD: usize = 4096;

/// The order of a weight's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockOrder {
    /// Row by row.
    Rows,
    /// Sixteen rows interleaved.
    Interleaved,
}

/// `y = x · wᵀ` for the given rows of `x` and a range of rows of `w`.
#[derive(Debug)]
pub(super) struct QuantizedProduct<'a> {
    pub(super) format: Ggml,
    pub(super) order: BlockOrder,
    pub(super) bytes: &'a [u8],
    pub(super) row_bytes: usize,
    pub(super) x: &'a Activations,
    pub(super) rows: &'a [usize],
    pub(super) outs: Range<usize>,
    pub(super) y: MatMut<'a>,
    pub(super) accumulate: Accumulate,
}

/// A product for one format, known at compile time.
struct OfFormat<'a, F>(QuantizedProduct<'a>, &'a mut [u8], PhantomData<F>);

impl<F: UnitLayout> SimdWork for OfFormat<'_, F> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.with::<I, F>(self.1) }
    }
}

impl QuantizedProduct<'_> {
    pub(super) fn run(self, instructions: Instructions) {
        let scratch = match self.order {
            BlockOrder::Rows => ROWS * self.row_bytes,
            BlockOrder::Interleaved => 0,
        };
        with_byte_scratch(scratch, |scratch| self.run_with(instructions, scratch));
    }

    /// `scratch` has room for a strip, if rows have to be interleaved.
    fn run_with(self, instructions: Instructions, scratch: &mut [u8]) {
        macro_rules! of {
            ($format:ident) => {
                instructions.run(OfFormat(self, scratch, PhantomData::<layouts::$format>))
            };
        }
        match self.format {
            Ggml::F16 => unreachable!("a format without blocks has no strips"),
            Ggml::Q8_0 => of!(Q8_0),
            Ggml::Q4_0 => of!(Q4_0),
            Ggml::Q4_1 => of!(Q4_1),
            Ggml::Q5_0 => of!(Q5_0),
            Ggml::Q5_1 => of!(Q5_1),
            Ggml::Q2K => of!(Q2K),
            Ggml::Q3K => of!(Q3K),
            Ggml::Q4K => of!(Q4K),
            Ggml::Q5K => of!(Q5K),
            Ggml::Q6K => of!(Q6K),
            Ggml::Iq4Nl => of!(Iq4Nl),
            Ggml::MxFp4 => of!(MxFp4),
        }
    }

    /// # Safety
    /// The CPU has the instructions of `I`.
    #[inline(always)]
    unsafe fn with<I: Isa, F: UnitLayout>(mut self, scratch: &mut [u8]) {
        let strip_bytes = self.row_bytes * ROWS;
        for first in (0..self.rows.len()).step_by(TOGETHER) {
            let batch = first..self.rows.len().min(first + TOGETHER);
            for strip in self.outs.start / ROWS..self.outs.end.div_ceil(ROWS) {
                let start = strip * strip_bytes;
                let end = self.bytes.len().min(start + strip_bytes);
                let bytes = match self.order {
                    BlockOrder::Interleaved => &self.bytes[start..end],
                    BlockOrder::Rows => {
                        let rows = &self.bytes[start..end];
                        fill(self.format, rows, self.row_bytes, scratch);
                        &*scratch
                    }
                };
                // SAFETY: the caller's promise.
                unsafe { self.strip::<I, F>(bytes, strip, batch.clone()) };
            }
        }
    }

    /// Cuts rows of activations into eights, fours, twos and ones, and multiplies each with a strip.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn strip<I: Isa, F: UnitLayout>(
        &mut self,
        bytes: &[u8],
        strip: usize,
        batch: Range<usize>,
    ) {
        let mut at = batch.start;
        while at < batch.end {
            // SAFETY: the caller's promise.
            at += unsafe {
                match batch.end - at {
                    8.. if I::TILE >= 8 => self.tile::<I, F, 8>(bytes, strip, at),
                    4.. => self.tile::<I, F, 4>(bytes, strip, at),
                    2.. => self.tile::<I, F, 2>(bytes, strip, at),
                    _ => self.tile::<I, F, 1>(bytes, strip, at),
                }
            };
        }
    }

    /// A strip with `N` rows of activations. Returns `N`.
    ///
    /// # Safety
    /// As [`Self::with`].
    #[inline(always)]
    unsafe fn tile<I: Isa, F: UnitLayout, const N: usize>(
        &mut self,
        bytes: &[u8],
        strip: usize,
        at: usize,
    ) -> usize {
        let units = self.row_bytes / F::BYTES;
        assert!(
            bytes.len() == units * F::BYTES * ROWS
                && self.x.width() == units * F::GROUPS * F::GROUP,
            "the input width of the weight"
        );
        let x = std::array::from_fn(|i| self.x.row(self.rows[at + i]).as_ptr());
        let mut sums = [[0.0; ROWS]; N];
        // SAFETY: the strip's units and the blocks of rows of this width can be read.
        unsafe { add_up::<I, F, N>(bytes.as_ptr(), units, x, &mut sums) };
        let first = strip * ROWS;
        let outs = first.max(self.outs.start)..self.outs.end.min(first + ROWS);
        for (i, sums) in sums.iter().enumerate() {
            let y = &mut self.y.row(at + i)[outs.start - self.outs.start..][..outs.len()];
            let sums = &sums[outs.start - first..outs.end - first];
            match self.accumulate {
                Accumulate::Replace => y.copy_from_slice(sums),
                Accumulate::Add => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
            }
        }
        N
    }
}

/// The products of a strip's rows with `N` rows of activations. There are loops and no closures here: instructions in a
/// closure would be calls.
///
/// # Safety
/// The CPU has the instructions of `I`; all units and their activations can be read.
#[inline(always)]
unsafe fn add_up<I: Isa, F: UnitLayout, const N: usize>(
    strip: *const u8,
    units: usize,
    x: [*const Int8Block; N],
    totals: &mut [[f32; ROWS]; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [I::zero(); N];
        for unit in 0..units {
            let from = strip.add(unit * F::BYTES * ROWS);
            let head = F::head(from);
            for first in (0..F::GROUPS).step_by(F::TURN) {
                macro_rules! add {
                    ($($group:literal)*) => {$(
                        let (group, at) = (first + $group, unit * F::GROUPS);
                        add_group::<I, F, N>(from, &head, group, (at, &x), &mut sums);
                    )*};
                }
                // Unrolled by hand, so that shifts and offsets are constants.
                match F::TURN {
                    1 => {
                        add!(0);
                    }
                    2 => {
                        add!(0 1);
                    }
                    _ => {
                        add!(0 1 2 3 4 5 6 7);
                    }
                }
            }
        }
        for (sum, total) in sums.iter().zip(totals) {
            I::store(*sum, total.as_mut_ptr());
        }
    }
}

/// # Safety
/// As [`add_up`].
#[inline(always)]
unsafe fn add_group<I: Isa, F: UnitLayout, const N: usize>(
    unit: *const u8,
    head: &F::Head,
    group: usize,
    (first, x): (usize, &[*const Int8Block; N]),
    sums: &mut [I::Sums; N],
) {
    let bytes = F::BYTES * ROWS / F::GROUPS;
    I::prefetch(unit.wrapping_add(AHEAD + group * bytes), bytes);
    let per_block = INT8_BLOCK / F::GROUP;
    let (block, part) = ((first + group) / per_block, (first + group) % per_block);
    // SAFETY: the caller's promise.
    unsafe {
        let mut ints = [I::start(0, 0); N];
        for (x, int) in x.iter().zip(&mut ints) {
            let x = &*x.add(block);
            let start = if per_block == 1 {
                x.start
            } else {
                x.starts[part]
            };
            *int = if F::IS_SIGNED {
                I::start_signed(start)
            } else {
                I::start(start, F::BIAS)
            };
        }
        for word in 0..F::GROUP / FOUR {
            let codes = F::codes::<I>(unit, group, word);
            for (x, int) in x.iter().zip(&mut ints) {
                let x = (*x.add(block))
                    .codes
                    .as_ptr()
                    .add(part * F::GROUP + word * FOUR);
                *int = if F::IS_SIGNED {
                    I::dot_signed(*int, codes, x)
                } else {
                    I::dot(*int, codes, x)
                };
            }
        }
        let scales = F::scales::<I>(unit, head, group);
        for ((x, int), sum) in x.iter().zip(&ints).zip(&mut *sums) {
            let scales = I::mul(scales, I::splat((*x.add(block)).scale));
            *sum = I::mul_add(I::to_floats(*int), scales, *sum);
        }
        if F::HAS_OFFSETS {
            let offsets = F::offsets::<I>(unit, head, group);
            for (x, sum) in x.iter().zip(sums) {
                let x = &*x.add(block);
                let of_x = if per_block == 1 { x.sum } else { x.sums[part] };
                *sum = I::mul_add(offsets, I::splat(of_x), *sum);
            }
        }
    }
}
