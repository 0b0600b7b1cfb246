//! Sequences that share a row of a batch.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// The sequences that the rows of a batch are packed with. A sequence may continue an earlier one of its row, which it sees and
/// counts its positions from: sequences with a common beginning are a tree, whose parts are in the row once.
#[derive(Clone, Debug)]
pub struct Segments(Arc<SegmentRows>);

#[derive(Debug)]
struct SegmentRows {
    /// Row by row: where each segment starts, and where it ends with all that continue it.
    rows: Vec<Vec<Range<usize>>>,
    /// What a device has of them: all layers of a pass share it.
    uploaded: OnceLock<Box<dyn Any + Send + Sync>>,
}

/// A segment's own positions, and those of the segments before it that it sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SegmentView {
    pub(crate) own: Range<usize>,
    /// In order, none next to another, and the last maybe next to `own`.
    pub(crate) earlier: Vec<Range<usize>>,
}

/// The end of a segment that reaches to the end of its row.
const ROW_END: usize = usize::MAX;

impl PartialEq for Segments {
    fn eq(&self, other: &Self) -> bool {
        self.0.rows == other.0.rows
    }
}

impl Eq for Segments {}

impl Segments {
    fn new(rows: Vec<Vec<Range<usize>>>) -> Self {
        Self(Arc::new(SegmentRows {
            rows,
            uploaded: OnceLock::new(),
        }))
    }

    /// Every row is one sequence.
    pub fn whole() -> Self {
        Self::new(Vec::new())
    }

    /// Sequences with nothing in common: the first position of each, row by row.
    ///
    /// # Panics
    /// If the first sequence of a row does not start at 0, or starts are not in order.
    pub fn packed(starts: Vec<Vec<usize>>) -> Self {
        let of_row = |starts: Vec<usize>| -> Vec<Range<usize>> {
            let ends = starts.iter().skip(1).copied().chain([ROW_END]);
            starts
                .iter()
                .zip(ends)
                .map(|(start, end)| *start..end)
                .collect()
        };
        Self::tree(starts.into_iter().map(of_row).collect())
    }

    /// Sequences with common beginnings, row by row: each segment from its start to the end of the last one that continues it. A
    /// segment's own positions reach to the start of the next one.
    ///
    /// # Panics
    /// If the first segment of a row does not start at 0, starts are not in order, or a segment ends within another.
    pub fn tree(rows: Vec<Vec<Range<usize>>>) -> Self {
        for row in &rows {
            let starts: Vec<usize> = row.iter().map(|segment| segment.start).collect();
            assert!(
                starts.first() == Some(&0) && starts.is_sorted_by(|a, b| a < b),
                "starts of packed sequences: {starts:?}"
            );
            let row_end = row.iter().map(|segment| segment.end).max().unwrap_or(0);
            let mut open: Vec<usize> = Vec::new();
            for segment in row {
                while open.last().is_some_and(|end| *end <= segment.start) {
                    open.pop();
                }
                let is_inside = open.last().is_none_or(|end| segment.end <= *end);
                let at_start = segment.end == row_end || starts.binary_search(&segment.end).is_ok();
                assert!(
                    segment.start < segment.end && is_inside && at_start,
                    "segment {segment:?} of {row:?}"
                );
                open.push(segment.end);
            }
        }
        Self::new(rows)
    }

    /// The position of every token in its own sequence, row by row, for packed rows of length `seq`; `None` if rows are
    /// whole.
    pub fn positions(&self, seq: usize) -> Option<Vec<usize>> {
        let of_segment = |view: SegmentView| {
            let before: usize = view.earlier.iter().map(Range::len).sum();
            before..before + view.own.len()
        };
        let rows = 0..self.0.rows.len();
        (!self.are_whole()).then(|| {
            rows.flat_map(|row| self.views(row, seq).into_iter().flat_map(of_segment))
                .collect()
        })
    }

    /// Whether every row is one sequence.
    pub(crate) fn are_whole(&self) -> bool {
        self.0.rows.is_empty()
    }

    /// What a device has of them: made by the first call, or by every call if another type came first.
    pub(crate) fn uploaded<T: Clone + Send + Sync + 'static>(&self, upload: impl Fn() -> T) -> T {
        let first = self.0.uploaded.get_or_init(|| Box::new(upload()));
        first.downcast_ref::<T>().cloned().unwrap_or_else(upload)
    }

    /// Whether they fit a batch of this shape; packed rows have no earlier tokens.
    pub(crate) fn fit(&self, [batch, seq, kv_seq]: [usize; 3]) -> bool {
        let within = |row: &Vec<Range<usize>>| {
            let row_end = row.iter().map(|segment| segment.end).max();
            row.last().is_some_and(|last| last.start < seq.max(1))
                && row_end.is_some_and(|end| end == ROW_END || end == seq)
        };
        self.are_whole()
            || (self.0.rows.len() == batch && seq == kv_seq && self.0.rows.iter().all(within))
    }

    /// The segments of a row of length `seq`, in order.
    pub(crate) fn views(&self, row: usize, seq: usize) -> Vec<SegmentView> {
        let Some(segments) = self.0.rows.get(row) else {
            return vec![SegmentView {
                own: 0..seq,
                earlier: Vec::new(),
            }];
        };
        let starts = segments.iter().skip(1).map(|segment| segment.start);
        // What the last segment sees: the segments that it continues, and itself.
        let mut open: Vec<(Range<usize>, usize)> = Vec::new();
        let views = segments
            .iter()
            .zip(starts.chain([seq]))
            .map(|(segment, end)| {
                while open.last().is_some_and(|(_, end)| *end <= segment.start) {
                    open.pop();
                }
                let mut earlier: Vec<Range<usize>> = Vec::new();
                for (range, _) in &open {
                    match earlier.last_mut() {
                        Some(last) if last.end == range.start => last.end = range.end,
                        _ => earlier.push(range.clone()),
                    }
                }
                let own = segment.start..end;
                open.push((own.clone(), segment.end));
                SegmentView { own, earlier }
            });
        views.collect()
    }

    /// Where the segment of each position of a row ends, with all that continue it: no later position sees it.
    pub(crate) fn ends(&self, row: usize, seq: usize) -> Vec<usize> {
        let mut ends = vec![seq; seq];
        for segment in self.0.rows.get(row).into_iter().flatten() {
            ends[segment.start..].fill(segment.end.min(seq));
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_see_what_they_continue() {
        // 0..3, of which 3..5 is continued by 5..6 and 6..8; then 8..9; then another tree.
        let tree = Segments::tree(vec![vec![0..9, 3..8, 5..6, 6..8, 8..9, 9..ROW_END]]);
        let view = |own, earlier: Option<Range<usize>>| SegmentView {
            own,
            earlier: earlier.into_iter().collect(),
        };
        assert_eq!(
            tree.views(0, 11),
            [
                view(0..3, None),
                view(3..5, Some(0..3)),
                view(5..6, Some(0..5)),
                view(6..8, Some(0..5)),
                view(8..9, Some(0..3)),
                view(9..11, None),
            ]
        );
        assert_eq!(
            tree.positions(11).unwrap(),
            [0, 1, 2, 3, 4, 5, 5, 6, 3, 0, 1]
        );
        assert_eq!(tree.ends(0, 11), [9, 9, 9, 8, 8, 6, 8, 8, 9, 11, 11]);
        assert!(tree.fit([1, 11, 11]) && !tree.fit([1, 9, 9]) && !tree.fit([2, 11, 11]));
    }

    #[test]
    #[should_panic(expected = "segment 3..8")]
    fn a_segment_that_ends_within_another_is_refused() {
        Segments::tree(vec![vec![0..5, 3..8, 5..9]]);
    }
}
