//! Rows of numbers as a cache holds them, and pieces of them as f32.

use std::ops::Range;

use half::bf16;

use crate::product::gemm::with_scratch;
use crate::simd::multiversion;

/// In what form a cache holds numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// As they are.
    F32,
    /// Rounded to 8 significant bits.
    Bf16,
    /// 8 bits each, and a scale for 32 that lie together: as ggml's format of that name, but that the scale is a bf16, which
    /// no number is too large or too small for.
    Q8_0,
}

/// Numbers of a block, and its bytes: a scale in bf16, and codes.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = 34;

impl CacheType {
    /// All, from many bits to few.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Q8_0];

    /// Its name, as `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of a row of so many numbers. Blocks do not cross rows: the last one is filled up.
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => 4 * width,
            Self::Bf16 => 2 * width,
            Self::Q8_0 => width.div_ceil(BLOCK) * BLOCK_BYTES,
        }
    }
}

/// The largest code.
const MOST: f32 = 127.0;

multiversion! {
    /// Rounds rows of numbers to blocks. What is not finite makes its block NaN, so that it is not lost.
    fn encode_blocks<FMA>(values: &[f32], width: usize, bytes: &mut [u8]) {
        let _ = FMA;
        let row_bytes = CacheType::Q8_0.row_bytes(width).max(1);
        let rows = values.chunks(width.max(1)).zip(bytes.chunks_mut(row_bytes));
        for (row, bytes) in rows {
            let blocks = row.chunks(BLOCK).zip(bytes.as_chunks_mut().0);
            for (values, bytes) in blocks {
                let mut block = [0.0; BLOCK];
                block[..values.len()].copy_from_slice(values);
                encode_block(&block, bytes);
            }
        }
    }
}

/// Codes are of the scale as it is stored, so that its rounding adds no error.
#[inline(always)]
fn encode_block(values: &[f32; BLOCK], bytes: &mut [u8; BLOCK_BYTES]) {
    let larger = |a: f32, b: f32| if a < b { b } else { a };
    let largest = values.iter().fold(0.0, |m, v| larger(m, v.abs()));
    let are_finite = values.iter().fold(true, |all, v| all & v.is_finite());
    let scale = if are_finite {
        bf16::from_f32(largest / MOST)
    } else {
        bf16::NAN
    };
    bytes[..2].copy_from_slice(&scale.to_le_bytes());
    let step = scale.to_f32();
    for (byte, value) in bytes[2..].iter_mut().zip(values) {
        // 0 / 0 is the code 0 too.
        let code = (value / step).round_ties_even().clamp(-MOST, MOST);
        *byte = code as i8 as u8;
    }
}

/// The bytes of rows `[len, heads, width]`, heads of a position side by side.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u8]),
    Q8_0(&'a [u8]),
}

/// Rows `[len, heads, width]` that attention reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) stored: Stored<'a>,
    pub(crate) len: usize,
    pub(crate) heads: usize,
    pub(crate) width: usize,
}

impl Rows<'_> {
    /// Lends some rows of a head as f32, `[rows, width]`: where they lie if they lie so, else decoded into scratch.
    pub(crate) fn lend<R>(
        &self,
        rows: Range<usize>,
        head: usize,
        use_them: impl FnOnce(&[f32]) -> R,
    ) -> R {
        if let (Stored::F32(values), 1) = (self.stored, self.heads) {
            return use_them(&values[rows.start * self.width..rows.end * self.width]);
        }
        with_scratch(rows.len() * self.width, |values| {
            self.read(rows, head, values);
            use_them(values)
        })
    }

    /// Decodes some rows of a head.
    fn read(&self, rows: Range<usize>, head: usize, out: &mut [f32]) {
        let (first, width) = (rows.start * self.heads + head, self.width);
        if width == 0 || rows.is_empty() {
            return;
        }
        let from = |row_size: usize| (first * row_size, self.heads * row_size);
        match self.stored {
            Stored::F32(values) => {
                let (start, stride) = from(width);
                let rows = values[start..].chunks(stride).zip(out.chunks_mut(width));
                rows.for_each(|(row, out)| out.copy_from_slice(&row[..width]));
            }
            Stored::Bf16(bytes) => {
                let (start, stride) = from(CacheType::Bf16.row_bytes(width));
                read_bf16(&bytes[start..], stride, width, out);
            }
            Stored::Q8_0(bytes) => {
                let (start, stride) = from(CacheType::Q8_0.row_bytes(width));
                read_blocks(&bytes[start..], stride, width, out);
            }
        }
    }

    /// Decodes all heads of consecutive positions from one on, as many as there is room for.
    pub(crate) fn read_from(&self, position: usize, out: &mut [f32]) {
        // Heads of a position lie side by side, so that each is a row as of one head.
        let first = position * self.heads;
        let rows = out.len() / self.width.max(1);
        let flat = Self { heads: 1, ..*self };
        flat.read(first..first + rows, 0, out);
    }
}

multiversion! {
    /// Rows that lie `stride` bytes apart.
    fn read_bf16<FMA>(bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
        let _ = FMA;
        for (row, out) in bytes.chunks(stride).zip(out.chunks_exact_mut(width)) {
            for (code, value) in row.as_chunks::<2>().0.iter().zip(out) {
                *value = f32_of(code);
            }
        }
    }
}

multiversion! {
    /// Rows that lie `stride` bytes apart.
    fn read_blocks<FMA>(bytes: &[u8], stride: usize, width: usize, out: &mut [f32]) {
        let _ = FMA;
        for (row, out) in bytes.chunks(stride).zip(out.chunks_exact_mut(width)) {
            let (blocks, _) = row.as_chunks::<BLOCK_BYTES>();
            let (whole, rest) = out.as_chunks_mut::<BLOCK>();
            for (block, values) in blocks.iter().zip(&mut *whole) {
                decode_block(block, values);
            }
            if let Some(block) = blocks.get(whole.len())
                && !rest.is_empty()
            {
                let mut values = [0.0; BLOCK];
                decode_block(block, &mut values);
                rest.copy_from_slice(&values[..rest.len()]);
            }
        }
    }
}

/// A bf16.
#[inline(always)]
fn f32_of(bytes: &[u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16)
}

#[inline(always)]
fn decode_block(block: &[u8; BLOCK_BYTES], values: &mut [f32; BLOCK]) {
    let scale = f32_of(&[block[0], block[1]]);
    for (value, code) in values.iter_mut().zip(&block[2..]) {
        *value = f32::from(*code as i8) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::noise;

    /// Half a step, which its rounding to bf16 may have made larger.
    const HALF_A_STEP: f32 = 0.5 * (1.0 + 1.0 / 512.0) / MOST;

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
        encode_blocks(values, width, &mut bytes);
        bytes
    }

    #[test]
    fn what_is_read_is_what_was_written_to_half_a_step() {
        for (len, heads, width) in [(1, 1, 1), (5, 1, 64), (3, 2, 40), (4, 3, 31), (2, 2, 96)] {
            let values = sample(len * heads, width);
            let bytes = encoded(&values, width);
            let rows = Rows {
                stored: Stored::Q8_0(&bytes),
                len,
                heads,
                width,
            };
            let mut all = vec![f32::NAN; values.len()];
            rows.read_from(0, &mut all);
            for (row, found) in values.chunks(width).zip(all.chunks(width)) {
                for (block, found) in row.chunks(BLOCK).zip(found.chunks(BLOCK)) {
                    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let most = (HALF_A_STEP + f32::EPSILON) * largest;
                    let pairs = block.iter().zip(found);
                    pairs.for_each(|(v, f)| assert!((v - f).abs() <= most, "{v} {f} {most}"));
                }
            }
        }
    }

    #[test]
    fn a_piece_of_a_head_is_that_part_of_all_of_it() {
        let (len, heads, width) = (9, 3, 40);
        let values = sample(len * heads, width);
        let bf16: Vec<u8> = values
            .iter()
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect();
        let blocks = encoded(&values, width);
        for stored in [
            Stored::F32(&values),
            Stored::Bf16(&bf16),
            Stored::Q8_0(&blocks),
        ] {
            for heads in [1, heads] {
                let rows = Rows {
                    stored,
                    len: values.len() / width / heads,
                    heads,
                    width,
                };
                let mut all = vec![f32::NAN; values.len()];
                rows.read_from(0, &mut all);
                for (piece, head) in [(0..1, heads - 1), (2..9, 0), (4..4, 0)] {
                    rows.lend(piece.clone(), head, |found| {
                        let of = |row| &all[(row * heads + head) * width..][..width];
                        let expected: Vec<f32> = piece.clone().flat_map(of).copied().collect();
                        assert_eq!(found, expected, "{piece:?} of head {head}");
                    });
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let bytes = encoded(&[0.0; 64], 64);
        let mut found = [f32::NAN; 64];
        read_blocks(&bytes, bytes.len(), 64, &mut found);
        assert_eq!(found, [0.0; 64]);
    }

    #[test]
    fn what_is_not_finite_is_not_lost() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = sample(1, 64);
            values[40] = bad;
            let bytes = encoded(&values, 64);
            let mut found = [0.0; 64];
            read_blocks(&bytes, bytes.len(), 64, &mut found);
            assert!(found[..32].iter().all(|v| v.is_finite()));
            assert!(found[32..].iter().all(|v| v.is_nan()), "{bad}");
        }
    }
}
