//! A whole JSON-lines file as samples.

use crate::error::{Error, Result};
use crate::file::{parse_line, read_lines};
use crate::row::{Limits, Row};
use crate::sample::Sample;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::path::Path;

/// One file of a data folder (`train.jsonl`, `valid.jsonl`, `test.jsonl`), in memory.
#[derive(Clone, Debug)]
pub struct Split {
    /// The samples in the order of the file. Long `text` rows give several.
    pub samples: Vec<Sample>,
    /// What was read, and what was lost.
    pub counts: Counts,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows, blank lines not counted.
    pub rows: usize,
    /// Tokens of all samples; a token on which a long text is cut counts in both pieces.
    pub tokens: usize,
    /// Tokens that are targets.
    pub trained_tokens: usize,
    /// UTF-8 bytes of text that the targets stand for.
    pub trained_bytes: usize,
    /// Rows that lost tokens to the maximum length.
    pub truncated_rows: usize,
    /// Samples without a single target. They are kept, so that another program's batches can be
    /// replayed.
    pub untrained_samples: usize,
}

impl Split {
    /// Reads a file.
    ///
    /// Each line is one JSON object, and its keys say what it is:
    ///
    /// | row | tokens | trained |
    /// |---|---|---|
    /// | `text` | the text and EOS; if too long, consecutive pieces that share one token | all |
    /// | `prompt`, `completion` (strings) | both joined, and EOS | completion and EOS |
    /// | `prompt` (messages), `completion` (messages or string) | the chat template's | the assistant's turns of the completion, with their end token |
    /// | `messages`, optional `tools` | the chat template's | all turns of the assistant, with their end token |
    /// | `input_ids`, optional `labels` | as given | where `labels` (in the place of the token, as in Hugging Face) is not −100 |
    ///
    /// A BOS is put before `text` and `prompt` strings if the model was trained with one; the first
    /// token of a sample is never trained. Rows other than `text` are truncated at the right.
    ///
    /// `tokenizer` may be `None` if all rows are `input_ids`. `vocab_size` is the model's.
    ///
    /// # Errors
    /// If the file cannot be read, a row is malformed (the first in the file is named), a token id
    /// is not below `vocab_size`, `max_length` is less than 2, or no token is trained.
    pub fn open(
        path: &Path,
        tokenizer: Option<&Tokenizer>,
        max_length: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        if max_length < 2 {
            return Err(Error::MaxLength(max_length));
        }
        // Batches hold ids as `i32`.
        let limits = Limits {
            max_length,
            vocab_size: vocab_size.min(i32::MAX as usize),
        };
        let lines = read_lines(path)?;
        let read = |(number, line): &(usize, String)| {
            let row = parse_line(line).and_then(Row::parse);
            row.and_then(|row| row.samples(tokenizer, limits))
                .map_err(|problem| problem.at(path, *number))
        };
        // Collected before errors are looked at, so that the first in the file is the one reported.
        let rows: Vec<Result<Vec<Sample>>> = lines.par_iter().map(read).collect();
        let rows = rows.into_iter().collect::<Result<Vec<_>>>()?;

        let counts = Counts::of(&rows);
        if counts.trained_tokens == 0 {
            return Err(Error::NothingTrained {
                path: path.to_path_buf(),
                rows: counts.rows,
            });
        }
        Ok(Self {
            samples: rows.into_iter().flatten().collect(),
            counts,
        })
    }
}

impl Counts {
    fn of(rows: &[Vec<Sample>]) -> Self {
        let samples = || rows.iter().flatten();
        Self {
            rows: rows.len(),
            tokens: samples().map(|sample| sample.ids.len()).sum(),
            trained_tokens: samples().map(Sample::trained_tokens).sum(),
            trained_bytes: samples().map(|sample| sample.trained_bytes).sum(),
            truncated_rows: samples().filter(|sample| sample.truncated).count(),
            untrained_samples: samples()
                .filter(|sample| sample.trained_tokens() == 0)
                .count(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::tokenizer;

    fn open(text: &str, max_length: usize) -> Result<Split, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        std::fs::write(&path, text).unwrap();
        let place = folder.path().display().to_string();
        let split = Split::open(&path, Some(&tokenizer(None, true)), max_length, 288);
        split.map_err(|problem| problem.to_string().replace(&place, "DIR"))
    }

    #[test]
    fn rows_keep_their_order_and_are_counted() {
        let text = "{\"text\": \"qzxj\"}\n\n{\"input_ids\": [9, 8, 7, 6, 5], \"labels\": [-100, -100, -100, -100, 5]}\n\
                    {\"prompt\": \"é\", \"completion\": \"w\"}\n";
        let split = open(text, 4).unwrap();
        let ids: Vec<usize> = split
            .samples
            .iter()
            .map(|sample| sample.ids.len())
            .collect();
        assert_eq!(ids, [4, 3, 4, 4]);
        let expected = Counts {
            rows: 3,
            tokens: 15,
            trained_tokens: 6,
            trained_bytes: 5,
            truncated_rows: 2,
            untrained_samples: 1,
        };
        assert_eq!(split.counts, expected);
    }

    #[test]
    fn the_first_bad_line_is_named() {
        let rows = "{\"text\": \"a\"}\n\n{\"txt\": \"a\"}\nnonsense\n";
        let problem = open(rows, 8).unwrap_err();
        assert!(
            problem.starts_with("DIR/train.jsonl:3: expected one of the rows {text}, "),
            "{problem}"
        );
        assert!(problem.ends_with("found the keys {txt}"), "{problem}");
    }

    #[test]
    fn a_file_that_trains_nothing_is_refused() {
        let nothing = "DIR/train.jsonl: no token to train on in ";
        assert_eq!(open("", 8).unwrap_err(), format!("{nothing}0 rows"));
        let masked = "{\"input_ids\": [5, 6], \"labels\": [5, -100]}";
        assert_eq!(open(masked, 8).unwrap_err(), format!("{nothing}1 rows"));
        assert!(
            open("{\"text\": \"a\"}", 1)
                .unwrap_err()
                .contains("at least 2 tokens, found 1")
        );
    }
}
