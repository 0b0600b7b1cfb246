//! Regular expressions as Python writes them.

use std::sync::Arc;

use fancy_regex::Regex;

use super::keys::Setting;
use crate::{Error, Result};

/// Steps back that a match may take. A pattern that takes more is one that explodes.
const BACKTRACKS: usize = 1_000_000;

/// A pattern.
#[derive(Clone, Debug)]
pub struct Pattern {
    regex: Arc<Regex>,
}

impl Pattern {
    /// Compiles a pattern in Python's dialect.
    ///
    /// # Errors
    /// In words: if it is none.
    pub fn new(pattern: &str) -> std::result::Result<Self, String> {
        // Python's end of the text is what is `\z` elsewhere.
        let pattern = pattern.replace(r"\Z", r"\z");
        let mut builder = fancy_regex::RegexBuilder::new(&pattern);
        let regex = builder.backtrack_limit(BACKTRACKS).build();
        let regex = regex.map_err(|problem| problem.to_string())?;
        Ok(Self {
            regex: Arc::new(regex),
        })
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
        for captures in self.regex.captures_iter(text) {
            let captures = captures.map_err(|problem| problem.to_string())?;
            let first = usize::from(captures.len() > 1);
            let group = |at: usize| captures.get(at).map_or("", |group| group.as_str());
            found.push(
                (first..captures.len())
                    .map(|at| group(at).to_owned())
                    .collect(),
            );
        }
        Ok(found)
    }

    /// `re.sub` with an empty text.
    ///
    /// # Errors
    /// As [`Self::find_all`].
    pub fn remove_from(&self, text: &str) -> std::result::Result<String, String> {
        let mut rest = String::new();
        let mut end = 0;
        for found in self.regex.find_iter(text) {
            let found = found.map_err(|problem| problem.to_string())?;
            rest.push_str(&text[end..found.start()]);
            end = found.end();
        }
        rest.push_str(&text[end..]);
        Ok(rest)
    }
}
