//! Settings of the sampler.

use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleConfig {
    /// Divides the logits. 0 always chooses the most likely token; ties go to the lower id.
    pub temperature: f32,
    /// Keep this many of the most likely tokens; 0 for all.
    pub top_k: usize,
    /// Keep the smallest set of tokens with this total probability; 1 for all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the highest probability; 0 for all.
    pub min_p: f32,
    /// Makes tokens less likely that are already in the text; 1 has no effect.
    pub repetition_penalty: f32,
    /// The number of last tokens, including the prompt's, that the penalty looks at; 0 for all.
    pub repetition_window: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl SampleConfig {
    /// Always the most likely token.
    pub const fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 0,
            seed: 0,
        }
    }

    /// # Errors
    /// If a setting is out of range.
    pub(crate) fn check(&self) -> Result<()> {
        let non_negative = |value: f32| value >= 0.0 && value.is_finite();
        let settings = [
            (
                "temperature",
                self.temperature,
                non_negative(self.temperature),
                "a number from 0 up",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "a number above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "a number from 0 to 1",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
                "a number above 0",
            ),
        ];
        match settings
            .into_iter()
            .find(|(.., has_meaning, _)| !has_meaning)
        {
            None => Ok(()),
            Some((name, found, _, expected)) => Err(Error::Setting {
                name,
                expected,
                found,
            }),
        }
    }
}
