//! The ranks and alphas of an adapter's modules, by the patterns of PEFT's config.

use std::collections::BTreeMap;

use regex::Regex;

use crate::Error;

/// Ranks and alphas of an adapter's modules.
pub(crate) struct PatternedSizes {
    pub(crate) alphas: PeftPatterns<f64>,
    pub(crate) ranks: PeftPatterns<usize>,
    pub(crate) alpha: f64,
    pub(crate) rank: usize,
}

impl PatternedSizes {
    pub(crate) fn alpha_of(&self, module: &str) -> f64 {
        self.alphas.find(module).unwrap_or(self.alpha)
    }

    pub(crate) fn rank_of(&self, module: &str) -> usize {
        self.ranks.find(module).unwrap_or(self.rank)
    }
}

/// PEFT's patterns: regular expressions that match the end of a module's path, from a dot or its start.
pub(crate) struct PeftPatterns<T>(Vec<(Regex, T)>);

impl<T: Copy> PeftPatterns<T> {
    pub(crate) fn new<'a>(patterns: impl Iterator<Item = (&'a str, T)>) -> Result<Self, Error> {
        let compiled = patterns.map(|(pattern, value)| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            regex.map(|regex| (regex, value)).map_err(|error| {
                Error::Unsupported(format!("adapter_config.json: pattern `{pattern}`: {error}"))
            })
        });
        Ok(Self(compiled.collect::<Result<_, _>>()?))
    }

    pub(crate) fn find(&self, module: &str) -> Option<T> {
        self.0
            .iter()
            .find(|(regex, _)| regex.is_match(module))
            .map(|(_, value)| *value)
    }
}

/// The most frequent value: an adapter's default, from which the rest deviates.
pub(crate) fn most_common<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_insert(0usize) += 1);
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(value, _)| value)
}
