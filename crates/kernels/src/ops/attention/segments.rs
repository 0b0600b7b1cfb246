//! Sequences that share a row of a batch.

use std::sync::Arc;

/// The starts of the sequences that the rows of a batch are packed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments(Arc<[Vec<usize>]>);

impl Segments {
    /// Every row is one sequence.
    pub fn whole() -> Self {
        Self(Arc::new([]))
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
        Self(starts.into())
    }

    /// The position of every token in its own sequence, row by row, for packed rows of length `seq`; `None` if rows are
    /// whole.
    pub fn positions(&self, seq: usize) -> Option<Vec<usize>> {
        let of_row = |starts: &Vec<usize>| {
            let ends = starts[1..].iter().copied().chain([seq]);
            let lengths = starts.iter().zip(ends).map(|(start, end)| end - start);
            lengths.flat_map(|len| 0..len).collect::<Vec<_>>()
        };
        (!self.0.is_empty()).then(|| self.0.iter().flat_map(of_row).collect())
    }

    /// Whether they fit a batch of this shape; packed rows have no earlier tokens.
    pub(crate) fn fit(&self, [batch, seq, kv_seq]: [usize; 3]) -> bool {
        let within = |starts: &Vec<usize>| starts.last().is_some_and(|last| *last < seq.max(1));
        self.0.is_empty() || (self.0.len() == batch && seq == kv_seq && self.0.iter().all(within))
    }

    pub(super) fn of_row(&self, row: usize) -> &[usize] {
        self.0.get(row).map_or(&[0], Vec::as_slice)
    }
}
