//! Token sequences in one row, their common beginnings once.
//!
//! Sequences that come in the order of their ids are the branches of a tree, one after another: each begins with some tokens of
//! the one before it and adds its own. What it begins with is read where it lies, so nothing is copied.

use std::ops::Range;

use kernels::Segments;

/// A row of tokens, and the branches in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct PrefixTree {
    ids: Vec<u32>,
    /// The index of each token in its own sequence.
    depths: Vec<usize>,
    /// Where the tokens of the last sequence are.
    path: Vec<usize>,
    branches: Vec<Branch>,
}

/// A sequence that leaves the one before it.
#[derive(Clone, Copy, Debug)]
struct Branch {
    /// The place of its first own token.
    start: usize,
    /// The number of tokens that it begins with.
    common: usize,
    /// The place of the token that the sequence before it has instead, if it goes on.
    instead: Option<usize>,
}

impl PrefixTree {
    /// The tokens of the row.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The number of tokens that a sequence would add.
    pub(crate) fn added_by(&self, ids: &[u32]) -> usize {
        ids.len() - self.common(ids)
    }

    /// How many tokens of the last sequence another one begins with.
    fn common(&self, ids: &[u32]) -> usize {
        let last = self.path.iter().map(|place| &self.ids[*place]);
        last.zip(ids).take_while(|(last, id)| last == id).count()
    }

    /// Adds a sequence, whose ids do not come before those of the last one. Returns the places of its tokens.
    pub(crate) fn add(&mut self, ids: &[u32]) -> &[usize] {
        let (common, start) = (self.common(ids), self.ids.len());
        let instead = self.path.get(common).copied();
        let follows = common.checked_sub(1).map(|last| self.path[last] + 1) == Some(start);
        if common < ids.len() && !follows {
            self.branches.push(Branch {
                start,
                common,
                instead,
            });
        }
        self.path.truncate(common);
        self.path.extend(start..start + ids.len() - common);
        self.ids.extend_from_slice(&ids[common..]);
        self.depths.extend(common..ids.len());
        &self.path
    }

    /// The segments of the row.
    pub(crate) fn segments(&self) -> Segments {
        Segments::tree(vec![self.ranges()])
    }

    /// The range of each segment with all that continue it. Segments meet where sequences part.
    fn ranges(&self) -> Vec<Range<usize>> {
        let branches = self.branches.iter();
        let mut starts: Vec<usize> = branches
            .flat_map(|branch| [Some(branch.start), branch.instead])
            .flatten()
            .collect();
        starts.sort_unstable();
        starts.dedup();
        // From the last to the first: the branches after a place, those that are hidden by a nearer one left out.
        let mut later = self.branches.as_slice();
        let mut open: Vec<Branch> = Vec::new();
        let mut segments: Vec<Range<usize>> = Vec::with_capacity(starts.len());
        for start in starts.into_iter().rev() {
            while let Some((last, rest)) = later.split_last().filter(|(last, _)| last.start > start)
            {
                while open
                    .last()
                    .is_some_and(|nearer| nearer.common >= last.common)
                {
                    open.pop();
                }
                open.push(*last);
                later = rest;
            }
            // A branch ends what it does not begin with.
            let depth = self.depths[start];
            let at = open.partition_point(|branch| branch.common <= depth);
            let end = at
                .checked_sub(1)
                .map_or(self.ids.len(), |at| open[at].start);
            segments.push(start..end);
        }
        segments.reverse();
        segments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens that the last token of each sequence sees, by the segments' own rule.
    fn seen(tree: &PrefixTree, place: usize, segments: &[Range<usize>]) -> Vec<u32> {
        let sees = |other: &usize| {
            let segment = segments.iter().rfind(|segment| segment.start <= *other);
            segment.is_some_and(|segment| segment.end > place)
        };
        let places = (0..=place).filter(sees);
        places.map(|place| tree.ids[place]).collect()
    }

    fn check(mut sequences: Vec<Vec<u32>>) -> usize {
        sequences.sort();
        let mut tree = PrefixTree::default();
        let mut ends = Vec::new();
        for ids in &sequences {
            let added = tree.added_by(ids);
            let before = tree.ids().len();
            let places = tree.add(ids).to_vec();
            assert_eq!(
                (places.len(), tree.ids().len()),
                (ids.len(), before + added)
            );
            ends.push(places);
        }
        let positions = tree.segments().positions(tree.ids().len()).unwrap();
        let ranges = tree.ranges();
        for (ids, places) in sequences.iter().zip(ends) {
            for (at, place) in places.iter().enumerate() {
                assert_eq!(positions[*place], at, "{sequences:?}");
                assert_eq!(seen(&tree, *place, &ranges), ids[..=at], "{sequences:?}");
            }
        }
        tree.ids().len()
    }

    #[test]
    fn every_token_sees_its_own_sequence_and_nothing_else() {
        let lists = |all: &[&[u32]]| all.iter().map(|ids| ids.to_vec()).collect::<Vec<_>>();
        for (sequences, tokens) in [
            (lists(&[&[1, 2, 3]]), 3),
            (lists(&[&[1, 2, 3], &[1, 2, 3]]), 3),
            (lists(&[&[1, 2], &[1, 2, 3], &[1, 2, 3, 4]]), 4),
            (lists(&[&[1, 2, 3], &[1, 2, 4], &[1, 5], &[2]]), 6),
            (
                lists(&[
                    &[1, 2, 3, 4],
                    &[1, 2, 3, 5, 6],
                    &[1, 2, 7],
                    &[1, 2, 7, 8],
                    &[1, 9],
                ]),
                9,
            ),
        ] {
            assert_eq!(check(sequences.clone()), tokens, "{sequences:?}");
        }
        // All sorts of trees: ids of few kinds, lengths up to 9.
        let mut state = 7u64;
        let mut next = |n: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % n
        };
        for _ in 0..300 {
            let n = 1 + next(12);
            let sequence = |_| (0..1 + next(9)).map(|_| next(3) as u32).collect();
            check((0..n).map(sequence).collect());
        }
    }
}
