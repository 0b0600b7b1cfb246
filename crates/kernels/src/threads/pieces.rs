//! Ranges cut into pieces, one for each task.

use std::ops::Range;

use super::spin_pool::spin_for;

/// Cuts a range into pieces of at most `size`.
pub(crate) fn tiles(
    range: Range<usize>,
    size: usize,
) -> impl Iterator<Item = Range<usize>> + Clone {
    range
        .clone()
        .step_by(size)
        .map(move |start| start..range.end.min(start + size))
}

/// A range that starts at 0, cut into pieces of one size; the last one may be smaller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces {
    len: usize,
    size: usize,
}

impl Pieces {
    pub(crate) fn new(len: usize, size: usize) -> Self {
        let size = size.max(1);
        Self { len, size }
    }

    pub(crate) fn len(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    pub(crate) fn get(&self, i: usize) -> Range<usize> {
        i * self.size..self.len.min((i + 1) * self.size)
    }

    /// [`spin_for`] with a task for each piece.
    pub(crate) fn spin_for(&self, task: impl Fn(Range<usize>) + Sync) {
        spin_for(self.len(), |i| task(self.get(i)));
    }
}
