//! The rows of a file in tokens, one after another, with a bounded part of the file in memory.

use crate::columns::Columns;
use crate::error::{Error, Result};
use crate::file::{RowText, UnreadColumn, parse_line};
use crate::notes::RowNotes;
use crate::row::{Limits, Row, row_keys};
use crate::sample::Sample;
use crate::table::Table;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::collections::BTreeMap;
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

/// How files are read.
#[derive(Clone, Copy)]
pub struct ReadOptions<'a> {
    /// May be `None` if all rows are `input_ids`.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The longest sample, in tokens.
    pub max_length: usize,
    /// The model's vocabulary size.
    pub vocab_size: usize,
    /// The accepted rows.
    pub filter: RowFilter,
    /// The columns that are called otherwise than the keys of rows.
    pub columns: &'a Columns,
    /// The folder of the token cache.
    pub cache: Option<&'a Path>,
    /// Receives how many bytes are tokenized, and how many there are. Not called for cached files.
    pub progress: &'a dyn Fn(u64, u64),
}

impl std::fmt::Debug for ReadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadOptions")
            .field("max_length", &self.max_length)
            .field("vocab_size", &self.vocab_size)
            .field("columns", &self.columns)
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

/// Unread keys, each with the number of rows that have it.
pub(crate) type IgnoredKeys = BTreeMap<String, usize>;

/// Adds unread keys, up to a number that a person would look at: a file may have a new key in every row.
pub(crate) fn note_ignored(
    names: &mut IgnoredKeys,
    more: impl IntoIterator<Item = (String, usize)>,
) {
    const MAX_IGNORED_KEYS: usize = 32;
    for (name, rows) in more {
        if let Some(known) = names.get_mut(&name) {
            *known += rows;
        } else if names.len() < MAX_IGNORED_KEYS {
            names.insert(name, rows);
        }
    }
}

/// How rows become samples.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowReader<'a> {
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    pub(crate) limits: Limits,
    pub(crate) filter: RowFilter,
    pub(crate) columns: &'a Columns,
}

/// A row in tokens.
#[derive(Debug)]
pub(crate) struct RowSamples {
    /// The row itself.
    pub(crate) text: RowText,
    pub(crate) samples: Vec<Sample>,
    /// Unread keys.
    pub(crate) ignored: Vec<String>,
    /// What of the row is not as it is written.
    pub(crate) notes: RowNotes,
}

/// A row's samples, its unread keys, and what of it is not as it is written.
type ReadRow = (Vec<Sample>, Vec<String>, RowNotes);

impl<'a> RowReader<'a> {
    /// # Errors
    /// If `max_length` is less than 2.
    pub(crate) fn new(options: &ReadOptions<'a>) -> Result<Self> {
        if options.max_length < 2 {
            return Err(Error::MaxLength(options.max_length));
        }
        let limits = Limits {
            max_length: options.max_length,
            // Batches hold ids as `i32`.
            vocab_size: options.vocab_size.min(i32::MAX as usize),
        };
        Ok(Self {
            tokenizer: options.tokenizer,
            limits,
            filter: options.filter,
            columns: options.columns,
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
        let mut lines = Table::open(path)?;
        let unread = self.unread_columns(path, lines.unread_columns())?;
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
            let read = |line: &RowText| {
                let row = self.row(&line.text);
                row.map_err(|problem| problem.at(path, line.place))
            };
            // Collected before errors are checked, so that the first in the file is reported.
            let rows: Vec<Result<ReadRow>> = chunk.par_iter().map(read).collect();
            for (text, row) in chunk.into_iter().zip(rows) {
                let (samples, mut ignored, notes) = row?;
                ignored.extend(unread.iter().cloned());
                take(RowSamples {
                    text,
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

    /// The names of columns that rows lack because their type has no form in JSON.
    ///
    /// # Errors
    /// If a row would read one of them.
    fn unread_columns(&self, path: &Path, columns: &[UnreadColumn]) -> Result<Vec<String>> {
        for column in columns {
            let outer = |name: &str| {
                name == column.name || name.split('.').next() == Some(column.name.as_str())
            };
            if row_keys().any(|key| key == column.name) || self.columns.names().any(outer) {
                let UnreadColumn { name, found } = column;
                let problem =
                    format!("expected text, numbers or lists in column `{name}`, found {found}");
                return Err(Error::malformed(path, problem));
            }
        }
        Ok(columns.iter().map(|column| column.name.clone()).collect())
    }

    /// One line's samples, its unread keys, and what of it is not as it is written.
    pub(crate) fn row(&self, line: &str) -> Result<ReadRow> {
        let mut value = parse_line(line)?;
        let renamed = value.as_object_mut().map(|row| self.columns.rename(row));
        let mut ignored = renamed.transpose()?.unwrap_or_default();
        let named: Vec<&str> = self.columns.keys().collect();
        let (row, unread) = Row::parse(value, &named)?;
        ignored.extend(unread);
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
