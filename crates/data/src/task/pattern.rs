//! Regular expressions in task files.

use std::ops::ControlFlow;

use super::keys::Setting;
use crate::jinja::PythonRegex;
use crate::{Error, Result};

/// A pattern in Python's dialect.
#[derive(Clone, Debug)]
pub struct Pattern {
    regex: PythonRegex,
}

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// In words: if it is none.
    pub fn new(pattern: &str) -> std::result::Result<Self, String> {
        let regex = PythonRegex::new(pattern)?;
        Ok(Self { regex })
    }

    pub(super) fn read(of: &Setting) -> Result<Self> {
        let pattern = of.text()?;
        Self::new(&pattern).map_err(|problem| of.error("a regular expression", problem))
    }

    /// What the harness looks for unless a task says otherwise.
    pub(super) fn usual() -> Result<Self> {
        Self::new(r"#### (\-?[0-9\.\,]+)").map_err(|problem| Error::schema("a pattern", problem))
    }

    /// `re.findall`: for each match its groups, or if it has none, all of it. Groups without a match are empty.
    ///
    /// # Errors
    /// In words: if the match takes too many steps.
    pub fn find_all(&self, text: &str) -> std::result::Result<Vec<Vec<String>>, String> {
        let mut found = Vec::new();
        self.regex.each_match(text, |captures| {
            let first = usize::from(captures.len() > 1);
            let group = |at: usize| captures.get(at).map_or("", |group| group.as_str());
            let groups = first..captures.len();
            found.push(groups.map(|at| group(at).to_owned()).collect());
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// `re.sub` with an empty text.
    ///
    /// # Errors
    /// As [`Self::find_all`].
    pub fn remove_from(&self, text: &str) -> std::result::Result<String, String> {
        self.regex.replace(text, "", 0)
    }
}
