//! Steps that are made to be timed, of a run that nobody keeps.

use model::Cost;

use super::{Event, StepReport};
use crate::Result;
use crate::events::Host;
use crate::session::Session;

impl Session {
    /// Makes so many steps at the recipe's learning rate, each as a run makes it, and writes nothing. The session is of no
    /// other use afterwards.
    ///
    /// # Errors
    /// If a loss or gradient is not finite, or a row cannot be read.
    pub fn trial(&mut self, steps: u64, host: &mut dyn Host) -> Result<Vec<StepReport>> {
        let rate = self.recipe.optimizer.learning_rate;
        let mut reports = Vec::new();
        for _ in 0..steps {
            let report = self.step(rate, None, host)?;
            host.see(&Event::Step(report.clone()));
            reports.push(report);
        }
        Ok(reports)
    }

    /// What training on a token of a sequence of `seq` costs.
    pub fn cost(&self, seq: usize) -> Cost {
        self.model.cost(seq)
    }
}
