//! The limits of one rendering: a template is a program of strangers.

use super::{Error, Result};
use std::cell::Cell;

/// Steps of one rendering: a chat of ten thousand messages needs about a million, and an endless loop stops within seconds.
const MAX_STEPS: u64 = 20_000_000;
/// The longest text. A row has at most 16 MiB.
pub(crate) const MAX_TEXT_BYTES: usize = 64 << 20;
/// All texts of one rendering together.
const MAX_TOTAL_BYTES: u64 = 512 << 20;
/// Elements of a list that are copied in the time of one step.
const COPIES_PER_STEP: usize = 8;
/// The deepest nesting of statements, expressions and macros while a template runs; each level takes a part of the stack.
const MAX_RUNNING_DEPTH: usize = 160;

#[derive(Debug, Default)]
pub(crate) struct Budget {
    steps: Cell<u64>,
    bytes: Cell<u64>,
    depth: Cell<usize>,
}

impl Budget {
    /// Counts a step.
    pub(crate) fn step(&self) -> Result<()> {
        self.steps(1)
    }

    fn steps(&self, more: u64) -> Result<()> {
        let steps = self.steps.get() + more;
        self.steps.set(steps);
        match steps > MAX_STEPS {
            true => Err(Error::new(format!("takes more than {MAX_STEPS} steps"))),
            false => Ok(()),
        }
    }

    /// Counts the copying of elements.
    pub(crate) fn copy(&self, elements: usize) -> Result<()> {
        self.steps((elements / COPIES_PER_STEP) as u64)
    }

    /// Counts a text before it is made.
    pub(crate) fn text(&self, bytes: usize) -> Result<()> {
        let total = self.bytes.get() + bytes as u64;
        self.bytes.set(total);
        match bytes > MAX_TEXT_BYTES || total > MAX_TOTAL_BYTES {
            true => Err(Error::new("makes too much text")),
            false => Ok(()),
        }
    }

    /// Runs a part one level deeper.
    pub(crate) fn deeper(&self) -> Result<()> {
        self.depth.set(self.depth.get() + 1);
        match self.depth.get() > MAX_RUNNING_DEPTH {
            true => Err(Error::new("calls itself too deeply")),
            false => Ok(()),
        }
    }

    pub(crate) fn shallower(&self) {
        self.depth.set(self.depth.get().saturating_sub(1));
    }
}
