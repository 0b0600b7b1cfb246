//! A frozen weight in the bytes it was published in.
//!
//! A [`Matrix`] is a view: the bytes usually belong to a mapped file, and only [`Matrix::repack`] copies them whole.
//! Kernels read a tile, which is decoded into scratch that fits the cache, or the product of one row with a vector.
//! Rows may start at any byte address: misaligned dense formats are read byte by byte.

mod copies;
#[cfg(feature = "gpu")]
pub(crate) mod placed;
mod repack;
mod split_kv_b;

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Device;
use bytes::Bytes;

pub(crate) use self::copies::Copies;
pub use self::copies::FileAccess;
pub use self::split_kv_b::SplitKvB;
use super::dtype_rows::{
    decode_bf16, decode_e4m3, decode_f32, dot_bf16, dot_e4m3, dot_f16, dot_f32, dot_values,
};
use super::ggml::Ggml;
use crate::error::Error;
use crate::memory::with_scratch;
use crate::simd::{decode_f16, dot};

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
    /// ggml's blocks, which do not cross rows.
    Ggml(Ggml),
    /// The same blocks with sixteen rows interleaved, for products in int8. Made in memory by [`Matrix::repack`], never
    /// stored.
    Interleaved(Ggml),
    /// A `kv_b_proj` in two matrices, each in a format of its own.
    SplitKvB(SplitKvB),
}

/// The scales of an FP8 matrix. Blocks at the right and lower edge may be partial.
#[derive(Clone, Debug)]
pub struct Fp8Blocks {
    scales: Arc<[f32]>,
    block: [usize; 2],
    /// Scales per row of blocks.
    stride: usize,
    /// The row of the full matrix at which this view starts; it need not be a block edge.
    first_row: usize,
}

impl Fp8Blocks {
    fn scale(&self, row: usize, col: usize) -> f32 {
        let block_row = (self.first_row + row) / self.block[0];
        self.scales[block_row * self.stride + col / self.block[1]]
    }
}

impl Format {
    /// The numbers of a block and their bytes, without scales that are stored elsewhere.
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

    /// Bytes of whole blocks with `numbers` numbers.
    fn bytes_of(&self, numbers: usize) -> usize {
        let (block, bytes) = self.block();
        numbers / block * bytes
    }

    /// Its display name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Fp8(_) => "FP8",
            Self::Ggml(format) | Self::Interleaved(format) => format.name(),
            Self::SplitKvB(_) => "split kv_b",
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
    placement: Placement,
}

/// Where a matrix lies besides its bytes: on a GPU, or nowhere.
#[derive(Clone, Debug, Default)]
struct Placement(#[cfg(feature = "gpu")] Option<placed::Placed>);

impl Placement {
    /// That of a view that starts `row` rows later.
    fn starting_at(&self, row: usize) -> Self {
        #[cfg(feature = "gpu")]
        return Self(self.0.clone().map(|placed| placed.starting_at(row)));
        #[cfg(not(feature = "gpu"))]
        return {
            let _ = row;
            self.clone()
        };
    }
}

impl Matrix {
    /// A matrix over stored bytes, in a format that keeps its scales in them.
    ///
    /// # Errors
    /// If the byte length is not that of `rows × cols` numbers, a row is not whole blocks, or the format is not one
    /// that is stored in one piece.
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
                placement: Placement::default(),
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

    /// The up-projection `[heads · (nope + v), rank]` of latent attention from its two parts: `keys` `[heads · rank,
    /// nope]`, transposed head by head, and `values` `[heads · v, rank]`.
    ///
    /// # Errors
    /// If the shapes do not have `heads` heads of one rank.
    pub fn from_split_kv_b(keys: Self, values: Self, heads: usize) -> Result<Self, Error> {
        let split = SplitKvB::new(keys, values, heads)?;
        Ok(Self {
            rows: split.rows(),
            cols: split.cols(),
            bytes: Bytes::new(),
            format: Format::SplitKvB(split),
            placement: Placement::default(),
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
            placement: Placement::default(),
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

    /// Its keys and values, if it is a `kv_b_proj` in two parts.
    pub fn split_kv_b(&self) -> Option<&SplitKvB> {
        match &self.format {
            Format::SplitKvB(split) => Some(split),
            _ => None,
        }
    }

    /// The stored bytes of all rows, without scales or parts that are stored elsewhere.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Its size in bytes, with block scales; of a view of a split `kv_b_proj`, the size of both whole parts.
    pub fn size_bytes(&self) -> usize {
        let elsewhere = match &self.format {
            Format::Fp8(blocks) => blocks.scales.len() * 4,
            Format::SplitKvB(split) => split.size_bytes(),
            _ => 0,
        };
        self.bytes.len() + elsewhere
    }

    /// A view of some rows that shares the bytes. Of an interleaved matrix, rows that are not whole strips are copied.
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
            Format::SplitKvB(split) => *split = split.starting_at(rows.start),
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
            placement: self.placement.starting_at(rows.start),
        }
    }

    /// Half of the smallest step of the format, summed over a row: how far rounding may move values near zero. 0 for
    /// formats whose steps shrink with the value.
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
        if let Format::SplitKvB(split) = &self.format {
            return split.decode(rows, cols, out);
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
            // Tiles need not start or end at a block edge.
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
            Format::SplitKvB(split) => split.decode(row..row + 1, cols, out),
        }
    }

    /// Bytes of a row.
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

/// Copies of matrices on a device.
impl Matrix {
    /// Copies matrices of one shape and format to a GPU, as one stack. On a CPU it does nothing. `on_copied` gets each
    /// matrix as it is stored; its bytes are not read again.
    ///
    /// # Errors
    /// If a row is larger than the device can bind, formats differ, or one was made for the CPU's products.
    pub fn place(
        matrices: &mut [Self],
        device: &Device,
        on_copied: &mut dyn FnMut(&Self),
    ) -> Result<(), Error> {
        #[cfg(feature = "gpu")]
        return placed::place_on(matrices, device, on_copied);
        #[cfg(not(feature = "gpu"))]
        return {
            let _ = (matrices, device, on_copied);
            Ok(())
        };
    }

    /// Copies matrices that were taken from a stack on a GPU once more, as a stack of their own.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn place_apart(matrices: &mut [Self]) -> Result<(), Error> {
        #[cfg(feature = "gpu")]
        return placed::place_apart(matrices);
        #[cfg(not(feature = "gpu"))]
        return {
            let _ = matrices;
            Ok(())
        };
    }
}

/// Cuts a column range at block edges, and pairs each piece with its scale.
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

/// Values that are decoded at a time; whole blocks of every format.
const DECODED: usize = 256;

/// Decodes columns of a row of blocks. Blocks that are only partly needed are decoded whole on the side.
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

/// The product of a row of blocks with `x`; [`DECODED`] values are decoded at a time.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{every_block_format, every_format, noise};

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
}
