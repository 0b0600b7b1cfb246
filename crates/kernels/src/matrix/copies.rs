//! Copies of a few weights that stay in their file, made again and again while a model runs.
//!
//! [`Matrix::repack`] copies a model once and reads its file where it is mapped. Here the bytes are asked for: a page that
//! was never mapped need not be taken out again, which would stop all threads for a moment, for each weight.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::strips::{LINE, ROWS, fill};
use super::{Format, Matrix};
use crate::Compute;
use crate::product::gemm::with_byte_scratch;
use crate::product::team::share_quickly;

/// Bytes that are worth a task.
const TASK: usize = 1 << 16;

/// How the bytes of a file are had, which is mapped.
#[derive(Clone, Copy, Debug)]
pub struct FileAccess {
    /// Says that they will be read soon.
    pub advise_willneed: fn(&[u8]),
    /// Copies them to as many others.
    pub read: fn(&[u8], &mut [u8]),
}

/// Matrices that are copied into one piece of memory.
pub(crate) struct Copies {
    pub(crate) stored: [Matrix; 3],
    memory: Vec<u8>,
}

/// Some rows of a matrix, and where their copy goes.
struct Part<'a> {
    rows: &'a [u8],
    row_bytes: usize,
    format: Format,
    to: &'a mut [u8],
}

impl Copies {
    /// Memory for them that was used before serves if it is of the right size.
    pub(crate) fn new(stored: [Matrix; 3], compute: Compute, used: Option<Vec<u8>>) -> Self {
        let len = Self::len(&stored, compute);
        let memory = used.filter(|memory| memory.len() == len);
        Self {
            memory: memory.unwrap_or_else(|| vec![0; len]),
            stored,
        }
    }

    /// Bytes of their memory.
    pub(crate) fn len(stored: &[Matrix; 3], compute: Compute) -> usize {
        let lines = stored.iter().map(|w| w.repacked_lines(compute));
        lines.sum::<usize>() + LINE
    }

    /// Copies all of them, on all threads.
    pub(crate) fn fill(all: &mut [Self], compute: Compute, file: FileAccess) {
        let parts = all.iter_mut().flat_map(|copies| copies.parts(compute));
        // Each is taken once.
        let parts: Vec<Mutex<Part<'_>>> = parts.map(Mutex::new).collect();
        share_quickly(parts.len(), |i| {
            let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
            part.fill(file);
        });
    }

    fn parts(&mut self, compute: Compute) -> Vec<Part<'_>> {
        let (mut parts, mut left) = (vec![], self.memory.as_mut_slice());
        let first = left.as_ptr().align_offset(LINE).min(LINE);
        left = &mut left[first..];
        for matrix in &self.stored {
            let (own, after) = left.split_at_mut(matrix.repacked_lines(compute));
            let own = &mut own[..matrix.repacked_bytes(compute)];
            let row_bytes = matrix.row_bytes();
            let n_rows = (TASK / row_bytes.max(1)).max(1).next_multiple_of(ROWS);
            let size = (n_rows * row_bytes).max(1);
            let pairs = matrix.bytes.chunks(size).zip(own.chunks_mut(size));
            parts.extend(pairs.map(|(rows, to)| Part {
                rows,
                row_bytes,
                format: matrix.repacked_format(compute),
                to,
            }));
            left = after;
        }
        parts
    }

    /// The matrices, which read the copies, and the memory, which is to be kept as long as they are.
    pub(crate) fn finish(self, compute: Compute) -> ([Matrix; 3], Bytes) {
        let mut at = self.memory.as_ptr().align_offset(LINE).min(LINE);
        let memory = Bytes::from(self.memory);
        let matrices = self
            .stored
            .map(|w| w.repacked_in(&memory, &mut at, compute));
        (matrices, memory)
    }
}

impl Part<'_> {
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
