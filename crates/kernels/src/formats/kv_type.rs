//! The data types of a KV cache, and its 8-bit codec.

use half::bf16;

use super::dtype_rows::{Q8_BLOCK, Q8_BLOCK_BYTES, RowDtype};
use crate::simd::multiversion;

/// KV-cache data type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// f32 values.
    F32,
    /// Half the memory, 11 significant bits; values beyond ±65,504 overflow to infinity.
    F16,
    /// Half the memory, 8 significant bits.
    Bf16,
    /// 8 bits per number and a scale per 32: like ggml's format of that name, except that the scale is a bf16, whose
    /// range has room for every value.
    Q8_0,
}

impl CacheType {
    /// All types, from many bits to few.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0];

    /// Its name, such as `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a row of `width` numbers. Blocks do not cross rows: the last one is padded.
    pub fn row_bytes(self, width: usize) -> usize {
        self.row_dtype().row_bytes(width)
    }

    /// The type of its rows in products.
    pub(crate) fn row_dtype(self) -> RowDtype {
        match self {
            Self::F32 => RowDtype::F32,
            Self::F16 => RowDtype::F16,
            Self::Bf16 => RowDtype::Bf16,
            Self::Q8_0 => RowDtype::Q8Bf16,
        }
    }
}

/// The largest code.
const Q8_MAX: f32 = 127.0;

multiversion! {
    /// Quantizes rows of numbers to blocks. A block with a value that is not finite becomes NaN, so that it does not go
    /// unnoticed.
    fn encode_q8_rows<FMA>(values: &[f32], width: usize, bytes: &mut [u8]) {
        let _ = FMA;
        let row_bytes = CacheType::Q8_0.row_bytes(width).max(1);
        let rows = values.chunks(width.max(1)).zip(bytes.chunks_mut(row_bytes));
        for (row, bytes) in rows {
            let blocks = row.chunks(Q8_BLOCK).zip(bytes.as_chunks_mut().0);
            for (values, bytes) in blocks {
                let mut block = [0.0; Q8_BLOCK];
                block[..values.len()].copy_from_slice(values);
                encode_block(&block, bytes);
            }
        }
    }
}

/// Codes are relative to the stored scale, so that its rounding adds no error.
#[inline(always)]
fn encode_block(values: &[f32; Q8_BLOCK], bytes: &mut [u8; Q8_BLOCK_BYTES]) {
    let larger = |a: f32, b: f32| if a < b { b } else { a };
    let largest = values.iter().fold(0.0, |m, v| larger(m, v.abs()));
    let are_finite = values.iter().fold(true, |all, v| all & v.is_finite());
    let scale = if are_finite {
        bf16::from_f32(largest / Q8_MAX)
    } else {
        bf16::NAN
    };
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    let step = scale.to_f32();
    for (byte, value) in bytes[2..].iter_mut().zip(values) {
        // 0 / 0 is the code 0 too.
        let code = (value / step).round_ties_even().clamp(-Q8_MAX, Q8_MAX);
        *byte = code as i8 as u8;
    }
}

multiversion! {
    /// Decodes rows of blocks.
    fn decode_q8_rows<FMA>(bytes: &[u8], width: usize, values: &mut [f32]) {
        let _ = FMA;
        let row_bytes = CacheType::Q8_0.row_bytes(width).max(1);
        let rows = values.chunks_mut(width.max(1)).zip(bytes.chunks(row_bytes));
        for (row, bytes) in rows {
            let blocks = row.chunks_mut(Q8_BLOCK).zip(bytes.as_chunks().0);
            for (values, bytes) in blocks {
                decode_block(bytes, values);
            }
        }
    }
}

#[inline(always)]
fn decode_block(block: &[u8; Q8_BLOCK_BYTES], values: &mut [f32]) {
    let scale = bf16::from_le_bytes([block[0], block[1]]).to_f32();
    for (value, code) in values.iter_mut().zip(&block[2..]) {
        *value = f32::from(*code as i8) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    /// Half a step, which its rounding to bf16 may have made larger.
    const HALF_A_STEP: f32 = 0.5 * (1.0 + 1.0 / 512.0) / Q8_MAX;

    /// Numbers of very different sizes, row by row.
    fn sample(rows: usize, width: usize) -> Vec<f32> {
        let mut values = noise(rows * width, 5);
        let rows = values.chunks_mut(width).enumerate();
        rows.for_each(|(i, row)| row.iter_mut().for_each(|v| *v *= [1.0, 1e30, 1e-30][i % 3]));
        values
    }

    /// Bytes of blocks, checked to be as many as the type says.
    fn encoded(values: &[f32], width: usize) -> Vec<u8> {
        let rows = values.len() / width;
        let mut bytes = vec![0xAA; rows * CacheType::Q8_0.row_bytes(width)];
        encode_q8_rows(values, width, &mut bytes);
        bytes
    }

    fn decoded(bytes: &[u8], width: usize, len: usize) -> Vec<f32> {
        let mut values = vec![f32::NAN; len];
        decode_q8_rows(bytes, width, &mut values);
        values
    }

    #[test]
    fn what_is_read_is_what_was_written_to_half_a_step() {
        for (rows, width) in [(1, 1), (5, 64), (6, 40), (12, 31), (4, 96)] {
            let values = sample(rows, width);
            let found = decoded(&encoded(&values, width), width, values.len());
            for (row, found) in values.chunks(width).zip(found.chunks(width)) {
                for (block, found) in row.chunks(Q8_BLOCK).zip(found.chunks(Q8_BLOCK)) {
                    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let most = (HALF_A_STEP + f32::EPSILON) * largest;
                    let pairs = block.iter().zip(found);
                    pairs.for_each(|(v, f)| assert!((v - f).abs() <= most, "{v} {f} {most}"));
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let bytes = encoded(&[0.0; 64], 64);
        assert_eq!(decoded(&bytes, 64, 64), [0.0; 64]);
    }

    #[test]
    fn what_is_not_finite_is_not_lost() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = sample(1, 64);
            values[40] = bad;
            let found = decoded(&encoded(&values, 64), 64, 64);
            assert!(found[..32].iter().all(|v| v.is_finite()));
            assert!(found[32..].iter().all(|v| v.is_nan()), "{bad}");
        }
    }
}
