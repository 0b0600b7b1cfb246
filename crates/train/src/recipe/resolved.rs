//! A resolved recipe: as text, and what follows from it.

use model::OperandRounding;

use super::{Method, Moments, Recipe};

/// One pass: it suffices for a small data set, and a second pass is a decision.
const DEFAULT_EPOCHS: f64 = 1.0;

impl Recipe {
    /// The resolved recipe as TOML, which [`Recipe::open`] reads back to an equal value.
    ///
    /// # Panics
    /// If a field that was set by hand has no form in TOML: an integer beyond 63 bits, a path that is not UTF-8, or a
    /// compute format that is for inference. [`Recipe::open`] returns none of these.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings that came from TOML can be written as TOML")
    }

    /// Optimizer updates of a run on this many rows. The last epoch is rounded up to a whole step, and there is at least
    /// one.
    pub fn total_steps(&self, n_rows: usize) -> u64 {
        if let Some(steps) = self.train.steps {
            return steps;
        }
        let epochs = self.train.epochs.unwrap_or(DEFAULT_EPOCHS);
        // Beyond 2^53 rows this rounds, and beyond 64 bits it saturates; no run gets there.
        ((epochs * n_rows as f64 / self.rows_per_step() as f64).ceil() as u64).max(1)
    }

    /// Rows of a step: samples, packed rows of samples, or pairs.
    pub(crate) fn rows_per_step(&self) -> usize {
        self.train.batch_size.saturating_mul(self.train.accumulate)
    }

    /// Fills in the defaults that depend on another key.
    pub(crate) fn resolve(&mut self) {
        let moments = match (self.train.method, self.precision.compute) {
            (Method::Full, OperandRounding::Fp8(_)) => Moments::Bf16,
            _ => Moments::F32,
        };
        self.optimizer.moments.get_or_insert(moments);

        if self.train.steps.is_none() && self.train.epochs.is_none() {
            self.train.epochs = Some(DEFAULT_EPOCHS);
        }
    }
}
