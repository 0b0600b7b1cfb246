//! Repacked copies of an expert's weights, made again and again while a model runs.
//!
//! [`Matrix::repack`] copies a model once, through the mapping of its file. These copies read the file instead: a page
//! that was never mapped need not be unmapped again, which would stop all threads for a moment for each weight.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::{Format, Matrix};
use crate::formats::interleaved::{LINE, ROWS, fill};
use crate::memory::with_byte_scratch;
use crate::settings::Compute;
use crate::threads::spin_for;

/// Bytes per task.
const TASK_BYTES: usize = 1 << 16;

/// How to read the file that the matrices are mapped from.
#[derive(Clone, Copy, Debug)]
pub struct FileAccess {
    /// Advises the system that the bytes will be needed soon.
    pub advise_willneed: fn(&[u8]),
    /// Reads the bytes into a buffer of the same length.
    pub read: fn(&[u8], &mut [u8]),
}

/// The three matrices of an expert, to be copied into one piece of memory.
pub(crate) struct Copies {
    pub(crate) stored: [Matrix; 3],
    memory: Vec<u8>,
}

/// Rows of a matrix, and the memory for their copy.
struct RepackTask<'a> {
    rows: &'a [u8],
    row_bytes: usize,
    format: Format,
    to: &'a mut [u8],
}

impl Copies {
    /// Memory for the copies; `used` memory is recycled if it has the right size.
    pub(crate) fn new(stored: [Matrix; 3], compute: Compute, used: Option<Vec<u8>>) -> Self {
        let len = Self::len(&stored, compute);
        let memory = used.filter(|memory| memory.len() == len);
        Self {
            memory: memory.unwrap_or_else(|| vec![0; len]),
            stored,
        }
    }

    /// Bytes of memory for the copies.
    pub(crate) fn len(stored: &[Matrix; 3], compute: Compute) -> usize {
        let lines = stored.iter().map(|w| w.repacked_lines(compute));
        lines.sum::<usize>() + LINE
    }

    /// Makes all copies, on all threads.
    pub(crate) fn fill(all: &mut [Self], compute: Compute, file: FileAccess) {
        let parts = all.iter_mut().flat_map(|copies| copies.parts(compute));
        // Each task is taken once.
        let parts: Vec<Mutex<RepackTask<'_>>> = parts.map(Mutex::new).collect();
        spin_for(parts.len(), |i| {
            let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
            part.fill(file);
        });
    }

    fn parts(&mut self, compute: Compute) -> Vec<RepackTask<'_>> {
        let (mut parts, mut left) = (vec![], self.memory.as_mut_slice());
        let first = left.as_ptr().align_offset(LINE).min(LINE);
        left = &mut left[first..];
        for matrix in &self.stored {
            let (own, after) = left.split_at_mut(matrix.repacked_lines(compute));
            let own = &mut own[..matrix.repacked_bytes(compute)];
            let row_bytes = matrix.row_bytes();
            let n_rows = (TASK_BYTES / row_bytes.max(1))
                .max(1)
                .next_multiple_of(ROWS);
            let size = (n_rows * row_bytes).max(1);
            let pairs = matrix.bytes.chunks(size).zip(own.chunks_mut(size));
            parts.extend(pairs.map(|(rows, to)| RepackTask {
                rows,
                row_bytes,
                format: matrix.repacked_format(compute),
                to,
            }));
            left = after;
        }
        parts
    }

    /// The matrices over the copies, and their memory, which must live as long as they do.
    pub(crate) fn finish(self, compute: Compute) -> ([Matrix; 3], Bytes) {
        let mut at = self.memory.as_ptr().align_offset(LINE).min(LINE);
        let memory = Bytes::from(self.memory);
        let matrices = self
            .stored
            .map(|w| w.repacked_in(&memory, &mut at, compute));
        (matrices, memory)
    }
}

impl RepackTask<'_> {
    fn fill(&mut self, file: FileAccess) {
        let Format::Interleaved(format) = self.format else {
            return (file.read)(self.rows, self.to);
        };
        let strip = ROWS * self.row_bytes;
        with_byte_scratch(self.rows.len(), |rows| {
            (file.read)(self.rows, rows);
            let strips = rows.chunks(strip).zip(self.to.chunks_mut(strip));
            strips.for_each(|(rows, to)| fill(format, rows, self.row_bytes, to));
        });
    }
}
