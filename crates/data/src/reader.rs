//! The rows of a file in tokens, one after the other, with a bounded part of the file in memory.

use crate::error::{Error, Result};
use crate::file::{Line, Lines, parse_line};
use crate::row::{Limits, Row};
use crate::sample::Sample;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;

/// As much of a file as is tokenized at once, on all threads.
const CHUNK_BYTES: usize = 4 << 20;

/// Which rows a caller can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Rows to learn from alone.
    Samples,
    /// Preference rows: each gives two samples, the chosen one first.
    Pairs,
    /// All.
    Any,
}

/// Names of keys that nothing reads, as many as a person would look at: a file may have a new one in every row.
pub(crate) fn note_ignored(names: &mut BTreeSet<String>, row: Vec<String>) {
    const MOST: usize = 32;
    for name in row {
        if names.len() < MOST {
            names.insert(name);
        }
    }
}

/// How rows become samples.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    pub(crate) limits: Limits,
    pub(crate) wanted: Wanted,
}

/// A row in tokens.
#[derive(Debug)]
pub(crate) struct RowSamples {
    /// Where its line begins in the file.
    pub(crate) offset: u64,
    /// Where the line ends.
    pub(crate) end: u64,
    pub(crate) samples: Vec<Sample>,
    /// Keys that nothing reads.
    pub(crate) ignored: Vec<String>,
}

impl<'a> Reader<'a> {
    /// # Errors
    /// If `max_length` is less than 2.
    pub(crate) fn new(
        tokenizer: Option<&'a Tokenizer>,
        max_length: usize,
        vocab_size: usize,
        wanted: Wanted,
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
            wanted,
        })
    }

    /// Hands over every row of a file in order.
    ///
    /// # Errors
    /// If the file cannot be read or a row is malformed (the first in the file is named), or what
    /// `take` returns.
    pub(crate) fn read(
        &self,
        path: &Path,
        mut take: impl FnMut(RowSamples) -> Result<()>,
    ) -> Result<()> {
        let mut lines = Lines::open(path)?;
        loop {
            let (mut chunk, mut bytes, mut failed) = (Vec::new(), 0, None);
            while bytes < CHUNK_BYTES && failed.is_none() {
                match lines.next() {
                    Some(Ok(line)) => {
                        bytes += line.text.len();
                        chunk.push(line);
                    }
                    Some(Err(problem)) => failed = Some(problem),
                    None => break,
                }
            }
            let is_last = chunk.is_empty() || bytes < CHUNK_BYTES;
            let read = |line: &Line| {
                let row = self.row(&line.text);
                row.map_err(|problem| problem.at(path, line.number))
            };
            // Collected before errors are looked at, so that the first in the file is the one reported.
            let rows: Vec<Result<(Vec<Sample>, Vec<String>)>> =
                chunk.par_iter().map(read).collect();
            for (line, row) in chunk.iter().zip(rows) {
                let (samples, ignored) = row?;
                take(RowSamples {
                    offset: line.offset,
                    end: line.end,
                    samples,
                    ignored,
                })?;
            }
            match failed {
                Some(problem) => return Err(problem),
                None if is_last => return Ok(()),
                None => {}
            }
        }
    }

    /// One line's samples, and the keys that nothing reads.
    pub(crate) fn row(&self, line: &str) -> Result<(Vec<Sample>, Vec<String>)> {
        let (row, ignored) = Row::parse(parse_line(line)?)?;
        self.wanted.check(&row)?;
        Ok((row.samples(self.tokenizer, self.limits)?, ignored))
    }
}

impl Wanted {
    fn check(self, row: &Row) -> Result<()> {
        match (self, row) {
            (Self::Samples, Row::Pair(_)) => Err(Error::schema(
                "a row to learn from alone",
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
