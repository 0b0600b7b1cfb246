//! What is known of samples without their tokens: the place and length of each, and counts over a file.

use crate::sample::Sample;
use serde::{Deserialize, Serialize};

/// The place of a sample, and what is known without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SampleEntry {
    /// The offset of its tokens in the cache, or else of its row in the file.
    pub(crate) offset: u64,
    /// The fingerprint of its tokens and marks.
    pub(crate) fingerprint: u64,
    pub(crate) tokens: u32,
    pub(crate) trained_tokens: u32,
    pub(crate) trained_bytes: u32,
    /// Its number among the samples of its row.
    pub(crate) piece: u32,
    pub(crate) truncated: bool,
}

/// Counts over the rows of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// Rows without blank lines.
    pub rows: usize,
    /// Tokens of all samples; a token shared by two pieces of a long text counts twice.
    pub tokens: usize,
    /// Tokens that are targets.
    pub trained_tokens: usize,
    /// UTF-8 bytes of the targets' text.
    pub trained_bytes: usize,
    /// Rows that lost tokens to the maximum length.
    pub truncated_rows: usize,
    /// Samples without a target.
    pub untrained_samples: usize,
}

impl SampleEntry {
    /// The entry of a sample at `offset`.
    pub(crate) fn of(sample: &Sample, offset: u64) -> Self {
        // A row has at most 2²⁴ bytes.
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            offset,
            fingerprint: sample.fingerprint(),
            tokens: number(sample.ids.len()),
            trained_tokens: number(sample.trained_tokens()),
            trained_bytes: number(sample.trained_bytes),
            piece: 0,
            truncated: sample.truncated,
        }
    }
}

impl Counts {
    /// Adds a row.
    pub(crate) fn add_row(&mut self, samples: &[Sample]) {
        let count = |holds: fn(&&Sample) -> bool| samples.iter().filter(holds).count();
        self.add(Self {
            rows: 1,
            tokens: samples.iter().map(|sample| sample.ids.len()).sum(),
            trained_tokens: samples.iter().map(Sample::trained_tokens).sum(),
            trained_bytes: samples.iter().map(|sample| sample.trained_bytes).sum(),
            truncated_rows: count(|sample| sample.truncated),
            untrained_samples: count(|sample| sample.trained_tokens() == 0),
        });
    }

    /// Counts the tokens of these samples alone. Rows, and samples without a target, stay counted.
    pub(crate) fn recount(&mut self, samples: &[SampleEntry]) {
        let sum =
            |of: fn(&SampleEntry) -> u32| samples.iter().map(|sample| of(sample) as usize).sum();
        self.tokens = sum(|sample| sample.tokens);
        self.trained_tokens = sum(|sample| sample.trained_tokens);
        self.trained_bytes = sum(|sample| sample.trained_bytes);
    }

    /// Adds the counts of another file.
    pub(crate) fn add(&mut self, more: Self) {
        self.rows += more.rows;
        self.tokens += more.tokens;
        self.trained_tokens += more.trained_tokens;
        self.trained_bytes += more.trained_bytes;
        self.truncated_rows += more.truncated_rows;
        self.untrained_samples += more.untrained_samples;
    }
}
