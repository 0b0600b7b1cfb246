//! Samples side by side, in the shape a model takes.

use crate::sample::Sample;

/// What a target position holds when nothing is to be predicted there: PyTorch's `ignore_index`.
pub const IGNORE: i32 = -100;

/// A rectangle of tokens and the targets they are to predict.
///
/// # Shapes
/// `input_ids` and `targets` are `[rows, cols]`, row-major; `cols` is the longest sample's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Tokens, padded on the right.
    pub input_ids: Vec<i32>,
    /// The token after the one in the same place of `input_ids` if it is trained, else [`IGNORE`].
    /// So the last of a row is always [`IGNORE`].
    pub targets: Vec<i32>,
    /// How many samples.
    pub rows: usize,
    /// Length of the longest.
    pub cols: usize,
    /// Length of each sample without its padding, `[rows]`.
    pub lengths: Vec<usize>,
    /// How many targets there are. Zero is possible: check before dividing by it.
    pub trained_tokens: usize,
    /// UTF-8 bytes of text that the targets stand for.
    pub trained_bytes: usize,
}

/// Puts samples side by side.
///
/// # Panics
/// If a token id is beyond `i32`, or a sample has not one mark per token. Samples that this crate
/// reads are checked.
pub fn collate(samples: &[&Sample], pad_id: u32) -> Batch {
    let as_i32 = |id: u32| {
        i32::try_from(id).expect("token ids are below the vocabulary size, which fits i32")
    };
    let rows = samples.len();
    let cols = samples
        .iter()
        .map(|sample| sample.ids.len())
        .max()
        .unwrap_or(0);
    let mut input_ids = vec![as_i32(pad_id); rows * cols];
    let mut targets = vec![IGNORE; rows * cols];
    for (row, sample) in samples.iter().enumerate() {
        assert_eq!(
            sample.ids.len(),
            sample.trained.len(),
            "a sample has one mark per token"
        );
        for (col, (&id, &trained)) in sample.ids.iter().zip(&sample.trained).enumerate() {
            let position = row * cols + col;
            input_ids[position] = as_i32(id);
            if trained && col > 0 {
                targets[position - 1] = as_i32(id);
            }
        }
    }
    Batch {
        trained_tokens: targets.iter().filter(|&&target| target != IGNORE).count(),
        trained_bytes: samples.iter().map(|sample| sample.trained_bytes).sum(),
        lengths: samples.iter().map(|sample| sample.ids.len()).collect(),
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
    fn no_samples_make_an_empty_batch() {
        let batch = collate(&[], 0);
        assert_eq!((batch.rows, batch.cols, batch.trained_tokens), (0, 0, 0));
    }
}
