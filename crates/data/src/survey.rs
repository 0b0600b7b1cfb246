//! A survey of data before training: the lengths of samples, and repeated samples.

use crate::corpus::Corpus;
use serde::Serialize;
use std::collections::HashMap;

/// The survey of one corpus among others.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Survey {
    /// Number of samples.
    pub samples: usize,
    /// Their lengths.
    pub lengths: Lengths,
    /// Samples with the tokens and marks of an earlier one in the same corpus.
    pub repeated: Repeats,
    /// Samples that also occur in each of the corpora before it, in their order.
    pub shared: Vec<Repeats>,
}

/// Lengths in tokens; percentiles are lengths that occur (nearest rank).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest.
    pub min: u32,
    /// Half of the samples are no longer.
    pub median: u32,
    /// 90 % of the samples are no longer.
    pub p90: u32,
    /// 99 % of the samples are no longer.
    pub p99: u32,
    /// The longest.
    pub max: u32,
    /// The arithmetic mean.
    pub mean: f64,
}

/// Repeated samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Repeats {
    /// Number of samples.
    pub samples: usize,
    /// The first of them and the sample that it repeats, counted from 0.
    pub first: Option<[usize; 2]>,
}

impl Survey {
    /// Surveys corpora, each with those before it.
    pub fn of(corpora: &[&Corpus]) -> Vec<Self> {
        let mut seen: Vec<HashMap<u64, usize>> = Vec::new();
        let mut surveys = Vec::new();
        for corpus in corpora {
            let (mut own, mut repeated) = (HashMap::new(), Repeats::default());
            let mut shared = vec![Repeats::default(); seen.len()];
            for (index, fingerprint) in corpus.fingerprints().enumerate() {
                for (earlier, shared) in seen.iter().zip(&mut shared) {
                    shared.add(index, earlier.get(&fingerprint));
                }
                repeated.add(index, own.get(&fingerprint));
                own.entry(fingerprint).or_insert(index);
            }
            seen.push(own);
            surveys.push(Self {
                samples: corpus.len(),
                lengths: Lengths::of(corpus.lengths()),
                repeated,
                shared,
            });
        }
        surveys
    }
}

impl Repeats {
    fn add(&mut self, index: usize, earlier: Option<&usize>) {
        if let Some(&earlier) = earlier {
            self.samples += 1;
            self.first.get_or_insert([index, earlier]);
        }
    }
}

impl Lengths {
    fn of(mut lengths: Vec<u32>) -> Self {
        lengths.sort_unstable();
        let at = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100).max(1);
            lengths.get(rank - 1).copied().unwrap_or(0)
        };
        let sum: f64 = lengths.iter().map(|&length| f64::from(length)).sum();
        Self {
            min: at(0),
            median: at(50),
            p90: at(90),
            p99: at(99),
            max: at(100),
            mean: sum / lengths.len().max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::columns::Columns;
    use crate::reader::{ReadOptions, RowFilter};

    fn corpus(rows: &[&[u32]]) -> Corpus {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = rows
            .iter()
            .map(|ids| format!("{{\"input_ids\": {ids:?}}}\n"));
        std::fs::write(file.path(), lines.collect::<String>()).unwrap();
        let options = ReadOptions {
            tokenizer: None,
            max_length: 9,
            vocab_size: 99,
            filter: RowFilter::Any,
            columns: &Columns::default(),
            cache: None,
            progress: &|_, _| {},
        };
        Corpus::open(&[file.path().to_owned()], options).unwrap()
    }

    #[test]
    fn repeats_are_found_within_and_between() {
        let train = corpus(&[&[1, 2], &[3, 4], &[1, 2], &[1, 2, 3]]);
        let (valid, test) = (corpus(&[&[7, 8], &[1, 2]]), corpus(&[&[9, 9], &[7, 8]]));
        let found = Survey::of(&[&train, &valid, &test]);
        let repeats = |samples, first| Repeats { samples, first };
        assert_eq!(found[0].repeated, repeats(1, Some([2, 0])));
        assert_eq!(found[0].shared, []);
        assert_eq!(found[1].repeated, repeats(0, None));
        assert_eq!(found[1].shared, [repeats(1, Some([1, 0]))]);
        assert_eq!(
            found[2].shared,
            [repeats(0, None), repeats(1, Some([1, 0]))]
        );
    }

    #[test]
    fn percentiles_are_lengths_that_occur() {
        let lengths = Lengths::of((1..=200).rev().collect());
        let expected = Lengths {
            min: 1,
            median: 100,
            p90: 180,
            p99: 198,
            max: 200,
            mean: 100.5,
        };
        assert_eq!(lengths, expected);
        assert_eq!(Lengths::of(vec![]), Lengths::default());
        assert_eq!(Lengths::of(vec![7]).p99, 7);
    }
}
