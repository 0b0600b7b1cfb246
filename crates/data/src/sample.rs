//! One sequence of tokens, with a mark on each token that the model learns to predict.

use crate::error::Result;
use crate::tokenizer::{Encoded, Special, Tokenizer};
use sha2::{Digest, Sha256};
use std::ops::Range;

/// One sequence, no longer than the maximum length.
///
/// `trained[0]` is always false: the first token has no predecessor to be predicted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether token `i` is a target; as long as `ids`.
    pub trained: Vec<bool>,
    /// UTF-8 bytes of the targets' text. Special tokens have none, and neither have rows of `input_ids`.
    pub trained_bytes: usize,
    /// Whether tokens were cut off because of the maximum length.
    pub truncated: bool,
}

impl Sample {
    /// How many tokens are targets.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }

    /// A hash of its tokens and marks.
    pub(crate) fn fingerprint(&self) -> u64 {
        let words = self.ids.iter().zip(&self.trained);
        let mut hash = Sha256::new();
        words.for_each(|(&id, &trained)| hash.update(word(id, trained).to_le_bytes()));
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        u64::from_le_bytes(first)
    }

    /// The sample for people: runs of text, and whether each is trained. A run that begins or ends inside a character shows
    /// `U+FFFD` there.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn spans(&self, tokenizer: &Tokenizer) -> Result<Vec<(String, bool)>> {
        let mut spans = Vec::new();
        let mut start = 0;
        for run in self.trained.chunk_by(|a, b| a == b) {
            let ids = self.ids.get(start..start + run.len()).unwrap_or_default();
            spans.push((tokenizer.decode(ids, Special::Keep)?, run[0]));
            start += run.len();
        }
        Ok(spans)
    }
}

/// The bit that marks a trained token in a word.
const TRAINED: u32 = 1 << 31;

/// A token and its mark in one word, as the token cache stores it.
pub(crate) fn word(id: u32, trained: bool) -> u32 {
    if trained { id | TRAINED } else { id }
}

/// The token and the mark of a [`word`].
pub(crate) fn id_and_mark(word: u32) -> (u32, bool) {
    (word & !TRAINED, word & TRAINED != 0)
}

/// A whole row in tokens, before it is truncated.
#[derive(Debug, Default)]
pub(crate) struct MarkedTokens {
    pub(crate) ids: Vec<u32>,
    pub(crate) trained: Vec<bool>,
    /// Bytes of text that each token adds to those before it.
    pub(crate) text_bytes: Vec<usize>,
}

impl MarkedTokens {
    /// Marks every token that touches a trained span of the text.
    ///
    /// A token may straddle the beginning of a span (`": "` + `"yes"` has a token `" yes"`); it is trained, because the span
    /// cannot be written without it.
    pub(crate) fn new(encoded: Encoded, spans: &[Range<usize>], tokenizer: &Tokenizer) -> Self {
        let mut covered = 0;
        let mut marked = Self {
            ids: encoded.ids,
            ..Self::default()
        };
        for (range, &id) in encoded.ranges.iter().zip(&marked.ids) {
            let touches = |span: &Range<usize>| range.start < span.end && range.end > span.start;
            marked.trained.push(spans.iter().any(touches));
            let new_bytes = range.end.saturating_sub(covered.max(range.start));
            marked.text_bytes.push(if tokenizer.is_special(id) {
                0
            } else {
                new_bytes
            });
            covered = covered.max(range.end);
        }
        marked
    }

    /// Appends a trained end token, unless the row already ends with one.
    pub(crate) fn end_with(&mut self, eos_id: Option<u32>) {
        if let Some(id) = eos_id
            && self.ids.last() != Some(&id)
        {
            self.ids.push(id);
            self.trained.push(true);
            self.text_bytes.push(0);
        }
    }

    /// The first `max_length` tokens.
    pub(crate) fn truncate(&self, max_length: usize) -> Sample {
        self.slice(0..self.ids.len().min(max_length))
    }

    /// The last `max_length` tokens, and a BOS if there is one.
    pub(crate) fn last(&self, max_length: usize, bos_id: Option<u32>) -> Sample {
        let excess = self.ids.len().saturating_sub(max_length);
        let mut sample = self.slice(excess..self.ids.len());
        let first = self.ids.first().copied();
        if excess > 0
            && first == bos_id
            && let (Some(bos), Some(slot)) = (first, sample.ids.first_mut())
        {
            *slot = bos;
        }
        sample
    }

    /// Consecutive pieces of at most `max_length` tokens. Each begins with the last token of the previous piece, so that every
    /// token except the row's first is a target exactly once.
    pub(crate) fn chunks(&self, max_length: usize) -> Vec<Sample> {
        let step = max_length.saturating_sub(1).max(1);
        let last = self.ids.len().saturating_sub(1).max(1);
        let cut = |start: usize| {
            let end = (start + step + 1).min(self.ids.len());
            Sample {
                truncated: false,
                ..self.slice(start..end)
            }
        };
        (0..last).step_by(step).map(cut).collect()
    }

    fn slice(&self, range: Range<usize>) -> Sample {
        let truncated = range.len() < self.ids.len();
        let mut trained = self.trained[range.clone()].to_vec();
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let bytes = self.text_bytes[range.clone()].iter().zip(&trained);
        let trained_bytes = bytes
            .filter(|&(_, &trained)| trained)
            .map(|(bytes, _)| bytes)
            .sum();
        Sample {
            ids: self.ids[range].to_vec(),
            trained,
            trained_bytes,
            truncated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Bos;
    use crate::tokenizer::tests::tokenizer;

    fn counted(n: u32) -> MarkedTokens {
        MarkedTokens {
            ids: (0..n).collect(),
            trained: vec![true; n as usize],
            text_bytes: vec![1; n as usize],
        }
    }

    #[test]
    fn every_token_of_a_long_text_is_a_target_once() {
        for (n, max_length) in [
            (1, 4),
            (2, 4),
            (4, 4),
            (5, 4),
            (7, 4),
            (8, 4),
            (100, 7),
            (9, 2),
        ] {
            let chunks = counted(n).chunks(max_length);
            let targets = |chunk: &Sample| -> Vec<u32> {
                chunk
                    .ids
                    .iter()
                    .zip(&chunk.trained)
                    .filter(|&(_, &t)| t)
                    .map(|(&id, _)| id)
                    .collect()
            };
            let all: Vec<u32> = chunks.iter().flat_map(targets).collect();
            assert_eq!(
                all,
                (1..n).collect::<Vec<_>>(),
                "{n} tokens in pieces of {max_length}"
            );
            assert!(
                chunks
                    .iter()
                    .all(|chunk| chunk.ids.len() <= max_length && !chunk.truncated)
            );
            assert_eq!(
                chunks
                    .iter()
                    .map(|chunk| chunk.trained_bytes)
                    .sum::<usize>(),
                n as usize - 1
            );
        }
    }

    #[test]
    fn truncation_is_noted_and_counts_only_the_rest() {
        let short = counted(5).truncate(3);
        assert_eq!(
            (short.ids, short.trained_bytes, short.truncated),
            (vec![0, 1, 2], 2, true)
        );
        assert!(!counted(5).truncate(5).truncated);
        let end = counted(5).last(3, Some(0));
        assert_eq!(
            (end.ids, end.trained, end.truncated),
            (vec![0, 3, 4], vec![false, true, true], true)
        );
        assert_eq!(counted(5).last(3, None).ids, [2, 3, 4]);
    }

    #[test]
    fn bytes_of_characters_in_several_tokens_count_once_and_special_tokens_not_at_all() {
        let tokenizer = tokenizer(None, true);
        let text = "<｜begin▁of▁sentence｜>x🚀é<｜end▁of▁sentence｜>";
        let encoded = tokenizer.encode_with_ranges(text, Bos::Never).unwrap();
        let sample = MarkedTokens::new(encoded, std::slice::from_ref(&(0..text.len())), &tokenizer)
            .truncate(99);
        assert!(sample.ids.len() > 6);
        assert_eq!(sample.trained_bytes, "x🚀é".len());
        let spans = sample.spans(&tokenizer).unwrap();
        let expected = [
            ("<｜begin▁of▁sentence｜>", false),
            ("x🚀é<｜end▁of▁sentence｜>", true),
        ];
        assert_eq!(
            spans,
            expected.map(|(text, trained)| (text.to_owned(), trained))
        );
    }
}
