//! Sequences that share a row of a batch.

use std::any::Any;
use std::sync::{Arc, OnceLock};

/// The starts of the sequences that the rows of a batch are packed with.
#[derive(Clone, Debug)]
pub struct Segments(Arc<SegmentRows>);

#[derive(Debug)]
struct SegmentRows {
    starts: Vec<Vec<usize>>,
    /// What a device has of them: all layers of a pass share it.
    uploaded: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.0.starts == other.0.starts
    }
}

impl Eq for Segments {}

impl Segments {
    fn new(starts: Vec<Vec<usize>>) -> Self {
        Self(Arc::new(SegmentRows {
            starts,
            uploaded: OnceLock::new(),
        }))
    }

    /// Every row is one sequence.
    pub fn whole() -> Self {
        Self::new(Vec::new())
    }

    /// The first position of every sequence, row by row.
    ///
    /// # Panics
    /// If the first sequence of a row does not start at 0, or starts are not in order.
    pub fn packed(starts: Vec<Vec<usize>>) -> Self {
        for starts in &starts {
            assert!(
                starts.first() == Some(&0) && starts.is_sorted_by(|a, b| a < b),
                "starts of packed sequences: {starts:?}"
            );
        }
        Self::new(starts)
    }

    /// The position of every token in its own sequence, row by row, for packed rows of length `seq`; `None` if rows are
    /// whole.
    pub fn positions(&self, seq: usize) -> Option<Vec<usize>> {
        let of_row = |starts: &Vec<usize>| {
            let ends = starts[1..].iter().copied().chain([seq]);
            let lengths = starts.iter().zip(ends).map(|(start, end)| end - start);
            lengths.flat_map(|len| 0..len).collect::<Vec<_>>()
        };
        (!self.are_whole()).then(|| self.0.starts.iter().flat_map(of_row).collect())
    }

    /// Whether every row is one sequence.
    pub(crate) fn are_whole(&self) -> bool {
        self.0.starts.is_empty()
    }

    /// What a device has of them: made by the first call, or by every call if another type came first.
    pub(crate) fn uploaded<T: Clone + Send + Sync + 'static>(&self, upload: impl Fn() -> T) -> T {
        let first = self.0.uploaded.get_or_init(|| Box::new(upload()));
        first.downcast_ref::<T>().cloned().unwrap_or_else(upload)
    }

    /// Whether they fit a batch of this shape; packed rows have no earlier tokens.
    pub(crate) fn fit(&self, [batch, seq, kv_seq]: [usize; 3]) -> bool {
        let within = |starts: &Vec<usize>| starts.last().is_some_and(|last| *last < seq.max(1));
        self.are_whole()
            || (self.0.starts.len() == batch && seq == kv_seq && self.0.starts.iter().all(within))
    }

    pub(crate) fn of_row(&self, row: usize) -> &[usize] {
        self.0.starts.get(row).map_or(&[0], Vec::as_slice)
    }
}
