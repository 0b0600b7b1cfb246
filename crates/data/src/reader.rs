//! The rows of a file in tokens, one after another, with a bounded part of the file in memory.

use crate::error::{Error, Result};
use crate::file::{JsonLine, JsonLines, parse_line};
use crate::notes::RowNotes;
use crate::row::{Limits, Row};
use crate::sample::Sample;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;

/// Bytes of a file that are tokenized at once, on all threads.
const TOKENIZED_CHUNK_BYTES: usize = 4 << 20;

/// The rows that a caller accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowFilter {
    /// Rows of one sample, or several: not preferences.
    Samples,
    /// Preference rows: two samples each, the chosen one first.
    Pairs,
    /// All rows.
    Any,
}

/// Adds a row's unread keys to the names, up to a number that a person would look at: a file may have a new key in every row.
pub(crate) fn note_ignored(names: &mut BTreeSet<String>, row: impl IntoIterator<Item = String>) {
    const MAX_IGNORED_KEYS: usize = 32;
    for name in row {
        if names.len() < MAX_IGNORED_KEYS {
            names.insert(name);
        }
    }
}

/// How rows become samples.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowReader<'a> {
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    pub(crate) limits: Limits,
    pub(crate) filter: RowFilter,
}

/// A row in tokens.
#[derive(Debug)]
pub(crate) struct RowSamples {
    /// The offset of its line.
    pub(crate) offset: u64,
    /// The offset of the line's end.
    pub(crate) end: u64,
    pub(crate) samples: Vec<Sample>,
    /// Unread keys.
    pub(crate) ignored: Vec<String>,
    /// What of the row is not as it is written.
    pub(crate) notes: RowNotes,
}

impl<'a> RowReader<'a> {
    /// # Errors
    /// If `max_length` is less than 2.
    pub(crate) fn new(
        tokenizer: Option<&'a Tokenizer>,
        max_length: usize,
        vocab_size: usize,
        filter: RowFilter,
    ) -> Result<Self> {
        if max_length < 2 {
            return Err(Error::MaxLength(max_length));
        }
        let limits = Limits {
            max_length,
            // Batches hold ids as `i32`.
            vocab_size: vocab_size.min(i32::MAX as usize),
        };
        Ok(Self {
            tokenizer,
            limits,
            filter,
        })
    }

    /// Passes every row of a file to `take`, in order.
    ///
    /// # Errors
    /// If the file cannot be read, a row is malformed (the first in the file is named), or `take` fails.
    pub(crate) fn read(
        &self,
        path: &Path,
        mut take: impl FnMut(RowSamples) -> Result<()>,
    ) -> Result<()> {
        let mut lines = JsonLines::open(path)?;
        loop {
            let (mut chunk, mut bytes, mut failed) = (Vec::new(), 0, None);
            while bytes < TOKENIZED_CHUNK_BYTES && failed.is_none() {
                match lines.next() {
                    Some(Ok(line)) => {
                        bytes += line.text.len();
                        chunk.push(line);
                    }
                    Some(Err(problem)) => failed = Some(problem),
                    None => break,
                }
            }
            let is_last = chunk.is_empty() || bytes < TOKENIZED_CHUNK_BYTES;
            let read = |line: &JsonLine| {
                let row = self.row(&line.text);
                row.map_err(|problem| problem.at(path, line.number))
            };
            // Collected before errors are checked, so that the first in the file is reported.
            let rows: Vec<Result<(Vec<Sample>, Vec<String>, RowNotes)>> =
                chunk.par_iter().map(read).collect();
            for (line, row) in chunk.iter().zip(rows) {
                let (samples, ignored, notes) = row?;
                take(RowSamples {
                    offset: line.offset,
                    end: line.end,
                    samples,
                    ignored,
                    notes,
                })?;
            }
            match failed {
                Some(problem) => return Err(problem),
                None if is_last => return Ok(()),
                None => {}
            }
        }
    }

    /// One line's samples, its unread keys, and what of it is not as it is written.
    pub(crate) fn row(&self, line: &str) -> Result<(Vec<Sample>, Vec<String>, RowNotes)> {
        let (row, ignored) = Row::parse(parse_line(line)?)?;
        self.filter.check(&row)?;
        let mut notes = RowNotes::new();
        let samples = row.samples(self.tokenizer, self.limits, &mut notes)?;
        Ok((samples, ignored, notes))
    }
}

impl RowFilter {
    fn check(self, row: &Row) -> Result<()> {
        match (self, row) {
            (Self::Samples, Row::Pair(_)) => Err(Error::schema(
                "a row of another kind",
                "a preference row {chosen, rejected}, which `train.loss = \"dpo\"` learns from",
            )),
            (Self::Pairs, row) if !matches!(row, Row::Pair(_)) => Err(Error::schema(
                "a preference row {chosen, rejected, prompt?}",
                "another kind of row",
            )),
            _ => Ok(()),
        }
    }
}
