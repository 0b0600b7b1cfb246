//! Packing: which samples share a row of a batch.
//!
//! Packing is by best fit, longest first: each sample goes into the fullest row that has room for it. The result depends on the
//! lengths alone, so a resumed run packs alike.
//!
//! Source: D. S. Johnson, Near-optimal bin packing algorithms, 1973.

use std::collections::BTreeMap;

/// The rows of a packing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Samples of all rows, one row after another; empty if every row is one sample.
    samples: Vec<u32>,
    /// Where each row ends in `samples`.
    ends: Vec<usize>,
    n_rows: usize,
}

impl Packing {
    /// Every sample is a row.
    pub fn none(n_samples: usize) -> Self {
        Self {
            samples: Vec::new(),
            ends: Vec::new(),
            n_rows: n_samples,
        }
    }

    /// Every two samples are a row.
    ///
    /// # Panics
    /// If there are more than 2³² samples.
    pub fn pairs(n_samples: usize) -> Self {
        let n = u32::try_from(n_samples).expect("samples are counted in 32 bits");
        Self {
            samples: (0..n).collect(),
            ends: (1..=n_samples / 2).map(|row| 2 * row).collect(),
            n_rows: n_samples / 2,
        }
    }

    /// Rows of at most `capacity` tokens, for samples of these lengths. A longer sample has a row alone.
    ///
    /// Samples keep their order in a row, and rows are in the order of their first samples.
    ///
    /// # Panics
    /// If there are more than 2³² samples.
    pub fn best_fit(lengths: &[u32], capacity: usize) -> Self {
        let n_samples = u32::try_from(lengths.len()).expect("samples are counted in 32 bits");
        let mut longest_first: Vec<u32> = (0..n_samples).collect();
        longest_first.sort_by_key(|&sample| (u32::MAX - lengths[sample as usize], sample));

        let mut rows: Vec<Vec<u32>> = Vec::new();
        // Rows by the room they have left.
        let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for sample in longest_first {
            let length = lengths[sample as usize] as usize;
            let fitting = open.range_mut(length..).next();
            let (room, row) = match fitting.and_then(|(&room, rows)| Some((room, rows.pop()?))) {
                Some(found) => found,
                None => {
                    rows.push(Vec::new());
                    (capacity.max(length), rows.len() - 1)
                }
            };
            if open.get(&room).is_some_and(Vec::is_empty) {
                open.remove(&room);
            }
            rows[row].push(sample);
            if room > length {
                open.entry(room - length).or_default().push(row);
            }
        }

        rows.iter_mut().for_each(|row| row.sort_unstable());
        rows.sort_unstable();
        let ends = rows.iter().scan(0, |end, row| {
            *end += row.len();
            Some(*end)
        });
        Self {
            ends: ends.collect(),
            n_rows: rows.len(),
            samples: rows.into_iter().flatten().collect(),
        }
    }

    /// Appends the rows of more samples, which come after `earlier` samples.
    pub fn append(&mut self, more: &Self, earlier: usize) {
        let offset = u32::try_from(earlier).expect("samples are counted in 32 bits");
        let end = self.samples.len();
        self.samples
            .extend(more.samples.iter().map(|sample| sample + offset));
        self.ends.extend(more.ends.iter().map(|more| more + end));
        self.n_rows += more.n_rows;
    }

    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The samples of a row.
    ///
    /// # Panics
    /// If `row` is out of range.
    pub fn row(&self, row: usize) -> Vec<usize> {
        if self.samples.is_empty() {
            return vec![row];
        }
        let start = if row == 0 { 0 } else { self.ends[row - 1] };
        let samples = self.samples[start..self.ends[row]].iter();
        samples.map(|&sample| sample as usize).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(packing: &Packing) -> Vec<Vec<usize>> {
        (0..packing.n_rows()).map(|row| packing.row(row)).collect()
    }

    #[test]
    fn each_sample_goes_where_it_fits_best() {
        let check = |lengths: &[u32], expected: &[&[usize]]| {
            assert_eq!(
                rows(&Packing::best_fit(lengths, 10)),
                expected,
                "{lengths:?}"
            );
        };
        check(&[], &[]);
        check(&[10, 10], &[&[0], &[1]]);
        check(&[4, 7, 3, 6], &[&[0, 3], &[1, 2]]);
        // 12 is longer than a row may be; 5 and 5 fill one.
        check(&[5, 12, 5, 1], &[&[0, 2], &[1], &[3]]);
        // 2 goes to the row of 8, not to that of 6.
        check(&[8, 6, 2, 4], &[&[0, 2], &[1, 3]]);
    }

    #[test]
    fn every_sample_is_packed_once_and_rows_are_nearly_full() {
        let lengths: Vec<u32> = (0..5000)
            .map(|i: u32| i.wrapping_mul(2_654_435_761) % 900 + 1)
            .collect();
        let packing = Packing::best_fit(&lengths, 1024);
        let mut seen: Vec<usize> = rows(&packing).concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..5000).collect::<Vec<_>>());
        let tokens = |row: &[usize]| row.iter().map(|&i| lengths[i] as usize).sum::<usize>();
        assert!(rows(&packing).iter().all(|row| tokens(row) <= 1024));
        let all: usize = lengths.iter().map(|&length| length as usize).sum();
        assert!(all as f64 / (packing.n_rows() * 1024) as f64 > 0.99);
    }

    #[test]
    fn folders_are_packed_apart_and_joined() {
        let mut packing = Packing::best_fit(&[4, 6], 10);
        packing.append(&Packing::best_fit(&[5, 9], 10), 2);
        assert_eq!(rows(&packing), [vec![0, 1], vec![2], vec![3]]);
        let mut single = Packing::none(2);
        single.append(&Packing::none(1), 2);
        assert_eq!(rows(&single), [[0], [1], [2]]);
    }
}
