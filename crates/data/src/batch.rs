//! Batches: rows of samples in the shape that a model takes.

use crate::sample::Sample;

/// The target of a position without a prediction: PyTorch's `ignore_index`.
pub const IGNORE: i32 = -100;

/// A rectangle of tokens and their targets.
///
/// # Shapes
/// `input_ids` and `targets` are `[rows, cols]`, row-major; `cols` is the longest row's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Tokens, padded on the right.
    pub input_ids: Vec<i32>,
    /// The next token if it is trained, else [`IGNORE`]. So the last of a sample is always [`IGNORE`].
    pub targets: Vec<i32>,
    /// Number of rows.
    pub rows: usize,
    /// Length of the longest row.
    pub cols: usize,
    /// Length of each row without its padding, `[rows]`.
    pub lengths: Vec<usize>,
    /// The beginning of each sample in each row: only 0 if rows are not packed.
    pub starts: Vec<Vec<usize>>,
    /// Number of targets. Zero is possible: check before dividing by it.
    pub trained_tokens: usize,
    /// UTF-8 bytes of the targets' text.
    pub trained_bytes: usize,
}

impl Batch {
    /// Whether any row has several samples.
    pub fn is_packed(&self) -> bool {
        self.starts.iter().any(|starts| starts.len() > 1)
    }
}

/// A batch with a row for each sample.
///
/// # Panics
/// If a token id is beyond `i32`, or a sample does not have one mark per token. Samples that this crate reads are checked.
pub fn collate(samples: &[&Sample], pad_id: u32) -> Batch {
    let rows: Vec<&[&Sample]> = samples.iter().map(std::slice::from_ref).collect();
    collate_rows(&rows, pad_id)
}

/// A batch of rows of several samples each. No sample may see another.
///
/// # Panics
/// As [`collate`].
pub fn collate_rows(packed: &[&[&Sample]], pad_id: u32) -> Batch {
    let as_i32 = |id: u32| {
        i32::try_from(id).expect("token ids are below the vocabulary size, which fits i32")
    };
    let length = |row: &&[&Sample]| row.iter().map(|sample| sample.ids.len()).sum();
    let lengths: Vec<usize> = packed.iter().map(length).collect();
    let (rows, cols) = (packed.len(), lengths.iter().copied().max().unwrap_or(0));
    let mut input_ids = vec![as_i32(pad_id); rows * cols];
    let mut targets = vec![IGNORE; rows * cols];
    let mut starts = vec![Vec::new(); rows];
    for (row, samples) in packed.iter().enumerate() {
        let mut start = 0;
        for sample in *samples {
            let (ids, trained) = (&sample.ids, &sample.trained);
            assert_eq!(ids.len(), trained.len(), "a sample has one mark per token");
            for (col, (&id, &trained)) in ids.iter().zip(trained).enumerate() {
                let position = row * cols + start + col;
                input_ids[position] = as_i32(id);
                if trained && col > 0 {
                    targets[position - 1] = as_i32(id);
                }
            }
            starts[row].push(start);
            start += ids.len();
        }
    }
    Batch {
        trained_tokens: targets.iter().filter(|&&target| target != IGNORE).count(),
        trained_bytes: packed
            .iter()
            .copied()
            .flatten()
            .map(|sample| sample.trained_bytes)
            .sum(),
        lengths,
        starts,
        input_ids,
        targets,
        rows,
        cols,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ids: &[u32], trained: &[bool], trained_bytes: usize) -> Sample {
        Sample {
            ids: ids.to_vec(),
            trained: trained.to_vec(),
            trained_bytes,
            truncated: false,
        }
    }

    #[test]
    fn targets_are_the_next_tokens_and_padding_is_never_one() {
        let long = sample(&[5, 6, 7, 8], &[false, false, true, true], 9);
        let short = sample(&[3, 4], &[false, true], 2);
        let batch = collate(&[&long, &short], 2);
        let expected = Batch {
            input_ids: vec![5, 6, 7, 8, 3, 4, 2, 2],
            targets: vec![-100, 7, 8, -100, 4, -100, -100, -100],
            rows: 2,
            cols: 4,
            lengths: vec![4, 2],
            starts: vec![vec![0], vec![0]],
            trained_tokens: 3,
            trained_bytes: 11,
        };
        assert_eq!(batch, expected);
    }

    #[test]
    fn a_first_token_is_never_a_target_of_the_row_above() {
        let (above, below) = (
            sample(&[1, 2], &[false, false], 0),
            sample(&[3, 4], &[true, true], 0),
        );
        assert_eq!(collate(&[&above, &below], 0).targets, [-100, -100, 4, -100]);
    }

    #[test]
    fn packed_samples_follow_each_other_and_predict_nothing_across() {
        let long = sample(&[5, 6, 7], &[false, true, true], 2);
        let short = sample(&[3, 4], &[true, true], 1);
        let batch = collate_rows(&[&[&short, &long], &[&long]], 0);
        assert_eq!(batch.input_ids, [3, 4, 5, 6, 7, 5, 6, 7, 0, 0]);
        let expected = [4, -100, 6, 7, -100, 6, 7, -100, -100, -100];
        assert_eq!(batch.targets, expected);
        assert_eq!(batch.starts, [vec![0, 2], vec![0]]);
        assert_eq!(
            (batch.lengths.as_slice(), batch.trained_bytes),
            (&[5, 3][..], 5)
        );
        assert!(batch.is_packed() && !collate(&[&long], 0).is_packed());
    }

    #[test]
    fn no_samples_make_an_empty_batch() {
        let batch = collate(&[], 0);
        assert_eq!((batch.rows, batch.cols, batch.trained_tokens), (0, 0, 0));
    }
}
