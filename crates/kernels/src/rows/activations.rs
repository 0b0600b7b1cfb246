//! Activations rounded to int8, in blocks of 32 with a scale each: what packed weights are multiplied with.

use crate::product::strided::Mat;
use crate::rows::isa::STEP;
use crate::simd::multiversion;

/// Values of a block.
pub(crate) const BLOCK: usize = 32;
/// Values of a lane of a sum.
const FOUR: usize = 4;
/// The largest code.
const MOST: f32 = 127.0;

/// Rows of codes, and what products need of each four of them. Rows are filled up to whole steps with zeros.
#[derive(Debug)]
pub(crate) struct Activations {
    /// Values of a row, whole steps.
    width: usize,
    codes: Vec<i8>,
    /// The sums of four codes, negative: what a weight's bias is multiplied with.
    starts: Vec<i32>,
    /// The scale of four codes.
    scales: Vec<f32>,
    /// The sums of four values: what a weight's offset is multiplied with.
    sums: Vec<f32>,
}

/// A row, for the vector instructions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) codes: *const i8,
    pub(super) starts: *const i32,
    pub(super) scales: *const f32,
    pub(super) sums: *const f32,
}

impl Activations {
    /// Rounds rows. What is not finite makes its block NaN.
    pub(crate) fn new(x: Mat<'_>) -> Self {
        let width = x.cols().next_multiple_of(STEP);
        let (n, fours) = (x.rows() * width, x.rows() * width / FOUR);
        let mut rounded = Self {
            width,
            codes: vec![0; n],
            starts: vec![0; fours],
            scales: vec![0.0; fours],
            sums: vec![0.0; fours],
        };
        for row in 0..x.rows() {
            rounded.fill(row, x.row(row));
        }
        rounded
    }

    fn fill(&mut self, row: usize, values: &[f32]) {
        let (at, fours) = (row * self.width, row * self.width / FOUR);
        let n_fours = values.len().div_ceil(FOUR);
        round(
            values,
            &mut self.codes[at..at + values.len()],
            &mut self.scales[fours..fours + n_fours],
        );
        add_up(
            &self.codes[at..at + self.width],
            &self.scales[fours..fours + self.width / FOUR],
            &mut self.starts[fours..fours + self.width / FOUR],
            &mut self.sums[fours..fours + self.width / FOUR],
        );
    }

    /// Values of a row, those that fill it up included.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn row(&self, row: usize) -> Row {
        let (at, fours) = (row * self.width, row * self.width / FOUR);
        Row {
            codes: self.codes[at..].as_ptr(),
            starts: self.starts[fours..].as_ptr(),
            scales: self.scales[fours..].as_ptr(),
            sums: self.sums[fours..].as_ptr(),
        }
    }
}

/// Rounds values in blocks of 32 of a row: what [`Activations`] keep of them.
pub(crate) fn round_rows(values: &mut [f32], width: usize) {
    let mut codes = vec![0; width];
    let mut scales = vec![0.0; width.div_ceil(FOUR)];
    for row in values.chunks_mut(width.max(1)) {
        round(row, &mut codes, &mut scales);
        for (i, (value, code)) in row.iter_mut().zip(&codes).enumerate() {
            *value = f32::from(*code) * scales[i / FOUR];
        }
    }
}

/// The largest magnitude, or what is above all: an infinity, or a NaN.
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.abs().to_bits());
    f32::from_bits(bits.fold(0, u32::max))
}

multiversion! {
    fn round<FMA>(values: &[f32], codes: &mut [i8], scales: &mut [f32]) {
        let _ = FMA;
        let blocks = values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
        for ((values, codes), scales) in blocks.zip(scales.chunks_mut(BLOCK / FOUR)) {
            let largest = largest(values);
            let (mut scale, mut inverse) = (largest / MOST, MOST / largest);
            if !inverse.is_finite() {
                // Zeros, values too small for an inverse, or no numbers.
                scale = if largest < 1.0 { 0.0 } else { f32::NAN };
                inverse = 0.0;
            }
            scales.fill(scale);
            for (code, value) in codes.iter_mut().zip(values) {
                *code = rounded(value * inverse);
            }
        }
    }
}

/// The nearest code, the even one of two that are equally near. The product with the inverse of a scale is at most a
/// rounding above 127; of an infinity or a NaN it is one again, for which any code will do.
#[inline(always)]
fn rounded(value: f32) -> i8 {
    /// Added to a small number, it leaves the number in its lowest bits.
    const TO_BITS: f32 = 12_582_912.0;
    (value + TO_BITS).to_bits() as i8
}

multiversion! {
    fn add_up<FMA>(codes: &[i8], scales: &[f32], starts: &mut [i32], sums: &mut [f32]) {
        let _ = FMA;
        let (codes, _) = codes.as_chunks::<FOUR>();
        for (((codes, scale), start), sum) in codes.iter().zip(scales).zip(starts).zip(sums) {
            let total: i32 = codes.iter().map(|code| i32::from(*code)).sum();
            *start = -total;
            *sum = total as f32 * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::noise;

    #[test]
    fn a_value_is_off_by_half_a_step_at_most() {
        let values = noise(3 * 77, 1);
        let mut rounded = values.clone();
        round_rows(&mut rounded, 77);
        for row in 0..3 {
            for block in (0..77).step_by(BLOCK) {
                let range = row * 77 + block..row * 77 + (block + BLOCK).min(77);
                let most = values[range.clone()]
                    .iter()
                    .fold(0f32, |most, v| most.max(v.abs()));
                for i in range {
                    let error = (values[i] - rounded[i]).abs();
                    assert!(error <= most / MOST * 0.5001, "{i}: {error} of {most}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5; 96];
            values[40] = poison;
            round_rows(&mut values, 96);
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
        round_rows(&mut zeros, 64);
        assert!(zeros.iter().all(|value| *value == 0.0));
    }
}
