//! How much memory a verb may use, and what is said if it needs more.

use crate::console::{NO_MEMORY, WithCode};
use crate::host::machine::{Machine, MemoryLimit};
use crate::plan::knobs::Knob;
use crate::plan::lines::{GIB, size};

// The memory of a verb.
#[derive(Debug, Default, Clone, Copy, clap::Args)]
pub(crate) struct BudgetArgs {
    /// Memory budget, in GiB. What needs more is refused with exit code 5; a mixture of experts that generates keeps experts on
    /// disk instead. Default: free memory.
    #[arg(long, value_name = "GIB", value_parser = gib)]
    pub(crate) memory_budget: Option<u64>,
}

/// How many knobs an error names.
const NAMED: usize = 3;

/// The share of free memory that a program with no budget takes for a model that generates.
const SHARE_OF_FREE: f64 = 0.75;

/// Bytes from GiB.
fn gib(text: &str) -> Result<u64, String> {
    let gib: f64 = text
        .parse()
        .map_err(|_| format!("expected a number, found `{text}`"))?;
    let bytes = gib * GIB;
    if bytes >= 1.0 && bytes < 2f64.powi(60) {
        return Ok(bytes as u64);
    }
    Err(format!("expected a number of GiB above 0, found {text}"))
}

impl BudgetArgs {
    /// What bounds a verb on this machine: its budget, or free memory, whichever is less; none if neither is known.
    pub(crate) fn limit(self) -> Option<MemoryLimit> {
        let free = Machine::here().free();
        let budget = self.memory_budget.map(|bytes| MemoryLimit {
            bytes,
            source: "--memory-budget".into(),
        });
        match (budget, free) {
            (Some(budget), Some(free)) => Some(if budget.bytes < free.bytes {
                budget
            } else {
                free
            }),
            (budget, free) => budget.or(free),
        }
    }

    /// The share of the limit that weights, caches and passes may take: without a budget, the rest is for other programs.
    pub(crate) fn share(self) -> f64 {
        match self.memory_budget {
            Some(_) => 1.0,
            None => SHARE_OF_FREE,
        }
    }

    /// The options on the command line.
    pub(crate) fn words(self) -> Vec<String> {
        let budget = self.memory_budget.map(|bytes| bytes as f64 / GIB);
        let words = budget.map(|gib| ["--memory-budget".to_owned(), gib.to_string()]);
        words.into_iter().flatten().collect()
    }
}

/// The sentence about something that needs more of its own memory than there is, with what would help most.
pub(crate) fn too_large(what: &str, own: f64, limit: &MemoryLimit, knobs: &[Knob]) -> String {
    let mut text = format!(
        "{what} needs {} of memory, and there are {} ({})",
        size(own),
        size(limit.bytes as f64),
        limit.source
    );
    if knobs.is_empty() {
        return text;
    }
    text.push_str("; what would help most:");
    for knob in knobs.iter().take(NAMED) {
        text.push_str(&format!("\n  {knob}"));
    }
    text
}

/// An error with the exit code of too little memory.
pub(crate) fn refusal(message: String) -> anyhow::Error {
    anyhow::Error::new(WithCode {
        code: NO_MEMORY,
        message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_numbers_of_gib_above_zero() {
        assert_eq!(gib("1.5"), Ok(3 << 29));
        for text in ["0", "-1", "nan", "inf", "1e300", "many"] {
            assert!(
                gib(text).unwrap_err().starts_with("expected a number"),
                "{text}"
            );
        }
    }
}
