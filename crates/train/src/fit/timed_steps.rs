//! Timed steps of a run that is not kept.

use model::Cost;

use crate::Result;
use crate::events::{Event, Host, StepReport};
use crate::session::Session;

impl Session {
    /// Makes steps at the recipe's learning rate, each as a run makes it, and writes nothing. The session cannot train a run
    /// afterwards.
    ///
    /// # Errors
    /// If a loss or gradient is not finite, or a row cannot be read.
    pub fn timed_steps(&mut self, steps: u64, host: &mut dyn Host) -> Result<Vec<StepReport>> {
        self.expect_alike()?;
        let rate = self.recipe.optimizer.learning_rate;
        let mut reports = Vec::new();
        for _ in 0..steps {
            let report = self.step(rate, None, host)?;
            host.see(&Event::Step(report.clone()));
            reports.push(report);
        }
        Ok(reports)
    }

    /// The cost of training on one token of a sequence of `seq` tokens.
    pub fn cost(&self, seq: usize) -> Cost {
        self.model.cost(seq)
    }
}
