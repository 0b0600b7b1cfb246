//! Activations quantized to int8 in blocks of 32 with a scale each, for products with ggml's blocks.

use rayon::prelude::*;

use crate::memory::Mat;
use crate::simd::multiversion;

/// Values of a block.
pub(crate) const INT8_BLOCK: usize = 32;
/// The largest code.
const INT8_MAX: f32 = 127.0;
/// Values per task.
const TASK_VALUES: usize = 1 << 15;

/// 32 codes, and the sums that products need. A value is `scale · code`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(super) struct Int8Block {
    pub(super) codes: [i8; INT8_BLOCK],
    pub(super) scale: f32,
    /// The negative sum of the codes, which a weight's bias is multiplied with.
    pub(super) start: i32,
    /// The sum of the values, which a weight's offset is multiplied with.
    pub(super) sum: f32,
    /// The same for each half of the block.
    pub(super) starts: [i32; 2],
    pub(super) sums: [f32; 2],
}

/// Rows of blocks.
#[derive(Debug)]
pub(crate) struct Activations {
    /// Blocks of a row.
    width: usize,
    blocks: Vec<Int8Block>,
}

impl Activations {
    /// Quantizes rows of whole blocks. A block with a value that is not finite becomes NaN.
    pub(crate) fn new(x: Mat<'_>) -> Self {
        let width = x.cols() / INT8_BLOCK;
        let mut blocks = vec![Int8Block::default(); x.rows() * width];
        let rows = (TASK_VALUES / x.cols().max(1)).max(1);
        if x.rows() > rows {
            let tasks = blocks.par_chunks_mut((rows * width).max(1)).enumerate();
            tasks.for_each(|(task, blocks)| fill(x, task * rows, width, blocks));
        } else {
            fill(x, 0, width, &mut blocks);
        }
        Self { width, blocks }
    }

    /// Values of a row.
    pub(super) fn width(&self) -> usize {
        self.width * INT8_BLOCK
    }

    pub(super) fn row(&self, row: usize) -> &[Int8Block] {
        &self.blocks[row * self.width..][..self.width]
    }
}

/// Quantizes consecutive rows, from `first` on.
fn fill(x: Mat<'_>, first: usize, width: usize, blocks: &mut [Int8Block]) {
    let rows = blocks.chunks_mut(width.max(1));
    rows.enumerate()
        .for_each(|(row, blocks)| round(x.row(first + row), blocks));
}

/// Rounds the values of rows to those that [`Activations`] hold: the plain reference.
#[cfg(test)]
pub(crate) fn round_rows_to_int8(values: &mut [f32], width: usize) {
    let mut blocks = vec![Int8Block::default(); width.div_ceil(INT8_BLOCK)];
    for row in values.chunks_mut(width.max(1)) {
        round(row, &mut blocks);
        for (values, block) in row.chunks_mut(INT8_BLOCK).zip(&blocks) {
            for (value, code) in values.iter_mut().zip(block.codes) {
                *value = f32::from(code) * block.scale;
            }
        }
    }
}

multiversion! {
    /// Quantizes a row, padded with zeros.
    fn round<FMA>(values: &[f32], blocks: &mut [Int8Block]) {
        let _ = FMA;
        for (values, block) in values.chunks(INT8_BLOCK).zip(blocks) {
            match values.as_array() {
                Some(values) => *block = Int8Block::new(values),
                None => {
                    let mut whole = [0.0; INT8_BLOCK];
                    whole[..values.len()].copy_from_slice(values);
                    *block = Int8Block::new(&whole);
                }
            }
        }
    }
}

impl Int8Block {
    #[inline(always)]
    fn new(values: &[f32; INT8_BLOCK]) -> Self {
        let largest = largest(values);
        let (mut scale, mut inverse) = (largest / INT8_MAX, INT8_MAX / largest);
        if !inverse.is_finite() {
            // Zeros, values too small for an inverse, or NaN.
            scale = if largest < 1.0 { 0.0 } else { f32::NAN };
            inverse = 0.0;
        }
        let mut codes = [0; INT8_BLOCK];
        for (code, value) in codes.iter_mut().zip(values) {
            *code = rounded(value * inverse);
        }
        let sum = |half: &[i8]| half.iter().map(|code| i32::from(*code)).sum::<i32>();
        let [low, high] = [sum(&codes[..INT8_BLOCK / 2]), sum(&codes[INT8_BLOCK / 2..])];
        Self {
            codes,
            scale,
            start: -(low + high),
            sum: (low + high) as f32 * scale,
            starts: [-low, -high],
            sums: [low as f32 * scale, high as f32 * scale],
        }
    }
}

/// The largest magnitude; an infinity or NaN counts as largest.
#[inline(always)]
fn largest(values: &[f32; INT8_BLOCK]) -> f32 {
    let bits = values.iter().map(|value| value.abs().to_bits());
    f32::from_bits(bits.fold(0, u32::max))
}

/// The nearest code, ties to even. The product with the inverse of a scale exceeds 127 by at most a rounding error; if
/// the block has an infinity or a NaN, any code will do.
#[inline(always)]
fn rounded(value: f32) -> i8 {
    /// Adding it to a small number leaves the rounded number in the lowest bits.
    const TO_BITS: f32 = 12_582_912.0;
    (value + TO_BITS).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    #[test]
    fn a_value_is_off_by_half_a_step_at_most() {
        let values = noise(3 * 77, 1);
        let mut rounded = values.clone();
        round_rows_to_int8(&mut rounded, 77);
        for row in 0..3 {
            for block in (0..77).step_by(INT8_BLOCK) {
                let range = row * 77 + block..row * 77 + (block + INT8_BLOCK).min(77);
                let most = values[range.clone()]
                    .iter()
                    .fold(0f32, |most, v| most.max(v.abs()));
                for i in range {
                    let error = (values[i] - rounded[i]).abs();
                    assert!(error <= most / INT8_MAX * 0.5001, "{i}: {error} of {most}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5; 96];
            values[40] = poison;
            round_rows_to_int8(&mut values, 96);
            assert!(values[32..64].iter().all(|value| value.is_nan()));
            assert!(
                values[..32]
                    .iter()
                    .chain(&values[64..])
                    .all(|value| *value == 0.5)
            );
        }
        let mut zeros = vec![0.0; 64];
        zeros[3] = 1e-39;
        round_rows_to_int8(&mut zeros, 64);
        assert!(zeros.iter().all(|value| *value == 0.0));
    }
}
