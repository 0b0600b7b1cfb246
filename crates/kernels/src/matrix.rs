//! A frozen weight in the bytes it was published in.
//!
//! A [`Matrix`] is a view: the bytes usually belong to a mapped file, and only [`Matrix::repack`] copies them whole.
//! Kernels ask for a tile, which is decoded into scratch that fits the cache, or for the product of one row with
//! a vector. Rows may start at any byte address: dense formats are read byte-wise where they are misaligned.

pub(crate) mod copies;
pub(crate) mod heads;
pub(crate) mod strips;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use self::heads::SplitKvB;
use crate::Error;
use crate::fp8::e4m3_to_f32;
use crate::ggml::Ggml;
use crate::product::gemm::{dot, with_scratch};
use crate::rows::decode_f16;
use crate::simd::multiversion;

/// How the numbers of a [`Matrix`] are stored.
#[derive(Clone, Debug)]
pub enum Format {
    /// IEEE single precision, little-endian.
    F32,
    /// IEEE half precision, little-endian.
    F16,
    /// bfloat16, little-endian.
    Bf16,
    /// E4M3 codes with one f32 scale per block: `value = code × scale`.
    Fp8(Fp8Blocks),
    /// Blocks of ggml's, which do not cross rows.
    Ggml(Ggml),
    /// The same blocks with sixteen rows side by side, for products in int8: made in memory, never stored.
    Interleaved(Ggml),
    /// Two matrices, each in a format of its own.
    SplitKvB(SplitKvB),
}

/// The scales of an FP8 matrix. Blocks at the right and lower edge may be partial.
#[derive(Clone, Debug)]
pub struct Fp8Blocks {
    scales: Arc<[f32]>,
    block: [usize; 2],
    /// Scales per row of blocks.
    stride: usize,
    /// Row of the full matrix at which this view starts: views need not start at a block edge.
    first_row: usize,
}

impl Fp8Blocks {
    fn scale(&self, row: usize, col: usize) -> f32 {
        let block_row = (self.first_row + row) / self.block[0];
        self.scales[block_row * self.stride + col / self.block[1]]
    }
}

impl Format {
    /// Numbers that are stored together, and their bytes; scales that are stored elsewhere are not counted.
    fn block(&self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Fp8(_) => (1, 1),
            Self::Ggml(format) | Self::Interleaved(format) => {
                (format.block(), format.block_bytes())
            }
            Self::SplitKvB(_) => (1, 0),
        }
    }

    /// Bytes of so many numbers of a row, whole blocks.
    fn bytes_of(&self, numbers: usize) -> usize {
        let (block, bytes) = self.block();
        numbers / block * bytes
    }

    /// The name a person reads.
    pub fn name(&self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Fp8(_) => "FP8",
            Self::Ggml(format) | Self::Interleaved(format) => format.name(),
            Self::SplitKvB(_) => "halves",
        }
    }
}

/// A frozen matrix `[rows, cols]`, row-major, in its stored form. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    bytes: Bytes,
    format: Format,
}

impl Matrix {
    /// A matrix over stored bytes of a format without scales elsewhere.
    ///
    /// # Errors
    /// If the byte length is not `rows × cols` numbers, or a row is not whole blocks; if the format has its bytes elsewhere,
    /// or is none that is stored.
    pub fn dense(rows: usize, cols: usize, format: Format, bytes: Bytes) -> Result<Self, Error> {
        let (block, size) = match format {
            Format::Interleaved(_) => (1, 0),
            _ => format.block(),
        };
        let expected = rows.saturating_mul(cols / block).saturating_mul(size);
        if bytes.len() == expected && cols.is_multiple_of(block) && size > 0 {
            return Ok(Self {
                rows,
                cols,
                bytes,
                format,
            });
        }
        Err(Error::ByteLength {
            rows,
            cols,
            format: format.name(),
            expected,
            found: bytes.len(),
        })
    }

    /// A matrix of E4M3 codes with block scales in `[⌈rows/block⌉, ⌈cols/block⌉]`.
    ///
    /// # Errors
    /// If the bytes or the scales do not fit the shape, or a scale is not a finite, non-negative number.
    pub fn fp8(
        shape: [usize; 2],
        codes: Bytes,
        scales: Vec<f32>,
        scale_shape: &[usize],
        block: [usize; 2],
    ) -> Result<Self, Error> {
        let [rows, cols] = shape;
        let expected = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
        if scale_shape != expected || scales.len() != expected[0] * expected[1] {
            return Err(Error::ScaleShape {
                expected,
                found: scale_shape.to_vec(),
            });
        }
        if let Some(idx) = scales.iter().position(|s| !s.is_finite() || *s < 0.0) {
            return Err(Error::BadScale {
                idx,
                found: scales[idx].to_string(),
            });
        }
        let blocks = Fp8Blocks {
            scales: scales.into(),
            block,
            stride: expected[1],
            first_row: 0,
        };
        Self::dense(rows, cols, Format::Fp8(blocks), codes)
    }

    /// The up-projection `[heads · (nope + v), rank]` of latent attention from its halves: `keys` `[heads · rank, nope]`,
    /// transposed head by head, and `values` `[heads · v, rank]`.
    ///
    /// # Errors
    /// If the two are not of so many heads of one rank.
    pub fn from_split_kv_b(keys: Self, values: Self, heads: usize) -> Result<Self, Error> {
        let heads = SplitKvB::new(keys, values, heads)?;
        Ok(Self {
            rows: heads.rows(),
            cols: heads.cols(),
            bytes: Bytes::new(),
            format: Format::SplitKvB(heads),
        })
    }

    /// A matrix that owns f32 values.
    ///
    /// # Panics
    /// If `values` are not `rows × cols`.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(
            values.len(),
            rows * cols,
            "a {rows} × {cols} matrix of {} values",
            values.len()
        );
        let bytes = values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>();
        Self {
            rows,
            cols,
            bytes: bytes.into(),
            format: Format::F32,
        }
    }

    /// Number of rows, the output width of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns, the input width of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the numbers are stored.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// The halves, if it is made of such.
    pub fn split_kv_b(&self) -> Option<&SplitKvB> {
        match &self.format {
            Format::SplitKvB(heads) => Some(heads),
            _ => None,
        }
    }

    /// The stored bytes of all rows; scales and halves, which are stored elsewhere, are not in them.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Bytes held, block scales included; of a view of halves, both of them.
    pub fn size_bytes(&self) -> usize {
        let elsewhere = match &self.format {
            Format::Fp8(blocks) => blocks.scales.len() * 4,
            Format::SplitKvB(heads) => heads.size_bytes(),
            _ => 0,
        };
        self.bytes.len() + elsewhere
    }

    /// A view of some rows, sharing the bytes; a copy where they are no whole strips.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    pub fn row_range(&self, rows: Range<usize>) -> Self {
        let row_bytes = self.row_bytes();
        assert!(rows.end <= self.rows, "rows {rows:?} leave the matrix");
        if let Format::Interleaved(format) = self.format {
            return self.strips_of(format, rows);
        }
        let mut format = self.format.clone();
        match &mut format {
            Format::Fp8(blocks) => blocks.first_row += rows.start,
            Format::SplitKvB(heads) => *heads = heads.starting_at(rows.start),
            _ => {}
        }
        let bytes = self
            .bytes
            .slice(rows.start * row_bytes..rows.end * row_bytes);
        Self {
            rows: rows.len(),
            cols: self.cols,
            bytes,
            format,
        }
    }

    /// Summed over a row, half of the smallest step of the format: how far rounding may move values near zero. 0 for
    /// formats whose steps shrink with the value for as long as it matters.
    pub fn smallest_half_steps(&self, row: usize) -> f32 {
        match &self.format {
            Format::Fp8(blocks) => {
                spans(0..self.cols, blocks.block[1], |col| blocks.scale(row, col))
                    .map(|(span, scale)| span.len() as f32 * scale * 2f32.powi(-10))
                    .sum()
            }
            _ => 0.0,
        }
    }

    /// The values in place, if they are stored as aligned f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match self.format {
            Format::F32 if cfg!(target_endian = "little") => cast_f32(&self.bytes),
            _ => None,
        }
    }

    /// Decodes a tile into `out`, row-major and contiguous: `[rows, cols]` of the ranges.
    ///
    /// # Panics
    /// If a range leaves the matrix or `out` is shorter than the tile.
    pub fn decode(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "tile {rows:?} × {cols:?} leaves the matrix"
        );
        if let Format::SplitKvB(heads) = &self.format {
            return heads.decode(rows, cols, out);
        }
        for (row, line) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            self.decode_row(row, cols.clone(), line);
        }
    }

    /// Decodes the whole matrix. For tests, merging and export; no kernel needs it.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.decode(0..self.rows, 0..self.cols, &mut out);
        out
    }

    fn decode_row(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let line = self.row(row);
        let bytes = &line[self.format.bytes_of(cols.start)..self.format.bytes_of(cols.end)];
        match &self.format {
            // Tiles need not begin and end with a block.
            Format::Ggml(format) => decode_blocks(*format, line, cols, out),
            Format::Interleaved(format) => self.decode_strip(*format, row, cols, out),
            Format::F32 => decode_f32(bytes, out),
            Format::F16 => decode_f16(bytes, out),
            Format::Bf16 => decode_bf16(bytes, out),
            Format::Fp8(blocks) => {
                for (span, scale) in
                    spans(cols.clone(), blocks.block[1], |col| blocks.scale(row, col))
                {
                    let at = span.start - cols.start..span.end - cols.start;
                    decode_e4m3(&bytes[at.clone()], &mut out[at], scale);
                }
            }
            Format::SplitKvB(heads) => heads.decode(row..row + 1, cols, out),
        }
    }

    /// How many bytes a row has.
    pub(crate) fn row_bytes(&self) -> usize {
        self.format.bytes_of(self.cols)
    }

    /// The bytes of a row.
    fn row(&self, row: usize) -> &[u8] {
        let size = self.row_bytes();
        &self.bytes[row * size..(row + 1) * size]
    }

    /// The product of one row with `x`, straight from the stored bytes.
    ///
    /// # Panics
    /// If `x` is not one value per column.
    pub fn dot(&self, row: usize, x: &[f32]) -> f32 {
        assert_eq!(x.len(), self.cols, "a vector of the matrix's width");
        let bytes = self.row(row);
        match &self.format {
            Format::Ggml(format) => dot_blocks(*format, bytes, x),
            Format::F32 => dot_f32(bytes, x),
            Format::F16 => dot_f16(bytes, x),
            Format::Bf16 => dot_bf16(bytes, x),
            Format::Fp8(blocks) => {
                spans(0..self.cols, blocks.block[1], |col| blocks.scale(row, col))
                    .map(|(span, scale)| scale * dot_e4m3(&bytes[span.clone()], &x[span]))
                    .sum()
            }
            Format::Interleaved(_) | Format::SplitKvB(_) => with_scratch(self.cols, |line| {
                self.decode(row..row + 1, 0..x.len(), line);
                dot(line, x)
            }),
        }
    }
}

/// Cuts a column range at block edges and gives each piece its scale.
fn spans(
    cols: Range<usize>,
    block: usize,
    scale: impl Fn(usize) -> f32,
) -> impl Iterator<Item = (Range<usize>, f32)> {
    let (mut start, end) = (cols.start, cols.end);
    std::iter::from_fn(move || {
        let span = start..end.min((start / block + 1) * block);
        start = span.end;
        (!span.is_empty()).then(|| (span.clone(), scale(span.start)))
    })
}

#[expect(
    unsafe_code,
    reason = "reinterpreting bytes as f32 in place; alignment is checked by align_to"
)]
fn cast_f32(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is a valid f32, and align_to returns only the aligned middle.
    let (head, values, tail) = unsafe { bytes.align_to::<f32>() };
    (head.is_empty() && tail.is_empty()).then_some(values)
}

fn f32_at(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn bf16_at(bytes: &[u8]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
}

fn f16_at(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Values that are decoded at a time: whole blocks of every format.
const DECODED: usize = 256;

/// Decodes some columns of a row of blocks. At the edges, blocks that are not wanted whole are decoded beside.
fn decode_blocks(format: Ggml, line: &[u8], cols: Range<usize>, out: &mut [f32]) {
    let (block, size) = (format.block(), format.block_bytes());
    let mut at = cols.start;
    while at < cols.end {
        let done = at - cols.start;
        let whole = (cols.end - at) / block;
        if at.is_multiple_of(block) && whole > 0 {
            let from = at / block;
            let values = &mut out[done..done + whole * block];
            format.decode(&line[from * size..(from + whole) * size], values);
            at += whole * block;
        } else {
            let (first, mut values) = (at / block, [0.0; DECODED]);
            let values = &mut values[..block];
            format.decode(&line[first * size..(first + 1) * size], values);
            let end = cols.end.min((first + 1) * block);
            out[done..done + end - at]
                .copy_from_slice(&values[at - first * block..end - first * block]);
            at = end;
        }
    }
}

/// The product of a row of blocks with `x`, some values decoded at a time.
fn dot_blocks(format: Ggml, line: &[u8], x: &[f32]) -> f32 {
    let mut values = [0.0; DECODED];
    let bytes = DECODED / format.block() * format.block_bytes();
    let parts = line.chunks(bytes).zip(x.chunks(DECODED));
    let products = parts.map(|(line, x)| {
        let values = &mut values[..x.len()];
        format.decode(line, values);
        dot_values(values, x)
    });
    products.sum()
}

/// Independent partial sums of a dot product: enough to hide the latency of an addition.
const LANES: usize = 32;

/// Sums `value(chunk) × x` over chunks of `SIZE` bytes, in a fixed order of lanes.
#[inline(always)]
fn dot_with<const SIZE: usize, const FMA: bool>(
    bytes: &[u8],
    x: &[f32],
    value: impl Fn(&[u8]) -> f32,
) -> f32 {
    let mut lanes = [0f32; LANES];
    let (mut codes, mut xs) = (bytes.chunks_exact(SIZE * LANES), x.chunks_exact(LANES));
    for (codes, xs) in codes.by_ref().zip(xs.by_ref()) {
        for (lane, (code, x)) in lanes.iter_mut().zip(codes.chunks_exact(SIZE).zip(xs)) {
            *lane = if FMA {
                value(code).mul_add(*x, *lane)
            } else {
                value(code) * x + *lane
            };
        }
    }
    let rest = codes.remainder().chunks_exact(SIZE).zip(xs.remainder());
    for (lane, (code, x)) in lanes.iter_mut().zip(rest) {
        *lane = if FMA {
            value(code).mul_add(*x, *lane)
        } else {
            value(code) * x + *lane
        };
    }
    lanes.iter().sum()
}

multiversion! {
    fn dot_values<FMA>(values: &[f32], x: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        let add = |lane: &mut f32, value: f32, x: f32| {
            *lane = if FMA { value.mul_add(x, *lane) } else { value * x + *lane };
        };
        // Rows of blocks are of whole lanes.
        for (values, xs) in values.chunks_exact(LANES).zip(x.chunks_exact(LANES)) {
            for (lane, (value, x)) in lanes.iter_mut().zip(values.iter().zip(xs)) {
                add(lane, *value, *x);
            }
        }
        lanes.iter().sum()
    }
}
multiversion! {
    fn dot_f32<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<4, FMA>(bytes, x, f32_at) }
}
multiversion! {
    fn dot_f16<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<2, FMA>(bytes, x, f16_at) }
}
multiversion! {
    fn dot_bf16<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<2, FMA>(bytes, x, bf16_at) }
}
multiversion! {
    fn dot_e4m3<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<1, FMA>(bytes, x, |code| e4m3_to_f32(code[0])) }
}
multiversion! {
    fn decode_bf16<FMA>(bytes: &[u8], out: &mut [f32]) {
        for (code, value) in bytes.chunks_exact(2).zip(out) { *value = bf16_at(code); }
    }
}
multiversion! {
    fn decode_f32<FMA>(bytes: &[u8], out: &mut [f32]) {
        for (code, value) in bytes.chunks_exact(4).zip(out) { *value = f32_at(code); }
    }
}
multiversion! {
    fn decode_e4m3<FMA>(bytes: &[u8], out: &mut [f32], scale: f32) {
        for (code, value) in bytes.iter().zip(out) { *value = e4m3_to_f32(*code) * scale; }
    }
}

/// The bits of the nearest bf16, the even one of two that are equally near: what the library gives, as vectors can make it.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if value.is_nan() { quiet } else { nearest }) as u16
}

multiversion! {
    /// Rounds f32 values to bf16 and back.
    fn round_to_bf16<FMA>(values: &mut [f32]) {
        let _ = FMA;
        for value in values {
            *value = f32::from_bits(u32::from(bf16_bits(*value)) << 16);
        }
    }
}
multiversion! {
    /// Rounds f32 values to bf16.
    fn narrow_to_bf16<FMA>(values: &[f32], out: &mut [bf16]) {
        let _ = FMA;
        for (value, out) in values.iter().zip(out) {
            *out = bf16::from_bits(bf16_bits(*value));
        }
    }
}
multiversion! {
    /// The values of bf16 numbers.
    fn widen_bf16<FMA>(values: &[bf16], out: &mut [f32]) {
        let _ = FMA;
        for (value, out) in values.iter().zip(out) {
            *out = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
    }
}

/// Rounds f32 values to f16 and back; those beyond its largest become infinite.
pub(crate) fn round_to_f16(values: &mut [f32]) {
    let mut halves = [f16::ZERO; DECODED];
    for values in values.chunks_mut(DECODED) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

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

    #[test]
    fn a_tile_is_a_cut_of_the_whole() {
        for matrix in every_format(11, 23, 1) {
            let whole = matrix.to_f32();
            let mut tile = vec![0.0; 4 * 9];
            matrix.decode(5..9, 7..16, &mut tile);
            for (i, line) in tile.chunks(9).enumerate() {
                assert_eq!(
                    line,
                    &whole[(5 + i) * 23 + 7..][..9],
                    "{}",
                    matrix.format().name()
                );
            }
            let mut view = vec![0.0; 3 * 23];
            matrix.row_range(4..7).decode(0..3, 0..23, &mut view);
            assert_eq!(view, whole[4 * 23..7 * 23], "{}", matrix.format().name());
        }
    }

    /// A matrix of every format of blocks, with rows of two of the largest; of codes that mean numbers.
    pub(crate) fn every_block_format(rows: usize) -> Vec<Matrix> {
        let cols = 2 * DECODED;
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

    #[test]
    fn a_tile_of_blocks_is_a_cut_of_the_whole() {
        for matrix in every_block_format(5) {
            let (whole, cols) = (matrix.to_f32(), matrix.cols());
            assert!(whole.iter().all(|value| value.is_finite()));
            for range in [
                0..cols,
                0..256,
                256..512,
                32..64,
                3..5,
                17..300,
                250..512,
                31..33,
                7..7,
            ] {
                let mut tile = vec![0.0; 3 * range.len()];
                matrix.decode(1..4, range.clone(), &mut tile);
                for (row, line) in (1..4).zip(tile.chunks(range.len().max(1))) {
                    let expected = &whole[row * cols..][range.clone()];
                    assert_eq!(line, expected, "{} {range:?}", matrix.format().name());
                }
            }
            let view = matrix.row_range(2..4).to_f32();
            assert_eq!(view, whole[2 * cols..4 * cols]);
        }
        let torn = Matrix::dense(1, 48, Format::Ggml(Ggml::Q8_0), Bytes::from(vec![0; 51]));
        assert!(torn.is_err());
    }

    #[test]
    fn a_row_product_agrees_with_the_decoded_row() {
        // Different orders of f32 sums, relative to the sum of magnitudes.
        const TOLERANCE: f64 = 1e-6;
        for matrix in every_format(9, 77, 2)
            .into_iter()
            .chain(every_block_format(9))
        {
            let cols = matrix.cols();
            let (x, whole) = (noise(cols, 3), matrix.to_f32());
            for row in 0..9 {
                let size: f64 = whole[row * cols..][..cols]
                    .iter()
                    .map(|w| f64::from(w.abs()))
                    .sum();
                let expected: f64 = whole[row * cols..][..cols]
                    .iter()
                    .zip(&x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                let found = f64::from(matrix.dot(row, &x));
                assert!(
                    (found - expected).abs() <= TOLERANCE * size,
                    "{} row {row}: {found} {expected}",
                    matrix.format().name()
                );
            }
        }
    }

    #[test]
    fn misaligned_bytes_decode_the_same() {
        let aligned = Matrix::from_f32(3, 4, &noise(12, 4));
        let shifted: Vec<u8> = std::iter::once(0)
            .chain(aligned.bytes.iter().copied())
            .collect();
        let shifted = Matrix::dense(3, 4, Format::F32, Bytes::from(shifted).slice(1..)).unwrap();
        assert_eq!(aligned.to_f32(), shifted.to_f32());
    }

    #[test]
    fn bad_bytes_and_scales_are_refused() {
        let short = Matrix::dense(2, 3, Format::Bf16, Bytes::from_static(&[0; 11])).unwrap_err();
        assert_eq!(
            short.to_string(),
            "expected 12 bytes for a 2 × 3 BF16 matrix, found 11"
        );
        let grid = Matrix::fp8(
            [130, 4],
            Bytes::from(vec![0; 520]),
            vec![1.0],
            &[1, 1],
            [128, 128],
        )
        .unwrap_err();
        assert_eq!(
            grid.to_string(),
            "expected [2, 1] block scales, found [1, 1]"
        );
        let nan = Matrix::fp8(
            [2, 2],
            Bytes::from(vec![0; 4]),
            vec![f32::NAN],
            &[1, 1],
            [128, 128],
        )
        .unwrap_err();
        assert!(matches!(nan, Error::BadScale { idx: 0, .. }));
    }

    #[test]
    fn rounding_to_bf16_is_the_librarys() {
        let special = [
            0.0,
            -0.0,
            f32::NAN,
            f32::INFINITY,
            f32::MAX,
            1e-40,
            f32::from_bits(0x7F80_0001),
        ];
        let halfway = (0..99).map(|i| f32::from_bits(0x3F80_8000 + (i << 15)));
        let values: Vec<f32> = special
            .into_iter()
            .chain(halfway)
            .chain(noise(99, 1))
            .collect();
        let mut narrow = vec![bf16::ZERO; values.len()];
        narrow_to_bf16(&values, &mut narrow);
        let expected: Vec<u16> = values
            .iter()
            .map(|v| bf16::from_f32(*v).to_bits())
            .collect();
        assert_eq!(
            narrow.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            expected
        );
        let (mut rounded, mut widened) = (values, vec![0.0; narrow.len()]);
        round_to_bf16(&mut rounded);
        widen_bf16(&narrow, &mut widened);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits() >> 16).collect::<Vec<_>>();
        assert_eq!(bits(&rounded), bits(&widened));
        assert_eq!(
            bits(&rounded),
            expected.into_iter().map(u32::from).collect::<Vec<_>>()
        );
    }
}
