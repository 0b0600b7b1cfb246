//! Repacking: copying matrices into memory in the order in which products read them fastest.

use std::ops::Range;

use bytes::Bytes;
use rayon::prelude::*;

use super::{Format, Matrix, Placement, decode_blocks};
use crate::formats::Ggml;
use crate::formats::interleaved::{LINE, ROWS, fill, row_blocks};
use crate::memory::with_byte_scratch;
use crate::settings::Compute;

impl Matrix {
    /// Repacks matrices for products in `compute`: those that have products in int8 are interleaved, the others copied.
    /// Calls `on_copied` once nothing reads a matrix's old bytes any more. All copies share one piece of memory, which
    /// the system can back with huge pages; the small pages of a mapped file would miss the CPU's page cache again and
    /// again.
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

    /// The matrix over its copy in `memory` at `at`, which moves behind the copy.
    pub(super) fn repacked_in(&self, memory: &Bytes, at: &mut usize, compute: Compute) -> Self {
        let start = *at;
        *at += self.repacked_lines(compute);
        Self {
            format: self.repacked_format(compute),
            bytes: memory.slice(start..start + self.repacked_bytes(compute)),
            placement: Placement::default(),
            ..*self
        }
    }

    /// The matrix with each stored part replaced by `map`, if it can be repacked.
    pub(super) fn map_stored(&self, map: &mut dyn FnMut(&Self) -> Self) -> Self {
        match &self.format {
            Format::Ggml(_) | Format::F32 | Format::F16 | Format::Bf16 | Format::Fp8(_) => {
                map(self)
            }
            Format::SplitKvB(split) => Self {
                format: Format::SplitKvB(split.map_stored(map)),
                bytes: self.bytes.clone(),
                placement: Placement::default(),
                ..*self
            },
            Format::Interleaved(_) => self.clone(),
        }
    }

    pub(super) fn repacked_format(&self, compute: Compute) -> Format {
        match self.format {
            Format::Ggml(format) if compute == Compute::MatchWeight && format.has_blocks() => {
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

    /// The same, rounded up to whole cache lines.
    pub(super) fn repacked_lines(&self, compute: Compute) -> usize {
        self.repacked_bytes(compute).next_multiple_of(LINE)
    }

    /// Writes the repacked bytes, on all threads.
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
            placement: Placement::default(),
        }
    }

    /// Blocks of one row of an interleaved matrix, from `first` on.
    fn strip_blocks(&self, format: Ggml, row: usize, first: usize, blocks: &mut [u8]) {
        let strip = ROWS * self.row_bytes();
        let bytes = &self.bytes[row / ROWS * strip..][..strip];
        row_blocks(format, bytes, row % ROWS, first, blocks);
    }

    /// Decodes columns of one row of an interleaved matrix.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{every_block_format, every_format};

    /// A matrix of every format, of 40 rows: two and a half strips.
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
        for compute in [Compute::MatchWeight, Compute::F32] {
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
