//! Values and matrices that tests share.

use half::{bf16, f16};

use crate::formats::{Format, Ggml, Matrix};

/// Pseudo-random values in [-1, 1), the same on every machine.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
    .take(n)
    .collect()
}

/// One matrix of every format over the same values, FP8 with small ragged blocks.
pub(crate) fn every_format(rows: usize, cols: usize, seed: u64) -> Vec<Matrix> {
    let values = noise(rows * cols, seed);
    let bf: Vec<u8> = values
        .iter()
        .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
        .collect();
    let hf: Vec<u8> = values
        .iter()
        .flat_map(|v| f16::from_f32(*v).to_le_bytes())
        .collect();
    let codes: Vec<u8> = (0..rows * cols)
        .map(|i| (i * 37 % 251) as u8)
        .map(|c| if c & 0x7F == 0x7F { 1 } else { c })
        .collect();
    let block = [3, 5];
    let grid = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    let scales = noise(grid[0] * grid[1], seed + 1)
        .iter()
        .map(|s| (s.abs() + 0.1) / 448.0)
        .collect();
    vec![
        Matrix::from_f32(rows, cols, &values),
        Matrix::dense(rows, cols, Format::Bf16, bf.into()).unwrap(),
        Matrix::dense(rows, cols, Format::F16, hf.into()).unwrap(),
        Matrix::fp8([rows, cols], codes.into(), scales, &grid, block).unwrap(),
    ]
}

/// A matrix of every format of blocks, with rows of two of the largest; of codes that mean numbers.
pub(crate) fn every_block_format(rows: usize) -> Vec<Matrix> {
    let cols = 2 * 256;
    let formats = Ggml::WRITTEN
        .into_iter()
        .chain(Ggml::READ_ONLY)
        .filter(|format| format.block() > 1);
    let matrix = |format: Ggml| {
        let bytes = rows * cols / format.block() * format.block_bytes();
        // Of no byte the highest bits of an exponent are set, so that no scale is infinite.
        let bytes: Vec<u8> = (0..bytes).map(|i| (i * 37 % 251) as u8 & 0xAF).collect();
        Matrix::dense(rows, cols, Format::Ggml(format), bytes.into()).unwrap()
    };
    formats.map(matrix).collect()
}
