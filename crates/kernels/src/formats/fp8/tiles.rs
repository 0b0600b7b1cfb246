//! Matrices in E4M3 with one scale per tile: 128 × 128 for weights, 1 × 128 for activations, 128 × 1 for operands that
//! are summed over tokens.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.2; deepseek-ai/DeepSeek-V3: inference/kernel.py, `act_quant`, for
//! the scale and its floor.

use std::ops::Range;

use rayon::prelude::*;

use super::{ceil_power_of_two, e4m3_to_f32, encode_scaled, encode_scaled_each, round_to_e4m3};
use crate::memory::with_scratch;
use crate::settings::Scales;
use crate::simd::multiversion;

/// The largest value of E4M3; the largest value of a tile is scaled to it.
const LARGEST: f32 = 448.0;
/// The least magnitude that a tile is scaled by, so that a tile of zeros has a scale to divide by.
const FLOOR: f32 = 1e-4;
/// The tile of a weight.
pub(crate) const BLOCK: [usize; 2] = [128, 128];
/// Values of an activation that share a scale.
pub const TILE_GROUP: usize = 128;
/// Rows per task, if tiles are lower than that.
const ROUNDED_TASK_ROWS: usize = 64;

impl Scales {
    fn of(self, largest: f32) -> f32 {
        let scale = largest.max(FLOOR) / LARGEST;
        match self {
            Self::F32 => scale,
            Self::PowerOfTwo => ceil_power_of_two(scale),
            Self::One => 1.0,
        }
    }
}

/// A matrix `[rows, cols]` in tiles: `value = code × scale`. Tiles at the right and lower edge may be partial.
#[derive(Clone, Debug, PartialEq)]
pub struct Tiles {
    /// `[rows, cols]`, row-major.
    pub codes: Vec<u8>,
    /// `[⌈rows / tile⌉, ⌈cols / tile⌉]`, row-major.
    pub scales: Vec<f32>,
    /// Rows and columns of a tile.
    pub tile: [usize; 2],
    cols: usize,
}

impl Tiles {
    /// Rows of `cols` values in tiles of 1 × 128, which were encoded elsewhere.
    ///
    /// # Panics
    /// If there is not a scale for each tile.
    pub fn of_rows(codes: Vec<u8>, scales: Vec<f32>, cols: usize) -> Self {
        let rows = codes.len() / cols.max(1);
        assert_eq!(
            scales.len(),
            rows * cols.div_ceil(TILE_GROUP),
            "a scale for each tile"
        );
        Self {
            codes,
            scales,
            tile: [1, TILE_GROUP],
            cols,
        }
    }

    /// Number of rows and columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.codes.len() / self.cols.max(1), self.cols]
    }

    /// Bytes of codes and scales.
    pub fn size_bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }

    /// Rows decoded to f32, row-major.
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let stride = self.cols.div_ceil(self.tile[1]);
        for (row, out) in rows.zip(out.chunks_mut(self.cols.max(1))) {
            let scales = &self.scales[row / self.tile[0] * stride..][..stride];
            decode_row(
                &self.codes[row * self.cols..][..self.cols],
                scales,
                self.tile[1],
                out,
            );
        }
    }
}

multiversion! {
    fn decode_row<FMA>(codes: &[u8], scales: &[f32], width: usize, out: &mut [f32]) {
        let _ = FMA;
        let parts = codes.chunks(width).zip(out.chunks_mut(width));
        for ((codes, out), scale) in parts.zip(scales) {
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = e4m3_to_f32(*code) * scale);
        }
    }
}

/// Encodes a matrix `[rows, cols]` in tiles.
///
/// # Panics
/// If the values do not fill the shape, or a side of the tile is 0.
pub fn encode_tiles(
    values: &[f32],
    [rows, cols]: [usize; 2],
    tile: [usize; 2],
    kind: Scales,
) -> Tiles {
    assert_eq!(values.len(), rows * cols, "values of the shape");
    let stride = cols.div_ceil(tile[1]);
    let mut codes = vec![0; values.len()];
    let mut scales = vec![0.0; rows.div_ceil(tile[0]) * stride];
    if cols > 0 {
        // A task is whole bands of tiles.
        let bands = ROUNDED_TASK_ROWS.div_ceil(tile[0]);
        codes
            .par_chunks_mut(bands * tile[0] * cols)
            .zip(scales.par_chunks_mut(bands * stride))
            .zip(values.par_chunks(bands * tile[0] * cols))
            .for_each(|((codes, scales), values)| {
                let bands = values.chunks(tile[0] * cols).zip(scales.chunks_mut(stride));
                for (codes, (values, scales)) in codes.chunks_mut(tile[0] * cols).zip(bands) {
                    encode_band(values, cols, tile[1], kind, (codes, scales));
                }
            });
    }
    Tiles {
        codes,
        scales,
        tile,
        cols,
    }
}

/// Rounds rows of `width` values to E4M3 in tiles of 1 × 128, in place; serial.
pub(crate) fn round_rows(values: &mut [f32], width: usize, kind: Scales) {
    for row in values.chunks_mut(width.max(1)) {
        for part in row.chunks_mut(TILE_GROUP) {
            round_scaled(part, kind.of(largest_magnitude(part, 0.0)));
        }
    }
}

/// Rounds rows of `width` values to E4M3 in tiles of 128 × 1, in place; serial.
pub(crate) fn round_columns(values: &mut [f32], width: usize, kind: Scales) {
    with_scratch(width, |scales| {
        for band in values.chunks_mut((TILE_GROUP * width).max(1)) {
            scales.fill(0.0);
            band.chunks(width).for_each(|row| larger_each(row, scales));
            scales.iter_mut().for_each(|scale| *scale = kind.of(*scale));
            band.chunks_mut(width)
                .for_each(|row| round_scaled_each(row, scales));
        }
    });
}

/// Rounds rows of `width` values to E4M3 in tiles of 128 × 128, in place; serial.
pub(crate) fn round_blocks(values: &mut [f32], width: usize, kind: Scales) {
    let [height, block_width] = BLOCK;
    for band in values.chunks_mut((height * width).max(1)) {
        for start in (0..width).step_by(block_width) {
            let cols = start..width.min(start + block_width);
            let largest = band.chunks(width).fold(0.0, |largest, row| {
                largest_magnitude(&row[cols.clone()], largest)
            });
            let scale = kind.of(largest);
            band.chunks_mut(width)
                .for_each(|row| round_scaled(&mut row[cols.clone()], scale));
        }
    }
}

multiversion! {
    fn round_scaled<FMA>(values: &mut [f32], scale: f32) {
        let _ = FMA;
        values.iter_mut().for_each(|v| *v = round_to_e4m3(*v / scale) * scale);
    }
}

multiversion! {
    fn round_scaled_each<FMA>(values: &mut [f32], scales: &[f32]) {
        let _ = FMA;
        let each = values.iter_mut().zip(scales);
        each.for_each(|(v, scale)| *v = round_to_e4m3(*v / scale) * scale);
    }
}

/// Encodes one row of tiles. The rows are read twice in memory order: reading tile by tile would jump from row to row.
fn encode_band(
    values: &[f32],
    cols: usize,
    width: usize,
    kind: Scales,
    (codes, scales): (&mut [u8], &mut [f32]),
) {
    scales.fill(0.0);
    for row in values.chunks(cols) {
        match width {
            1 => larger_each(row, scales),
            _ => row
                .chunks(width)
                .zip(&mut *scales)
                .for_each(|(part, largest)| *largest = largest_magnitude(part, *largest)),
        }
    }
    scales.iter_mut().for_each(|scale| *scale = kind.of(*scale));
    for (row, codes) in values.chunks(cols).zip(codes.chunks_mut(cols)) {
        match width {
            1 => encode_scaled_each(row, scales, codes),
            _ => row
                .chunks(width)
                .zip(codes.chunks_mut(width))
                .zip(&*scales)
                .for_each(|((row, codes), scale)| encode_scaled(row, *scale, codes)),
        }
    }
}

multiversion! {
    /// The largest magnitude of the values and `so_far`.
    fn largest_magnitude<FMA>(values: &[f32], so_far: f32) -> f32 {
        let _ = FMA;
        let mut lanes = [so_far; 32];
        for part in values.chunks(32) {
            lanes.iter_mut().zip(part).for_each(|(lane, value)| *lane = larger(*lane, value.abs()));
        }
        // The maximum of halves, then of quarters: comparing one after another would take as long as reading the
        // values.
        for half in [16, 8, 4, 2, 1] {
            let (left, right) = lanes.split_at_mut(half);
            left.iter_mut().zip(right).for_each(|(left, right)| *left = larger(*left, *right));
        }
        lanes[0]
    }
}

multiversion! {
    /// Raises each maximum to the magnitude of a value.
    fn larger_each<FMA>(values: &[f32], largest: &mut [f32]) {
        let _ = FMA;
        largest.iter_mut().zip(values).for_each(|(largest, value)| *largest = larger(*largest, value.abs()));
    }
}

/// The larger of two values; a NaN on the left loses, a NaN on the right is never chosen.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a < b { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::fp8::f32_to_e4m3;
    use crate::testing::noise;

    /// Rows that were rounded for the wire are rounded once more by the product that reads them.
    #[test]
    fn rounding_twice_is_rounding_once() {
        let shape = [64, 300];
        for kind in [Scales::F32, Scales::PowerOfTwo, Scales::One] {
            for seed in 0..20 {
                let magnitude = 10f32.powi(seed % 7 - 5);
                let mut values = noise(shape[0] * shape[1], seed as u64);
                values.iter_mut().for_each(|value| *value *= magnitude);
                let mut round = || {
                    let tiles = encode_tiles(&values, shape, [1, 128], kind);
                    tiles.decode(0..shape[0], &mut values);
                    values.clone()
                };
                assert_eq!(round(), round());
            }
        }
        // The largest value of a tile decides its scale, whatever its mantissa is: each of eight.
        for bits in (0x3F80_0000..0x4000_0000u32).step_by(8) {
            let scale = Scales::F32.of(f32::from_bits(bits));
            assert_eq!(Scales::F32.of(LARGEST * scale), scale);
        }
    }

    #[test]
    fn every_tile_has_its_own_scale_and_ragged_edges_have_theirs() {
        for ([rows, cols], tile) in [
            ([300, 200], [128, 128]),
            ([5, 300], [1, 128]),
            ([300, 70], [128, 1]),
            ([1, 1], [128, 128]),
            ([130, 3], [1, 2]),
            ([0, 7], [1, 128]),
            ([7, 0], [1, 128]),
        ] {
            for kind in [Scales::F32, Scales::PowerOfTwo] {
                let mut values = noise(rows * cols, 3);
                values
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, v)| *v *= (i % 97) as f32);
                let tiles = encode_tiles(&values, [rows, cols], tile, kind);
                let mut decoded = vec![0.0; rows * cols];
                tiles.decode(0..rows, &mut decoded);
                for (i, value) in values.iter().enumerate() {
                    let (row, col) = (i / cols, i % cols);
                    let of_tile = |at: usize| [at / cols / tile[0], at % cols / tile[1]];
                    let mates = (0..values.len()).filter(|at| of_tile(*at) == of_tile(i));
                    let scale = if i % 31 == 0 {
                        // The tile's own maximum, found the slow way, for some of the values.
                        kind.of(mates.map(|at| values[at].abs()).fold(0.0, f32::max))
                    } else {
                        tiles.scales[row / tile[0] * cols.div_ceil(tile[1]) + col / tile[1]]
                    };
                    assert_eq!(tiles.codes[i], f32_to_e4m3(value / scale));
                    assert_eq!(decoded[i], e4m3_to_f32(tiles.codes[i]) * scale);
                    let step = scale * (value.abs() / scale / 16.0).max(2f32.powi(-10));
                    assert!((decoded[i] - value).abs() <= step * 1.001);
                }
            }
        }
    }

    #[test]
    fn rounding_is_encoding_and_decoding() {
        for [rows, cols] in [[5, 300], [300, 5], [129, 129], [1, 1], [0, 3], [3, 0]] {
            for kind in [Scales::F32, Scales::PowerOfTwo, Scales::One] {
                type Round = fn(&mut [f32], usize, Scales);
                let ways = [
                    (round_rows as Round, [1, 128]),
                    (round_columns, [128, 1]),
                    (round_blocks, [128, 128]),
                ];
                for (round, tile) in ways {
                    let values = noise(rows * cols, 5);
                    let mut expected = vec![0.0; values.len()];
                    let tiles = encode_tiles(&values, [rows, cols], tile, kind);
                    tiles.decode(0..rows, &mut expected);
                    let mut found = values;
                    round(&mut found, cols, kind);
                    assert_eq!(found, expected);
                }
            }
        }
    }

    #[test]
    fn zeros_and_tiny_values_have_a_scale_to_divide_by() {
        let tiles = encode_tiles(&[0.0, -0.0, 1e-30], [1, 3], [1, 128], Scales::F32);
        assert_eq!(
            (tiles.codes, tiles.scales),
            (vec![0, 0x80, 0], vec![FLOOR / LARGEST])
        );
    }
}
