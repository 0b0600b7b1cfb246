//! Rows of blocks, sixteen side by side: what vector instructions multiply without moving anything between lanes.
//!
//! A strip is sixteen rows, the last one filled up with zeros. It is made of units, a block of each row; in a unit the
//! blocks' fields follow one another, and a field is cut into words, of which come the first ones of all rows, then the
//! second ones, and so on. So a unit has as many bytes as its blocks, and every row can be read back.

use std::ops::Range;

use bytes::Bytes;
use rayon::prelude::*;

use super::{Format, Matrix, decode_blocks};
use crate::product::ahead::ask_for;
use crate::product::gemm::with_byte_scratch;
use crate::{Compute, Ggml, rows};

/// Rows of a strip.
pub(crate) const ROWS: usize = 16;
/// Bytes of a line of the cache.
pub(super) const LINE: usize = 64;
/// What stands in for the fields of rows that are not there.
const NOTHING: [u8; 128] = [0; 128];

/// Bytes of a block that have one meaning.
#[derive(Clone, Copy, Debug)]
struct Field {
    at: usize,
    bytes: usize,
    cut: Cut,
}

/// How a field is cut.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Bytes,
    Twos,
    Fours,
    /// 32 bits in fours, reordered: the bits of every fourth code come to lie in one byte.
    Bits,
}

const fn field(at: usize, bytes: usize, cut: Cut) -> Field {
    Field { at, bytes, cut }
}

/// The fields of a format's blocks, in the order in which a unit has them.
fn fields(format: Ggml) -> &'static [Field] {
    use Cut::{Bits, Bytes, Fours, Twos};
    match format {
        Ggml::F16 => unreachable!("a format without blocks has no strips"),
        Ggml::Q8_0 => const { &[field(0, 2, Twos), field(2, 32, Fours)] },
        Ggml::Q4_0 | Ggml::Iq4Nl => const { &[field(0, 2, Twos), field(2, 16, Fours)] },
        Ggml::MxFp4 => const { &[field(0, 1, Bytes), field(1, 16, Fours)] },
        Ggml::Q4_1 => const { &[field(0, 4, Twos), field(4, 16, Fours)] },
        Ggml::Q5_0 => const { &[field(0, 2, Twos), field(2, 4, Bits), field(6, 16, Fours)] },
        Ggml::Q5_1 => const { &[field(0, 4, Twos), field(4, 4, Bits), field(8, 16, Fours)] },
        Ggml::Q2K => {
            const {
                &[
                    field(80, 4, Twos),
                    field(0, 16, Bytes),
                    field(16, 64, Fours),
                ]
            }
        }
        Ggml::Q3K => {
            const {
                &[
                    field(108, 2, Twos),
                    field(96, 12, Bytes),
                    field(0, 32, Fours),
                    field(32, 64, Fours),
                ]
            }
        }
        Ggml::Q4K => {
            const {
                &[
                    field(0, 4, Twos),
                    field(4, 12, Bytes),
                    field(16, 128, Fours),
                ]
            }
        }
        Ggml::Q5K => {
            const {
                &[
                    field(0, 4, Twos),
                    field(4, 12, Bytes),
                    field(16, 32, Fours),
                    field(48, 128, Fours),
                ]
            }
        }
        Ggml::Q6K => {
            const {
                &[
                    field(208, 2, Twos),
                    field(192, 16, Bytes),
                    field(128, 64, Fours),
                    field(0, 128, Fours),
                ]
            }
        }
    }
}

impl Matrix {
    /// Copies matrices into new memory as products in `compute` read them fastest, those that have products in int8 with
    /// sixteen rows side by side, and says of each when nothing reads its old bytes any more. The memory is one piece: so
    /// the system can give it pages of a size of which a CPU has all at hand, where a file's small pages are looked up again
    /// and again.
    pub fn repack(matrices: &mut [Self], compute: Compute, on_copied: &mut dyn FnMut(&Self)) {
        let mut stored: Vec<Self> = vec![];
        for matrix in &*matrices {
            matrix.map_stored(&mut |part| {
                stored.push(part.clone());
                part.clone()
            });
        }
        let total: usize = stored.iter().map(|w| w.repacked_lines(compute)).sum();
        let mut all = vec![0; total + LINE];
        let first = all.as_ptr().align_offset(LINE).min(LINE);
        let mut left = &mut all[first..];
        for matrix in &stored {
            let (part, after) = left.split_at_mut(matrix.repacked_lines(compute));
            matrix.copy_to(&mut part[..matrix.repacked_bytes(compute)], compute);
            on_copied(matrix);
            left = after;
        }
        let (all, mut at) = (Bytes::from(all), first);
        for matrix in matrices {
            *matrix = matrix.map_stored(&mut |part| part.repacked_in(&all, &mut at, compute));
        }
    }

    /// The matrix over its copy in some memory, which begins at a place that is moved behind it.
    pub(super) fn repacked_in(&self, memory: &Bytes, at: &mut usize, compute: Compute) -> Self {
        let start = *at;
        *at += self.repacked_lines(compute);
        Self {
            format: self.repacked_format(compute),
            bytes: memory.slice(start..start + self.repacked_bytes(compute)),
            ..*self
        }
    }

    /// The matrix with what it is made of replaced, if that can be laid out.
    pub(super) fn map_stored(&self, map: &mut dyn FnMut(&Self) -> Self) -> Self {
        match &self.format {
            Format::Ggml(_) | Format::F32 | Format::F16 | Format::Bf16 | Format::Fp8(_) => {
                map(self)
            }
            Format::SplitKvB(heads) => Self {
                format: Format::SplitKvB(heads.map_stored(map)),
                bytes: self.bytes.clone(),
                ..*self
            },
            Format::Interleaved(_) => self.clone(),
        }
    }

    pub(super) fn repacked_format(&self, compute: Compute) -> Format {
        match self.format {
            Format::Ggml(format) if compute == Compute::Int8 && rows::multiplies(format) => {
                Format::Interleaved(format)
            }
            _ => self.format.clone(),
        }
    }

    pub(super) fn repacked_bytes(&self, compute: Compute) -> usize {
        match self.repacked_format(compute) {
            Format::Interleaved(_) => self.rows.next_multiple_of(ROWS) * self.row_bytes(),
            _ => self.bytes.len(),
        }
    }

    /// The same in whole lines of the cache.
    pub(super) fn repacked_lines(&self, compute: Compute) -> usize {
        self.repacked_bytes(compute).next_multiple_of(LINE)
    }

    /// Copies the bytes as they are laid out, on all threads.
    fn copy_to(&self, out: &mut [u8], compute: Compute) {
        let is_strips = matches!(self.repacked_format(compute), Format::Interleaved(_));
        let row_bytes = self.row_bytes();
        let rows = (ROWS * row_bytes).max(1);
        let tasks = out.par_chunks_mut(rows).zip(self.bytes.par_chunks(rows));
        tasks.for_each(|(out, rows)| match self.format {
            Format::Ggml(format) if is_strips => fill(format, rows, row_bytes, out),
            _ => out.copy_from_slice(rows),
        });
    }

    pub(super) fn strips_of(&self, format: Ggml, rows: Range<usize>) -> Self {
        let row_bytes = self.row_bytes();
        let (format, bytes) = if rows.start.is_multiple_of(ROWS) {
            let end = rows.end.next_multiple_of(ROWS);
            let bytes = self.bytes.slice(rows.start * row_bytes..end * row_bytes);
            (Format::Interleaved(format), bytes)
        } else {
            let mut bytes = vec![0; rows.len() * row_bytes];
            for (row, blocks) in rows.clone().zip(bytes.chunks_exact_mut(row_bytes)) {
                self.strip_blocks(format, row, 0, blocks);
            }
            (Format::Ggml(format), bytes.into())
        };
        Self {
            rows: rows.len(),
            cols: self.cols,
            bytes,
            format,
        }
    }

    /// Some blocks of a row, from one on.
    fn strip_blocks(&self, format: Ggml, row: usize, first: usize, blocks: &mut [u8]) {
        let strip = ROWS * self.row_bytes();
        let bytes = &self.bytes[row / ROWS * strip..][..strip];
        row_blocks(format, bytes, row % ROWS, first, blocks);
    }

    /// Decodes some columns of a row.
    pub(super) fn decode_strip(
        &self,
        format: Ggml,
        row: usize,
        cols: Range<usize>,
        out: &mut [f32],
    ) {
        let block = format.block();
        let blocks = cols.start / block..cols.end.div_ceil(block);
        with_byte_scratch(blocks.len() * format.block_bytes(), |bytes| {
            self.strip_blocks(format, row, blocks.start, bytes);
            let start = blocks.start * block;
            decode_blocks(format, bytes, cols.start - start..cols.end - start, out);
        });
    }
}

/// Lays rows side by side.
///
/// # Panics
/// If there are more than sixteen, or they are not of one length that fills the strip.
pub(crate) fn fill(format: Ggml, rows: &[u8], row_bytes: usize, strip: &mut [u8]) {
    let (block, n) = (format.block_bytes(), rows.len() / row_bytes.max(1));
    assert!(
        n <= ROWS && n * row_bytes == rows.len() && strip.len() == ROWS * row_bytes,
        "{n} rows of a strip"
    );
    for (i, unit) in strip.chunks_exact_mut(ROWS * block).enumerate() {
        // Of sixteen rows at once no CPU guesses what is read next: the next strip, mostly.
        let ahead = rows.as_ptr_range().end.addr() + i * ROWS * block;
        for line in (0..ROWS * block).step_by(LINE) {
            ask_for(ahead.wrapping_add(line));
        }
        let mut left = unit;
        for field in fields(format) {
            let (words, after) = left.split_at_mut(ROWS * field.bytes);
            let from = std::array::from_fn(|row| match row < n {
                true => &rows[row * row_bytes + i * block + field.at..][..field.bytes],
                false => &NOTHING[..field.bytes],
            });
            match field.cut {
                Cut::Bytes => spread::<1>(from, words, |word| word),
                Cut::Twos => spread::<2>(from, words, |word| word),
                Cut::Fours => spread::<4>(from, words, |word| word),
                Cut::Bits => spread::<4>(from, words, by_byte),
            }
            left = after;
        }
    }
}

/// Reads some blocks of a row back.
///
/// # Panics
/// If the strip has no such blocks.
pub(super) fn row_blocks(
    format: Ggml,
    strip: &[u8],
    row: usize,
    first_block: usize,
    blocks: &mut [u8],
) {
    let block = format.block_bytes();
    let units = strip.chunks_exact(ROWS * block).skip(first_block);
    assert!(
        row < ROWS && blocks.len() / block + first_block <= strip.len() / (ROWS * block),
        "blocks of a strip"
    );
    for (unit, blocks) in units.zip(blocks.chunks_exact_mut(block)) {
        let mut start = 0;
        for field in fields(format) {
            let unit = &unit[start..start + ROWS * field.bytes];
            let to = &mut blocks[field.at..field.at + field.bytes];
            match field.cut {
                Cut::Bytes => collect::<1>(unit, row, to, |word| word),
                Cut::Twos => collect::<2>(unit, row, to, |word| word),
                Cut::Fours => collect::<4>(unit, row, to, |word| word),
                Cut::Bits => collect::<4>(unit, row, to, by_code),
            }
            start += ROWS * field.bytes;
        }
    }
}

#[inline(always)]
fn spread<const N: usize>(
    from: [&[u8]; ROWS],
    words: &mut [u8],
    word: impl Fn([u8; N]) -> [u8; N],
) {
    let from = from.map(|row| row.as_chunks::<N>().0);
    let words = words.as_chunks_mut::<N>().0.chunks_exact_mut(ROWS);
    for (i, words) in words.enumerate() {
        for (to, from) in words.iter_mut().zip(&from) {
            *to = word(from[i]);
        }
    }
}

#[inline(always)]
fn collect<const N: usize>(
    unit: &[u8],
    row: usize,
    to: &mut [u8],
    word: impl Fn([u8; N]) -> [u8; N],
) {
    let rows = unit.as_chunks::<N>().0.chunks_exact(ROWS);
    for (rows, to) in rows.zip(to.as_chunks_mut::<N>().0) {
        *to = word(rows[row]);
    }
}

/// Bit 4c + j comes to 8j + c.
fn by_byte(bits: [u8; 4]) -> [u8; 4] {
    let bits = u32::from_le_bytes(bits);
    std::array::from_fn(|j| {
        // Every fourth bit, and neighbors pushed together: pairs, then fours, then all eight.
        let every_fourth = bits >> j & 0x1111_1111;
        let pairs = (every_fourth | every_fourth >> 3) & 0x0303_0303;
        let fours = (pairs | pairs >> 6) & 0x000F_000F;
        (fours | fours >> 12) as u8
    })
}

/// And back.
fn by_code(bytes: [u8; 4]) -> [u8; 4] {
    let bit = |i: usize| u32::from(bytes[i % 4] >> (i / 4) & 1) << i;
    (0..32).fold(0, |bits, i| bits | bit(i)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::tests::{every_block_format, every_format};

    #[test]
    fn a_strip_has_every_byte_of_its_rows_once() {
        let formats = Ggml::WRITTEN.into_iter().chain(Ggml::READ_ONLY);
        for format in formats.filter(|format| format.block() > 1) {
            let (block, units) = (format.block_bytes(), 3);
            let all: usize = fields(format).iter().map(|field| field.bytes).sum();
            assert_eq!(all, block, "{}", format.name());
            for n in [1, 5, 16] {
                let rows: Vec<u8> = (0..n * units * block)
                    .map(|i| (i * 61 % 253) as u8)
                    .collect();
                let mut strip = vec![0xEE; ROWS * units * block];
                fill(format, &rows, units * block, &mut strip);
                for (row, expected) in rows.chunks(units * block).enumerate() {
                    for first in 0..units {
                        let mut found = vec![0; (units - first) * block];
                        row_blocks(format, &strip, row, first, &mut found);
                        assert_eq!(found, expected[first * block..], "{}", format.name());
                    }
                }
                if n < ROWS {
                    let mut found = vec![1; units * block];
                    row_blocks(format, &strip, n, 0, &mut found);
                    assert!(found.iter().all(|byte| *byte == 0));
                }
            }
        }
    }

    /// Every form of a matrix, 40 rows of each: two strips and a half.
    fn every_form() -> Vec<Matrix> {
        let [keys, values] = [64, 32].map(|rows| every_block_format(rows).remove(0));
        let rank = values.cols();
        let keys = keys.row_range(0..1).bytes().repeat(2 * rank);
        let format = values.format().clone();
        let keys = Matrix::dense(2 * rank, rank, format, keys.into()).unwrap();
        let mut all = every_block_format(40);
        all.extend(every_format(40, 37, 3));
        all.push(Matrix::from_split_kv_b(keys, values, 2).unwrap());
        all
    }

    #[test]
    fn what_is_laid_out_has_the_values_it_had() {
        for compute in [Compute::Int8, Compute::F32] {
            check_laid_out(compute);
        }
    }

    fn check_laid_out(compute: Compute) {
        let before = every_form();
        let (mut after, mut copied) = (before.clone(), 0);
        Matrix::repack(&mut after, compute, &mut |matrix| {
            copied += matrix.size_bytes();
        });
        let stored: usize = before.iter().map(Matrix::size_bytes).sum();
        assert_eq!(copied, stored);
        for (before, after) in before.iter().zip(&after) {
            let (name, cols) = (after.format().name(), after.cols());
            let expected = before.to_f32();
            assert_eq!(after.to_f32(), expected, "{name}");
            // Views that are whole strips, begin with one, or begin and end inside one.
            for rows in [0..32, 16..40, 3..21] {
                let view = after.row_range(rows.clone()).to_f32();
                assert_eq!(
                    view,
                    expected[rows.start * cols..rows.end * cols],
                    "{name} {rows:?}"
                );
            }
        }
    }
}
